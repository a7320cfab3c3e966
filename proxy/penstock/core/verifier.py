"""Is this event log what the schema promises? The guarantees as a program that knows nothing of how logs are made.

`verify` judges a whole log, `Verifier` a stream while it runs, `parse_log` reads a log from a file. G7 (the order
inside one engine chunk) and G8 (a replay is byte-identical) are not checked: one log shows neither where the
engine's chunks began nor a second copy of itself. Event types and fields that are unknown are passed over (G9).
"""

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import orjson

from penstock.core import sse
from penstock.core.events import BlockStatus, FinishReason, ModerationAction, StreamStatus

Event = Mapping[str, Any]

SCHEMA_MAJOR: Final = "1"

# What each field must be, by event type; "?" allows null, "!" means that the field may be missing.
_PLACE = {"choice": "count", "block": "count"}
_DELTA = {**_PLACE, "text": "string", "logprobs": "array!", "token_ids": "array!", "refusal": "boolean!"}
_CALL = {**_PLACE, "call_id": "string"}
_TOKENS = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "answer_tokens",
    "tool_tokens",
    "delivered_tokens",
    "wasted_tokens_after_cancel",
)
_WITHHELD = ("marker", "hidden", "stop", "moderation")
_SIZES = ("generated", "added", "delivered", *_WITHHELD)
ENVELOPE: Final = {"type": "string", "stream_id": "string", "seq": "count", "ts": "count", "ext": "object!"}
FIELDS: Final[Mapping[str, Mapping[str, str]]] = {
    "stream.start": {
        "schema": "string",
        "model": "string",
        "choices": "count",
        "upstream": "string",
        "trace_id": "string?",
        "resumable_until": "count?",
        "continues": "string!",
    },
    "delta.role": {"choice": "count", "role": "string"},
    "reasoning.start": _PLACE,
    "delta.reasoning": _DELTA,
    "reasoning.end": {**_PLACE, "bytes": "count", "tokens": "count", "status": "block status"},
    "text.start": _PLACE,
    "delta.text": _DELTA,
    "text.end": {**_PLACE, "bytes": "count", "status": "block status"},
    "tool_call.start": {**_CALL, "index": "count", "name": "string", "executor": "string!"},
    "tool_call.arguments_chunk": {**_CALL, "text": "string"},
    "tool_call.ready": {**_CALL, "name": "string", "arguments": "object"},
    "tool_call.denied": {**_CALL, "name": "string", "rule": "string", "reason": "string"},
    "tool_call.progress": {**_CALL, "name": "string", "status": "string", "attempt": "count"},
    "tool_call.result": {
        **_CALL,
        "name": "string",
        "ok": "boolean",
        "bytes": "count",
        "duration_ms": "count",
        "problem": "string!",
        "content": "string!",
    },
    "structured": {"choice": "count", "value": "any", "schema_name": "string!", "section": "count!"},
    "annotation": {"kind": "string", "data": "object", "choice": "count!", "anchor": "object!"},
    "tool_call.end": {
        **_CALL,
        "arguments": "string",
        "valid": "boolean",
        "problem": "string!",
        "status": "block status",
    },
    "moderation": {
        "choice": "count",
        "block": "count?",
        "action": "moderation action",
        "rule": "string",
        "category": "string",
        "offset": "count",
        "length": "count",
    },
    "usage": {
        **dict.fromkeys(_TOKENS, "count"),
        "estimated": "boolean",
        "bytes": "sizes",
        "final": "boolean",
    },
    "finish": {
        "choice": "count",
        "reason": "finish reason",
        "cause": "string?",
        "raw_reason": "string?",
        "stop": "string or integer!",
        "logprobs": "array!",
        "token_ids": "array!",
    },
    "warning": {"code": "string", "detail": "string"},
    "error": {"code": "string", "message": "string", "retryable": "boolean", "origin": "string"},
    "stream.end": {
        "status": "stream status",
        "finish_reasons": "array",
        "events": "count",
        "duration_ms": "count",
        "ttft_ms": "count?",
    },
}
"""Every event type of schema 1.0 with its fields; all of them also have those of `ENVELOPE`."""

