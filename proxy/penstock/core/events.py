"""What the model is saying, in nobody's dialect: the events that travel between the steps.

The reader makes `Text`, `ToolDelta`, `Finished` and so on; each step transforms those that it knows and passes
the rest on; the dialects spell what comes out at the end. Slotted and mutable on purpose: one object per
token is made (0.2 us) and the steps fill it in, instead of copying it (0.5 us frozen).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

BlockStatus = Literal["complete", "incomplete"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "cancelled", "error", "other"]
StreamStatus = Literal["completed", "failed", "cancelled", "incomplete"]
ModerationAction = Literal["redact", "halt", "flag"]
Opinion = Literal["pass", "violation", "failed"]
WithheldKind = Literal["marker", "hidden", "stop", "moderation"]
Ext = dict[str, Any]

# JSON's safe integers end here; no engine counts so far.
_MOST_TOKENS = 2**53


class Channel(Enum):
    """Where a piece of text belongs. RAW has not been told apart yet; only the channel step sees it."""

    RAW = "raw"
    REASONING = "reasoning"
    ANSWER = "answer"


@dataclass(slots=True)
class EngineOpened:
    """The engine's first word. `whole` is its answer where it did not stream one.

    `state` is the family's state in which the model begins, where the engine knows what the prompt has opened.
    """

    engine_id: str | None
    model: str | None
    created: int | None
    whole: Ext | None = None
    state: str | None = None


@dataclass(slots=True)
class StreamStarted:
    """The first event of every stream."""

    model: str
    choices: int
    upstream: str
    trace_id: str | None
    engine_id: str | None = None
    created: int | None = None
    whole: Ext | None = None
    resumable_until: int | None = None
    continues: str | None = None
    """The stream whose partial answer this one goes on with."""


@dataclass(slots=True)
class Extra:
    """Fields of the engine that have no place here: they go into `ext` of the next event of that choice.

    `choice` is None for fields that stood beside the choices; `in_delta` tells the choice's delta from the choice.
    """

    choice: int | None
    fields: Ext
    in_delta: bool = False


@dataclass(slots=True)
class Role:
    choice: int
    role: str


@dataclass(slots=True)
class Text:
    """Whole characters of one channel.

    `tokens` is how many tokens it cost, 0 where the engine did not say; `logprobs` the entries that the engine
    gave for them. `added` is text that the model did not write (a placeholder, the marks of inlined reasoning),
    `inlined` the reasoning with its marks, which is shown as answer and counted as reasoning. `section` counts the
    delimited sections of the answer and what stands between them, each a block of its own.
    """

    choice: int
    channel: Channel
    text: str
    tokens: int = 0
    logprobs: list[Any] | None = None
    token_ids: list[int] | None = None
    refusal: bool = False
    added: bool = False
    inlined: bool = False
    block: int = 0
    section: int = 0


@dataclass(slots=True)
class BlockStarted:
    choice: int
    block: int
    channel: Channel


@dataclass(slots=True)
class BlockEnded:
    """`size` is the UTF-8 length of all the block's deltas, `tokens` what they cost."""

    choice: int
    block: int
    channel: Channel
    size: int
    tokens: int
    status: BlockStatus


@dataclass(slots=True)
class ToolDelta:
    """A piece of a call as the engine's own parser cut it: `index` and `call_id` are the engine's."""

    choice: int
    index: int
    call_id: str | None
    name: str | None
    arguments: str
    tokens: int = 0


@dataclass(slots=True)
class ToolMarkup:
    """Raw text between a family's tool markers, still to be read in the family's `syntax`.

    `phase` is "opened" right after the start marker, "text" for what follows, "closed" at the end marker and
    "cut" where the choice ended without one. `name` is set where a header names the tool (Harmony).
    """

    choice: int
    syntax: str
    text: str
    phase: Literal["opened", "text", "closed", "cut"] = "text"
    name: str | None = None
    tokens: int = 0


@dataclass(slots=True)
class ToolStarted:
    """`denied` tells those who must leave a denied call out from its start; the event that says why follows.

    `runs_here` tells that Penstock runs the call itself, so that no client may.
    """

    choice: int
    call_id: str
    index: int
    name: str
    block: int = 0
    denied: bool = False
    runs_here: bool = False


@dataclass(slots=True)
class ToolArguments:
    """A piece of a call's arguments. `added` is text that the model did not write so: JSON made of its XML."""

    choice: int
    call_id: str
    text: str
    tokens: int = 0
    block: int = 0
    added: bool = False


@dataclass(slots=True)
class ToolReady:
    """The signal to execute. `arguments` is the JSON object as text, complete, on one line."""

    choice: int
    call_id: str
    name: str
    arguments: str
    block: int = 0


@dataclass(slots=True)
class ToolEnded:
    choice: int
    call_id: str
    arguments: str
    valid: bool
    problem: str | None
    status: BlockStatus
    block: int = 0


@dataclass(slots=True)
class ToolDenied:
    """Policy says no: the call never becomes ready. `rule` names the rule, `reason` is a sentence for people."""

    choice: int
    call_id: str
    name: str
    rule: str
    reason: str
    block: int = 0


