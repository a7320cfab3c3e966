"""Recorded exchanges with the engine, and the ways in which a replay of one can misbehave.

A recording is JSON Lines: a header that holds the request and the answer's status, then one line per
network read with its time. `parse_recording` reads one, `pick_recording` finds the one that answers a
request, `parse_fault` reads a misbehaviour, and `plan_replay` turns recording and fault into a list of timed
actions that the shell only has to carry out.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from http import HTTPStatus
from itertools import accumulate
from typing import Any, Final, TypeVar

import orjson

FORMAT_VERSION: Final = 1
EVENT_STREAM: Final = "text/event-stream"
FOREVER: Final = math.inf

# What was sent before a TCP reset can still be thrown away unread at the other end: aiohttp's client raises
# at once, with the last bytes still in its buffer. 50 ms let a reader on the same machine take them first.
RESET_GRACE_SECONDS: Final = 0.05

_BLANK_LINE: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_WIDE_CHARACTER: Final = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")

_T = TypeVar("_T")


class RecordingError(ValueError):
    """A recording that cannot be used; the text names the file, the line and what is wrong there."""


class ReplayError(ValueError):
    """A request or a flag that the replay cannot follow; `status` is the HTTP status that says so."""

    status = 400


class UnknownRecordingError(ReplayError):
    """No recording answers the request; the text lists those that there are."""

    status = 404


# --- Recordings -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """One network read: its bytes (never empty) and when they came, in ms since the request was sent."""

    ms: float
    data: bytes


@dataclass(frozen=True, slots=True)
class Recording:
    """One exchange with a real engine. Chunks are in order of time and there is at least one."""

    name: str
    engine: str
    about: str
    request: Mapping[str, Any]
    status: int
    content_type: str
    chunks: tuple[Chunk, ...]
    said: tuple[str, ...] = ()
    """What the model was made to write, per choice, before vLLM cut or parsed it; empty where nobody knows."""

    @property
    def body(self) -> bytes:
        """The whole answer, as the engine wrote it."""
        return b"".join(chunk.data for chunk in self.chunks)

    @property
    def model(self) -> str:
        """The model that was asked; empty where the request named none."""
        model = self.request.get("model")
        return model if isinstance(model, str) else ""

    @property
    def is_event_stream(self) -> bool:
        """Whether the answer is server-sent events; otherwise it is one document."""
        return self.content_type.lower().startswith(EVENT_STREAM)


def parse_recording(content: bytes, source: str) -> Recording:
    """Read one recording; `source` (a path, say) opens the text of every `RecordingError`."""
    numbered = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not numbered:
        raise RecordingError(f"{source}: the file is empty; a recording starts with its header line")
    header = _read_header(*numbered[0], source)
    chunks: list[Chunk] = []
    for number, line in numbered[1:]:
        chunk = _read_chunk(line, f"{source}, line {number}")
        if chunks and chunk.ms < chunks[-1].ms:
            problem = f"ms goes back from {chunks[-1].ms:g} to {chunk.ms:g}; lines must be in order of time"
            raise RecordingError(f"{source}, line {number}: {problem}")
        chunks.append(chunk)
    if not chunks:
        raise RecordingError(f"{source}: no chunk follows the header; is the recording cut short?")
    return replace(header, chunks=tuple(chunks))


def _read_header(number: int, line: bytes, source: str) -> Recording:
    where = f"{source}, line {number}"
    fields = _read_object(line, where)
    version = fields.get("recording")
    if version != FORMAT_VERSION:
        problem = f'a header has "recording": {FORMAT_VERSION}, the format\'s version; found {_show(version)}'
        raise RecordingError(f"{where}: {problem}")
    status = _field(fields, "status", int, "a number", where)
    if not 200 <= status <= 599:
        raise RecordingError(f"{where}: status is {status}; it must be an HTTP status from 200 to 599")
    return Recording(
        name=_text(fields, "name", where),
        engine=_text(fields, "engine", where),
        about=_text(fields, "about", where),
        request=_field(fields, "request", dict, "an object", where),
        status=status,
        content_type=_text(fields, "content_type", where),
        chunks=(),
        said=_said(fields, where),
    )


def _read_chunk(line: bytes, where: str) -> Chunk:
    fields = _read_object(line, where)
    ms = fields.get("ms")
    if isinstance(ms, bool) or not isinstance(ms, int | float) or ms < 0:
        raise RecordingError(f"{where}: ms must be a number of milliseconds, 0 or more; found {_show(ms)}")
    if ("text" in fields) == ("base64" in fields):
        raise RecordingError(f'{where}: a chunk has either "text" or "base64", exactly one of them')
    if "text" in fields:
        return Chunk(float(ms), _text(fields, "text", where).encode())
    return Chunk(float(ms), _read_base64(fields, where))


def _read_base64(fields: Mapping[str, object], where: str) -> bytes:
    try:
        return base64.b64decode(_text(fields, "base64", where), validate=True)
    except binascii.Error as error:
        raise RecordingError(f"{where}: base64 cannot be decoded: {error}") from error


def _read_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RecordingError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordingError(f"{where}: must be a JSON object; found {_show(value)}")
    return value


def _said(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    said = fields.get("said", [])
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        raise RecordingError(f"{where}: said must be a list of texts, one a choice")
    return tuple(said)


def _text(fields: Mapping[str, object], key: str, where: str) -> str:
    text = _field(fields, key, str, "a string", where)
    if not text:
        raise RecordingError(f"{where}: {key} must not be empty")
    return text


def _field(fields: Mapping[str, object], key: str, wanted: type[_T], called: str, where: str) -> _T:
    value = fields.get(key)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise RecordingError(f"{where}: {key} must be {called}; found {_show(value)}")
    return value


def _show(value: object) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- Which recording answers a request ------------------------------------------------------------


def pick_recording(recordings: Sequence[Recording], request: Mapping[str, Any], name: object = None) -> Recording:
    """The recording called `name`; else the one whose last user message, `stream` and `n` are the request's;
    else the first with the request's `stream`. Raises `UnknownRecordingError` where there is none."""
    if name is not None:
        return _find(recordings, lambda one: one.name == name, f"No recording is called {_show(name)}")
    asked = _essence(request)
    for recording in recordings:
        if _essence(recording.request) == asked:
            return recording
    stream = bool(request.get("stream"))
    missing = f"No recording has stream={json.dumps(stream)}"
    return _find(recordings, lambda one: bool(one.request.get("stream")) == stream, missing)


