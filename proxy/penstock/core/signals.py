"""Facts that the shell tells an exchange. Every signal carries `now`, monotonic seconds: the core has no clock."""

from dataclasses import dataclass
from typing import Any

from penstock.core.errors import Problem
from penstock.core.events import Event, Opinion
from penstock.core.frames import Record
from penstock.core.tagged_stream import TaggedReader


@dataclass(slots=True)
class EngineChosen:
    """The request goes to this engine now: the first one, or another after `TryAnotherEngine`.

    `tagged` reads the plugin's records, where this engine sends those instead of its own chunks.
    """

    upstream: str
    tagged: TaggedReader | None
    now: float


@dataclass(slots=True)
class NoEngineLeft:
    """There is no (other) engine to ask. `problem` is told where none was asked: else the failure of the last is."""

    problem: Problem
    now: float


@dataclass(slots=True)
class EngineSpoke:
    """Bytes of a streamed answer."""

    data: bytes
    now: float


@dataclass(slots=True)
class EngineTagged:
    """What one engine step brought for this stream, as the plugin's records."""

    records: list[Record]
    now: float


@dataclass(slots=True)
class EngineAnswered:
    """The whole body of an answer that was not streamed."""

    body: bytes
    now: float


@dataclass(slots=True)
class AnswerTold:
    """A piece of an answer that no engine gives now: what a reader would have made of an engine's words."""

    events: list[Event]
    now: float


@dataclass(slots=True)
class EngineRefused:
    """The engine answered with an error status instead of a stream."""

    status: int
    body: bytes
    now: float


@dataclass(slots=True)
class EngineClosed:
    """No more bytes will come: the answer ended, or `problem` says how the connection broke."""

    problem: Problem | None
    now: float


@dataclass(slots=True)
class ClientLeft:
    """The client closed its connection."""

    now: float


@dataclass(slots=True)
class ClientBacklog:
    """`unsent` bytes wait in the client's connection.

    Told when a write leaves more than the high-water mark there, then before each `ClockTicked`, and when the
    low-water mark is reached again, as often as the client still lags.
    """

    unsent: int
    now: float


@dataclass(slots=True)
class Unread:
    """The last reader of the stream left, and the stream goes on for a while in case that one comes back."""

    now: float


@dataclass(slots=True)
class ReadAgain:
    """Somebody came back."""

    now: float


@dataclass(slots=True)
class Cancelled:
    """Somebody with the right to do so cancelled the stream (`DELETE`)."""

    now: float


@dataclass(slots=True)
class ToolTried:
    """Penstock begins to run a call; `attempt` counts from 1."""

    call_id: str
    name: str
    attempt: int
    now: float


@dataclass(slots=True)
class ToolReturned:
    """What came of a call. `answer` is for the model, also where `problem` says why it failed."""

    call_id: str
    name: str
    answer: str
    problem: str | None
    seconds: float
    now: float


@dataclass(slots=True)
class Annotated:
    """A backend adds a note to the stream; its shape was judged before."""

    kind: str
    data: dict[str, Any]
    anchor: dict[str, int] | None
    now: float


@dataclass(slots=True)
class Draining:
    """This replica stops and the time for open streams is over."""

    now: float


@dataclass(slots=True)
class StoreLost:
    """What the stream says can no longer be logged for other replicas; `fatal` where it shall end for that."""

    fatal: bool
    now: float


@dataclass(slots=True)
class TakenOver:
    """Another replica believed this one dead and has ended the stream in the log."""

    now: float


@dataclass(slots=True)
class VerdictReached:
    """What the classifier at place `watch` thinks of the text of question `number`."""

    number: int
    watch: int
    opinion: Opinion
    category: str
    now: float


@dataclass(slots=True)
class Broke:
    """A fault of our own in handling this stream."""

    now: float


@dataclass(slots=True)
class ClockTicked:
    """The time that a `WakeAt` asked for has come."""

    now: float


Signal = (
    EngineChosen
    | NoEngineLeft
    | EngineSpoke
    | EngineTagged
    | EngineAnswered
    | AnswerTold
    | EngineRefused
    | EngineClosed
    | ClientLeft
    | ClientBacklog
    | Unread
    | ReadAgain
    | Cancelled
    | Annotated
    | ToolTried
    | ToolReturned
    | Draining
    | StoreLost
    | TakenOver
    | VerdictReached
    | Broke
    | ClockTicked
)
