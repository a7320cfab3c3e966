"""What an engine said, kept so that it can be told again: its events as the reader made them, before any step.

Told again it takes the whole journey anew, so what a caller wants of it and what moderation thinks of it are those of
the new request. Tokens are left out: whoever is told a kept answer costs no engine anything.
"""

from dataclasses import dataclass, replace

import orjson

from penstock.core.events import (
    EngineDone,
    EngineOpened,
    Event,
    Extra,
    Failed,
    Finished,
    Role,
    Text,
    ToolDelta,
    Warned,
    utf8_size,
)

# What an event takes beside its text, about: an object of Python and its places.
_EVENT_BYTES = 200
# Pieces that are joined at once: each is an object of some fifty bytes beside its few letters.
_MOST_PIECES = 256


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """One whole answer. Its events are nobody's to change: steps get copies, from `again`."""

    model: str | None
    state: str | None
    """The family's state in which the model began, where the engine had told it."""
    whole: bytes | None
    """The body, of an answer that was not streamed."""
    events: tuple[Event, ...]
    size: int

    def again(self) -> list[Event]:
        return [replace(event) for event in self.events]


class AnswerKeeper:
    """Listens beside the first step and has the answer in the end, if it was whole and of at most so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._begin()

    def note(self, heard: list[Event]) -> None:
        for event in heard:
            if self._size <= self._most_bytes:
                self._take(event)
        if self._size > self._most_bytes:
            self._events.clear()
            self._tail.clear()

    def begin_anew(self) -> None:
        """Another engine answers: what the one before it said is no part of the answer."""
        self._begin()

    def answer(self) -> KeptAnswer | None:
        """None where the engine did not say that this was all, called a tool, or said too much."""
        if not self._is_whole or self._opened is None or self._size > self._most_bytes:
            return None
        self._seal()
        return KeptAnswer(self._opened.model, self._opened.state, self._body, tuple(self._events), self._size)

    def _begin(self) -> None:
        self._opened: EngineOpened | None = None
        self._body: bytes | None = None
        self._events: list[Event] = []
        self._tail: list[str] = []  # the text of the last event, in pieces
        self._size = 0
        self._is_whole = False

    def _take(self, event: Event) -> None:
        match event:
            case EngineOpened():
                self._opened = replace(event, whole=None)
                self._body = None if event.whole is None else orjson.dumps(event.whole)
                self._size += len(self._body or b"")
            case Text():
                self._take_text(event)
            case Role() | Finished() | Extra() | Warned():
                self._add(replace(event, tokens=0) if isinstance(event, Finished) else replace(event))
            case EngineDone():
                self._is_whole = True
            case ToolDelta() | Failed():
                self._size = self._most_bytes + 1  # a call is an act, not an answer to be given twice
            case _:
                pass  # the engine's counts

    def _take_text(self, event: Text) -> None:
        last = self._events[-1] if self._events else None
        if not isinstance(last, Text) or _kind_of(last) != _kind_of(event) or _has_extras(last) or _has_extras(event):
            self._add(replace(event, text="", tokens=0))
        self._tail.append(event.text)
        if len(self._tail) == _MOST_PIECES:
            self._tail = ["".join(self._tail)]
        self._size += utf8_size(event.text)

    def _add(self, event: Event) -> None:
        self._seal()
        self._events.append(event)
        self._size += _EVENT_BYTES + _size_of_extras(event)

    def _seal(self) -> None:
        if self._events and isinstance(last := self._events[-1], Text):
            last.text += "".join(self._tail)
        self._tail.clear()


def _kind_of(text: Text) -> tuple[object, ...]:
    return text.choice, text.channel, text.refusal


def _has_extras(event: Text) -> bool:
    return bool(event.logprobs or event.token_ids)


def _size_of_extras(event: Event) -> int:
    match event:
        case Text() | Finished():
            return len(orjson.dumps([event.logprobs, event.token_ids]))
        case Extra():
            return len(orjson.dumps(event.fields))
        case _:
            return 0
