"""How far ahead of its client a stream may run: what a client that lags has no room for waits here, and shrinks.

    keeps up ──more than high_bytes unsent──> lags ──has room, and nothing waits here──> keeps up
                                               │ has room: as much goes out as high_bytes
                                               │ more than half of buffer_bytes wait: the engine is paused
                                               │ it cannot be paused, and more than buffer_bytes wait: cut off
                                               └ nothing taken for stall_seconds: cut off

The step stands before `seq`, so that merging and shedding leave no gap and a replay is byte for byte what was sent.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import orjson

from penstock.core.errors import LimitReached
from penstock.core.events import Event, Extra, Text, ToolArguments, Usage, utf8_size

Measure = Literal["merge", "shed", "pause", "cut"]

_REMEDY = "read faster; resume the stream where its headers say that it can be, else ask again"
# What an event costs in memory beside its text.
_EVENT_BYTES = 200
# A merged delta grows no longer than this, in bytes, so that a client is not given one frame of all that it missed.
_MOST_MERGED = 16 * 1024
# The stall time is looked at this many times.
_LOOKS = 4


@dataclass(frozen=True, slots=True)
class SlowClient:
    """What is done about a client that lags. Sizes are bytes that it has not taken.

    `measures`: `merge` deltas of a block, `shed` running usage, `pause` the reading of the engine, `cut` the client
    off after `stall_seconds` without a byte taken. `buffer_bytes` is the bound that holds whatever the measures.
    """

    measures: frozenset[Measure]
    buffer_bytes: int
    stall_seconds: float

    @property
    def low_bytes(self) -> int:
        return self.buffer_bytes // 16

    @property
    def high_bytes(self) -> int:
        return self.buffer_bytes // 4

    @property
    def pause_bytes(self) -> int:
        """Merging gets a quarter of the buffer before the engine is made to wait."""
        return self.buffer_bytes // 2


class Pacing:
    """The step. `told` hears of the client's backlog, `feed` holds while the client `lags`."""

    def __init__(self, policy: SlowClient) -> None:
        self._policy = policy
        self.lags = False
        self.is_paused = False
        self._unsent = 0
        self._progress = 0.0  # when the client was last seen to take something
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._runs: dict[int, _Held] = {}

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def waiting(self) -> int:
        """Bytes that this client has not taken: those handed to its connection and those held here."""
        return self._unsent + self._held_bytes

    def feed(self, items: list[Event]) -> list[Event]:
        if not self.lags:
            return items
        out: list[Event] = []
        for item in items:
            if isinstance(item, Extra):
                out.append(item)  # is not sent by itself: it goes with the next event that is
            elif not (isinstance(item, Usage) and not item.final and "shed" in self._policy.measures):
                self._hold(item)
        return out

    def told(self, unsent: int, now: float) -> list[Event]:
        """`unsent` bytes wait in the client's connection. Returns what there is room for now."""
        if unsent < self._unsent or not self.lags:
            self._progress = now
        self._unsent = unsent
        if unsent <= self._policy.high_bytes:
            return self._release(self._policy.high_bytes)
        self.lags = True
        return []

    def let_go(self) -> list[Event]:
        """Everything that is held, in its order."""
        return self._release(self._held_bytes)

    def must_pause(self, *, shared: bool) -> bool:
        """Whether the engine is to be paused now; told once until `may_resume`.

        A connection that brings the streams of other clients too, `shared`, is never paused.
        """
        can_pause = not shared and "pause" in self._policy.measures
        if self.is_paused or not can_pause or self.waiting <= self._policy.pause_bytes:
            return False
        self.is_paused = True
        return True

    def may_resume(self) -> bool:
        if not self.is_paused or self.waiting > self._policy.high_bytes:
            return False
        self.is_paused = False
        return True

    def verdict(self, now: float) -> LimitReached | None:
        """Why the client has to be cut off now, if it has to."""
        policy = self._policy
        if self.waiting > policy.buffer_bytes and not self.is_paused:
            message = (
                f"more than {policy.buffer_bytes} bytes wait for a client that does not read fast enough "
                f"(limits.buffer_bytes); {_REMEDY}"
            )
            return LimitReached("client_too_slow", message, retryable=True)
        if self.lags and "cut" in policy.measures and now >= self._progress + policy.stall_seconds:
            message = (
                f"the client took nothing for {policy.stall_seconds:g} s while {self.waiting} bytes waited for it "
                f"(slow_client.stall_seconds); {_REMEDY}"
            )
            return LimitReached("client_stalled", message, status=408, retryable=True)
        return None

    def next_look(self, now: float) -> float | None:
        """When to look again whether the client has stalled."""
        if not self.lags or "cut" not in self._policy.measures:
            return None
        return min(now + self._policy.stall_seconds / _LOOKS, self._progress + self._policy.stall_seconds)

    def _hold(self, item: Event) -> None:
        size = _size(item)
        choice = getattr(item, "choice", None)
        run = self._runs.get(choice) if choice is not None else None
        if run is not None and "merge" in self._policy.measures and run.takes(item, size):
            run.take(item, size)
            self._held_bytes += size
            return
        held = _Held(item, size + _EVENT_BYTES)
        if choice is None:
            self._runs.clear()  # it keeps its place between the deltas of all choices
        else:
            self._runs[choice] = held
        self._held.append(held)
        self._held_bytes += held.size

    def _release(self, room: int) -> list[Event]:
        """The first events, up to the one that fills `room` bytes."""
        out: list[Event] = []
        while self._held and room > 0:
            held = self._held.popleft()
            room -= held.size
            self._held_bytes -= held.size
            out.append(held.whole())
        self.lags = bool(self._held)
        if out:
            self._runs = {choice: run for choice, run in self._runs.items() if not run.is_out}
        return out


