"""The stable schema on the wire: every event, in its three forms."""

import importlib.resources
import json
from typing import Any, get_args

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core import sse
from penstock.core.dialects import NO_EXT, Dialect, Ext
from penstock.core.dialects.native import NativeFolded, NativeNdjson, NativeSse, refusal, type_and_fields
from penstock.core.errors import CallerError, EngineError, Overloaded
from penstock.core.events import (
    Annotation,
    BlockEnded,
    BlockStarted,
    Channel,
    ClientEvent,
    Failed,
    Finished,
    Moderated,
    Role,
    StreamEnded,
    StreamStarted,
    Structured,
    Text,
    ToolArguments,
    ToolDenied,
    ToolEnded,
    ToolProgress,
    ToolReady,
    ToolResult,
    ToolStarted,
    Usage,
    Warned,
)

SCHEMA: Any = json.loads(importlib.resources.files("penstock.core").joinpath("schema-1.0.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SIZES = dict.fromkeys(("generated", "added", "delivered", "marker", "hidden", "stop", "moderation"), 3)
COUNTS = {
    "prompt_tokens": 1,
    "cached_tokens": 2,
    "completion_tokens": 3,
    "reasoning_tokens": 4,
    "answer_tokens": 5,
    "tool_tokens": 6,
    "delivered_tokens": 7,
    "wasted_tokens_after_cancel": 8,
}
START = StreamStarted("tiny", 2, "vllm", "4bf9", engine_id="chatcmpl-1", created=5, whole={"id": "x"})

SPELLINGS: list[tuple[ClientEvent, str, dict[str, Any]]] = [
    (
        START,
        "stream.start",
        {
            "schema": "1.0",
            "model": "tiny",
            "choices": 2,
            "upstream": "vllm",
            "trace_id": "4bf9",
            "resumable_until": None,
        },
    ),
    (Role(1, "assistant"), "delta.role", {"choice": 1, "role": "assistant"}),
    (BlockStarted(1, 2, Channel.REASONING), "reasoning.start", {"choice": 1, "block": 2}),
    (BlockStarted(1, 2, Channel.ANSWER), "text.start", {"choice": 1, "block": 2}),
    (Text(1, Channel.REASONING, "é", block=2), "delta.reasoning", {"choice": 1, "block": 2, "text": "é"}),
    (Text(1, Channel.ANSWER, "\n😀", 5, block=2), "delta.text", {"choice": 1, "block": 2, "text": "\n😀"}),
    (
        Text(0, Channel.ANSWER, "No", logprobs=[{"token": "No"}], token_ids=[7], refusal=True),
        "delta.text",
        {"choice": 0, "block": 0, "text": "No", "logprobs": [{"token": "No"}], "token_ids": [7], "refusal": True},
    ),
    (
        BlockEnded(1, 2, Channel.REASONING, 4, 3, "complete"),
        "reasoning.end",
        {"choice": 1, "block": 2, "bytes": 4, "tokens": 3, "status": "complete"},
    ),
    (
        BlockEnded(1, 2, Channel.ANSWER, 4, 3, "incomplete"),
        "text.end",
        {"choice": 1, "block": 2, "bytes": 4, "status": "incomplete"},
    ),
    (
        ToolStarted(1, "c1", 3, "f", 2),
        "tool_call.start",
        {"choice": 1, "block": 2, "call_id": "c1", "index": 3, "name": "f"},
    ),
    (
        ToolArguments(1, "c1", '{"a":', 9, 2),
        "tool_call.arguments_chunk",
        {"choice": 1, "block": 2, "call_id": "c1", "text": '{"a":'},
    ),
    (
        ToolReady(1, "c1", "f", '{"a": [1.50, "\\u00e9"]}', 2),
        "tool_call.ready",
        {"choice": 1, "block": 2, "call_id": "c1", "name": "f", "arguments": {"a": [1.5, "é"]}},
    ),
    (
        ToolEnded(1, "c1", "{}", valid=True, problem=None, status="complete", block=2),
        "tool_call.end",
        {"choice": 1, "block": 2, "call_id": "c1", "arguments": "{}", "valid": True, "status": "complete"},
    ),
    (
        ToolEnded(1, "c1", "{", valid=False, problem="cut", status="incomplete", block=2),
        "tool_call.end",
        {"choice": 1, "block": 2, "call_id": "c1", "arguments": "{", "valid": False, "problem": "cut"}
        | {"status": "incomplete"},
    ),
    (
        ToolDenied(1, "c1", "pay", "no-money", "not here", 2),
        "tool_call.denied",
        {"choice": 1, "block": 2, "call_id": "c1", "name": "pay", "rule": "no-money", "reason": "not here"},
    ),
    (
        ToolProgress(1, "c1", "find", "retrying", 2, 2),
        "tool_call.progress",
        {"choice": 1, "block": 2, "call_id": "c1", "name": "find", "status": "retrying", "attempt": 2},
    ),
    (
        ToolResult(1, "c1", "find", ok=True, size=2, duration_ms=5, content="ok", block=2),
        "tool_call.result",
        {"choice": 1, "block": 2, "call_id": "c1", "name": "find", "ok": True, "bytes": 2, "duration_ms": 5}
        | {"content": "ok"},
    ),
    (
        ToolResult(1, "c1", "find", ok=False, size=0, duration_ms=5, problem="gone", block=2),
        "tool_call.result",
        {"choice": 1, "block": 2, "call_id": "c1", "name": "find", "ok": False, "bytes": 0, "duration_ms": 5}
        | {"problem": "gone"},
    ),
    (
        Structured(1, '{"a":[1]}', "thing", 3),
        "structured",
        {"choice": 1, "value": {"a": [1]}, "schema_name": "thing", "section": 3},
    ),
    (
        Annotation("citation", {"marker": "[1]"}, 1, {"block": 0, "offset": 2}),
        "annotation",
        {"kind": "citation", "data": {"marker": "[1]"}, "choice": 1, "anchor": {"block": 0, "offset": 2}},
    ),
    (Annotation("status", {}), "annotation", {"kind": "status", "data": {}}),
    (
        Usage(**COUNTS, estimated=True, sizes=SIZES, final=False, engine_fields={"total_tokens": 4}),
        "usage",
        {**COUNTS, "estimated": True, "bytes": SIZES, "final": False},
    ),
    (
        Moderated("redact", "codename", "custom", 1, back=10, length=10, block=3, offset=4),
        "moderation",
        {"choice": 1, "block": 3, "action": "redact", "rule": "codename", "category": "custom"}
        | {"offset": 4, "length": 10},
    ),
    (
        Finished(1, "stop", "END", 1, [{"token": ""}], [9], "stop", "stop_string"),
        "finish",
        {"choice": 1, "reason": "stop", "cause": "stop_string", "raw_reason": "stop", "stop": "END"}
        | {"logprobs": [{"token": ""}], "token_ids": [9]},
    ),
    (
        Finished(0, None, 151645, reason="cancelled"),
        "finish",
        {"choice": 0, "reason": "cancelled", "cause": None, "raw_reason": None, "stop": 151645},
    ),
    (Warned("missing_done", "why"), "warning", {"code": "missing_done", "detail": "why"}),
    (
        Failed("engine_gone", "gone", retryable=True, origin="upstream", engine_body={"error": {}}, status=502),
        "error",
        {"code": "engine_gone", "message": "gone", "retryable": True, "origin": "upstream"},
    ),
    (
        StreamEnded("incomplete", ["length"], 9, 30, None),
        "stream.end",
        {"status": "incomplete", "finish_reasons": ["length"], "events": 9, "duration_ms": 30, "ttft_ms": None},
    ),
]


def ext_of(**beside: Any) -> Ext:
    ext = Ext()
    ext.beside = beside
    return ext


# --- Every event ----------------------------------------------------------------------------------


def test_the_table_has_every_event_and_every_type_of_the_schema() -> None:
    types = {reference["$ref"].rpartition("/")[2] for reference in SCHEMA["oneOf"]} - {"unknown"}
    assert {name for _, name, _ in SPELLINGS} == types
    assert {type(event) for event, _, _ in SPELLINGS} == set(get_args(ClientEvent))


@pytest.mark.parametrize(
    ("event", "name", "fields"), SPELLINGS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_event_is_spelled(event: ClientEvent, name: str, fields: dict[str, Any]) -> None:
    line = NativeNdjson("st_1").render(event, 7, 1000, NO_EXT)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    told = json.loads(line)
    assert list(told.items()) == [("type", name), ("stream_id", "st_1"), ("seq", 7), ("ts", 1000), *fields.items()]
    VALIDATOR.validate(told)


@pytest.mark.parametrize("event", [event for event, _, _ in SPELLINGS], ids=lambda event: type(event).__name__)
def test_both_streams_carry_the_same_json(event: ClientEvent) -> None:
    [frame] = sse.Parser(1 << 20).feed(NativeSse("st_1").render(event, 7, 1000, ext_of(x=1)))
    assert frame.data + b"\n" == NativeNdjson("st_1").render(event, 7, 1000, ext_of(x=1))
    assert (frame.event.decode(), frame.id) == (json.loads(frame.data)["type"], b"st_1:7")


def test_arguments_are_passed_as_the_model_wrote_them() -> None:
    event = ToolReady(0, "c1", "f", '{"n": 1.50, "big": 123456789012345678901234567890}')
    assert b'"arguments":{"n": 1.50, "big": 123456789012345678901234567890}' in NativeNdjson("s").render(
        event, 1, 1, NO_EXT
    )


def test_fields_of_the_engine_stand_in_ext() -> None:
    ext = ext_of(a=1, b=1, c=1)
    ext.choice, ext.delta = {"b": 2, "c": 2}, {"c": 3}
    told = json.loads(NativeNdjson("st_1").render(Text(0, Channel.ANSWER, "Hi"), 1, 1, ext))
    assert told["ext"] == {"a": 1, "b": 2, "c": 3}
    assert told["text"] == "Hi"


# --- The quick way for text -----------------------------------------------------------------------


@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1),
    channel=st.sampled_from([Channel.ANSWER, Channel.REASONING]),
    numbers=st.tuples(*[st.integers(0, 2**53)] * 4),
)
def test_the_quick_way_writes_what_the_long_way_writes(
    text: str, channel: Channel, numbers: tuple[int, int, int, int]
) -> None:
    choice, block, seq, ts = numbers
    event = Text(choice, channel, text, block=block)
    name, fields = type_and_fields(event)
    long_way = orjson.dumps({"type": name, "stream_id": "st_1", "seq": seq, "ts": ts, **fields})
    assert NativeNdjson("st_1").render(event, seq, ts, NO_EXT) == long_way + b"\n"
    assert NativeSse("st_1").render(event, seq, ts, NO_EXT) == sse.encode(name.encode(), b"st_1:%d" % seq, long_way)


@pytest.mark.parametrize("more", [{"logprobs": [{"token": "a"}]}, {"token_ids": [1]}, {"refusal": True}])
def test_text_with_more_than_text_does_not_lose_it(more: Any) -> None:
    told = json.loads(NativeNdjson("st_1").render(Text(0, Channel.ANSWER, "a", **more), 1, 1, NO_EXT))
    assert {name: told[name] for name in more} == more


# --- The three forms ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "streams", "content_type", "preamble", "heartbeat"),
    [
        (NativeSse("s"), True, "text/event-stream; charset=utf-8", b": ok\n\n", b": heartbeat\n\n"),
        (NativeNdjson("s"), True, "application/x-ndjson; charset=utf-8", b"\n", b"\n"),
        (NativeFolded("s"), False, "application/json", b"", b""),
    ],
)
def test_a_form(dialect: Dialect, streams: bool, content_type: str, preamble: bytes, heartbeat: bytes) -> None:
    assert (dialect.streams, dialect.content_type) == (streams, content_type)
    assert (dialect.preamble, dialect.heartbeat) == (preamble, heartbeat)
    if streams:
        assert dialect.whole() == (200, b""), "what was streamed has no body of its own"
    problem = Overloaded("draining", "later")
    assert dialect.refusal(problem) == refusal(problem)