def _find(recordings: Sequence[Recording], suits: Callable[[Recording], bool], complaint: str) -> Recording:
    for recording in recordings:
        if suits(recording):
            return recording
    known = ", ".join(recording.name for recording in recordings)
    raise UnknownRecordingError(f'{complaint}. Ask by name with vllm_xargs: {{"replay": NAME}}; known: {known}.')


def _essence(request: Mapping[str, Any]) -> tuple[object, bool, object]:
    """What two requests must share to be answered alike: last user message, `stream`, `n`."""
    messages = request.get("messages")
    spoken = [
        message.get("content")
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, dict) and message.get("role") == "user"
    ]
    return (spoken[-1] if spoken else None, bool(request.get("stream")), request.get("n") or 1)


# --- What a replay does ---------------------------------------------------------------------------


class Ending(Enum):
    """How the connection is left after the last byte of the answer."""

    COMPLETE = auto()
    """The body is ended as HTTP asks; the connection may serve the next request."""
    CLOSE = auto()
    """The body is ended as HTTP asks, however little of it there was, and the connection is closed."""
    RESET = auto()
    """The connection is torn down by a TCP reset; the body is not ended."""


@dataclass(frozen=True, slots=True)
class SendHeaders:
    """Send the status line and headers `at` so many seconds after the request arrived.

    `content_length` is None where the body is to be sent with chunked encoding."""

    at: float
    status: int
    content_type: str
    content_length: int | None


@dataclass(frozen=True, slots=True)
class SendBytes:
    """Send these bytes, in one write, `at` so many seconds after the request arrived."""

    at: float
    data: bytes


@dataclass(frozen=True, slots=True)
class EndAnswer:
    """End the answer `at` so many seconds after the request arrived."""

    at: float
    ending: Ending


Action = SendHeaders | SendBytes | EndAnswer