_AFTER_ERROR = frozenset({"reasoning.end", "text.end", "tool_call.end", "finish", "usage", "stream.end"})
_SURROGATE = re.compile("[\ud800-\udfff]")


def verify(events: Iterable[Event]) -> list[str]:
    """Everything that is wrong with a whole log, in the order of the log; an empty list means it keeps its promises.

    Each sentence opens with what was broken, as in "G1: seq 7 follows seq 5". That is the name of a guarantee, or
    `schema` for a field that is missing or has another type than the schema says, or `ts` for a clock that goes
    back. One fault may cause several sentences; the first names it. `events` are as `parse_log` returns them.
    """
    verifier = Verifier()
    found = [problem for event in events for problem in verifier.feed(event)]
    return found + verifier.end()


class Verifier:
    """The same for a log that comes bit by bit. Keeps the arguments of open tool calls and nothing else that grows."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._seq = 0
        self._ts = 0
        self._events = 0
        self._stream_id: str | None = None
        self._started = False
        self._ended_at: int | None = None
        self._failed_at: int | None = None
        self._final_at: int | None = None
        self._choice_count: int | None = None
        self._choices: dict[int, _Choice] = {}
        self._delivered = 0
        self._last_usage: dict[str, int] = {}

    def feed(self, event: Event) -> list[str]:
        """What is wrong with the next event. Never raises, whatever JSON it is given."""
        self._found = []
        self._events += 1
        wrong = _wrong_fields(event, ENVELOPE)
        if wrong:
            return [f"schema: event {self._events} ({_show(event.get('type'))}): {problem}" for problem in wrong]
        self._follow(event)
        name = event["type"]
        if name in FIELDS:
            wrong = _wrong_fields(event, FIELDS[name])
            self._found += [f"schema: seq {event['seq']} ({name}): {problem}" for problem in wrong]
            if not wrong:
                self._order(event)
                if check := _CHECKS.get(name):
                    check(self, event)
        return self._found

    def end(self) -> list[str]:
        """What is missing when no event follows any more."""
        if self._events == 0:
            return ["G2: the log holds no event"]
        if self._ended_at is None:
            return [f"G2: the log stops after seq {self._seq} without stream.end"]
        return []

    def _report(self, broken: str, event: Event, problem: str) -> None:
        self._found.append(f"{broken}: seq {event['seq']} ({event['type']}) {problem}")

    # -- what holds for every event ----------------------------------------------------------------

    def _follow(self, event: Event) -> None:
        """Sequence number, stream and clock, also of events whose type is unknown."""
        seq, ts = event["seq"], event["ts"]
        if seq != self._seq + 1:
            self._found.append(f"G1: seq {seq} follows seq {self._seq}" if self._seq else f"G1: seq starts at {seq}")
        if self._events == 1 and event["type"] != "stream.start":
            self._report("G2", event, "opens the log; stream.start must")
        if self._stream_id is None:
            self._stream_id = event["stream_id"]
        elif event["stream_id"] != self._stream_id:
            self._report("G2", event, f"is of stream {event['stream_id']!r}, the log of {self._stream_id!r}")
        if self._ended_at is not None:
            self._report("G2", event, f"comes after stream.end at seq {self._ended_at}")
        if ts < self._ts:
            self._report("ts", event, f"goes back by {self._ts - ts} ms")
        self._seq, self._ts = seq, ts

    def _order(self, event: Event) -> None:
        """What may still come after an error, and after the final usage."""
        name = event["type"]
        if self._failed_at is not None and name not in _AFTER_ERROR and name != "error":
            self._report("error", event, f"comes after the error at seq {self._failed_at}; only ends may")
        if self._final_at is not None and name not in ("stream.end", "usage"):
            self._report("usage", event, f"comes after the final usage at seq {self._final_at}")
        if "choice" in FIELDS[name] and "choice" in event:
            count = self._choice_count
            if count is not None and event["choice"] >= count:
                self._report("G5", event, f"is of choice {event['choice']}; the stream has {count}")
            if self._choice(event).reason is not None:
                self._report("G5", event, f"comes after the finish of choice {event['choice']}")

    def _choice(self, event: Event) -> "_Choice":
        return self._choices.setdefault(event["choice"], _Choice())

    # -- the stream --------------------------------------------------------------------------------

    def _stream_start(self, event: Event) -> None:
        if self._started:
            self._report("G2", event, "is a second stream.start")
            return
        self._started = True
        self._choice_count = event["choices"]
        if event["choices"] == 0:
            self._report("schema", event, "has no choices; there is at least 1")
        if event["schema"].partition(".")[0] != SCHEMA_MAJOR:
            self._report("schema", event, f"is of schema {event['schema']}; this verifier knows {SCHEMA_MAJOR}.x")

    def _stream_end(self, event: Event) -> None:
        self._ended_at = event["seq"]
        if event["events"] != self._events:
            self._report("G2", event, f"counts {event['events']} events; the log has {self._events}")
        self._finishes(event)
        if self._final_at is None:
            self._report("usage", event, "comes without a final usage before it")
        self._status(event)

    def _finishes(self, event: Event) -> None:
        for number in self._unfinished():
            self._report("G5", event, f"comes before the finish of choice {number}")
        for number, choice in sorted(self._choices.items()):
            for block in choice.open:
                self._report("G3", event, f"comes before the end of block {block} of choice {number}")
        told = [choice.reason for _, choice in sorted(self._choices.items()) if choice.reason is not None]
        if event["finish_reasons"] != told:
            self._report("G5", event, f"says finish_reasons {_show(event['finish_reasons'])}; the choices said {told}")

    def _unfinished(self) -> list[int]:
        """Choices without a finish: at least the first of them, and never as many as a forged count says."""
        numbers = range(min(self._choice_count or 0, len(self._choices) + 1))
        return [n for n in numbers if n not in self._choices or self._choices[n].reason is None]

    def _status(self, event: Event) -> None:
        """Cancelled after every choice had finished, a stream may have any reasons; else they settle its status."""
        status = event["status"]
        reasons = {choice.reason for choice in self._choices.values()}
        if self._failed_at is not None or status == "failed":
            if self._failed_at is None:
                self._report("status", event, "is failed, but there was no error")
            elif status != "failed":
                self._report("status", event, f"is {status} in spite of the error at seq {self._failed_at}")
        elif "error" in reasons:
            self._report("status", event, "has a choice that finished with error, but there was no error event")
        elif "cancelled" in reasons and status != "cancelled":
            self._report("status", event, f"is {status}, but a choice was cancelled")
        elif status != "cancelled" and status != ("incomplete" if "length" in reasons else "completed"):
            self._report("status", event, f"is {status}, but the choices finished with {sorted(map(str, reasons))}")

    def _error(self, event: Event) -> None:
        if self._failed_at is not None:
            self._report("error", event, f"is a second error; the first was at seq {self._failed_at}")
        self._failed_at = event["seq"]

    # -- choices and blocks ------------------------------------------------------------------------

    def _role(self, event: Event) -> None:
        choice = self._choice(event)
        if choice.has_role:
            self._report("G3", event, f"is a second role of choice {event['choice']}")
        elif choice.next_block:
            self._report("G3", event, f"comes after the first block of choice {event['choice']}")
        choice.has_role = True

    def _finish(self, event: Event) -> None:
        choice = self._choice(event)
        for block in choice.open:
            self._report("G5", event, f"comes before the end of block {block} of choice {event['choice']}")
        choice.reason = event["reason"]

    def _block_start(self, event: Event) -> None:
        choice, number = self._choice(event), event["block"]
        if not choice.has_role:
            self._report("G3", event, f"comes before the role of choice {event['choice']}")
        if number != choice.next_block:
            self._report("G3", event, f"opens block {number} of choice {event['choice']}, not {choice.next_block}")
        for other, block in choice.open.items():
            if block.kind != "tool_call":
                self._report("G4", event, f"opens block {number} while {block.kind} block {other} is open")
            elif block.is_whole():
                self._report("G4", event, f"opens block {number} while tool call block {other} is open and whole")
        choice.next_block = max(choice.next_block, number + 1)
        choice.open[number] = _Block(event["type"].partition(".")[0])

    def _tool_start(self, event: Event) -> None:
        choice = self._choice(event)
        if not event["call_id"]:
            self._report("tool_call", event, "has an empty call_id")
        elif event["call_id"] in choice.call_ids:
            self._report("tool_call", event, f"repeats call_id {event['call_id']!r}")
        if event["index"] in choice.call_indexes:
            self._report("tool_call", event, f"repeats index {event['index']}")
        choice.call_ids.add(event["call_id"])
        choice.call_indexes.add(event["index"])
        self._block_start(event)
        block = choice.open[event["block"]]
        block.call_id, block.name = event["call_id"], event["name"]

    def _open_block(self, event: Event, kind: str) -> "_Block | None":
        block = self._choice(event).open.get(event["block"])
        if block is None:
            self._report("G3", event, f"is for block {event['block']}, which is not open")
            return None
        if block.kind != kind:
            self._report("G3", event, f"is for block {event['block']}, which is a {block.kind} block")
            return None
        if kind == "tool_call" and event["call_id"] != block.call_id:
            self._report("tool_call", event, f"has call_id {event['call_id']!r} in the block of {block.call_id!r}")
        return block

    def _delta(self, event: Event) -> None:
        self._text(event, event["type"].partition(".")[2])

    def _arguments(self, event: Event) -> None:
        block = self._text(event, "tool_call")
        if block is not None:
            block.pieces.append(event["text"])
            if block.is_ready:
                self._report("tool_call", event, "comes after ready")

    def _text(self, event: Event, kind: str) -> "_Block | None":
        text = event["text"]
        if not text:
            self._report("G6", event, "is an empty delta")
        if _SURROGATE.search(text):
            self._report("G6", event, "holds half a character")
        size = _size(text)
        self._delivered += size
        block = self._open_block(event, kind)
        if block is not None:
            block.size += size
        return block

    def _block_end(self, event: Event) -> None:
        block = self._open_block(event, event["type"].partition(".")[0])
        if block is not None and event["bytes"] != block.size:
            self._report("G6", event, f"says {event['bytes']} bytes; the deltas have {block.size}")
        self._close(event)

    def _close(self, event: Event) -> None:
        if self._failed_at is not None and event["status"] != "incomplete":
            self._report("error", event, f"ends {event['status']} after the error; it must end incomplete")
        self._choice(event).open.pop(event["block"], None)

    def _ready(self, event: Event) -> None:
        block = self._open_block(event, "tool_call")
        if block is None:
            return
        if block.is_ready:
            self._report("tool_call", event, f"is a second ready of {block.call_id!r}")
        if event["name"] != block.name:
            self._report("tool_call", event, f"names {event['name']!r}; the call is of {block.name!r}")
        if not _is_same_json(event["arguments"], _arguments_of(block.arguments)):
            self._report("tool_call", event, "has other arguments than the chunks")
        if block.is_denied:
            self._report("tool_call", event, "is ready though it was denied")
        block.is_ready = True
        self._choice(event).ready.add(event["call_id"])

    def _denied(self, event: Event) -> None:
        block = self._open_block(event, "tool_call")
        if block is not None:
            if block.is_ready or block.is_denied:
                self._report("tool_call", event, f"denies {block.call_id!r}, which was judged before")
            block.is_denied = True

    def _run(self, event: Event) -> None:
        """What Penstock runs was ready before, and has one result, after which nothing follows."""
        choice = self._choice(event)
        if event["call_id"] not in choice.ready:
            self._report("tool_call", event, f"runs {event['call_id']!r}, which is not ready")
        if event["call_id"] in choice.results:
            self._report("tool_call", event, f"comes after the result of {event['call_id']!r}")
        if event["type"] == "tool_call.result":
            choice.results.add(event["call_id"])
            if event["ok"] == ("problem" in event):
                self._report("tool_call", event, "must name a problem if it failed, and only then")

    def _structured(self, event: Event) -> None:
        choice = self._choice(event)
        for number, block in choice.open.items():
            if block.kind != "tool_call":
                self._report("structured", event, f"comes before the end of block {number} of choice {event['choice']}")
        place = event.get("section", -1)
        if place in choice.values:
            self._report("structured", event, f"is a second value of choice {event['choice']}")
        choice.values.add(place)

    def _tool_end(self, event: Event) -> None:
        block = self._open_block(event, "tool_call")
        if block is not None:
            if event["arguments"] != block.arguments:
                self._report("tool_call", event, "has other arguments than the chunks")
            if event["valid"] != block.is_ready:
                problem = "is valid without a ready before it" if event["valid"] else "is not valid after its ready"
                self._report("tool_call", event, problem)
        if event["valid"] == ("problem" in event):
            self._report("tool_call", event, "must name a problem if it is not valid, and only then")
        if event["valid"] and event["status"] != "complete":
            self._report("tool_call", event, f"is valid, but its status is {event['status']}")
        self._close(event)

    def _moderation(self, event: Event) -> None:
        if event["block"] is not None and event["block"] >= self._choice(event).next_block:
            self._report("G3", event, f"is for block {event['block']}, which was never opened")

    # -- usage -------------------------------------------------------------------------------------

    def _usage(self, event: Event) -> None:
        sizes = event["bytes"]
        counts = {name: event[name] for name in ("completion_tokens", "delivered_tokens")}
        counts |= {f"bytes.{name}": sizes[name] for name in _SIZES}
        for name, before in self._last_usage.items():
            if counts[name] < before:
                self._report("usage", event, f"counts {name} {counts[name]} after {before}")
        self._last_usage = counts
        if self._final_at is not None:
            self._report("usage", event, f"comes after the final usage at seq {self._final_at}")
        if event["final"]:
            self._final_usage(event, sizes)

    def _final_usage(self, event: Event, sizes: Mapping[str, int]) -> None:
        if self._final_at is None:
            self._final_at = event["seq"]
        for number in self._unfinished():
            self._report("usage", event, f"is final before the finish of choice {number}")
        written = sizes["generated"] + sizes["added"]
        accounted = sizes["delivered"] + sum(sizes[name] for name in _WITHHELD)
        if written != accounted:
            self._report("G6", event, f"has {written} bytes generated and added, but {accounted} accounted for")
        if sizes["delivered"] != self._delivered:
            self._report("G6", event, f"says {sizes['delivered']} bytes delivered; the deltas have {self._delivered}")


@dataclass(slots=True)
class _Choice:
    """What one choice has said so far."""

    has_role: bool = False
    reason: str | None = None
    next_block: int = 0
    open: dict[int, "_Block"] = field(default_factory=dict)
    call_ids: set[str] = field(default_factory=set)
    call_indexes: set[int] = field(default_factory=set)
    values: set[int] = field(default_factory=set)
    ready: set[str] = field(default_factory=set)
    results: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Block:
    """One open block; `kind` is text, reasoning or tool_call, `size` the bytes of its deltas."""

    kind: str
    size: int = 0
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    is_ready: bool = False
    is_denied: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def is_whole(self) -> bool:
        """Whether the arguments are one complete JSON object, so that the call has no reason to stay open."""
        arguments = self.arguments
        return arguments.rstrip().endswith("}") and _arguments_of(arguments) is not None


_CHECKS: Final[Mapping[str, Callable[[Verifier, Event], None]]] = {
    "stream.start": Verifier._stream_start,
    "delta.role": Verifier._role,
    "reasoning.start": Verifier._block_start,
    "delta.reasoning": Verifier._delta,
    "reasoning.end": Verifier._block_end,
    "text.start": Verifier._block_start,
    "delta.text": Verifier._delta,
    "text.end": Verifier._block_end,
    "tool_call.start": Verifier._tool_start,
    "tool_call.arguments_chunk": Verifier._arguments,
    "tool_call.ready": Verifier._ready,
    "tool_call.denied": Verifier._denied,
    "tool_call.progress": Verifier._run,
    "tool_call.result": Verifier._run,
    "structured": Verifier._structured,
    "tool_call.end": Verifier._tool_end,
    "moderation": Verifier._moderation,
    "usage": Verifier._usage,
    "finish": Verifier._finish,
    "error": Verifier._error,
    "stream.end": Verifier._stream_end,
}


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _arguments_of(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None. No text at all counts as the empty object."""
    if not text.strip():
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _is_same_json(one: Any, other: Any) -> bool:
    """Equal as JSON, where 1, 1.0 and true are three values. Without recursion: arguments may be nested deeply."""
    pairs = [(one, other)]
    while pairs:
        one, other = pairs.pop()
        if type(one) is not type(other):
            return False
        if isinstance(one, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(value, other[name]) for name, value in one.items()]
        elif isinstance(one, list):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif one != other:
            return False
    return True


