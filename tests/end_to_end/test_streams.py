"""What the real engine generates arrives whole, in the stable events: nothing lost, nothing added, all counted."""

from typing import Any

import pytest

from support.engine import Engine
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller
from support.record import CLOCK, EMOJI, PARIS, THINKING, THINKING_TOOL, TOKYO, WEATHER
from support.scripts import Script

pytestmark = pytest.mark.engine

THOUGHT, ANSWER = "\nThe user says hi.\n", "\n\nHello! How can I help?"
PARIS_ARGUMENTS = '{"city": "Paris", "unit": "celsius"}'
TOKYO_ARGUMENTS = '{"city": "東京"}'


def size(text: str) -> int:
    return len(text.encode())


async def said_directly(direct: Caller, **request: Any) -> tuple[str, str]:
    """Reasoning and content of the first choice as the engine itself streams them."""
    answer = await direct.chat(stream=True, **request)
    deltas = [choice["delta"] for chunk in answer.chunks for choice in chunk["choices"] if choice["index"] == 0]
    reasoning = "".join(delta.get("reasoning") or "" for delta in deltas)
    return reasoning, "".join(delta.get("content") or "" for delta in deltas)


@pytest.mark.parametrize("accept", [SSE, NDJSON])
async def test_every_character_arrives_once_however_it_was_cut_into_tokens(
    penstock: Caller, direct: Caller, script: Script, accept: str
) -> None:
    request = script(EMOJI, bytewise=True)
    answer = await penstock.stream(accept, **request)
    assert answer.headers["Content-Type"].startswith(accept)
    assert f"<think>{answer.reasoning()}</think>{answer.text()}" == EMOJI
    assert await said_directly(direct, **request) == ("", EMOJI)
    sizes = answer.usage["bytes"]
    assert sizes["generated"] == size(EMOJI)
    assert sizes["delivered"] == size(EMOJI) - size("<think></think>")
    assert sizes["marker"] == size("<think></think>")
    # Every byte is one token, and one more for each marker and for the end.
    assert answer.usage["completion_tokens"] == size(EMOJI) - size("<think></think>") + 3
    assert answer.usage["estimated"] is False
    assert (answer.finish()["reason"], answer.finish()["cause"]) == ("stop", "eos")
    assert answer.end["status"] == "completed"


async def test_a_family_emoji_is_never_cut(penstock: Caller, script: Script) -> None:
    answer = await penstock.stream(**script("👨‍👩‍👧‍👦 and e\u0301!", bytewise=True))
    assert answer.text() == "👨‍👩‍👧‍👦 and e\u0301!"
    assert not any(event["text"].endswith("\u200d") for event in answer.of("delta.text"))


async def test_what_vllm_parsed_arrives_as_vllm_split_it(penstock: Caller, direct: Caller, script: Script) -> None:
    request = script(THINKING_TOOL, model="tiny-parsed", tools=[WEATHER])
    answer = await penstock.stream(**request)
    assert (answer.reasoning(), answer.text()) == await said_directly(direct, **request)
    assert answer.reasoning() == "\nI need the weather.\n"
    assert answer.text() == "\n\nOne moment.\n"
    assert_one_call(answer, "get_weather", PARIS_ARGUMENTS)


async def test_a_tool_call_in_the_text_is_taken_out_of_it(inline_penstock: Caller, script: Script) -> None:
    answer = await inline_penstock.stream(**script(THINKING_TOOL, tools=[WEATHER]))
    assert answer.reasoning() == "\nI need the weather.\n"
    assert answer.text() == "\n\nOne moment.\n"
    assert_one_call(answer, "get_weather", PARIS_ARGUMENTS)
    assert answer.usage["bytes"]["generated"] == size(THINKING_TOOL)
    assert answer.finish()["raw_reason"] == "stop"


def assert_one_call(answer: Answer, name: str, arguments: str) -> None:
    start, ready, end = answer.of("tool_call.start", "tool_call.ready", "tool_call.end")
    assert start["name"] == ready["name"] == name
    assert answer.arguments() == end["arguments"] == arguments
    assert ready["arguments"] == {"city": "Paris", "unit": "celsius"}
    assert end["valid"]
    assert answer.finish()["reason"] == "tool_calls"


@pytest.mark.parametrize(("model", "parses"), [("tiny", False), ("tiny-parsed", True)])
async def test_two_calls_are_two_blocks(
    penstock: Caller, inline_penstock: Caller, script: Script, model: str, parses: bool
) -> None:
    caller = penstock if parses else inline_penstock
    said = f"<think>\nHm.\n</think>\n\n{PARIS}\n{TOKYO}"
    answer = await caller.stream(**script(said, model=model, tools=[WEATHER, CLOCK]))
    assert [event["name"] for event in answer.of("tool_call.ready")] == ["get_weather", "get_time"]
    ends = answer.of("tool_call.end")
    assert [end["arguments"] for end in ends] == [PARIS_ARGUMENTS, TOKYO_ARGUMENTS]
    assert len({end["call_id"] for end in ends}) == 2
    assert len({end["block"] for end in ends}) == 2


async def test_choices_are_told_apart(penstock: Caller, script: Script) -> None:
    other = "<think>\nHm.\n</think>\n\nHi 👧!"
    answer = await penstock.stream(**script(THINKING, other))
    assert (answer.reasoning(0), answer.text(0)) == (THOUGHT, ANSWER)
    assert (answer.reasoning(1), answer.text(1)) == ("\nHm.\n", "\n\nHi 👧!")
    assert answer.one("stream.start")["choices"] == 2
    assert answer.end["finish_reasons"] == ["stop", "stop"]
    assert answer.usage["bytes"]["generated"] == size(THINKING) + size(other)


