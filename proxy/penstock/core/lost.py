"""The last words of a stream whose replica died: what its log leaves open is closed by whoever finds it.

The same end as any failed stream has: the error, the ends of open blocks, each open choice's finish, the final usage
and `stream.end`. The bill is an estimate, the last count in the log and a token for each delta behind it, unless the
stream had said its final count.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from penstock.core.commands import Ending, RecordUsage
from penstock.core.dialects import NO_EXT, Dialect, Form, native, openai_chat
from penstock.core.errors import Overloaded
from penstock.core.events import (
    BlockEnded,
    Channel,
    ClientEvent,
    Failed,
    Finished,
    StreamEnded,
    StreamStatus,
    ToolEnded,
    Usage,
)

LOST = (
    "the replica that carried this stream is gone; what it had said is in the log, the rest was not generated: "
    "send the request again, or continue this answer in a new stream (penstock.continue)"
)
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "answer_tokens", "tool_tokens")
_TOKENS_OF = {
    "delta.reasoning": "reasoning_tokens",
    "delta.text": "answer_tokens",
    "tool_call.arguments_chunk": "tool_tokens",
}
# Of a stream that said its end itself. How a failed one came to fail is in its error's code.
_ENDINGS: dict[str, Ending] = {
    "completed": Ending.COMPLETED,
    "incomplete": Ending.COMPLETED,
    "cancelled": Ending.CANCELLED,
}
_SIZES = ("generated", "added", "delivered", "marker", "hidden", "stop", "moderation")


def replica_lost() -> Overloaded:
    """The replica that carried the stream died; another one says so."""
    return Overloaded("replica_lost", LOST, status=502)


@dataclass(slots=True)
class Closing:
    """What is appended to the log, the number of its last event, and the bill."""

    data: bytes
    last: int
    record: RecordUsage


@dataclass(slots=True)
class _Block:
    kind: str
    call_id: str = ""
    text: list[str] = field(default_factory=list)
    is_ready: bool = False


class Remains:
    """Reads what a native log says and knows what it leaves open."""

    def __init__(self) -> None:
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {"seq": 0, "ts": 0}
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._finishes: dict[int, str] = {}
        self._counts = dict.fromkeys((*_COUNTS, "delivered_tokens", "wasted_tokens_after_cancel"), 0)
        self._sizes = dict.fromkeys(_SIZES, 0)
        self._first_text: int | None = None
        self._error: str | None = None
        self._billed = False
        self._is_exact = False
        self._end: dict[str, Any] | None = None

    def read(self, event: dict[str, Any]) -> None:
        self._first = self._first or event
        self._last = event
        name = event["type"]
        place = (event.get("choice", 0), event.get("block", 0))
        if name in _TOKENS_OF:
            self._count(event, name)
            self._blocks[place].text.append(event["text"])
        elif name in ("text.start", "reasoning.start", "tool_call.start"):
            self._blocks[place] = _Block(name.partition(".")[0], event.get("call_id", ""))
            if name != "reasoning.start" and self._first_text is None:
                self._first_text = event["ts"]
        elif name == "tool_call.ready":
            self._blocks[place].is_ready = True
        elif name in ("text.end", "reasoning.end", "tool_call.end"):
            self._blocks.pop(place, None)
        elif name == "finish":
            self._finishes[event["choice"]] = event["reason"]
        elif name == "usage":
            self._counts.update({count: event[count] for count in self._counts})
            self._sizes.update({size: event["bytes"].get(size, 0) for size in _SIZES})
            self._billed = event["final"]
            self._is_exact = self._billed and not event["estimated"]
        elif name == "error":
            self._error = event["code"]
        elif name == "stream.end":
            self._end = event

    def close(self, form: Form, stream_id: str, ts: int) -> Closing:
        """The end, spelled in the log's own form, and nothing where it was said. `ts` is Unix milliseconds."""
        if self._end is not None:
            return Closing(b"", self._last["seq"], self._record_of(self._end))
        dialect: Dialect = native.NativeSse(stream_id) if form is Form.SSE else native.NativeNdjson(stream_id)
        ended_by_itself = bool(self._first) and len(self._finishes) == self._first["choices"] and self._error is None
        events = self._ends(ended_by_itself)
        usage = self._usage()
        if not self._billed:
            events.append(usage)
        seq = self._last["seq"]
        duration = max(0, ts - self._first.get("ts", ts))
        ttft = None if self._first_text is None else self._first_text - self._first["ts"]
        status = self._status(ended_by_itself)
        events.append(StreamEnded(status, self._reasons(), seq + len(events) + 1, duration, ttft))
        data = b"".join(dialect.render(event, seq + n, ts, NO_EXT) for n, event in enumerate(events, 1))
        return Closing(
            data, seq + len(events), self._record(Ending.REPLICA_LOST, "replica_lost", usage, duration, ttft)
        )

    def _ends(self, ended_by_itself: bool) -> list[ClientEvent]:
        if ended_by_itself:
            return []
        problem = replica_lost()
        ends = {place: _end_of(place, block) for place, block in self._blocks.items()}
        whole = [place for place, block in self._blocks.items() if block.is_ready]
        events: list[ClientEvent] = [ends.pop(place) for place in whole]
        if self._error is None:
            events.append(Failed(problem.code, problem.message, problem.retryable, problem.origin))
        events += ends.values()
        for choice in range(self._first.get("choices", 0)):
            if choice not in self._finishes:
                self._finishes[choice] = "error"
                events.append(Finished(choice, None, reason="error", cause="error"))
        return events

    def _status(self, ended_by_itself: bool) -> StreamStatus:
        if not ended_by_itself:
            return "failed"
        return "incomplete" if "length" in self._finishes.values() else "completed"

    def _reasons(self) -> list[str]:
        return [reason for _, reason in sorted(self._finishes.items())]

    def _count(self, event: dict[str, Any], name: str) -> None:
        for count in ("completion_tokens", "delivered_tokens", _TOKENS_OF[name]):
            self._counts[count] += 1
        size = len(event["text"].encode())
        self._sizes["generated"] += size
        self._sizes["delivered"] += size

    def _usage(self) -> Usage:
        counts: dict[str, Any] = {**self._counts}
        return Usage(**counts, estimated=not self._is_exact, sizes=self._sizes, final=True)

    def _record_of(self, end: dict[str, Any]) -> RecordUsage:
        """The bill of a stream that ended before its replica did, which had not written it yet."""
        ending = _ENDINGS.get(end["status"], Ending.REPLICA_LOST)
        return self._record(ending, self._error, self._usage(), end["duration_ms"], end["ttft_ms"])

    def _record(
        self, ending: Ending, error_code: str | None, usage: Usage, duration: int, ttft: int | None
    ) -> RecordUsage:
        return RecordUsage(
            ending=ending,
            usage=usage,
            finish_reasons=self._reasons(),
            error_code=error_code,
            model=self._first.get("model"),
            engine_id=None,
            ttft_seconds=None if ttft is None else ttft / 1000,
            duration_seconds=duration / 1000,
        )