# --- Fields ---------------------------------------------------------------------------------------


def _wrong_fields(event: Event, fields: Mapping[str, str]) -> list[str]:
    problems = []
    for name, kind in fields.items():
        if name not in event:
            if not kind.endswith("!"):
                problems.append(f"{name} is missing")
        elif not (kind.endswith("?") and event[name] is None) and not _KINDS[kind.rstrip("?!")](event[name]):
            problems.append(f"{name} is {_show(event[name])}, not {_wanted(kind.rstrip('?!'))}")
    return problems


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(name)) for name in _SIZES)


def _is_one_of(words: Iterable[str]) -> Callable[[Any], bool]:
    allowed = frozenset(words)
    return lambda value: isinstance(value, str) and value in allowed


# Closed in all of 1.x: an outcome that a client does not know would be read as success.
CLOSED_SETS: Final[Mapping[str, tuple[str, ...]]] = {
    "finish reason": get_args(FinishReason),
    "block status": get_args(BlockStatus),
    "stream status": get_args(StreamStatus),
    "moderation action": get_args(ModerationAction),
}
_KINDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "string": lambda value: isinstance(value, str),
    "string or integer": lambda value: isinstance(value, str | int) and not isinstance(value, bool),
    "count": _is_count,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "any": lambda _: True,
    "sizes": _is_sizes,
    **{name: _is_one_of(words) for name, words in CLOSED_SETS.items()},
}