@dataclass(slots=True)
class ToolProgress:
    """Penstock runs the call. `attempt` counts from 1."""

    choice: int
    call_id: str
    name: str
    status: Literal["running", "retrying"]
    attempt: int
    block: int = 0


@dataclass(slots=True)
class ToolResult:
    """What came of a call that Penstock ran. `size` is in UTF-8 bytes; `content` is set where it is shown."""

    choice: int
    call_id: str
    name: str
    ok: bool
    size: int
    duration_ms: int
    problem: str | None = None
    content: str | None = None
    block: int = 0


@dataclass(slots=True)
class Structured:
    """A value that is whole and valid; `value` is its JSON. `section` counts the delimited sections of a choice."""

    choice: int
    value: str
    schema_name: str | None = None
    section: int | None = None


@dataclass(slots=True)
class Annotation:
    """A note beside the text: a citation found in it, or what a backend adds.

    `inline` is one that was found in the text; it gets its anchor where its block is known. `length` is that of the
    marker, where it was left in the text.
    """

    kind: str
    data: Ext
    choice: int | None = None
    anchor: Ext | None = None
    inline: bool = False
    length: int = 0


@dataclass(slots=True)
class Withheld:
    """Generated, but not for the client: a marker, hidden reasoning, a stop string. Counted, never sent."""

    choice: int
    kind: WithheldKind
    text: str
    tokens: int = 0


@dataclass(slots=True)
class Moderated:
    """A rule did something to the text of a block; it comes right behind the text that it concerns.

    `length` characters of what was shown are concerned (the placeholder, the flagged text, none at a halt). They
    begin `back` characters before the end of what was shown so far; the blocks turn that into `offset`.
    """

    action: ModerationAction
    rule: str
    category: str
    choice: int
    back: int
    length: int
    call_id: str | None = None
    block: int | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Intervention:
    """What a rule did, for the audit. `text` is what it matched, as the model wrote it.

    `start` is where that begins in its lane, in characters that the model wrote; `tokens` how many tokens the lane
    had cost until then.
    """

    rule: str
    action: str
    category: str
    choice: int
    channel: str
    start: int
    tokens: int
    text: str


@dataclass(slots=True)
class Finished:
    """One choice ended. The reader knows `raw_reason` and `stop_reason`; the rest is filled in on the way.

    `calls_in_text` tells that tool calls were read from the text, so that the engine's own reason ignores them.
    """

    choice: int
    raw_reason: str | None
    stop_reason: str | int | None = None
    tokens: int = 0
    logprobs: list[Any] | None = None
    token_ids: list[int] | None = None
    reason: FinishReason = "other"
    cause: str | None = None
    calls_in_text: bool = False


@dataclass(slots=True)
class EngineUsage:
    """The engine's own count. `final` is False for the running count that comes with each chunk."""

    fields: Ext
    final: bool


@dataclass(slots=True)
class Usage:
    """Cumulative counts of one stream. Tokens as the engine counts them, sizes in UTF-8 bytes."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    tool_tokens: int
    delivered_tokens: int
    wasted_tokens_after_cancel: int
    estimated: bool
    sizes: dict[str, int]
    final: bool
    engine_fields: Ext | None = None


@dataclass(slots=True)
class Warned:
    code: str
    detail: str


@dataclass(slots=True)
class Failed:
    """The stream's one fatal error, as it is told to the client.

    `status` is for answers that are not streams, `engine_body` the engine's own words where it has said any. `quote` is
    the beginning of a chunk that could not be read, which may hold text of the answer.
    """

    code: str
    message: str
    retryable: bool
    origin: str
    engine_body: Ext | None = None
    status: int = 502
    quote: str = ""


@dataclass(slots=True)
class EngineDone:
    """The engine said that nothing more will come."""


@dataclass(slots=True)
class StreamEnded:
    status: StreamStatus
    finish_reasons: list[str]
    events: int
    duration_ms: int
    ttft_ms: int | None


Event = (
    EngineOpened
    | StreamStarted
    | Extra
    | Role
    | Text
    | BlockStarted
    | BlockEnded
    | ToolDelta
    | ToolMarkup
    | ToolStarted
    | ToolArguments
    | ToolReady
    | ToolEnded
    | ToolDenied
    | ToolProgress
    | ToolResult
    | Structured
    | Annotation
    | Withheld
    | Moderated
    | Finished
    | EngineUsage
    | Usage
    | Warned
    | Failed
    | EngineDone
    | StreamEnded
)


ClientEvent = (
    StreamStarted
    | Role
    | Text
    | BlockStarted
    | BlockEnded
    | ToolStarted
    | ToolArguments
    | ToolReady
    | ToolEnded
    | ToolDenied
    | ToolProgress
    | ToolResult
    | Structured
    | Annotation
    | Usage
    | Moderated
    | Finished
    | Warned
    | Failed
    | StreamEnded
)
"""What a dialect has to spell: everything that is left behind the last step."""


def utf8_size(text: str) -> int:
    """Bytes of `text` in UTF-8; ASCII, the usual case, is not encoded to find out (0.05 against 0.2 us)."""
    return len(text) if text.isascii() else len(text.encode())


def token_count(value: Any) -> int | None:
    """A count as an engine may send it, or None where it is no number of tokens at all."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None