def close_lost(bodies: Iterable[bytes], form: Form, dialect: str, stream_id: str, last: int, ts: int) -> Closing:
    """What to append to the log of a stream whose replica died, which is nothing where it had said all; and its bill.

    `bodies` are the events of a native log, empty for the other forms; `last` is the number of its last event.
    """
    remains = Remains()
    for body in bodies:
        remains.read(orjson.loads(body))
    if form in (Form.SSE, Form.NDJSON):
        if last == 0:
            # Not even the start: whoever waits for it is refused.
            return Closing(b"", 0, remains.close(form, stream_id, ts).record)
        return remains.close(form, stream_id, ts)
    closing = remains.close(Form.NDJSON, stream_id, ts)
    said = openai_chat.broken_off(replica_lost()) if dialect == openai_chat.ChatStream.__name__ and last else b""
    return Closing(said, last + 1 if said else last, closing.record)


def refusal_of(dialect: str) -> bytes:
    """The body of the answer to whoever waits for a stream that was lost before its first byte."""
    refusal = native.refusal if dialect.startswith("Native") else openai_chat.refusal
    return refusal(replica_lost())


def _end_of(place: tuple[int, int], block: _Block) -> ClientEvent:
    choice, number = place
    text = "".join(block.text)
    if block.is_ready:
        return ToolEnded(choice, block.call_id, text, True, None, "complete", number)
    if block.kind == "tool_call":
        return ToolEnded(choice, block.call_id, text, False, "the stream was cut off", "incomplete", number)
    channel = Channel.REASONING if block.kind == "reasoning" else Channel.ANSWER
    tokens = len(block.text) if channel is Channel.REASONING else 0
    return BlockEnded(choice, number, channel, len(text.encode()), tokens, "incomplete")
