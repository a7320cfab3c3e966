"""Tool calls for dialects that have no word for `ready`: fragments as they come, or each call once it is valid.

Stands before a dialect. Calls that policy denies by name, and those that Penstock runs itself, are left out from their
start and the others are numbered anew. A choice that ends with a call that is not valid ends with an error in the
dialect's own shape instead of its finish, so that no client takes it for a success; so does one whose every call was
denied. Both are told when all choices have finished, since such dialects have one error for all.
"""

from dataclasses import dataclass, field, replace

from penstock.core.dialects import NO_EXT, Dialect, Ext
from penstock.core.errors import Problem
from penstock.core.events import (
    ClientEvent,
    Failed,
    Finished,
    StreamEnded,
    ToolArguments,
    ToolDenied,
    ToolEnded,
    ToolReady,
    ToolStarted,
    Usage,
)
from penstock.core.wishes import ToolRelease

# Where a choice was cut, its finish or the stream's error says so.
_OWN_END = ("stop", "tool_calls", "other")


@dataclass(slots=True)
class _Call:
    started: ToolStarted
    ext: Ext
    is_out: bool = False
    pieces: list[str] = field(default_factory=list)


class ReleasedCalls:
    """A dialect with another before it."""

    def __init__(self, dialect: Dialect, release: ToolRelease) -> None:
        self._dialect = dialect
        self._release = release
        self._calls: dict[tuple[int, str], _Call] = {}
        self._counts: dict[int, int] = {}
        self._problems: dict[int, Failed] = {}
        self._denied: dict[int, ToolDenied] = {}
        self._failure: Failed | None = None

    @property
    def streams(self) -> bool:
        return self._dialect.streams

    @property
    def content_type(self) -> str:
        return self._dialect.content_type

    @property
    def preamble(self) -> bytes:
        return self._dialect.preamble

    @property
    def heartbeat(self) -> bytes:
        return self._dialect.heartbeat

    def whole(self) -> tuple[int, bytes]:
        return self._dialect.whole()

    def refusal(self, problem: Problem) -> bytes:
        return self._dialect.refusal(problem)

    def cut_off(self, problem: Problem) -> bytes:
        return self._dialect.cut_off(problem)

    def render(self, event: ClientEvent, seq: int, ts: int, ext: Ext) -> bytes:
        match event:
            case ToolStarted():
                events = self._start(event, ext)
            case ToolArguments():
                events = self._grow(event)
            case ToolReady():
                events = self._ready(event)
            case ToolDenied():
                self._denied[event.choice] = event
                events = []
            case ToolEnded():
                events = self._end(event)
            case Finished():
                events = self._finish(event)
            case Failed():
                self._failure = None
                events = [event]
            case Usage(final=True) | StreamEnded():
                failure, self._failure = self._failure, None
                events = [failure, event] if failure else [event]
            case _:
                return self._dialect.render(event, seq, ts, ext)
        return b"".join(
            self._dialect.render(one, seq, ts, ext if one is event else self._ext_of(one)) for one in events
        )

    def _start(self, event: ToolStarted, ext: Ext) -> list[ClientEvent]:
        call = self._calls[event.choice, event.call_id] = _Call(event, ext)
        is_hidden = event.denied or event.runs_here or self._release == "ready"
        return [] if is_hidden else [self._let_out(call)]

    def _let_out(self, call: _Call) -> ToolStarted:
        choice = call.started.choice
        index = self._counts[choice] = self._counts.get(choice, -1) + 1
        call.is_out = True
        call.started = replace(call.started, index=index)
        return call.started

    def _grow(self, event: ToolArguments) -> list[ClientEvent]:
        call = self._calls[event.choice, event.call_id]
        if call.is_out:
            return [event]
        if not (call.started.denied or call.started.runs_here):
            call.pieces.append(event.text)
        return []

    def _ready(self, event: ToolReady) -> list[ClientEvent]:
        call = self._calls[event.choice, event.call_id]
        if call.is_out:
            return [event]
        if call.started.runs_here:
            return []
        arguments = "".join(call.pieces)
        said = [ToolArguments(event.choice, event.call_id, arguments)] if arguments else []
        return [self._let_out(call), *said, event]

    def _end(self, event: ToolEnded) -> list[ClientEvent]:
        call = self._calls.pop((event.choice, event.call_id))
        if call.started.runs_here:
            return []
        if event.valid:
            return [event]
        denied = self._denied.get(event.choice)
        if denied is None or denied.call_id != event.call_id:
            message = f"the model's call of {call.started.name!r} is not valid: {event.problem}"
            self._problems.setdefault(event.choice, Failed("invalid_tool_call", message, True, "upstream"))
        elif call.is_out:  # it was denied for its arguments, when its beginning was told already
            self._problems.setdefault(event.choice, _refusal(denied))
        return []

    def _finish(self, event: Finished) -> list[ClientEvent]:
        problem, denied = self._problems.get(event.choice), self._denied.get(event.choice)
        if problem is None and denied is not None and event.choice not in self._counts:
            problem = _refusal(denied)
        if problem is None or event.reason not in _OWN_END:
            return [event]
        self._failure = self._failure or problem
        return []

    def _ext_of(self, event: ClientEvent) -> Ext:
        if isinstance(event, ToolStarted) and (call := self._calls.get((event.choice, event.call_id))):
            return call.ext
        return NO_EXT


def _refusal(denied: ToolDenied) -> Failed:
    message = f"the call of {denied.name!r} was denied by policy ({denied.rule}): {denied.reason}"
    return Failed("tool_call_denied", message, False, "policy", status=403)
