"""What one exchange is given: who it is, how it reads and what bounds it."""

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.channels import ReasoningPolicy
from penstock.core.citations import CitationPattern
from penstock.core.families import Family
from penstock.core.pacing import SlowClient
from penstock.core.rules import Policy
from penstock.core.tagged_stream import TaggedReader
from penstock.core.tool_policy import ToolRule
from penstock.core.verdicts import Watching
from penstock.core.wishes import LoopTerms


@dataclass(frozen=True, slots=True)
class Bounds:
    """The caps and times of one stream. Sizes in bytes, times in seconds."""

    line_bytes: int
    tool_call_bytes: int
    stream_bytes: int
    slow_client: SlowClient
    stream_seconds: float
    first_byte_seconds: float
    heartbeat_seconds: float
    engine_silence_seconds: float
    hold_chars: int = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """`epoch_ms` is the time at `started`, in Unix milliseconds."""

    stream_id: str
    upstream: str
    trace_id: str | None
    family: Family
    reasoning: ReasoningPolicy
    bounds: Bounds
    started: float
    epoch_ms: int
    tagged: TaggedReader | None = None
    """Reads the plugin's records, where the engine sends those instead of its own chunks."""
    loop: LoopTerms | None = None
    """Which tools are run here; None where none is."""
    tool_rules: Sequence[ToolRule] = ()
    """Those of the policy that concern this caller."""
    citations: Sequence[CitationPattern] = ()
    resumable_until: int | None = None
    """Unix milliseconds until which the log is kept at least; None where there is no log."""
    is_logged: bool = True
    """Whether events are kept, so that one that no client took was not said in vain."""
    outlives_client: bool = False
    """Whether the stream goes on where its client is cut off, so that one that comes back finds it."""
    policy: Policy | None = None
    """The moderation rules for this stream; None where there are none."""
    watching: Watching | None = None
    """The classifiers that judge the stream; None where there are none."""
    keep_bytes: int = 0
    """An answer of up to so many bytes is handed out when it is whole, to be told again; 0: none is."""