@pytest.mark.parametrize("model", ["tiny", "tiny-parsed"])
async def test_logprobs_and_token_ids_are_complete(
    penstock: Caller, engine: Engine, script: Script, model: str
) -> None:
    said = "<think>\nHm 👧.\n</think>\n\nHi 👧!"
    request = script(said, model=model, logprobs=True, top_logprobs=2, return_token_ids=True)
    answer = await penstock.stream(**request)
    carriers = answer.of("delta.text", "delta.reasoning", "finish")
    ids = [token for event in carriers for token in event.get("token_ids", [])]
    assert ids == request["vllm_xargs"]["script"]
    logprobs = [entry for event in carriers for entry in event.get("logprobs", [])]
    assert len(logprobs) == len(ids)
    told = b"".join(bytes(entry["bytes"]) for entry in logprobs).decode()
    assert told == said + "<|im_end|>"


@pytest.mark.parametrize("include", [False, True])
async def test_the_engines_stop_string_straddles_tokens(
    penstock: Caller, direct: Caller, script: Script, include: bool
) -> None:
    request = script("One two three END four", bytewise=True, stop=["three END"], include_stop_str_in_output=include)
    answer = await penstock.stream(**request)
    assert answer.text() == ("One two three END" if include else "One two ")
    assert ("", answer.text()) == await said_directly(direct, **request)
    finish = answer.finish()
    assert (finish["reason"], finish["cause"], finish["stop"]) == ("stop", "stop_string", "three END")


@pytest.mark.parametrize("include", [False, True])
async def test_penstocks_stop_string_looks_at_the_answer_only(penstock: Caller, script: Script, include: bool) -> None:
    said = "<think>\nAt the END I stop.\n</think>\n\nOne two three END" + " four" * 200
    request = script(said, bytewise=True, pause_ms=1, penstock={"stop": ["three END"], "include_stop": include})
    answer = await penstock.stream(**request)
    assert answer.reasoning() == "\nAt the END I stop.\n"
    assert answer.text() == "\n\nOne two " + ("three END" if include else "")
    assert (answer.finish()["cause"], answer.finish()["stop"]) == ("stop_string", "three END")
    assert answer.end["status"] == "completed"
    # Penstock hung up on the engine before its total, so the count is its own.
    assert answer.usage["estimated"] is True


async def test_max_tokens_ends_the_answer_as_incomplete(penstock: Caller, script: Script) -> None:
    answer = await penstock.stream(**script("<think>\nLet me think about that for a moment", max_tokens=6))
    finish = answer.finish()
    assert (finish["reason"], finish["cause"], finish["raw_reason"]) == ("length", "max_tokens", "length")
    assert answer.one("reasoning.end")["status"] == "incomplete"
    assert answer.end["status"] == "incomplete"
    assert answer.usage["completion_tokens"] == 6
    assert "\nLet me think about that".startswith(answer.reasoning())


@pytest.mark.parametrize("model", ["tiny", "tiny-parsed"])
async def test_max_tokens_within_a_character_sends_no_half_of_it(
    penstock: Caller, direct: Caller, script: Script, model: str
) -> None:
    request = script("<think>\n\n</think>\n\nHi 👧!", bytewise=True, model=model, max_tokens=12)
    answer = await penstock.stream(**request)
    assert answer.text() == "\n\nHi "
    assert (await said_directly(direct, **request))[1].endswith(answer.text())
    assert answer.usage["completion_tokens"] == 12


async def test_bytes_that_are_no_text_arrive_as_the_engine_spells_them(
    penstock: Caller, direct: Caller, script: Script
) -> None:
    request = script("Hi \udcf0\udc9f again \udcbf!", bytewise=True)
    answer = await penstock.stream(**request)
    assert ("", answer.text()) == await said_directly(direct, **request)
    assert answer.text() == "Hi \ufffd again \ufffd!"


async def test_the_folded_answer_says_what_the_stream_says(inline_penstock: Caller, script: Script) -> None:
    request = script(THINKING_TOOL, tools=[WEATHER])
    folded = (await inline_penstock.stream(FOLDED, **request)).json
    streamed = await inline_penstock.stream(**request)
    [choice] = folded["choices"]
    reasoning, text, call = choice["blocks"]
    assert (reasoning["text"], text["text"]) == (streamed.reasoning(), streamed.text())
    assert call["arguments"] == {"city": "Paris", "unit": "celsius"}
    assert choice["finish"]["reason"] == "tool_calls"
    assert folded["status"] == "completed"
    assert folded["usage"]["completion_tokens"] == streamed.usage["completion_tokens"]


async def test_the_engines_own_count_is_the_bill(penstock: Caller, direct: Caller, script: Script) -> None:
    request = script(THINKING, model="tiny-parsed")
    answer = await penstock.stream(**request)
    usage = (await direct.chat(**request)).json["usage"]
    counted = {name: answer.usage[name] for name in ("prompt_tokens", "completion_tokens")}
    assert counted == {name: usage[name] for name in counted}
    assert answer.usage["reasoning_tokens"] == usage["completion_tokens_details"]["reasoning_tokens"]
    assert answer.usage["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("plugin", ["off"])  # only vLLM's own chunks have such fields
async def test_fields_that_the_schema_has_no_place_for_travel_along(penstock: Caller, script: Script) -> None:
    answer = await penstock.stream(**script("Hi!", return_token_ids=True))
    ext = {name for event in answer.events for name in event.get("ext", {})}
    assert {"prompt_token_ids", "system_fingerprint"} <= ext
