"""What the events of a stream add up to."""

from typing import Any

import pytest

from penstock.core.fold import Event, Fold
from support.chunks import answer, content, final_usage, finish, reasoning, role, tool
from support.playbook import STREAM_ID, ask, play


def fold(*events: Event) -> dict[str, Any]:
    """The events given without their envelope, numbered from 1."""
    folded = Fold()
    for seq, event in enumerate(events, 1):
        folded.feed({"stream_id": "st_1", "seq": seq, "ts": 1000 + seq, **event})
    return folded.result()


def text(piece: str, choice: int = 0, block: int = 0, **more: Any) -> Event:
    return {"type": "delta.text", "choice": choice, "block": block, "text": piece, **more}


def opened(kind: str, choice: int = 0, block: int = 0, **more: Any) -> Event:
    return {"type": f"{kind}.start", "choice": choice, "block": block, **more}


def ended(kind: str, choice: int = 0, block: int = 0, **more: Any) -> Event:
    return {"type": f"{kind}.end", "choice": choice, "block": block, "status": "complete", **more}


START: Event = {
    "type": "stream.start",
    "schema": "1.0",
    "model": "m",
    "choices": 1,
    "upstream": "vllm",
    "trace_id": None,
    "resumable_until": None,
}
CALL: Event = {"call_id": "c1", "index": 0, "name": "f"}


def test_before_the_first_event() -> None:
    assert Fold().result() == {"status": "running", "choices": [], "warnings": [], "error": None}


def test_the_start_says_who_answers() -> None:
    assert fold(START) == {
        "stream_id": "st_1",
        "schema": "1.0",
        "model": "m",
        "upstream": "vllm",
        "trace_id": None,
        "status": "running",
        "choices": [],
        "warnings": [],
        "error": None,
        "last_seq": 1,
    }


def test_text_is_joined_by_block_and_by_choice() -> None:
    [choice] = fold(opened("text"), text("a"), text("b"), ended("text"), opened("text", block=1), text("c", block=1))[
        "choices"
    ]
    assert choice["text"] == "abc"
    assert choice["blocks"] == [
        {"block": 0, "type": "text", "text": "ab", "status": "complete"},
        {"block": 1, "type": "text", "text": "c", "status": "open"},
    ]


def test_reasoning_is_no_text_of_the_choice() -> None:
    thought = {"type": "delta.reasoning", "choice": 0, "block": 0, "text": "hm"}
    [choice] = fold(opened("reasoning"), thought, ended("reasoning", tokens=3))["choices"]
    assert choice["text"] == ""
    assert choice["blocks"] == [{"block": 0, "type": "reasoning", "text": "hm", "status": "complete", "tokens": 3}]


def test_logprobs_and_ids_are_joined_where_there_are_any() -> None:
    said = [text("a", logprobs=[1], token_ids=[1]), text("b"), text("c", logprobs=[2, 3])]
    [block] = fold(opened("text"), *said)["choices"][0]["blocks"]
    assert (block["text"], block["logprobs"], block["token_ids"]) == ("abc", [1, 2, 3], [1])


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([], {"arguments": None, "arguments_text": "", "valid": None, "status": "open"}),
        (
            [
                {"type": "tool_call.arguments_chunk", "choice": 0, "block": 0, "call_id": "c1", "text": '{"a":'},
                {"type": "tool_call.arguments_chunk", "choice": 0, "block": 0, "call_id": "c1", "text": "1}"},
                {"type": "tool_call.ready", "choice": 0, "block": 0, **CALL, "arguments": {"a": 1}},
                ended("tool_call", arguments='{"a":1}', valid=True),
            ],
            {"arguments": {"a": 1}, "arguments_text": '{"a":1}', "valid": True, "status": "complete"},
        ),
        (
            [
                {"type": "tool_call.arguments_chunk", "choice": 0, "block": 0, "call_id": "c1", "text": "{"},
                ended("tool_call", arguments="{", valid=False, problem="cut", status="incomplete"),
            ],
            {"arguments": None, "arguments_text": "{", "valid": False, "problem": "cut", "status": "incomplete"},
        ),
    ],
)
def test_a_call(events: list[Event], wanted: dict[str, Any]) -> None:
    [block] = fold(opened("tool_call", **CALL), *events)["choices"][0]["blocks"]
    assert block == {"block": 0, "type": "tool_call", "call_id": "c1", "name": "f", **wanted}


def test_choices_are_told_in_order_whichever_spoke_first() -> None:
    finish = {"type": "finish", "choice": 0, "reason": "length", "cause": None, "raw_reason": "length"}
    folded = fold(opened("text", 1), text("b", 1), {"type": "delta.role", "choice": 0, "role": "critic"}, finish)
    assert [(choice["choice"], choice["role"], choice["text"]) for choice in folded["choices"]] == [
        (0, "critic", ""),
        (1, "assistant", "b"),
    ]
    assert [choice["finish"] for choice in folded["choices"]] == [
        {"reason": "length", "cause": None, "raw_reason": "length"},
        None,
    ]


def test_of_usage_the_last_counts() -> None:
    first, last = ({"type": "usage", "completion_tokens": n, "final": n == 2} for n in (1, 2))
    assert fold(first, last)["usage"] == {"completion_tokens": 2}


def test_warnings_errors_and_the_end() -> None:
    folded = fold(
        {"type": "warning", "code": "w", "detail": "d"},
        {"type": "error", "code": "e", "message": "m", "retryable": True, "origin": "upstream"},
        {
            "type": "stream.end",
            "status": "failed",
            "finish_reasons": [],
            "events": 3,
            "duration_ms": 5,
            "ttft_ms": None,
        },
    )
    assert folded["warnings"] == [{"code": "w", "detail": "d"}]
    assert folded["error"] == {"code": "e", "message": "m", "retryable": True, "origin": "upstream"}
    assert (folded["status"], folded["duration_ms"], folded["ttft_ms"]) == ("failed", 5, None)
    assert "finish_reasons" not in folded


@pytest.mark.parametrize("name", ["text.edited", "delta.audio", "stream.pause", "x"])
def test_an_event_of_a_later_version_is_passed_over(name: str) -> None:
    assert fold(START, {"type": name, "choice": 0, "block": 9}) == {**fold(START), "last_seq": 2}


def test_the_events_of_a_stream_fold_into_the_answer_that_was_not_streamed() -> None:
    calls = [tool(call_id="c1", name="f", arguments='{"a": 1}')]
    steps = [*answer(reasoning("hm"), content("Hi ", token_ids=[5]), *calls, reason="tool_calls")]
    body = ask(tools=["f"])
    streamed = play(body, steps)
    folded = Fold()
    for event in streamed.events:
        folded.feed(event)
    assert folded.result() == play(body, steps, dialect="folded").body
    assert folded.result()["stream_id"] == STREAM_ID


def test_two_choices_of_one_stream() -> None:
    steps = [role(0) + role(1), content("b", 1), content("a", 0), finish(choice=1), finish(choice=0), final_usage(2)]
    body = play(ask(n=2), [*steps, b"data: [DONE]\n\n"], dialect="folded").body
    assert [choice["text"] for choice in body["choices"]] == ["a", "b"]
    assert body["usage"]["completion_tokens"] == 2