def test_what_keeps_a_stream_open_is_no_event() -> None:
    assert sse.Parser(100).feed(NativeSse.preamble + NativeSse.heartbeat) == []
    assert (NativeNdjson.preamble + NativeNdjson.heartbeat).split() == []


def test_the_folded_form_says_nothing_before_the_end() -> None:
    folded = NativeFolded("st_1")
    said: list[ClientEvent] = [START, BlockStarted(0, 0, Channel.ANSWER), Text(0, Channel.ANSWER, "Hi")]
    assert [folded.render(event, seq, 1000, NO_EXT) for seq, event in enumerate(said, 1)] == [b"", b"", b""]
    status, body = folded.whole()
    assert status == 200
    assert json.loads(body)["choices"][0]["text"] == "Hi"
    assert json.loads(body)["stream_id"] == "st_1"


def test_a_folded_answer_that_failed_has_the_status_of_its_error() -> None:
    folded = NativeFolded("st_1")
    folded.render(Failed("engine_gone", "gone", retryable=True, origin="upstream", status=504), 1, 1, NO_EXT)
    status, body = folded.whole()
    assert status == 504
    assert json.loads(body)["error"]["code"] == "engine_gone"


# --- Errors before the first byte -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "wanted"),
    [
        (
            CallerError("invalid_request", "no", param="penstock.stop"),
            {
                "code": "invalid_request",
                "message": "no",
                "param": "penstock.stop",
                "retryable": False,
                "origin": "client",
            },
        ),
        (
            EngineError("engine_refused", "no", engine_body={"error": {"message": "its own"}}),
            {"code": "engine_refused", "message": "no", "param": None, "retryable": True, "origin": "upstream"},
        ),
    ],
)
def test_a_refusal(problem: Any, wanted: dict[str, Any]) -> None:
    assert json.loads(refusal(problem)) == {"error": wanted}