class _Held:
    """An event that waits; a delta may grow by those that follow it. Its pieces are joined once, at the end."""

    __slots__ = ("_event", "_pieces", "is_out", "size")

    def __init__(self, event: Event, size: int) -> None:
        self._event = event
        self._pieces: list[str] = []
        self.size = size
        self.is_out = False

    def takes(self, item: Event, size: int) -> bool:
        """Whether `item` goes on where this one left off, and in the same manner."""
        first = self._event
        if self.size + size > _MOST_MERGED:
            return False
        if isinstance(first, Text) and isinstance(item, Text):
            return _manner(first) == _manner(item)
        return isinstance(first, ToolArguments) and isinstance(item, ToolArguments) and first.call_id == item.call_id

    def take(self, item: Event, size: int) -> None:
        first = self._event
        if not isinstance(first, Text | ToolArguments) or not isinstance(item, Text | ToolArguments):
            return
        self.size += size
        self._pieces.append(item.text)
        first.tokens += item.tokens
        if isinstance(first, Text) and isinstance(item, Text):
            # New lists: those that came are somebody else's too, where an answer is kept.
            if first.logprobs is not None and item.logprobs is not None:
                first.logprobs = first.logprobs + item.logprobs
            if first.token_ids is not None and item.token_ids is not None:
                first.token_ids = first.token_ids + item.token_ids

    def whole(self) -> Event:
        self.is_out = True
        if self._pieces and isinstance(self._event, Text | ToolArguments):
            self._event.text += "".join(self._pieces)
        return self._event


def _manner(item: Text) -> tuple[int, bool, bool, bool, bool]:
    return item.block, item.refusal, item.added, item.logprobs is None, item.token_ids is None


def _size(item: Event) -> int:
    """About what an event weighs on the wire; only clients that lag cost this."""
    if isinstance(item, ToolArguments) or (isinstance(item, Text) and not item.logprobs and not item.token_ids):
        return utf8_size(item.text)
    return len(orjson.dumps(item, default=str))
