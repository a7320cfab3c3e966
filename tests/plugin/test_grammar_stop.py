"""The grammar stop in the real vLLM: a value costs its own tokens, and is never cut."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import groupby
from typing import Any

import pytest
from tokenizers import Tokenizer

from support.engine import Engine
from support.http_client import Caller, calling, chat
from support.plugin_client import PluginClient, connected, finish, ids
from support.scripts import Json, Script
from support.sockets import until

pytestmark = pytest.mark.engine

TAIL = r"[0-9]{3}\s*"
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
EBNF = r"""
root ::= "{" ws [0-9]{1,3} ws "}" ws
ws ::= ([ \t\n] ws)?
"""


@pytest.fixture
async def direct(engine: Engine) -> AsyncIterator[Caller]:
    async with calling(engine.url) as caller:
        yield caller


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[PluginClient]:
    async with connected(engine.url) as connection:
        yield connection


@pytest.fixture
def script(engine: Engine) -> Script:
    return Script(engine)


def structured(**fields: Any) -> Json:
    """A request whose answer begins with the value: no thinking before it."""
    constraint = {name: fields.pop(name) for name in ("regex", "grammar", "json", "choice") if name in fields}
    plain = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 60, "temperature": 0}
    return {"structured_outputs": constraint, **plain, **fields}


async def answer(direct: Caller, **request: Any) -> tuple[str, str, Any, int]:
    """Text, finish reason, stop reason and completion tokens."""
    body = (await direct.chat(**request)).json
    [choice] = body["choices"]
    text = choice["message"]["content"]
    return text, choice["finish_reason"], choice["stop_reason"], body["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("constraint", "temperature"),
    [
        ({"regex": TAIL}, 0),
        ({"regex": TAIL}, 1),
        ({"choice": ["yes", "no"]}, 0),
        ({"json": OBJECT}, 0),
        ({"json": OBJECT}, 1),
    ],
)
async def test_a_value_ends_in_the_step_of_its_last_token(
    direct: Caller, constraint: dict[str, Any], temperature: float
) -> None:
    request = structured(**constraint, temperature=temperature, seed=7, max_tokens=200, return_token_ids=True)
    body = (await direct.chat(**request)).json
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "grammar")
    text = choice["message"]["content"]
    assert text == text.rstrip()
    if "json" in constraint:
        assert set(json.loads(text)) == {"a", "b"}
    elif "choice" in constraint:
        assert text in constraint["choice"]
    else:
        assert re.fullmatch("[0-9]{3}", text)
    # The end token is there as if the model had written it, and counted.
    assert body["usage"]["completion_tokens"] == len(choice["token_ids"])


async def test_the_tail_of_a_grammar(direct: Caller, script: Script) -> None:
    said = script("{ 12\n}   \n\n", eos=False, bytewise=True)
    text, reason, stop, tokens = await answer(direct, **{**structured(grammar=EBNF), **said})
    assert (text, reason, stop) == ("{ 12\n}", "stop", "grammar")
    assert tokens == len("{ 12\n}") + 1


@pytest.mark.parametrize(
    ("regex", "said", "whole"),
    [
        (r"[0-9]+", "12", "12"),
        (r"[0-9]{3}(\n\n[0-9]{3})?", "123\n\n456", "123\n\n456"),
        (r"New( York)?", "New York", "New York"),
        (r"[0-9]{2}( \n x)?\s*", "12 \n x", "12 \n x"),
    ],
)
async def test_a_value_that_could_still_grow_is_not_cut(
    direct: Caller, script: Script, regex: str, said: str, whole: str
) -> None:
    text, reason, _, _ = await answer(direct, **{**structured(regex=regex), **script(said, bytewise=True)})
    assert (text, reason) == (whole, "stop")


async def test_causes_on_the_tagged_stream(client: PluginClient) -> None:
    records = await client.over(await client.open(**chat(**structured(regex=TAIL))))
    end = finish(records)
    assert (end.cause, end.reason, end.stop) == ("grammar", "stop", "grammar")
    assert len(ids(records)) == 4


async def test_logprobs_are_the_models_own_to_the_last_token(direct: Caller) -> None:
    """The end token of such a request is generated: what the model thought of it cannot be made up."""
    body = (await direct.chat(**structured(regex=TAIL), logprobs=True, top_logprobs=2)).json
    [choice] = body["choices"]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("222", "grammar")
    assert [one["token"] for one in choice["logprobs"]["content"]] == ["2", "2", "2", "<|im_end|>"]
    assert len(choice["logprobs"]["content"]) == body["usage"]["completion_tokens"] == 4


SHAPES: dict[str, Json] = {
    "plain": {},
    "ids": {"return_token_ids": True},
    "its end shown": {"include_stop_str_in_output": True},
    "special tokens shown": {"skip_special_tokens": False, "return_token_ids": True},
    "both": {"skip_special_tokens": False, "include_stop_str_in_output": True},
    "logprobs": {"logprobs": True, "top_logprobs": 1, "return_token_ids": True},
    "choices": {"n": 3, "temperature": 1, "top_k": 1, "return_token_ids": True},
    "streamed": {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True},
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_client_cannot_tell_our_end_from_the_models(direct: Caller, shape: str) -> None:
    """Texts, ids, logprobs and usage are those of an answer that the model itself ended; only the reason is told."""
    request = structured(regex="[0-9]{3}", **SHAPES[shape])
    ours = (await direct.chat(**request)).body.decode()
    models = (await direct.chat(**request, vllm_xargs={"grammar_stop": 0})).body.decode()
    assert '"stop_reason":"grammar"' in ours
    assert '"stop_reason":"grammar"' not in models
    assert what_was_said(ours) == what_was_said(models)
    assert what_was_said(ours)[1]["completion_tokens"] == 4 * request.get("n", 1)


def what_was_said(answer: str) -> tuple[list[Json], Json]:
    """All choices, without the reason, and the usage; the pieces of a stream are put together."""
    whole = answer.removeprefix("data: ").split("\n\ndata: ")
    bodies = [json.loads(one) for one in whole if not one.startswith("[DONE]")]
    said: dict[int, Json] = {}
    for choice in (choice for body in bodies for choice in body["choices"]):
        message = choice.get("message") or choice["delta"]
        one = said.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": []})
        one["text"] += message.get("content") or ""
        one["ids"] += choice.get("token_ids") or []
        one["logprobs"] += [(it["token"], [top["token"] for top in it["top_logprobs"]]) for it in logprobs_of(choice)]
        one["reason"] = choice.get("finish_reason")
    usage = next(body["usage"] for body in reversed(bodies) if body.get("usage"))
    return [said[index] for index in sorted(said)], {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens")
    }


def logprobs_of(choice: Json) -> list[Json]:
    content: list[Json] = (choice.get("logprobs") or {}).get("content") or []
    return content


@pytest.mark.parametrize("regex", [r"\s*", r"(\s*[0-9])?\s*"])
async def test_a_grammar_that_accepts_at_once(direct: Caller, regex: str) -> None:
    """The engine must generate something: a blank, or the end."""
    text, reason, _, tokens = await answer(direct, **structured(regex=regex, max_tokens=100))
    assert (text.strip().rstrip("0123456789"), reason) == ("", "stop")
    assert tokens < 100
    assert tokens <= 3 or "[0-9]" in regex


async def test_min_tokens_is_kept_while_there_is_something_to_generate(direct: Caller) -> None:
    _, reason, stop, tokens = await answer(direct, **structured(regex=TAIL, min_tokens=10))
    assert (reason, stop) == ("stop", "grammar")
    assert tokens == 11
    # Nothing may follow: the engine has no token to go on with.
    assert await answer(direct, **structured(regex="[0-9]{3}", min_tokens=10)) == ("222", "stop", "grammar", 4)


async def test_ignore_eos_is_kept(direct: Caller) -> None:
    _, reason, stop, tokens = await answer(direct, **structured(regex=TAIL, ignore_eos=True, max_tokens=20))
    assert (reason, stop, tokens) == ("length", None, 20)


async def test_a_stop_token_of_the_request_comes_first(direct: Caller, script: Script) -> None:
    said = script("12 34", eos=False, bytewise=True)
    space = said["vllm_xargs"]["script"][2]
    request = {**structured(regex=r"[0-9]{2}( [0-9]{2})?\s*", stop_token_ids=[space]), **said}
    assert (await answer(direct, **request))[:3] == ("12", "stop", space)


async def test_a_stop_string_and_the_name_of_the_cause(direct: Caller) -> None:
    assert (await answer(direct, **structured(regex=TAIL, stop=["2"])))[1:3] == ("stop", "2")
    # Both in one step, the string's own is told: it is cut off, as always.
    assert (await answer(direct, **structured(regex=TAIL, stop=["222"])))[:3] == ("", "stop", "222")
    # A request that stops at this word itself is not told of a cause of that name.
    assert (await answer(direct, **structured(regex=TAIL, stop=["grammar"])))[:3] == ("222", "stop", None)


async def test_max_tokens_come_first(direct: Caller) -> None:
    assert (await answer(direct, **structured(regex=TAIL, max_tokens=3)))[1:] == ("length", None, 3)


async def test_each_choice_ends_by_itself(direct: Caller) -> None:
    body = (await direct.chat(**structured(regex=r"[0-9]{1,4}\s*", n=4, temperature=1, seed=7))).json
    for choice in body["choices"]:
        assert re.fullmatch(r"[0-9]{1,4}\s*", choice["message"]["content"])
        # One digit to three may be followed by the model's own end.
        assert choice["stop_reason"] == "grammar" or len(choice["message"]["content"]) < 4


async def test_the_value_begins_behind_the_reasoning(direct: Caller, script: Script) -> None:
    """What looks like the value within the reasoning ends nothing."""
    said = script("<think>123 456</think>789\n\n", eos=False)
    request = {**structured(regex=TAIL, chat_template_kwargs={"enable_thinking": True}), **said}
    assert (await answer(direct, **request))[:3] == ("<think>123 456</think>789", "stop", "grammar")


async def longest_run(direct: Caller, ids: list[int]) -> int:
    """Of white-space tokens."""
    tokenizer = Tokenizer.from_str((await direct.get("/v1/penstock/tokenizer")).json["tokenizer_json"])
    return max(len(list(run)) for blank, run in groupby(ids, lambda one: tokenizer.decode([one]).isspace()) if blank)


async def test_the_guard_ends_a_run_of_white_space_inside(direct: Caller) -> None:
    """At temperature 0 the tiny model loves white space: without a bound it writes nothing else up to its limit."""
    free = structured(json=OBJECT, max_tokens=200, vllm_xargs={"white_space_run": 0})
    text, reason, _, tokens = await answer(direct, **free)
    assert (reason, tokens) == ("length", 200)
    assert sum(map(str.isspace, text)) > 150
    for bound in (32, 5):
        given: Json = {"vllm_xargs": {"white_space_run": bound}} if bound != 32 else {}
        request = {**structured(json=OBJECT, max_tokens=400, return_token_ids=True), **given}
        body = (await direct.chat(**request)).json
        [choice] = body["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "grammar")
        assert set(json.loads(choice["message"]["content"])) == {"a", "b"}
        assert await longest_run(direct, choice["token_ids"]) == bound


async def test_a_bound_that_is_none_is_refused(direct: Caller) -> None:
    refused = await direct.post(
        "/v1/chat/completions", chat(**structured(regex=TAIL, vllm_xargs={"white_space_run": 999}))
    )
    assert refused.status == 400
    assert "vllm_xargs.white_space_run: 999 is no number of tokens from 0" in refused.json["error"]["message"]


async def test_ends_are_counted_in_vllms_own_metrics(direct: Caller, engine: Engine, script: Script) -> None:
    words = script("one two three four", eos=False)
    asked = {
        "grammar": structured(regex=TAIL),
        "eos": script("Hi"),
        "max_tokens": {**words, "max_tokens": 3},
        "stop_string": {**words, "stop": ["two"]},
        "stop_token": {**words, "stop_token_ids": words["vllm_xargs"]["script"][1:2]},
    }

    def counted(cause: str) -> float:
        return engine.metric(rf'penstock_request_ends_total\{{cause="{cause}"\}}')

    for cause, request in asked.items():
        await direct.chat(**request)
        before = await asyncio.to_thread(counted, cause)
        await direct.chat(**request)
        assert await asyncio.to_thread(counted, cause) == before + 1
    leaving = asyncio.create_task(direct.chat(**script("on and on ", eos=False, pause_ms=20), max_tokens=1000))
    await until(lambda: is_running(engine))
    leaving.cancel()

    async def is_counted() -> bool:
        with suppress(LookupError):
            return await asyncio.to_thread(counted, "abort") > 0
        return False

    await until(is_counted)


async def is_running(engine: Engine) -> bool:
    return await asyncio.to_thread(engine.running_requests) > 0


async def test_a_request_may_do_without(direct: Caller) -> None:
    off = structured(regex=TAIL, max_tokens=20, vllm_xargs={"grammar_stop": 0})
    assert (await answer(direct, **off))[1:] == ("length", None, 20)


async def test_many_at_once_beside_free_text(direct: Caller, engine: Engine, script: Script) -> None:
    values = [answer(direct, **structured(regex=f"[0-9]{{{1 + number % 5}}}\\s*")) for number in range(24)]
    texts = [answer(direct, **script(f"Number {number}.")) for number in range(8)]
    done = await asyncio.gather(*values, *texts)
    for number, (text, _, stop, tokens) in enumerate(done[:24]):
        assert (len(text), stop, tokens) == (1 + number % 5, "grammar", 2 + number % 5)
    assert [one[0] for one in done[24:]] == [f"Number {number}." for number in range(8)]
    assert await asyncio.to_thread(engine.running_requests) == 0
    assert await asyncio.to_thread(engine.kv_cache_usage) == 0
