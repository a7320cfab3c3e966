"""What an exchange asks the shell to do."""

from dataclasses import dataclass
from enum import Enum

from penstock.core.events import Usage


class Ending(Enum):
    """The one way a stream ended; `docs/explanation/endings.md` has a row for each."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    CLIENT_GONE = "client_gone"
    CAP_REACHED = "cap_reached"
    TIME_LIMIT = "time_limit"
    REFUSED = "refused"
    ENGINE_ERROR = "engine_error"
    ENGINE_GONE = "engine_gone"
    DRAINING = "draining"
    OUR_BUG = "our_bug"


@dataclass(slots=True)
class OpenClient:
    """Send the head of a streamed answer, 200, with these first bytes."""

    data: bytes


@dataclass(slots=True)
class SendToClient:
    data: bytes


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
class WakeAt:
    """Tell `ClockTicked` at this monotonic time; a later one replaces an earlier."""

    when: float


@dataclass(slots=True)
class RecordUsage:
    """The stream is over: its bill and what the trace tells of it."""

    ending: Ending
    usage: Usage
    finish_reasons: list[str]
    error_code: str | None
    model: str | None
    engine_id: str | None
    ttft_seconds: float | None
    duration_seconds: float


@dataclass(slots=True)
class Close:
    """Finish the client's answer; nothing follows."""


Command = OpenClient | SendToClient | Respond | AbortEngine | WakeAt | RecordUsage | Close