def plan_replay(recording: Recording, fault: Fault | None = None, speed: float = 1.0) -> list[Action]:
    """What to do and when: headers, then bytes, then one ending, in order of time.

    Recorded times are divided by `speed`; with speed 0 they all become 0. The seconds of a fault are real
    seconds whatever the speed. A time of `FOREVER` never comes: nothing behind it is ever done. Raises
    `ReplayError` where the fault cannot happen in this recording."""
    tape = _Tape(recording, _timed_chunks(recording, check_speed(speed)))
    if fault is None:
        return _whole_answer(tape)
    return FAULTS[fault.kind].plan(tape, fault)


def check_speed(value: object) -> float:
    """`value` as a speed: 0 (as fast as possible) or a positive number. Raises `ReplayError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ReplayError(
            f"The replay's speed is {_show(value)}; it must be 0 (as fast as possible) or a positive number."
        )
    return float(value)


def error_body(status: int, message: str) -> str:
    """An error as vLLM spells it, in OpenAI's shape."""
    phrase = HTTPStatus(status).phrase.replace(" ", "").replace("-", "").removesuffix("Error")
    return json.dumps({"error": {"message": message, "type": f"{phrase}Error", "param": None, "code": status}})


@dataclass(frozen=True, slots=True)
class _Tape:
    """A recording with its times at the chosen speed."""

    recording: Recording
    chunks: list[SendBytes]

    def event_ends(self) -> list[int]:
        """Byte offsets at which events end; in an answer that is no event stream, every chunk is an event."""
        if not self.recording.is_event_stream:
            return list(accumulate(len(chunk.data) for chunk in self.chunks))
        body = self.recording.body
        ends = [match.end() for match in _BLANK_LINE.finditer(body)]
        return ends if ends and ends[-1] == len(body) else [*ends, len(body)]

    def events(self) -> list[SendBytes]:
        """The same bytes, one item an event."""
        return _recut(self.chunks, self.event_ends())

    def split_at(self, fault: Fault) -> tuple[list[SendBytes], list[SendBytes], float]:
        """The events before the fault, those behind it, and the moment at which it happens."""
        events = self.events()
        if fault.after > len(events):
            raise ReplayError(
                f"The recording {self.recording.name} has {len(events)} events, "
                f"so {fault.kind} after={fault.after} never happens; choose a smaller after."
            )
        behind = events[fault.after :]
        moment = behind[0].at if behind else events[-1].at
        return events[: fault.after], behind, moment

    def need_events(self, fault: Fault) -> None:
        """Raise `ReplayError` where the answer is one document."""
        if not self.recording.is_event_stream:
            raise ReplayError(
                f"The fault {fault.kind} is for streams, and the recording {self.recording.name} is "
                f"{self.recording.content_type}; ask for a stream."
            )


def _timed_chunks(recording: Recording, speed: float) -> list[SendBytes]:
    seconds_per_ms = 0.001 / speed if speed else 0.0
    return [SendBytes(chunk.ms * seconds_per_ms, chunk.data) for chunk in recording.chunks]


def _recut(chunks: Sequence[SendBytes], ends: Iterable[int]) -> list[SendBytes]:
    """The same bytes cut at `ends` (ascending); a piece comes when its last byte came."""
    body = b"".join(chunk.data for chunk in chunks)
    arrived = list(accumulate(len(chunk.data) for chunk in chunks))
    pieces: list[SendBytes] = []
    start = 0
    for end in ends:
        pieces.append(SendBytes(chunks[bisect_left(arrived, end)].at, body[start:end]))
        start = end
    return pieces


def _whole_answer(tape: _Tape) -> list[Action]:
    return _answer(tape, tape.chunks)


def _answer(
    tape: _Tape, body: Sequence[SendBytes], ending: Ending = Ending.COMPLETE, end_at: float = 0.0
) -> list[Action]:
    """Headers, `body`, and the ending at `end_at` or with the last bytes, whichever is later.

    vLLM sends a stream's headers before the first token, a document's together with its body."""
    recording = tape.recording
    last = body[-1].at if body else 0.0
    headers = SendHeaders(
        at=0.0 if recording.is_event_stream or not body else body[0].at,
        status=recording.status,
        content_type=recording.content_type,
        content_length=_content_length(recording, body),
    )
    return [headers, *body, EndAnswer(max(last, end_at, headers.at), ending)]


