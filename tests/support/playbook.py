"""Plays a transcript to an exchange, so that a test reads as what the engine said and what the client got.

    outcome = play({}, [role(), content("Hi"), finish(), DONE])
    assert outcome.blocks() == ["text: Hi"]

Whatever is played, the promises that hold for every stream are checked on the way: the commands end with one
`Close`, there is one bill, what the model wrote is accounted for to the byte, and the event log is verified.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from penstock.core import sse
from penstock.core.channels import ReasoningPolicy
from penstock.core.citations import CitationPattern
from penstock.core.commands import (
    AbortEngine,
    Close,
    Command,
    OpenClient,
    RecordUsage,
    Respond,
    SendToClient,
    TryAnotherEngine,
    WakeAt,
)
from penstock.core.dialects import Dialect
from penstock.core.dialects.native import NativeFolded, NativeNdjson, NativeSse
from penstock.core.dialects.openai_chat import ChatStream, ChatWhole
from penstock.core.dialects.tool_release import ReleasedCalls
from penstock.core.errors import EngineError
from penstock.core.events import Usage
from penstock.core.exchange import Exchange
from penstock.core.families import FAMILIES, Family, State, choose_family, thinking_family
from penstock.core.pacing import SlowClient
from penstock.core.request import StreamRequest, read_request
from penstock.core.rules import Policy
from penstock.core.setting import Bounds, Setting
from penstock.core.signals import ClientLeft, EngineChosen, EngineSpoke, NoEngineLeft, Signal, TakenOver
from penstock.core.tool_policy import ToolRule
from penstock.core.verdicts import Watching
from penstock.core.verifier import Verifier, verify
from penstock.core.wishes import ToolRelease
from support.chunks import MODEL

Json = dict[str, Any]
Step = bytes | Signal
DialectName = Literal["ndjson", "sse", "folded", "chat", "chat_whole"]

STREAM_ID = "st_00112233445566778899aabbccddeeff"
STARTED = 100.0
EPOCH_MS = 1_000_000
PATIENT = SlowClient(frozenset({"merge", "shed", "pause", "cut"}), buffer_bytes=1 << 20, stall_seconds=30.0)
GENEROUS = Bounds(
    line_bytes=1 << 20,
    tool_call_bytes=1 << 24,
    stream_bytes=1 << 24,
    slow_client=PATIENT,
    stream_seconds=600.0,
    first_byte_seconds=1.0,
    heartbeat_seconds=15.0,
    engine_silence_seconds=30.0,
)
# Two families that a deployment might add: one with its own markers, one that does not think.
CUSTOM = Family(
    "custom",
    ("custom*",),
    start="before",
    start_without_thinking="answer",
    states={
        "before": State("answer", {"§§": "thought", "§!": "call"}, otherwise="answer"),
        "thought": State("reasoning", {"§§": "before"}),
        "answer": State("answer", {"§!": "call"}),
        "call": State("tool", {"§!": "before"}, syntax="hermes"),
    },
)
BARE = thinking_family("bare", ("bare*",), reasoning=None)
ALL_FAMILIES: tuple[Family, ...] = (*FAMILIES[:-1], CUSTOM, BARE, FAMILIES[-1])
FAMILY_NAMES = [family.name for family in ALL_FAMILIES]
_WITHHELD = ("marker", "hidden", "stop", "moderation")


@dataclass
class Outcome:
    """What came of a transcript. `events` is the log of the native streaming dialects, empty for the others."""

    exchange: Exchange
    commands: list[Command] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)

    def only(self, kind: type[Command]) -> Any:
        """The one command of this kind."""
        found = [command for command in self.commands if isinstance(command, kind)]
        assert len(found) == 1, f"{len(found)} commands {kind.__name__}"
        return found[0]

    def count(self, kind: type[Command]) -> int:
        return sum(isinstance(command, kind) for command in self.commands)

    @property
    def data(self) -> bytes:
        """Every byte of the streamed answer."""
        return b"".join(c.data for c in self.commands if isinstance(c, OpenClient | SendToClient))

    @property
    def record(self) -> RecordUsage:
        record: RecordUsage = self.only(RecordUsage)
        return record

    @property
    def body(self) -> Any:
        """The body of the answer that was not streamed, as JSON."""
        return json.loads(self.only(Respond).body)

    def types(self) -> list[str]:
        """The event types in order, a run of the same delta told once, however many pieces it came in."""
        places = [(event["type"], event.get("choice"), event.get("block")) for event in self.events]
        return [new[0] for old, new in pairwise([("", None, None), *places]) if old != new or not _is_delta(new[0])]

    def all_of(self, name: str) -> list[Json]:
        return [event for event in self.events if event["type"] == name]

    def one(self, name: str) -> Json:
        found = self.all_of(name)
        assert len(found) == 1, f"{len(found)} events {name}: {found}"
        return found[0]

    def blocks(self, choice: int = 0) -> list[str]:
        """The blocks of a choice in order, as `kind: everything in it`."""
        return [f"{kind}: {text}" for (of, _, kind, text) in self.contents() if of == choice]

    def contents(self) -> list[tuple[int, int, str, str]]:
        """Every block as (choice, block, kind, its deltas joined); a call's text is `name(arguments)`."""
        kinds: dict[tuple[int, int], str] = {}
        texts: dict[tuple[int, int], list[str]] = {}
        for event in self.events:
            if "block" not in event:
                continue
            place = (event["choice"], event["block"])
            if event["type"].endswith(".start"):
                kinds[place] = event["type"].removesuffix(".start")
                texts[place] = [event["name"], "("] if "name" in event else []
            elif _is_delta(event["type"]):
                texts[place].append(event["text"])
            elif event["type"] == "tool_call.end":
                texts[place].append(")")
        return [(*place, kinds[place], "".join(texts[place])) for place in sorted(kinds)]

    def finishes(self) -> dict[int, Json]:
        """What each choice's finish said, without the envelope."""
        return {event["choice"]: _bare(event) for event in self.all_of("finish")}

    def usage(self) -> Json:
        """The final usage event without the envelope."""
        return next(_bare(event) for event in reversed(self.events) if event["type"] == "usage" and event["final"])

    def chat_chunks(self) -> list[Json | str]:
        """The `data:` of each event of the OpenAI dialect, parsed; the end mark stays text."""
        frames = sse.Parser(1 << 24).feed(self.data)
        return [json.loads(f.data) if f.data != b"[DONE]" else "[DONE]" for f in frames]


