"""Engine bytes -> events: what each chunk says, and what is no chunk."""

import json
from typing import Any

import pytest

from penstock.core.engine_stream import ChatReader, refusal_message
from penstock.core.events import (
    Channel,
    EngineDone,
    EngineOpened,
    EngineUsage,
    Event,
    Extra,
    Failed,
    Finished,
    Role,
    Text,
    ToolDelta,
    Warned,
)
from support.chunks import (
    CREATED,
    DONE,
    chunk,
    content,
    counts,
    final_usage,
    finish,
    frame,
    reasoning,
    role,
    spoken,
    tool,
    whole,
)

OPENED = EngineOpened("chatcmpl-1", "tiny", CREATED)


def reader(choices: int = 1) -> ChatReader:
    return ChatReader(10_000, choices)


def read(*data: bytes, choices: int = 1) -> list[Event]:
    """The events of these reads, without the opening."""
    one = reader(choices)
    return [event for piece in data for event in one.feed(piece) if not isinstance(event, EngineOpened)]


def test_the_first_chunk_opens_and_brings_the_prompt_s_count() -> None:
    assert reader().feed(role(tokens=0)) == [OPENED, EngineUsage(counts(0), final=False), Role(0, "assistant")]


def test_text_reasoning_and_the_end() -> None:
    assert read(content("a"), reasoning("b"), finish("length"), DONE) == [
        Text(0, Channel.RAW, "a"),
        Text(0, Channel.REASONING, "b"),
        Finished(0, "length", reason="length", cause="max_tokens"),
        EngineDone(),
    ]


def test_one_chunk_expands_in_one_order() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{}"}}
    delta = {"tool_calls": [call], "refusal": "r", "content": "a", "reasoning_content": "b", "role": "assistant"}
    events = read(spoken({**delta, "x": 1}, finish_reason="stop", y=2))
    assert events == [
        Extra(0, {"y": 2}),
        Extra(0, {"x": 1}, in_delta=True),
        Role(0, "assistant"),
        Text(0, Channel.REASONING, "b"),
        Text(0, Channel.RAW, "a"),
        Text(0, Channel.ANSWER, "r", refusal=True),
        ToolDelta(0, 0, "c1", "f", "{}"),
        Finished(0, "stop", reason="stop", cause="eos"),
    ]


def test_tokens_and_what_came_with_them_stay_with_the_first_text() -> None:
    delta = {"content": "a", "reasoning": "b"}
    (thought, text) = read(spoken(delta, tokens=3, logprobs={"content": ["l"]}, token_ids=[5]))[1:]
    assert thought == Text(0, Channel.REASONING, "b", 3, ["l"], [5])
    assert text == Text(0, Channel.RAW, "a")


def test_tokens_without_text() -> None:
    assert read(content("", tokens=1))[1:] == [Text(0, Channel.RAW, "", 1)]
    assert read(spoken({}, token_ids=[5])) == [Text(0, Channel.RAW, "", 0, None, [5])]
    assert read(content("")) == []


def test_logprobs_of_a_chunk_with_calls_travel_after_them() -> None:
    events = read(tool(name="f", tokens=2, logprobs={"content": ["l"]}))[1:]
    assert events == [ToolDelta(0, 0, None, "f", "", 2), Text(0, Channel.RAW, "", 0, ["l"])]


def test_the_total_and_its_fields() -> None:
    assert read(final_usage(7)) == [
        EngineUsage(counts(7), final=False),
        Extra(None, {"system_fingerprint": "vllm-0.32.0-925e852b"}),
        EngineUsage(counts(7), final=True),
    ]


def test_a_total_is_summed_up_from_the_finishes() -> None:
    events = read(finish(tokens=2), finish(choice=1, tokens=3), DONE, choices=2)
    assert events[-2:] == [EngineUsage(counts(5), final=True), EngineDone()]


