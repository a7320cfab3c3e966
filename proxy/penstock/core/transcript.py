"""Events -> bytes: each gets its number and is encoded, once.

Engine fields that have no place in the schema go with the next event that they belong to.
"""

from collections.abc import Callable
from typing import Any

from penstock.core.dialects import NO_EXT, Ext, Spelling
from penstock.core.events import (
    Event,
    Extra,
    Finished,
    Role,
    StreamEnded,
    StreamStarted,
    Text,
    ToolArguments,
    ToolStarted,
    Usage,
)

# Unknown engine fields that wait for an event to go with; an engine with more of them is not one to remember.
_MOST_EXT = 64
_CARRIES_EXT = (Role, Text, ToolStarted, ToolArguments, Finished, Usage)


class Transcript:
    """What was told of one stream, in its dialect. `start` is asked for the first event when the first is due.

    `started` is when the stream began, on the clock of `now`, and `epoch_ms` the Unix time of it.
    """

    def __init__(self, dialect: Spelling, start: Callable[[], StreamStarted], *, started: float, epoch_ms: int) -> None:
        self._dialect = dialect
        self._start = start
        self._started = started
        self._epoch_ms = epoch_ms
        self._ext: dict[int | None, Ext] = {}
        self.seq = 0
        """The number of the last event; 0 where none was told."""
        self.first_text: float | None = None
        """When the first word, or the first call, was told."""

    @property
    def ttft_seconds(self) -> float | None:
        return None if self.first_text is None else self.first_text - self._started

    def spell(self, items: list[Event], now: float) -> bytes:
        """What one read brought is one write. Empty where the dialect has no word for any of it."""
        ts = self._epoch_ms + int((now - self._started) * 1000)
        pieces: list[bytes] = []
        render: Callable[[Any, int, int, Ext], bytes] = self._dialect.render  # behind the steps all are client events
        for item in items:
            if isinstance(item, Extra):
                self._keep(item)
                continue
            if self.seq == 0:
                self.seq = 1
                pieces.append(render(self._start(), 1, ts, NO_EXT))
            if self.first_text is None and isinstance(item, Text | ToolStarted):
                self.first_text = now
            self.seq += 1
            ext = self._take_ext(item) if self._ext else NO_EXT
            pieces.append(render(item, self.seq, ts, ext))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def number_after(self, items: list[Event]) -> int:
        """The number that the last of these will have; the start may still have to be told before them."""
        return (self.seq or 1) + sum(not isinstance(event, Extra) for event in items)

    def forget_ext(self) -> None:
        """They were of an engine that was given up."""
        self._ext.clear()

    def _keep(self, extra: Extra) -> None:
        ext = self._ext.setdefault(extra.choice, Ext())
        where = ext.beside if extra.choice is None else ext.delta if extra.in_delta else ext.choice
        if len(where) < _MOST_EXT:
            where.update(extra.fields)

    def _take_ext(self, item: Event) -> Ext:
        """Engine fields for this event: those of its choice and those beside the choices; at the end, all left."""
        ext = Ext()
        last = isinstance(item, StreamEnded)
        is_tick = isinstance(item, Usage) and not item.final  # foreign dialects have no word for it
        if is_tick or not (last or isinstance(item, _CARRIES_EXT)):
            return ext
        for choice in list(self._ext):
            if last or choice is None or choice == getattr(item, "choice", None):
                waiting = self._ext.pop(choice)
                ext.beside |= waiting.beside
                ext.choice |= waiting.choice
                ext.delta |= waiting.delta
        return ext