def _content_length(recording: Recording, body: Sequence[SendBytes]) -> int | None:
    """Known only for a document sent whole; what is chunked can end early and still cleanly."""
    size = sum(len(piece.data) for piece in body)
    whole = not recording.is_event_stream and size == len(recording.body)
    return size if whole else None


def _later(actions: Sequence[Action], seconds: float) -> list[Action]:
    return [replace(action, at=action.at + seconds) for action in actions]


# --- Faults ---------------------------------------------------------------------------------------


class FaultKind(StrEnum):
    """Every way to misbehave; docs/reference/replay.md says what each does."""

    STALL = "stall"
    DROP = "drop"
    RESET = "reset"
    CUT = "cut"
    ERROR = "error"
    NO_DONE = "no_done"
    DOUBLE_TOOLS = "double_tools"
    REFUSE = "refuse"
    SLOW_HEADERS = "slow_headers"
    SLOW_FIRST = "slow_first"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Fault:
    """A misbehaviour and its parameters, of which each kind uses those that its row in `FAULTS` takes."""

    kind: FaultKind
    after: int = 3
    """So many whole events are sent before it happens."""
    seconds: float = FOREVER
    """How long it lasts, in real time."""
    status: int = 503
    """The status of a refusal."""
    size: int = 1
    """The size in bytes of the pieces to send."""


def parse_fault(text: object) -> Fault:
    """Read `kind:parameter=value:...`, such as `stall:after=5:seconds=30`. Raises `ReplayError`."""
    if not isinstance(text, str):
        raise ReplayError(f"A fault is a string such as stall:after=5:seconds=30; found {_show(text)}.")
    kind_text, *settings = text.split(":")
    if kind_text not in FAULTS:
        raise ReplayError(f"Unknown fault {_show(kind_text)}; known: {describe_faults()}.")
    kind = FaultKind(kind_text)
    values: dict[str, Any] = {}
    for setting in settings:
        name, value = _parse_parameter(kind, setting)
        if name in values:
            raise ReplayError(f"The fault {kind} has {name} twice; give it once.")
        values[name] = value
    return Fault(kind, **values)


def describe_faults() -> str:
    """Every fault with the parameters that it takes, in one line, as in `drop:after=`."""
    return ", ".join(":".join([kind, *(f"{name}=" for name in row.takes)]) for kind, row in FAULTS.items())


def _parse_parameter(kind: FaultKind, setting: str) -> tuple[str, int | float]:
    name, equals, value = setting.partition("=")
    takes = FAULTS[kind].takes
    if name not in takes:
        known = f"it takes {', '.join(takes)}" if takes else "it takes none"
        raise ReplayError(f"The fault {kind} has no parameter {_show(name)}; {known}.")
    reader, wanted = _PARAMETERS[name]
    read = reader(value) if equals else None
    if read is None:
        raise ReplayError(f"The fault {kind} has {name}={_show(value)}; it must be {wanted}.")
    return name, read


def _read_count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None


def _read_size(text: str) -> int | None:
    return _read_count(text) or None


def _read_status(text: str) -> int | None:
    status = _read_count(text)
    return status if status in _ERROR_STATUSES else None


def _read_seconds(text: str) -> float | None:
    if text == "forever":
        return FOREVER
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


_ERROR_STATUSES: Final = frozenset(int(status) for status in HTTPStatus if status >= 400)

_PARAMETERS: Final[Mapping[str, tuple[Callable[[str], int | float | None], str]]] = {
    "after": (_read_count, "a number of events, 0 or more"),
    "seconds": (_read_seconds, "a number of seconds, 0 or more, or forever"),
    "status": (_read_status, "an HTTP error status such as 503"),
    "size": (_read_size, "a number of bytes, 1 or more"),
}


def _plan_stall(tape: _Tape, fault: Fault) -> list[Action]:
    before, behind, moment = tape.split_at(fault)
    stalled = [replace(event, at=event.at + fault.seconds) for event in behind]
    return _answer(tape, [*before, *stalled], end_at=moment + fault.seconds)


def _plan_drop(tape: _Tape, fault: Fault) -> list[Action]:
    before, _, moment = tape.split_at(fault)
    return _answer(tape, before, Ending.CLOSE, moment)


def _plan_reset(tape: _Tape, fault: Fault) -> list[Action]:
    before, _, moment = tape.split_at(fault)
    return _answer(tape, before, Ending.RESET, moment + RESET_GRACE_SECONDS)