def ask(**changes: Any) -> Json:
    """A request body; a tool is given by its name alone."""
    tools = [{"type": "function", "function": {"name": name}} for name in changes.pop("tools", ())]
    return {"model": MODEL, "messages": [], **({"tools": tools} if tools else {}), **changes}


def open_exchange(
    body: Json | None = None,
    *,
    dialect: DialectName = "ndjson",
    family: Family | str | None = None,
    reasoning: ReasoningPolicy | None = None,
    bounds: Bounds = GENEROUS,
    is_logged: bool = True,
    outlives_client: bool = False,
    policy: Policy | None = None,
    tool_rules: Sequence[ToolRule] = (),
    citations: Sequence[CitationPattern] = (),
    release: ToolRelease | None = None,
    watching: Watching | None = None,
    keep_bytes: int = 0,
    **changed_bounds: Any,
) -> Exchange:
    """An exchange as the shell would make it; `family` is one of its own, or the name of a known one."""
    request = read_request(json.dumps(body or ask()).encode(), streams=dialect != "chat_whole")
    named = family or request.family
    chosen = named if isinstance(named, Family) else choose_family(ALL_FAMILIES, request.model, named)
    assert chosen is not None
    reasoning_policy = reasoning or request.reasoning or "separate"
    changed = replace(bounds, **changed_bounds)
    setting = Setting(
        STREAM_ID,
        "vllm",
        None,
        chosen,
        reasoning_policy,
        changed,
        STARTED,
        EPOCH_MS,
        is_logged=is_logged,
        outlives_client=outlives_client,
        policy=policy,
        tool_rules=tool_rules,
        citations=citations,
        watching=watching,
        keep_bytes=keep_bytes,
    )
    spell = spelling(dialect, request)
    return Exchange(request, setting, lambda usage: ReleasedCalls(spell(usage), release) if release else spell(usage))


def spelling(dialect: DialectName, request: StreamRequest) -> Callable[[Callable[[int], tuple[int, int]]], Dialect]:
    def spell(running_usage: Callable[[int], tuple[int, int]]) -> Dialect:
        match dialect:
            case "ndjson":
                return NativeNdjson(STREAM_ID)
            case "sse":
                return NativeSse(STREAM_ID)
            case "folded":
                return NativeFolded(STREAM_ID)
            case "chat":
                return ChatStream(request, running_usage)
            case "chat_whole":
                return ChatWhole()

    return spell


