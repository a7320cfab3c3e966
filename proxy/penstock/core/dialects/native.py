"""The stable schema, version 1, as server-sent events, as NDJSON and folded into one JSON object."""

from typing import Any, ClassVar, assert_never

import orjson

from penstock.core import sse
from penstock.core.dialects import Ext, Form
from penstock.core.errors import Problem
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
from penstock.core.fold import Fold

SCHEMA_VERSION = "1.0"

_WORD = {Channel.ANSWER: "text", Channel.REASONING: "reasoning"}
_USAGE_COUNTS = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "answer_tokens",
    "tool_tokens",
    "delivered_tokens",
    "wasted_tokens_after_cancel",
)


def type_and_fields(event: ClientEvent) -> tuple[str, dict[str, Any]]:
    """An event's type and its own fields, in the order of the schema; the envelope comes apart."""
    match event:
        case Text():
            return _text(event)
        case BlockStarted():
            return f"{_WORD[event.channel]}.start", _place(event)
        case BlockEnded():
            return _block_end(event)
        case Role():
            return "delta.role", {"choice": event.choice, "role": event.role}
        case ToolStarted() | ToolArguments() | ToolReady() | ToolDenied() | ToolEnded():
            return _tool(event)
        case ToolProgress() | ToolResult():
            return _tool_run(event)
        case Structured():
            return _structured(event)
        case Annotation():
            return _annotation(event)
        case Usage():
            counts = {name: getattr(event, name) for name in _USAGE_COUNTS}
            return "usage", {
                **counts,
                "estimated": event.estimated,
                "bytes": event.sizes,
                "final": event.final,
            }
        case Moderated():
            return _moderation(event)
        case Finished():
            return _finish(event)
        case StreamStarted():
            return _start(event)
        case Warned():
            return "warning", {"code": event.code, "detail": event.detail}
        case Failed():
            fields = {"code": event.code, "message": event.message}
            return "error", {**fields, "retryable": event.retryable, "origin": event.origin}
        case StreamEnded():
            return _end(event)
        case _:
            assert_never(event)


def _place(event: Any) -> dict[str, Any]:
    return {"choice": event.choice, "block": event.block}


def _text(event: Text) -> tuple[str, dict[str, Any]]:
    fields = {"choice": event.choice, "block": event.block, "text": event.text}
    if event.logprobs is not None:
        fields["logprobs"] = event.logprobs
    if event.token_ids is not None:
        fields["token_ids"] = event.token_ids
    if event.refusal:
        fields["refusal"] = True
    return f"delta.{_WORD[event.channel]}", fields


def _block_end(event: BlockEnded) -> tuple[str, dict[str, Any]]:
    fields = {**_place(event), "bytes": event.size}
    if event.channel is Channel.REASONING:
        fields["tokens"] = event.tokens
    return f"{_WORD[event.channel]}.end", {**fields, "status": event.status}


def _tool(event: ToolStarted | ToolArguments | ToolReady | ToolDenied | ToolEnded) -> tuple[str, dict[str, Any]]:
    fields = {**_place(event), "call_id": event.call_id}
    match event:
        case ToolArguments():
            return "tool_call.arguments_chunk", {**fields, "text": event.text}
        case ToolStarted():
            executor = {"executor": "penstock"} if event.runs_here else {}
            return "tool_call.start", {**fields, "index": event.index, "name": event.name, **executor}
        case ToolReady():
            return "tool_call.ready", {**fields, "name": event.name, "arguments": orjson.Fragment(event.arguments)}
        case ToolDenied():
            return "tool_call.denied", {**fields, "name": event.name, "rule": event.rule, "reason": event.reason}
        case ToolEnded():
            return _tool_end(event)
        case _:
            assert_never(event)


def _tool_end(event: ToolEnded) -> tuple[str, dict[str, Any]]:
    fields = {**_place(event), "call_id": event.call_id, "arguments": event.arguments, "valid": event.valid}
    if event.problem is not None:
        fields["problem"] = event.problem
    return "tool_call.end", {**fields, "status": event.status}


def _moderation(event: Moderated) -> tuple[str, dict[str, Any]]:
    fields = {"action": event.action, "rule": event.rule, "category": event.category}
    return "moderation", {**_place(event), **fields, "offset": event.offset, "length": event.length}


def _tool_run(event: ToolProgress | ToolResult) -> tuple[str, dict[str, Any]]:
    if isinstance(event, ToolProgress):
        fields = {"call_id": event.call_id, "name": event.name, "status": event.status, "attempt": event.attempt}
        return "tool_call.progress", {**_place(event), **fields}
    fields = {**_place(event), "call_id": event.call_id, "name": event.name, "ok": event.ok}
    fields |= {"bytes": event.size, "duration_ms": event.duration_ms}
    if event.problem is not None:
        fields["problem"] = event.problem
    if event.content is not None:
        fields["content"] = event.content
    return "tool_call.result", fields


def _structured(event: Structured) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {"choice": event.choice, "value": orjson.Fragment(event.value)}
    if event.schema_name is not None:
        fields["schema_name"] = event.schema_name
    if event.section is not None:
        fields["section"] = event.section
    return "structured", fields


def _annotation(event: Annotation) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {"kind": event.kind, "data": event.data}
    if event.choice is not None:
        fields["choice"] = event.choice
    if event.anchor is not None:
        fields["anchor"] = event.anchor
    return "annotation", fields


def _finish(event: Finished) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {"choice": event.choice, "reason": event.reason, "cause": event.cause}
    fields["raw_reason"] = event.raw_reason
    if event.stop_reason is not None:
        fields["stop"] = event.stop_reason
    if event.logprobs is not None:
        fields["logprobs"] = event.logprobs
    if event.token_ids is not None:
        fields["token_ids"] = event.token_ids
    return "finish", fields


