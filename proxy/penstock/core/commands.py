"""What an exchange asks the shell to do."""

from dataclasses import dataclass
from enum import Enum

from penstock.core.errors import Problem
from penstock.core.events import Intervention, Usage
from penstock.core.kept_answer import KeptAnswer
from penstock.core.request import StreamRequest
from penstock.core.wishes import ToolRun


class Ending(Enum):
    """The one way a stream ended; `docs/explanation/endings.md` has a row for each."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    CLIENT_GONE = "client_gone"
    CAP_REACHED = "cap_reached"
    CLIENT_TOO_SLOW = "client_too_slow"
    TIME_LIMIT = "time_limit"
    REFUSED = "refused"
    ENGINE_ERROR = "engine_error"
    ENGINE_GONE = "engine_gone"
    HALTED = "halted"
    DRAINING = "draining"
    REPLICA_LOST = "replica_lost"
    TAKEN_OVER = "taken_over"
    STORE_LOST = "store_lost"
    OUR_BUG = "our_bug"


@dataclass(slots=True)
class OpenClient:
    """Send the head of a streamed answer, 200, with these first bytes, which are no event."""

    data: bytes


@dataclass(slots=True)
class SendToClient:
    """Send these bytes. `seq` is the number of the last event in them, 0 where they are none (a heartbeat)."""

    data: bytes
    seq: int = 0


@dataclass(slots=True)
class Respond:
    """Send one whole answer; nothing was sent before."""

    status: int
    body: bytes
    headers: dict[str, str]


@dataclass(slots=True)
class AbortEngine:
    """Close the connection to the engine now, so that it stops generating."""


@dataclass(slots=True)
class TryAnotherEngine:
    """This engine failed before its first token: give the request to another, or tell `NoEngineLeft`.

    The connection to this one is closed, so that it does not work for nobody.
    """

    problem: Problem


@dataclass(slots=True)
class PauseEngine:
    """Read no more of the engine's answer until `ResumeEngine`; what was read is still told."""


@dataclass(slots=True)
class ResumeEngine:
    """Read on."""


@dataclass(slots=True)
class CutClient:
    """Send these last bytes to the client alone and close its connection: the stream goes on without it."""

    data: bytes


@dataclass(slots=True)
class RunTools:
    """The engine's turn is over: run these calls, tell `ToolTried` and `ToolReturned` of each."""

    runs: list[ToolRun]


@dataclass(slots=True)
class AskAgain:
    """Put the next question of the same stream to an engine. `round` counts from 1."""

    request: StreamRequest
    round: int


@dataclass(slots=True)
class AskEngineHealth:
    """The engine has been silent for long: tell `EngineClosed` if its health check fails, nothing if it passes.

    A vLLM that gets SIGTERM stops its streams without closing them (4 of 5 runs of 0.32), so silence alone must
    not be trusted; neither must it end a stream, since a tool parser may hold its text back for minutes.
    """


@dataclass(slots=True)
class WakeAt:
    """Tell `ClockTicked` at this monotonic time; a later one replaces an earlier."""

    when: float


@dataclass(slots=True)
class AskModerator:
    """Ask the classifiers at these places about a text; each answers with a `VerdictReached` of the same number."""

    number: int
    text: str
    watches: tuple[int, ...]


@dataclass(slots=True)
class NoteIntervention:
    """A rule did something: for the audit. The text of the match is in it, for a digest and nothing else."""

    intervention: Intervention


@dataclass(slots=True)
class KeepAnswer:
    """The engine's whole answer, of a stream that may be told again."""

    answer: KeptAnswer


@dataclass(slots=True)
class RecordUsage:
    """The stream is over: its bill and what the trace tells of it.

    `unsent_bytes` is what was still held where the client had left or got an HTTP error: generated, never sent.
    """

    ending: Ending
    usage: Usage
    finish_reasons: list[str]
    error_code: str | None
    model: str | None
    engine_id: str | None
    ttft_seconds: float | None
    duration_seconds: float
    unsent_bytes: int = 0
    timeline: list[tuple[int, int, int, int]] | None = None
    """Where the audit was asked for it: (ms, choice, characters, tokens), all counted from the stream's beginning."""
    upstream: str = ""


@dataclass(slots=True)
class Close:
    """Finish the client's answer; nothing follows.

    `patient`: a whole answer waits for as long as its reader takes some of it; any other ending has one deadline.
    """

    patient: bool = False


Command = (
    OpenClient
    | SendToClient
    | Respond
    | AbortEngine
    | TryAnotherEngine
    | CutClient
    | PauseEngine
    | ResumeEngine
    | RunTools
    | AskAgain
    | AskEngineHealth
    | WakeAt
    | AskModerator
    | NoteIntervention
    | KeepAnswer
    | RecordUsage
    | Close
)