def play(body: Json | None, steps: Iterable[Step], *, cuts: Sequence[int] | None = None, **setting: Any) -> Outcome:
    """Plays the steps. Bytes are read by the engine connection, each step in one read at the time of the last signal.

    With `cuts` the bytes that follow each other are joined and cut again at these positions. `setting` is that of
    `open_exchange`. There is one engine: where another is wanted and no `EngineChosen` comes next, there is none.
    """
    outcome = Outcome(open_exchange(body, **setting))
    outcome.commands += outcome.exchange.start()
    now = STARTED
    left = False
    played = recut(list(steps), cuts) if cuts is not None else list(steps)
    for step, following in zip(played, [*played[1:], None], strict=True):
        signal = EngineSpoke(step, now) if isinstance(step, bytes) else step
        now = signal.now
        left |= isinstance(signal, ClientLeft | TakenOver) and not outcome.exchange.is_over
        outcome.commands += tell(outcome.exchange, signal, following)
    if setting.get("dialect", "ndjson") in ("ndjson", "sse"):
        outcome.events = parse_events(outcome.data)
    check(outcome, client_left=left)
    return outcome


def tell(exchange: Exchange, signal: Signal, following: object = None) -> list[Command]:
    """Tells it, and that there is no other engine if it wants one and `following` is not that one."""
    commands = exchange.receive(signal)
    if commands and isinstance(commands[-1], TryAnotherEngine) and not isinstance(following, EngineChosen):
        commands = commands + exchange.receive(NoEngineLeft(EngineError("no_engine", "there is one only"), signal.now))
    return commands


def recut(steps: list[Step], cuts: Sequence[int]) -> list[Step]:
    """The same steps with each run of bytes joined and cut at these positions."""
    run, out = b"", list[Step]()
    for step in [*steps, None]:
        if isinstance(step, bytes):
            run += step
            continue
        edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(run)}), len(run)]
        out += [run[start:end] for start, end in pairwise(edges) if run]
        run = b""
        if step is not None:
            out.append(step)
    return out


def parse_events(data: bytes) -> list[Json]:
    """The events of both native spellings, heartbeats left out."""
    if data.startswith((b":", b"event")):
        return [json.loads(frame.data) for frame in sse.Parser(1 << 26).feed(data)]
    return [json.loads(line) for line in data.split(b"\n") if line]


def check(outcome: Outcome, *, client_left: bool) -> None:
    """The promises that hold whatever was played."""
    commands = outcome.commands
    is_over = outcome.exchange.is_over
    assert outcome.count(Close) == outcome.count(RecordUsage) == int(is_over)
    assert outcome.count(OpenClient) + outcome.count(Respond) <= 1
    assert outcome.count(AbortEngine) <= 1
    if is_over:
        assert isinstance(commands[-1], Close)
        _check_bill(outcome.record, outcome.events)
        assert client_left or outcome.count(OpenClient) + outcome.count(Respond) == 1
    else:
        assert any(isinstance(command, WakeAt) for command in commands)
    if outcome.events and is_over and not client_left:
        assert verify(outcome.events) == []
    else:
        verifier = Verifier()
        assert [problem for event in outcome.events for problem in verifier.feed(event)] == []


def _check_bill(record: RecordUsage, events: list[Json]) -> None:
    sizes = record.usage.sizes
    accounted = sizes["delivered"] + sum(sizes[kind] for kind in _WITHHELD) + record.unsent_bytes
    assert sizes["generated"] + sizes["added"] == accounted, (sizes, record.unsent_bytes)
    if events:
        sent = sum(len(event["text"].encode()) for event in events if _is_delta(event["type"]))
        assert sizes["delivered"] == sent
    assert record.usage.final
    assert record.duration_seconds >= 0
    _check_counts(record.usage)


def _check_counts(usage: Usage) -> None:
    told = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.delivered_tokens)
    assert min(told) >= 0
    assert usage.delivered_tokens <= usage.completion_tokens


def _is_delta(name: str) -> bool:
    return name in ("delta.text", "delta.reasoning", "tool_call.arguments_chunk")


def _bare(event: Json) -> Json:
    return {name: value for name, value in event.items() if name not in ("type", "stream_id", "seq", "ts")}
