"""How answers are spelled: one file per dialect, each with its stream, its whole answer and its errors.

A dialect is chosen per request and lives as long as its stream. `Spelling` is what the exchange needs of it.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Protocol

from penstock.core.errors import Problem
from penstock.core.events import ClientEvent


class Form(Enum):
    """What the log of a stream is made of, which decides where it can be taken up again."""

    SSE = "sse"
    NDJSON = "ndjson"
    FOREIGN = "foreign"  # its clients break when they start in the middle: replayed from the start only
    WHOLE = "whole"  # one body at the end


class Spelling(Protocol):
    """What spells one stream. `streams` is False where the client gets one whole body at the end."""

    @property
    def streams(self) -> bool: ...

    @property
    def content_type(self) -> str: ...

    @property
    def preamble(self) -> bytes: ...

    @property
    def heartbeat(self) -> bytes: ...

    def render(self, event: ClientEvent, seq: int, ts: int, ext: "Ext") -> bytes:
        """The bytes of one event, empty where this dialect has no word for it. `ts` is in Unix milliseconds."""

    def whole(self) -> tuple[int, bytes]:
        """HTTP status and body of the whole answer, once every event was rendered."""

    def refusal(self, problem: Problem) -> bytes:
        """The body of an HTTP error answer, where nothing was sent yet."""

    def cut_off(self, problem: Problem) -> bytes:
        """The last bytes on a connection that is closed while its stream goes on; they are no event of the stream."""


class Dialect(Spelling, Protocol):
    """A spelling that stands alone; what it is can be told before there is a stream."""

    form: ClassVar[Form]
    streams: ClassVar[bool]
    content_type: ClassVar[str]
    preamble: ClassVar[bytes]
    heartbeat: ClassVar[bytes]


class Ext:
    """Engine fields without a place in the schema, waiting for the next event that they belong to."""

    __slots__ = ("beside", "choice", "delta")

    def __init__(self) -> None:
        self.beside: dict[str, Any] = {}
        self.choice: dict[str, Any] = {}
        self.delta: dict[str, Any] = {}

    def merged(self) -> Mapping[str, Any]:
        return {**self.beside, **self.choice, **self.delta}

    def with_beside(self, more: Mapping[str, Any]) -> "Ext":
        """The same with more fields beside the choices."""
        other = Ext()
        other.beside, other.choice, other.delta = {**self.beside, **more}, self.choice, self.delta
        return other

    def __bool__(self) -> bool:
        return bool(self.beside or self.choice or self.delta)


NO_EXT = Ext()