def test_without_counts_there_is_no_total() -> None:
    assert read(finish(), DONE)[-1] == EngineDone()
    assert not any(isinstance(event, EngineUsage) for event in read(finish(), DONE))


# --- Characters -----------------------------------------------------------------------------------


def test_halves_of_a_character_in_two_chunks() -> None:
    assert read(content("a\ud83d"), content("\ude00b")) == [Text(0, Channel.RAW, "a"), Text(0, Channel.RAW, "😀b")]


def test_bytes_of_a_character_in_two_chunks() -> None:
    halves = [
        b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % half for half in (b"\xf0\x9f", b"\x99\x82")
    ]
    assert read(*halves) == [Text(0, Channel.RAW, "🙂")]


def test_a_held_joiner_is_let_go_where_its_field_ends() -> None:
    events = read(reasoning("a\u200d"), content("b🇩"), finish())
    assert [event.text for event in events if isinstance(event, Text)] == ["a", "\u200d", "b", "🇩"]
    assert [event.channel for event in events if isinstance(event, Text)] == [Channel.REASONING] * 2 + [Channel.RAW] * 2


@pytest.mark.parametrize("end", [finish(), DONE, tool(name="f"), frame({"error": "x"}), b"data: {\n\n"])
def test_half_a_character_that_stays_half_is_dropped_and_said(end: bytes) -> None:
    events = read(content("a\ud83d"), end)
    assert [event.code for event in events if isinstance(event, Warned)] == ["invalid_unicode"]


def test_an_end_of_the_connection_lets_go_once() -> None:
    one = reader()
    one.feed(content("a\u200d"))
    assert one.close() == [Text(0, Channel.RAW, "\u200d")]
    assert one.close() == []
    assert one.feed(content("b")) == []


def test_halves_in_arguments_are_put_together_per_call() -> None:
    events = read(
        tool(0, name="f", arguments="a\ud83d"),
        tool(1, name="g", arguments="b\ud83d"),
        tool(0, arguments="\ude00"),
        tool(1, arguments="\ude01"),
    )
    assert [event.arguments for event in events if isinstance(event, ToolDelta)] == ["a", "b", "😀", "😁"]


def test_a_held_half_of_arguments_belongs_to_the_call_before() -> None:
    events = read(tool(0, call_id="c1", name="f", arguments="a🇩"), tool(0, call_id="c2", name="g"), finish())
    calls = [(event.call_id, event.arguments) for event in events if isinstance(event, ToolDelta)]
    assert calls == [("c1", "a"), (None, "🇩"), ("c2", "")]


def test_a_dropped_half_of_arguments_is_said() -> None:
    events = read(tool(name="f", arguments='"\ud83d'), finish())
    assert [event.code for event in events if isinstance(event, Warned)] == ["invalid_unicode"]


def test_what_is_no_text_is_made_sendable() -> None:
    lone = "\ud83d"
    body = {"choices": [{"index": 0, "delta": {"content": "a", "x": {lone: [lone]}}}], "model": lone, "y": lone}
    assert reader().feed(frame(body)) == [
        EngineOpened(None, "?", None),
        Extra(None, {"y": "?"}),
        Extra(0, {"x": {"?": ["?"]}}, in_delta=True),
        Text(0, Channel.RAW, "a"),
    ]


# --- What is no chunk -----------------------------------------------------------------------------


def failure(*data: bytes, choices: int = 1) -> Failed:
    failed = read(*data, choices=choices)[-1]
    assert isinstance(failed, Failed)
    return failed


def test_after_a_failure_nothing_is_said() -> None:
    events = read(b"data: 5\n\n" + content("a"), content("b"), DONE)
    assert [type(event) for event in events] == [Failed]


