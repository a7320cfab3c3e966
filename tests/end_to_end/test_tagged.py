"""Plain chunks and tagged tokens give the same events, byte for byte, but for what only one of them can know."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from support.engine import Engine
from support.http_client import NDJSON, Answer, Caller, Event, Json, calling, chat
from support.record import CLOCK, EMOJI, PARIS, THINKING, THINKING_TOOL, TOKYO, WEATHER
from support.scripts import Script
from support.sidecar import sidecar
from support.sockets import until

pytestmark = pytest.mark.engine

# The stream's own name and clock, and the ids that vLLM draws for its calls.
OWN = {"stream_id", "ts", "resumable_until", "seq", "duration_ms", "ttft_ms", "events", "call_id"}


@dataclass(frozen=True)
class Both:
    """The same request over both paths."""

    plain: Caller
    tagged: Caller

    async def ask(self, **request: Any) -> tuple[Answer, Answer]:
        return await self.plain.stream(NDJSON, **request), await self.tagged.stream(NDJSON, **request)


@pytest.fixture
async def both(engine: Engine) -> AsyncIterator[Both]:
    """An engine whose tool parser Penstock does without: the calls are read from the text on both paths."""
    inline = {"parses_tools": False}
    async with (
        sidecar(engine.url, inline) as plain,
        sidecar(engine.url, {**inline, "plugin": "auto"}) as tagged,
        calling(plain.url) as plain_caller,
        calling(tagged.url) as tagged_caller,
    ):
        plugin = tagged.server.cluster.members[0].engine.plugin
        assert plugin is not None
        assert plugin.vocabulary is not None, "the engine of these tests has the plugin"
        yield Both(plain_caller, tagged_caller)


# Whose a token is, plain chunks tell only where vLLM put one into each: on a busy machine it joins them.
COUNTS = ("cached_tokens", "reasoning_tokens", "answer_tokens", "tool_tokens", "delivered_tokens", "tokens")
PATIENCE = 8


def counts(answer: Answer) -> list[Any]:
    [usage] = [event for event in answer.events if event["type"] == "usage" and event["final"]]
    return [usage[name] for name in COUNTS if name in usage and name != "cached_tokens"]


def essence(answer: Answer, *more: str) -> list[Event]:
    """The log without `OWN`, ticks, and what time decides on both paths: cuts between deltas, turns between choices."""
    logs: dict[int, list[Event]] = {}
    for event in answer.events:
        if event["type"] == "usage" and not event["final"]:
            continue
        out = logs.setdefault(event.get("choice", -1), [])
        told = {name: value for name, value in event.items() if name not in OWN and name not in more}
        kept = _without_logarithms(told)
        last = out[-1] if out else {"type": None}
        if "text" in kept and last["type"] == kept["type"] and last["block"] == kept["block"]:
            last["text"] += kept["text"]
            for name in {"token_ids", "logprobs"} & kept.keys():
                last[name] = last.get(name, []) + kept[name]
        else:
            out.append(kept)
    return [event for choice in sorted(logs) for event in logs[choice]]


def _without_logarithms(value: Any) -> Any:
    """How such a sum comes out, in its last places, depends on what else vLLM reckoned in that step."""
    match value:
        case float():
            return None
        case list():
            return [_without_logarithms(item) for item in value]
        case dict():
            return {name: _without_logarithms(item) for name, item in value.items()}
        case _:
            return value


SCRIPTS: dict[str, Json] = {
    "thinking": {"texts": (THINKING,)},
    "emoji, a byte a token": {"texts": (EMOJI,), "bytewise": True},
    "a tool call": {"texts": (THINKING_TOOL,), "tools": [WEATHER]},
    "two tool calls": {"texts": (f"{PARIS}\n{TOKYO}",), "tools": [WEATHER, CLOCK]},
    "two choices": {"texts": (THINKING, EMOJI)},
    "thinking never closed": {"texts": ("<think>\nOn and on.",), "max_tokens": 6},
    "cut in the middle of an emoji": {"texts": ("Hi 👩‍👩‍👧",), "bytewise": True, "max_tokens": 5},
    "token ids": {"texts": (THINKING,), "return_token_ids": True},
    "token ids of two choices": {"texts": (THINKING, EMOJI), "return_token_ids": True},
    "special tokens shown": {"texts": ("Hi<|im_start|>there",), "skip_special_tokens": False},
    "special tokens cut out": {"texts": ("Hi<|im_start|>there",)},
    "a stop token": {"texts": ("Hello! How can I",), "stop_token_ids": [33]},
    "a stop token that is shown": {
        "texts": ("Hello! How can I",),
        "stop_token_ids": [33],
        "include_stop_str_in_output": True,
    },
    "a second end token": {"texts": ("Hello!<|endoftext|>",)},
    "hidden reasoning": {"texts": (THINKING_TOOL,), "tools": [WEATHER], "penstock": {"reasoning": "hide"}},
    "inline reasoning": {"texts": (EMOJI,), "penstock": {"reasoning": "inline"}},
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_both_paths_give_the_same_events(both: Both, script: Script, name: str) -> None:
    fields = dict(SCRIPTS[name])
    request = script(*fields.pop("texts"), bytewise=fields.pop("bytewise", False), **fields)
    plain, tagged = await both.ask(**request)
    assert essence(tagged, *COUNTS) == essence(plain, *COUNTS)
    for _ in range(PATIENCE):
        if counts(tagged) == counts(plain):
            break
        plain = await both.plain.stream(NDJSON, **request)
    assert counts(tagged) == counts(plain)


@pytest.mark.parametrize("bytewise", [False, True])
async def test_markers_that_are_spelled_in_several_tokens(engine: Engine, script: Script, bytewise: bool) -> None:
    """Such as no special token of this model: both paths find them in the text, and the tags agree."""
    spelled = {"planner": {"models": ["tiny"], "reasoning": {"open": "[plan]", "close": "[/plan]"}}}
    said = script("[plan]Hm [/p 👩‍👩‍👧[/plan]Yes, [plan.", bytewise=bytewise)
    answers = []
    for plugin in ("off", "auto"):
        upstream = {"parses_tools": False, "plugin": plugin}
        async with sidecar(engine.url, upstream, families=spelled) as running, calling(running.url) as caller:
            answers.append(await caller.stream(NDJSON, **said))
    plain, tagged = answers
    assert essence(tagged, *COUNTS) == essence(plain, *COUNTS)
    assert (tagged.reasoning(), tagged.text()) == ("Hm [/p 👩‍👩‍👧", "Yes, [plan.")


async def test_the_cause_of_an_end_is_the_same_on_both_paths(engine: Engine, both: Both, script: Script) -> None:
    async with calling(engine.url) as direct:
        stops = (await direct.get("/v1/penstock/capabilities")).json["hooks"]["grammar_stop"]
    words = script("one two three four", eos=False)
    third = words["vllm_xargs"]["script"][2]
    value = {"structured_outputs": {"choice": ["yes", "no"]}, "chat_template_kwargs": {"enable_thinking": False}}
    for cause, fields in {
        "eos": script("Hi<|endoftext|>", eos=False),
        "stop_token": {**words, "stop_token_ids": [third]},
        "stop_string": {**words, "stop": ["two"]},
        "max_tokens": {**words, "max_tokens": 3},
        "grammar": {**script("yes"), **value},
    }.items():
        plain, tagged = await both.ask(**fields)
        told = "eos" if cause == "grammar" and not stops else cause
        assert (plain.finish()["cause"], tagged.finish()["cause"]) == (told, told)
        # The plain path counts an end token that comes in one chunk with text as text.
        counts = ("cached_tokens", "answer_tokens", "delivered_tokens", "bytes")
        assert essence(plain, *counts) == essence(tagged, *counts)


async def test_our_own_stop_string_cuts_both_paths_at_the_same_character(both: Both, script: Script) -> None:
    plain, tagged = await both.ask(**script(THINKING, penstock={"stop": ["How can"]}))
    # Tokens are counted with the piece that they came in, and the pieces are a matter of time; so is whether the
    # engine's own total, and what came beside it, was on its way already at the cut.
    timely = (*COUNTS, "completion_tokens", "estimated", "ext", "bytes")
    assert essence(tagged, *timely) == essence(plain, *timely)
    assert tagged.finish()["stop"] == "How can"


async def test_what_needs_the_engines_own_text_falls_back_to_plain_chunks(both: Both, script: Script) -> None:
    for fields in ({"stop": ["can"]}, {"logprobs": True, "top_logprobs": 1}):
        plain, tagged = await both.ask(**script(THINKING, **fields))
        assert essence(tagged, *COUNTS) == essence(plain, *COUNTS)
        assert tagged.finish()["raw_reason"] == "stop"


async def test_a_refusal_is_the_same_http_status_and_body(both: Both) -> None:
    for fields in ({"model": "nobody"}, {"temperature": -1}, {"structured_outputs": {"regex": "("}}):
        plain, tagged = await both.ask(**fields)
        assert (tagged.status, tagged.error["code"]) == (plain.status, plain.error["code"])
        assert tagged.status >= 400


async def test_sixty_four_streams_at_once(both: Both, script: Script) -> None:
    texts = [f"<think>\nNumber {n} 🤔\n</think>\n\nIt is {n} 你好." for n in range(64)]
    answers = await asyncio.gather(*(both.tagged.stream(NDJSON, **script(text, pause_ms=5)) for text in texts))
    for text, answer in zip(texts, answers, strict=True):
        assert f"<think>{answer.reasoning()}</think>{answer.text()}" == text
        assert answer.end["status"] == "completed"


async def test_a_client_that_leaves_ends_the_generation(both: Both, engine: Engine, script: Script) -> None:
    body = chat(**script("Hello! ", eos=False, pause_ms=10, max_tokens=2000))
    task = asyncio.create_task(both.tagged.post("/v1/streams", body, {"Accept": NDJSON}))
    await until(lambda: _is_running(engine, 1))
    task.cancel()
    await asyncio.wait({task})
    await until(lambda: _is_running(engine, 0))


async def _is_running(engine: Engine, count: int) -> bool:
    return await asyncio.to_thread(engine.running_requests) == count


# --- What only the engine can know ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["So it is.\n</think>\n\nHello.", "</think>\n\nHello.", "So it is, and on"])
async def test_thinking_that_the_template_opened(engine: Engine, both: Both, script: Script, text: str) -> None:
    """The plugin sees what the prompt has opened, as vLLM's own parser does."""
    request = script(text, chat_template_kwargs={"open_think": True})
    async with sidecar(engine.url) as parsed, calling(parsed.url) as caller:
        plain = await caller.stream(NDJSON, model=engine.parsed_model, **request)
    tagged = await both.tagged.stream(NDJSON, **request)
    # vLLM's parser takes the line breaks around a thought away.
    assert tagged.reasoning().strip() == plain.reasoning().strip() == text.partition("</think>")[0].strip()
    assert tagged.text().strip() == plain.text().strip() == text.partition("</think>")[2].strip()


async def test_a_chunk_has_the_head_of_vllms_own(both: Both, script: Script) -> None:
    request = script(THINKING, stream=True, stream_options={"include_usage": True})
    before = int(time.time())
    plain, tagged = await both.plain.chat(**request), await both.tagged.chat(**request)
    for answer in (plain, tagged):
        assert all(chunk["id"] == f"chatcmpl-{answer.headers['X-Stream-Id']}" for chunk in answer.chunks)
        assert all(before <= chunk["created"] <= time.time() for chunk in answer.chunks)
    own = {"id", "created", "choices", "usage"}
    heads = [{k: v for k, v in chunk.items() if k not in own} for chunk in (plain.chunks[-1], tagged.chunks[-1])]
    assert heads[0] == heads[1]
    assert "system_fingerprint" in heads[0]