def _plan_cut(tape: _Tape, fault: Fault) -> list[Action]:
    before, _, _ = tape.split_at(fault)
    wide = _WIDE_CHARACTER.search(tape.recording.body, sum(len(event.data) for event in before))
    if wide is None:
        raise ReplayError(
            f"The recording {tape.recording.name} has no character of several bytes behind event "
            f"{fault.after}; choose a smaller after or another recording."
        )
    middle = (wide.start() + wide.end()) // 2
    ends = [end for end in tape.event_ends() if end < middle]
    return _answer(tape, _recut(tape.chunks, [*ends, middle]), Ending.CLOSE)


def _plan_error(tape: _Tape, fault: Fault) -> list[Action]:
    tape.need_events(fault)
    before, _, moment = tape.split_at(fault)
    frame = f"data: {error_body(500, 'Internal server error')}\n\n".encode()
    return _answer(tape, [*before, SendBytes(moment, frame), SendBytes(moment, b"data: [DONE]\n\n")])


def _plan_no_done(tape: _Tape, fault: Fault) -> list[Action]:
    tape.need_events(fault)
    return _answer(tape, [event for event in tape.events() if _payload(event.data) != b"[DONE]"])


def _plan_double_tools(tape: _Tape, fault: Fault) -> list[Action]:
    tape.need_events(fault)
    doubled = [[event, event] if _has_tool_call(event.data) else [event] for event in tape.events()]
    return _answer(tape, [event for pair in doubled for event in pair])


def _plan_refuse(_: _Tape, fault: Fault) -> list[Action]:
    body = error_body(fault.status, "Refused by the replay, as it was asked to.").encode()
    return [
        SendHeaders(0.0, fault.status, "application/json", len(body)),
        SendBytes(0.0, body),
        EndAnswer(0.0, Ending.COMPLETE),
    ]


def _plan_slow_headers(tape: _Tape, fault: Fault) -> list[Action]:
    return _later(_whole_answer(tape), fault.seconds)


def _plan_slow_first(tape: _Tape, fault: Fault) -> list[Action]:
    headers, *rest = _whole_answer(tape)
    return [replace(headers, at=0.0), *_later(rest, max(0.0, fault.seconds - rest[0].at))]


def _plan_bytes(tape: _Tape, fault: Fault) -> list[Action]:
    length = len(tape.recording.body)
    return _answer(tape, _recut(tape.chunks, [*range(fault.size, length, fault.size), length]))


def _payload(event: bytes) -> bytes:
    """The first `data` line of an event; vLLM writes one."""
    for line in event.splitlines():
        if line.startswith(b"data:"):
            return line.removeprefix(b"data:").strip()
    return b""


def _has_tool_call(event: bytes) -> bool:
    try:
        chunk = orjson.loads(_payload(event))
    except orjson.JSONDecodeError:
        return False
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    deltas = [choice.get("delta") for choice in choices or () if isinstance(choice, dict)]
    return any(isinstance(delta, dict) and delta.get("tool_calls") for delta in deltas)


@dataclass(frozen=True, slots=True)
class FaultRow:
    """One row of the table of faults: the parameters it takes and how it changes the plan."""

    takes: tuple[str, ...]
    plan: Callable[[_Tape, Fault], list[Action]]


FAULTS: Final[Mapping[FaultKind, FaultRow]] = {
    FaultKind.STALL: FaultRow(("after", "seconds"), _plan_stall),
    FaultKind.DROP: FaultRow(("after",), _plan_drop),
    FaultKind.RESET: FaultRow(("after",), _plan_reset),
    FaultKind.CUT: FaultRow(("after",), _plan_cut),
    FaultKind.ERROR: FaultRow(("after",), _plan_error),
    FaultKind.NO_DONE: FaultRow((), _plan_no_done),
    FaultKind.DOUBLE_TOOLS: FaultRow((), _plan_double_tools),
    FaultKind.REFUSE: FaultRow(("status",), _plan_refuse),
    FaultKind.SLOW_HEADERS: FaultRow(("seconds",), _plan_slow_headers),
    FaultKind.SLOW_FIRST: FaultRow(("seconds",), _plan_slow_first),
    FaultKind.BYTES: FaultRow(("size",), _plan_bytes),
}