def test_what_came_before_a_failure_in_the_same_chunk_is_said() -> None:
    body = {"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 5, "delta": {"content": "b"}}]}
    assert read(frame(body))[0] == Text(0, Channel.RAW, "a")


@pytest.mark.parametrize("index", [1, -1, None, "0", 0.0, True, [0], 10**30])
def test_a_choice_that_was_not_asked_for(index: Any) -> None:
    assert failure(chunk({"index": index, "delta": {"content": "a"}})).code == "engine_malformed"


def test_a_choice_without_an_index_is_the_first() -> None:
    assert read(chunk({"delta": {"content": "a"}})) == [Text(0, Channel.RAW, "a")]


def test_a_line_that_is_too_long() -> None:
    events = read(content("a") + b"data: " + b"x" * 20_000)
    assert events[0] == Text(0, Channel.RAW, "a")
    assert failure(b"data: " + b"x" * 20_000).code == "engine_line_too_long"


@pytest.mark.parametrize(
    ("body", "status", "retryable", "message"),
    [
        ({"error": {"message": "no", "code": 400}}, 400, False, "no"),
        ({"error": {"message": "wait", "code": 429}}, 429, True, "wait"),
        ({"error": {"message": "no", "code": "400"}}, 502, True, "no"),
        ({"error": {"message": "no", "code": 200}}, 502, True, "no"),
        ({"error": "words"}, 502, True, "words"),
        ({"object": "error", "message": "old", "code": 404}, 404, False, "old"),
        ({"object": "error"}, 502, True, "the engine reported an error without a message"),
    ],
)
def test_errors_in_band(body: Any, status: int, retryable: bool, message: str) -> None:
    failed = failure(frame(body))
    assert (failed.status, failed.retryable, failed.message) == (status, retryable, message)
    assert "error" in (failed.engine_body or {})


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_the_engine_gave_up(reason: str) -> None:
    events = read(finish(reason, tokens=2) + content("a"))
    assert events[-1] == Failed(
        f"engine_{reason}",
        f"the engine gave this request up (finish_reason '{reason}')",
        retryable=True,
        origin="upstream",
    )
    assert Text(0, Channel.RAW, "", 2) in events, "its tokens are counted"


# --- Whole answers --------------------------------------------------------------------------------


def test_a_whole_answer() -> None:
    body = whole({"content": "a", "reasoning": "b"}, token_ids=[1])
    events = reader().read_whole(body)
    assert events[0] == EngineOpened("chatcmpl-1", "tiny", CREATED, json.loads(body))
    assert events[1:] == [
        EngineUsage(counts(7), final=False),
        Role(0, "assistant"),
        Text(0, Channel.REASONING, "b", 0, None, [1]),
        Text(0, Channel.RAW, "a"),
        Finished(0, "stop", reason="stop", cause="eos"),
        EngineUsage(counts(7), final=True),
        EngineDone(),
    ]


def test_calls_of_a_whole_answer_have_no_index() -> None:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in (0, 1)]
    events = reader().read_whole(whole({"tool_calls": calls}, finish_reason="tool_calls"))
    assert [event.index for event in events if isinstance(event, ToolDelta)] == [0, 1]


def test_a_whole_answer_without_a_message() -> None:
    events = reader().read_whole(b'{"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}')
    assert isinstance(events[-1], Failed)


def test_halves_in_a_whole_answer_are_not_kept_in_what_is_sent_back() -> None:
    body = whole({"content": "a\ud83d"})
    opened = reader().read_whole(body)[0]
    assert isinstance(opened, EngineOpened)
    assert (opened.whole or {})["choices"][0]["message"]["content"] == "a?"


# --- Refusals -------------------------------------------------------------------------------------


def test_the_engine_s_own_words_of_a_refusal() -> None:
    body = {"error": {"message": "no such model", "code": 404}}
    assert refusal_message(404, json.dumps(body).encode()) == ("no such model", body)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"\xff\xfe", b"[]", b"{}", b"[" * 5000, b'{"a":' * 300 + b"1" + b"}" * 300]
)
def test_a_refusal_without_words(body: bytes) -> None:
    message, error = refusal_message(503, body)
    assert message.startswith("the engine answered 503: ")
    assert error is None