def _start(event: StreamStarted) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "model": event.model,
        "choices": event.choices,
        "upstream": event.upstream,
        "trace_id": event.trace_id,
        "resumable_until": event.resumable_until,
    }
    if event.continues is not None:
        fields["continues"] = event.continues
    return "stream.start", fields


def _end(event: StreamEnded) -> tuple[str, dict[str, Any]]:
    return "stream.end", {
        "status": event.status,
        "finish_reasons": event.finish_reasons,
        "events": event.events,
        "duration_ms": event.duration_ms,
        "ttft_ms": event.ttft_ms,
    }


class _Envelope:
    """Encodes an event once, with its envelope. Text deltas, the hot path, go around the dictionaries."""

    def __init__(self, stream_id: str) -> None:
        self._id = stream_id.encode()
        self._delta = {
            channel: (
                b'{"type":"delta.%b","stream_id":"%b","seq":%%d,"ts":%%d,"choice":%%d,"block":%%d,"text":%%b}'
                % (word.encode(), self._id)
            )
            for channel, word in _WORD.items()
        }

    def encode(self, event: ClientEvent, seq: int, ts: int, ext: Ext) -> tuple[bytes, bytes]:
        if isinstance(event, Text) and not (event.logprobs or event.token_ids or event.refusal or ext):
            text = orjson.dumps(event.text)
            delta = self._delta[event.channel] % (seq, ts, event.choice, event.block, text)
            return b"delta." + _WORD[event.channel].encode(), delta
        body = self.body(event, seq, ts, ext)
        return body["type"].encode(), orjson.dumps(body)

    def body(self, event: ClientEvent, seq: int, ts: int, ext: Ext) -> dict[str, Any]:
        """The event as a dictionary for orjson: parsed arguments in it are `orjson.Fragment`s."""
        name, fields = type_and_fields(event)
        body = {"type": name, "stream_id": self._id.decode(), "seq": seq, "ts": ts, **fields}
        if ext:
            body["ext"] = ext.merged()
        return body

    def unnumbered(self, problem: Problem) -> bytes:
        """An error of the connection alone: it is not in the log, so it has no `seq`."""
        fields = {"code": problem.code, "message": problem.message, "retryable": True, "origin": problem.origin}
        return orjson.dumps({"type": "error", "stream_id": self._id.decode(), **fields})


def refusal(problem: Problem) -> bytes:
    """The body of an HTTP error on the native routes."""
    fields = {"code": problem.code, "message": problem.message, "param": problem.param}
    return orjson.dumps({"error": {**fields, "retryable": problem.retryable, "origin": problem.origin}})


class NativeSse:
    """One frame an event: `event:` is the type, `id:` is `<stream_id>:<seq>`."""

    form: ClassVar[Form] = Form.SSE
    streams: ClassVar[bool] = True
    content_type: ClassVar[str] = "text/event-stream; charset=utf-8"
    preamble: ClassVar[bytes] = b": ok\n\n"
    heartbeat: ClassVar[bytes] = b": heartbeat\n\n"

    def __init__(self, stream_id: str) -> None:
        self._envelope = _Envelope(stream_id)
        self._id = stream_id.encode()

    def render(self, event: ClientEvent, seq: int, ts: int, ext: Ext) -> bytes:
        name, data = self._envelope.encode(event, seq, ts, ext)
        return sse.encode(name, b"%b:%d" % (self._id, seq), data)

    def whole(self) -> tuple[int, bytes]:
        return 200, b""

    def refusal(self, problem: Problem) -> bytes:
        return refusal(problem)

    def cut_off(self, problem: Problem) -> bytes:
        # Without an id, so that an EventSource resumes after the last event that it has.
        return b"event: error\ndata: %b\n\n" % self._envelope.unnumbered(problem)


class NativeNdjson:
    """One line an event; an empty line is the heartbeat, as NDJSON readers skip it."""

    form: ClassVar[Form] = Form.NDJSON
    streams: ClassVar[bool] = True
    content_type: ClassVar[str] = "application/x-ndjson; charset=utf-8"
    preamble: ClassVar[bytes] = b"\n"
    heartbeat: ClassVar[bytes] = b"\n"

    def __init__(self, stream_id: str) -> None:
        self._envelope = _Envelope(stream_id)

    def render(self, event: ClientEvent, seq: int, ts: int, ext: Ext) -> bytes:
        return self._envelope.encode(event, seq, ts, ext)[1] + b"\n"

    def whole(self) -> tuple[int, bytes]:
        return 200, b""

    def refusal(self, problem: Problem) -> bytes:
        return refusal(problem)

    def cut_off(self, problem: Problem) -> bytes:
        return self._envelope.unnumbered(problem) + b"\n"


class NativeFolded:
    """One JSON object with what all events add up to."""

    form: ClassVar[Form] = Form.WHOLE
    streams: ClassVar[bool] = False
    content_type: ClassVar[str] = "application/json"
    preamble: ClassVar[bytes] = b""
    heartbeat: ClassVar[bytes] = b""

    def __init__(self, stream_id: str) -> None:
        self._envelope = _Envelope(stream_id)
        self._fold = Fold()
        self._status = 200

    def render(self, event: ClientEvent, seq: int, ts: int, ext: Ext) -> bytes:
        self._fold.feed(self._envelope.body(event, seq, ts, ext))
        if isinstance(event, Failed):
            self._status = event.status
        return b""

    def whole(self) -> tuple[int, bytes]:
        return self._status, orjson.dumps(self._fold.result())

    def refusal(self, problem: Problem) -> bytes:
        return refusal(problem)

    def cut_off(self, problem: Problem) -> bytes:
        return b""
