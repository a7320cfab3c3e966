"""OpenAI chat completions as vLLM spells them: chunks, whole answers and errors."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core import sse
from penstock.core.commands import Respond
from penstock.core.dialects import NO_EXT, Ext
from penstock.core.dialects.openai_chat import ChatStream, ChatWhole, refusal, usage_object
from penstock.core.errors import CallerError, EngineError, OurBug, Problem
from penstock.core.events import (
    BlockEnded,
    BlockStarted,
    Channel,
    ClientEvent,
    Failed,
    Finished,
    Role,
    StreamEnded,
    StreamStarted,
    Text,
    ToolArguments,
    ToolEnded,
    ToolReady,
    ToolStarted,
    Usage,
    Warned,
)
from penstock.core.request import read_request
from penstock.core.signals import Cancelled, EngineAnswered
from support.chunks import CREATED, DONE, ENGINE_ID, MODEL, answer_of, content, counts, finish, role, whole
from support.playbook import STARTED, Json, Outcome, ask, play

START = StreamStarted(MODEL, 1, "vllm", None, engine_id=ENGINE_ID, created=CREATED)
HEAD = {"id": ENGINE_ID, "object": "chat.completion.chunk", "created": CREATED, "model": MODEL}
NAMED = {"name": "f", "arguments": ""}
SIZES = dict.fromkeys(("generated", "added", "delivered", "marker", "hidden", "stop", "moderation"), 0)
END = StreamEnded("completed", ["stop"], 9, 30, 5)
FAILED = Failed("engine_gone", "gone", retryable=True, origin="upstream")
CANCELLED = {
    "message": "the stream was cancelled, by a DELETE of its id or because its client left",
    "type": "invalid_request_error",
    "param": None,
    "code": "cancelled",
}


def usage(*, final: bool = True, engine_fields: Any = None) -> Usage:
    return Usage(9, 0, 7, 0, 0, 0, 0, 0, estimated=False, sizes=SIZES, final=final, engine_fields=engine_fields)


def stopped(choice: int = 0, **more: Any) -> Finished:
    return Finished(choice, "stop", reason="stop", **more)


def spelled(
    *events: ClientEvent, ext: Ext = NO_EXT, tokens: Callable[[int], Any] = lambda choice: (9, 0), **ask_for: Any
) -> Any:
    """What a client reads of these events after the start; `ext` goes with each of them."""
    request = read_request(json.dumps(ask(stream=True, **ask_for)).encode())
    dialect = ChatStream(request, tokens)
    data = dialect.render(START, 1, 5000, NO_EXT)
    data += b"".join(dialect.render(event, seq, 5000, ext) for seq, event in enumerate(events, 2))
    assert dialect.whole() == (200, b"")
    return [
        frame.data.decode() if frame.data == b"[DONE]" else json.loads(frame.data)
        for frame in sse.Parser(1 << 20).feed(data)
    ]


def choice_of(delta: Json, **more: Any) -> Json:
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}]}


def finish_of(reason: str | None, choice: int = 0, **more: Any) -> Json:
    ended: Json = {"delta": {}, "logprobs": None, "finish_reason": reason, "stop_reason": None}
    return {**HEAD, "choices": [{"index": choice, **ended, **more}]}


# --- Chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "chunks"),
    [
        ([Role(0, "assistant")], [choice_of({"role": "assistant", "content": ""})]),
        ([Text(0, Channel.ANSWER, "Hi")], [choice_of({"content": "Hi"})]),
        ([Text(0, Channel.REASONING, "hm")], [choice_of({"reasoning": "hm"})]),
        ([Text(0, Channel.ANSWER, "No", refusal=True)], [choice_of({"refusal": "No"})]),
        (
            [Text(0, Channel.ANSWER, "Hi", logprobs=[{"token": "Hi"}])],
            [choice_of({"content": "Hi"}, logprobs={"content": [{"token": "Hi"}]})],
        ),
        ([Text(0, Channel.REASONING, "hm", token_ids=[7])], [choice_of({"reasoning": "hm"}, token_ids=[7])]),
        (
            [ToolStarted(0, "c1", 1, "f"), ToolArguments(0, "c1", "{}")],
            [
                choice_of({"tool_calls": [{"index": 1, "id": "c1", "type": "function", "function": NAMED}]}),
                choice_of({"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}),
            ],
        ),
        ([END], ["[DONE]"]),
    ],
)  # fmt: skip
def test_an_event_is_a_chunk(events: list[ClientEvent], chunks: list[Any]) -> None:
    assert spelled(*events) == chunks


@pytest.mark.parametrize(
    "event",
    [
        BlockStarted(0, 0, Channel.ANSWER),
        BlockEnded(0, 0, Channel.ANSWER, 2, 1, "complete"),
        ToolReady(0, "c1", "f", "{}"),
        ToolEnded(0, "c1", "{}", valid=True, problem=None, status="complete"),
        Warned("w", "w"),
        usage(final=False),
        usage(),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_openai_has_no_word_for_is_nothing(event: ClientEvent) -> None:
    assert spelled(event) == []


def test_the_arguments_of_each_call_go_to_its_index_in_its_choice() -> None:
    calls = [ToolStarted(0, "c1", 0, "f"), ToolStarted(0, "c2", 1, "g"), ToolStarted(1, "c1", 3, "f")]
    told = spelled(*calls, ToolArguments(0, "c2", "a"), ToolArguments(1, "c1", "b"), ToolArguments(0, "c1", "c"))[3:]
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"]["tool_calls"][0]["index"]) for c in told] == [
        (0, 1),
        (1, 3),
        (0, 0),
    ]


def test_without_the_engine_s_date_it_is_now_in_seconds() -> None:
    dialect = ChatStream(read_request(json.dumps(ask()).encode()), lambda choice: (0, 0))
    dialect.render(StreamStarted(MODEL, 1, "vllm", None, engine_id="x"), 1, 1_795_228_289_999, NO_EXT)
    [frame] = sse.Parser(1000).feed(dialect.render(Role(0, "assistant"), 2, 0, NO_EXT))
    assert json.loads(frame.data)["created"] == 1_795_228_289


def test_fields_of_the_engine_stand_where_they_stood() -> None:
    ext = Ext()
    ext.beside, ext.choice, ext.delta = {"system_fingerprint": "x"}, {"matched": 1}, {"annotations": []}
    [told] = spelled(Text(0, Channel.ANSWER, "Hi"), ext=ext)
    assert told == {**choice_of({"content": "Hi", "annotations": []}, matched=1), "system_fingerprint": "x"}


@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1),
    channel=st.sampled_from([Channel.ANSWER, Channel.REASONING]),
    choice=st.integers(0, 200),
)
def test_the_quick_way_writes_what_the_long_way_writes(text: str, channel: Channel, choice: int) -> None:
    dialect = ChatStream(read_request(json.dumps(ask()).encode()), lambda choice: (0, 0))
    dialect.render(START, 1, 5000, NO_EXT)
    event = Text(choice, channel, text)
    assert dialect.render(event, 2, 5000, NO_EXT) == dialect._spell(event, 5000, NO_EXT)


def test_ids_are_those_of_the_engine_all_along() -> None:
    outcome = play(ask(), answer_of(["Hi", "!"]), dialect="chat")
    *chunks, done = outcome.chat_chunks()
    assert done == "[DONE]"
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks if isinstance(chunk, dict)} == {
        (ENGINE_ID, CREATED, MODEL)
    }


# --- The finish and the count ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        (stopped(), finish_of("stop")),
        (Finished(0, "length", reason="length"), finish_of("length")),
        (Finished(0, "repetition", reason="other"), finish_of("repetition")),
        (stopped(stop_reason="END"), finish_of("stop", stop_reason="END")),
        (stopped(stop_reason=151645), finish_of("stop", stop_reason=151645)),
        (Finished(0, "stop", reason="tool_calls", calls_in_text=True), finish_of("tool_calls")),
        (Finished(0, "stop", reason="tool_calls"), finish_of("stop")),
        (
            stopped(logprobs=[{"token": ""}], token_ids=[9]),
            finish_of("stop", logprobs={"content": [{"token": ""}]}, token_ids=[9]),
        ),
    ],
)
def test_a_finish_is_told_in_the_engine_s_words(event: Finished, wanted: Json) -> None:
    assert spelled(event, usage(), END) == [wanted, "[DONE]"]


def test_every_choice_has_its_finish() -> None:
    told = spelled(stopped(1), Text(0, Channel.ANSWER, "a"), stopped(0), usage(), END, n=2)
    assert told == [finish_of("stop", 1), choice_of({"content": "a"}), finish_of("stop", 0), "[DONE]"]


def test_the_count_is_told_where_it_is_wished() -> None:
    told = spelled(stopped(), usage(final=False), usage(), END, stream_options={"include_usage": True})
    assert told == [finish_of("stop"), {**HEAD, "choices": [], "usage": counts(7)}, "[DONE]"]


def test_the_engine_s_own_count_is_told_as_it_gave_it() -> None:
    own = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1, "prompt_tokens_details": None}
    assert usage_object(usage(engine_fields=own)) is own
    *_, counted, _ = spelled(stopped(), usage(engine_fields=own), END, stream_options={"include_usage": True})
    assert counted["usage"] == own


def test_what_stood_beside_the_count_stands_beside_what_is_told_last() -> None:
    ext = Ext()
    ext.beside = {"system_fingerprint": "x"}
    request = read_request(json.dumps(ask(stream=True)).encode())
    dialect = ChatStream(request, lambda choice: (0, 0))
    dialect.render(START, 1, 5000, NO_EXT)
    assert dialect.render(stopped(), 2, 5000, NO_EXT) == b"", "it waits for what stands beside the count"
    [frame] = sse.Parser(1000).feed(dialect.render(usage(), 3, 5000, ext))
    assert json.loads(frame.data) == {**finish_of("stop"), "system_fingerprint": "x"}
    *_, counted, _ = spelled(stopped(), usage(), END, ext=ext, stream_options={"include_usage": True})
    assert counted["system_fingerprint"] == "x"


def test_the_running_count_of_each_choice_is_told_where_it_is_wished() -> None:
    wish = {"include_usage": True, "continuous_usage_stats": True}
    said: list[ClientEvent] = [Text(0, Channel.ANSWER, "a"), Text(1, Channel.ANSWER, "b"), stopped(1)]
    told = spelled(*said, tokens=lambda choice: (9, choice + 1), n=2, stream_options=wish)
    assert [chunk["usage"] for chunk in told] == [counts(1), counts(2), counts(2)]


def test_without_any_finish_the_count_brings_none() -> None:
    assert spelled(usage(), END) == ["[DONE]"]


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "kind"),
    [
        ("client", "invalid_request_error"),
        ("upstream", "upstream_error"),
        ("proxy", "server_error"),
        ("policy", "policy_error"),
    ],
)
def test_an_error_after_the_first_byte(origin: str, kind: str) -> None:
    told = spelled(
        Text(0, Channel.ANSWER, "Hi"), Failed("c", "m", retryable=True, origin=origin), stopped(), usage(), END
    )
    assert told[1:] == [{"error": {"message": "m", "type": kind, "param": None, "code": "c"}}, "[DONE]"]


def test_the_engine_s_own_error_is_told_as_it_was_said() -> None:
    own = {"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}}
    assert spelled(Failed("engine_error", "m", True, "upstream", engine_body=own)) == [own]


def test_after_an_error_no_count_follows() -> None:
    told = spelled(stopped(), FAILED, usage(), END, n=2, stream_options={"include_usage": True})
    assert [list(chunk) for chunk in told[1:-1]] == [["error"]]


def test_a_cancelled_stream_says_so_once() -> None:
    gone = [Finished(choice, None, reason="cancelled") for choice in (0, 1)]
    assert spelled(*gone, usage(), END, n=2) == [{"error": CANCELLED}, "[DONE]"]


@pytest.mark.parametrize(
    ("problem", "wanted"),
    [
        (
            CallerError("invalid_request", "no", param="model"),
            {"error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "invalid_request"}},
        ),
        (OurBug("bug", "no"), {"error": {"message": "no", "type": "server_error", "param": None, "code": "bug"}}),
        (EngineError("engine_refused", "no", engine_body={"error": "its own"}), {"error": "its own"}),
    ],
)
def test_an_error_before_the_first_byte(problem: Problem, wanted: Json) -> None:
    assert json.loads(refusal(problem)) == wanted
    stream = ChatStream(read_request(json.dumps(ask()).encode()), lambda choice: (0, 0))
    assert stream.refusal(problem) == ChatWhole().refusal(problem) == refusal(problem)


# --- Whole answers --------------------------------------------------------------------------------


def answered(body: bytes, request: Json | None = None, **setting: Any) -> Outcome:
    return play(request, [EngineAnswered(body, STARTED + 1)], dialect="chat_whole", **setting)


def message_of(outcome: Outcome, choice: int = 0) -> Any:
    assert outcome.only(Respond).status == 200
    return outcome.body["choices"][choice]["message"]


@pytest.mark.parametrize(
    "body",
    [
        whole({"content": "Hi"}, system_fingerprint="x", prompt_logprobs=None),
        whole({"content": None}, finish_reason="length"),
        whole({"content": ""}),
        whole({"content": "Hi", "reasoning": "hm", "refusal": None, "tool_calls": []}),
        whole({"content": "Hi", "refusal": "No"}, {"content": "Ho"}),
        whole({"content": "Hi"}, logprobs={"content": [{"token": "Hi"}]}, token_ids=[1], stop_reason=5),
        whole({"content": "Hi"}, logprobs={"content": None}),
        whole({"content": "Hi"}, logprobs={"content": [], "refusal": None}, token_ids=[]),
        whole({"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}),
    ],
)
def test_an_answer_that_needs_no_change_is_the_engine_s(body: bytes) -> None:
    wanted = json.loads(body)
    assert answered(body, ask(n=len(wanted["choices"]), tools=["f"])).body == wanted


def test_reasoning_is_taken_out_of_the_content() -> None:
    body = whole({"content": "<think>hm</think>Hi"}, stop_reason=5)
    edited = json.loads(body)
    edited["choices"][0]["message"] |= {"content": "Hi", "reasoning": "hm"}
    assert answered(body).body == edited


def test_each_choice_is_edited_for_itself() -> None:
    outcome = answered(whole({"content": "Ho"}, {"content": "<think>hm</think>Hi"}), ask(n=2))
    assert message_of(outcome) == {"role": "assistant", "content": "Ho"}
    assert message_of(outcome, 1) == {"role": "assistant", "content": "Hi", "reasoning": "hm"}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    ("policy", "wanted", "text"),
    [("separate", "hm", "Hi"), ("hide", None, "Hi"), ("inline", None, "<think>hm</think>Hi")],
)
def test_reasoning_that_the_engine_split(name: str, policy: Any, wanted: str | None, text: str) -> None:
    message = message_of(answered(whole({"content": "Hi", name: "hm"}), reasoning=policy))
    assert (message[name], message["content"]) == (wanted, text)


def test_an_answer_that_is_all_hidden_is_null() -> None:
    assert message_of(answered(whole({"content": "<think>hm"}), reasoning="hide"))["content"] is None


def test_calls_are_taken_out_of_the_content() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    outcome = answered(whole({"content": f"Hi{call}{call}", "tool_calls": []}), ask(tools=["f"]))
    message = message_of(outcome)
    assert message["content"] == "Hi"
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert outcome.body["choices"][0]["finish_reason"] == "tool_calls"


def test_a_stop_string_cuts_a_whole_answer_with_its_logprobs_and_ids() -> None:
    logprobs = {"content": [{"token": "Hi END"}], "refusal": None}
    body = whole({"content": "Hi END more"}, logprobs=logprobs, token_ids=[1, 2], finish_reason="length")
    outcome = answered(body, ask(penstock={"stop": ["END"]}))
    [choice] = outcome.body["choices"]
    assert choice["message"]["content"] == "Hi "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")
    assert (choice["logprobs"], choice["token_ids"]) == (logprobs, [1, 2])


def test_hidden_reasoning_takes_its_logprobs_with_it() -> None:
    body = whole({"content": "<think>secret</think>Hi"}, logprobs={"content": [{"token": "secret"}]}, token_ids=[1])
    outcome = answered(body, reasoning="hide")
    assert b"secret" not in outcome.only(Respond).body
    assert outcome.body["choices"][0]["token_ids"] == []


def test_a_choice_that_nothing_was_said_of_keeps_its_finish() -> None:
    dialect = ChatWhole()
    body = json.loads(whole({"content": None}, finish_reason="length"))
    dialect.render(StreamStarted(MODEL, 1, "vllm", None, whole=body), 1, 1, NO_EXT)
    assert json.loads(dialect.whole()[1]) == json.loads(whole({"content": None}, finish_reason="length"))


def test_a_whole_answer_that_fails_is_the_error_with_its_status() -> None:
    dialect = ChatWhole()
    dialect.render(Failed("engine_gone", "gone", True, "upstream", status=504), 1, 1, NO_EXT)
    status, body = dialect.whole()
    assert status == 504
    assert json.loads(body)["error"] == {
        "message": "gone",
        "type": "upstream_error",
        "param": None,
        "code": "engine_gone",
    }


def test_a_whole_answer_that_fails_in_the_engine_s_words() -> None:
    dialect = ChatWhole()
    dialect.render(Failed("engine_error", "m", True, "upstream", {"error": "its own"}, 400), 1, 1, NO_EXT)
    assert dialect.whole() == (400, b'{"error":"its own"}')


def test_a_whole_answer_that_was_cancelled() -> None:
    outcome = play(ask(), [Cancelled(STARTED + 1)], dialect="chat_whole")
    assert outcome.only(Respond).status == 409
    assert outcome.body == {"error": CANCELLED}


def test_a_whole_stream_as_a_client_reads_it() -> None:
    steps = [role(), content("<think>hm"), content("</think>Hi"), finish("length"), DONE]
    *chunks, done = play(ask(), steps, dialect="chat").chat_chunks()
    assert [chunk["choices"][0]["delta"] for chunk in chunks if isinstance(chunk, dict)] == [
        {"role": "assistant", "content": ""},
        {"reasoning": "hm"},
        {"content": "Hi"},
        {},
    ]
    assert done == "[DONE]"