def _wanted(kind: str) -> str:
    if kind in CLOSED_SETS:
        return f"one of {', '.join(CLOSED_SETS[kind])}"
    return {"count": "a whole number from 0", "sizes": f"an object of the counts {', '.join(_SIZES)}"}.get(kind, kind)


def _show(value: Any) -> str:
    return reprlib.repr(value)  # short, and safe on what is nested deeply


# --- Reading a log --------------------------------------------------------------------------------


class LogError(ValueError):
    """Not an event log; `line` is where it stops being one, counted from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line = line


def parse_log(data: bytes) -> list[dict[str, Any]]:
    """The events of a log in one of its two spellings, NDJSON or server-sent events, told apart by the first line.

    Heartbeats, comments and blank lines are passed over. In server-sent events `event:` must be the event's type
    and `id:` its `<stream_id>:<seq>`. Raises `LogError`.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    return _read_ndjson(data) if data.lstrip()[:1] in (b"{", b"[", b"") else _read_sse(data)


def _read_ndjson(data: bytes) -> list[dict[str, Any]]:
    return [_read_event(line, number) for number, line in enumerate(data.splitlines(), 1) if line.strip()]


def _read_sse(data: bytes) -> list[dict[str, Any]]:
    parser = sse.Parser(limit=len(data) + 1)
    events: list[dict[str, Any]] = []
    said = 0  # the last line that is neither blank nor a comment
    for number, line in enumerate(data.splitlines(), 1):
        events += [_read_frame(frame, said) for frame in parser.feed(line + b"\n")]
        if line and not line.startswith(b":"):
            said = number
    if parser.feed(b"\n"):
        raise LogError(said, "the last event is not ended by a blank line; is the log cut short?")
    if said and not events:
        raise LogError(said, "neither NDJSON nor server-sent events")
    return events


def _read_frame(frame: sse.Frame, line: int) -> dict[str, Any]:
    event = _read_event(frame.data, line)
    name, place = str(event.get("type")), f"{event.get('stream_id')}:{event.get('seq')}"
    if frame.event != name.encode("utf-8", "surrogatepass"):
        raise LogError(line, f"event: is {_decode(frame.event)}, but the type is {name}")
    if frame.id != place.encode("utf-8", "surrogatepass"):
        raise LogError(line, f"id: is {_decode(frame.id or b'missing')}, but stream_id and seq are {place}")
    return event


def _read_event(line: bytes, number: int) -> dict[str, Any]:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LogError(number, f"not valid JSON: {error}") from error
    if not isinstance(event, dict):
        raise LogError(number, f"an event is a JSON object; found {_show(event)}")
    return event


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
