"""Every row of docs/explanation/endings.md, driven and compared: the page is the specification of how streams end."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from penstock.core.commands import AbortEngine, Ending, OpenClient, RecordUsage, Respond
from penstock.core.dialects import Form
from penstock.core.errors import EngineError, LimitReached
from penstock.core.lost import close_lost, replica_lost
from penstock.core.pacing import SlowClient
from penstock.core.signals import (
    Broke,
    Cancelled,
    ClientBacklog,
    ClientLeft,
    ClockTicked,
    Draining,
    EngineAnswered,
    EngineClosed,
    EngineRefused,
    NoEngineLeft,
    StoreLost,
    TakenOver,
    VerdictReached,
)
from penstock.core.verdicts import Watch, Watching
from penstock.core.verifier import verify
from penstock.shell.telemetry import Telemetry
from support.chunks import DONE, content, error, final_usage, finish, frame, role, tool, whole
from support.moderating import policy
from support.playbook import EPOCH_MS, STARTED, STREAM_ID, Outcome, Step, ask, parse_events, play

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "endings.md"
NOW = STARTED + 0.5
LATER = STARTED + 1000.0
HELLO: Sequence[Step] = (role(), content("Hello ", tokens=1))
HEAD_SENT: Sequence[Step] = (ClockTicked(STARTED + 1.0),)
ENGINES_STATUS = 418

Row = dict[str, str]
Key = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """How to bring an ending about: `last` after `before`; `unstreamed` where the engine was not asked to stream."""

    last: Sequence[Step]
    unstreamed: Sequence[Step] | None = None
    before: Sequence[Step] = HELLO
    body: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, Any] = field(default_factory=dict)


def ended(reason: str) -> Case:
    """The engine says so itself, with a finish, its total and the end mark."""
    answered = EngineAnswered(whole({"content": "Hello "}, finish_reason=reason), NOW)
    return Case([finish(reason, tokens=2), final_usage(2), DONE], [answered])


def told(*signals: Step, **more: Any) -> Case:
    """A signal from outside the engine's answer, the same for every kind of answer."""
    return Case(signals, signals, **more)


def closed(problem: Any, **more: Any) -> Case:
    return told(EngineClosed(problem, NOW), **more)


CASES: dict[Key, Case] = {
    ("completed", "the engine finished"): ended("stop"),
    ("completed", "a choice reached its length"): ended("length"),
    ("completed", "`penstock.stop` was found in every choice"): Case(
        [content("STOP", tokens=2)],
        [EngineAnswered(whole({"content": "Hello STOP"}), NOW)],
        body={"penstock": {"stop": ["STOP"]}},
    ),
    ("completed", "the engine closed without `[DONE]`"): Case(
        [finish(tokens=2), final_usage(2), EngineClosed(None, NOW)]
    ),
    ("cancelled", "`DELETE`"): told(Cancelled(NOW)),
    ("client_gone", "the client closed its connection"): told(ClientLeft(NOW)),
    ("cap_reached", "`limits.stream_bytes`"): Case(
        [content("x" * 2048, tokens=2)],
        [EngineClosed(LimitReached("stream_bytes_limit", "too large"), NOW)],
        bounds={"stream_bytes": 2048},
    ),
    ("cap_reached", "`limits.tool_call_bytes`"): Case(
        [tool(name="f", call_id="c", arguments="{" + " " * 2048, tokens=2)], bounds={"tool_call_bytes": 2048}
    ),
    ("client_too_slow", "`limits.buffer_bytes`"): Case(
        [ClientBacklog(2**17, NOW)], bounds={"slow_client": SlowClient(frozenset(), 2**16, 30.0)}
    ),
    ("client_too_slow", "`slow_client.stall_seconds`"): Case([ClientBacklog(2**19, NOW), ClockTicked(NOW + 30.0)]),
    ("time_limit", "`limits.stream_seconds`"): told(ClockTicked(LATER)),
    ("refused", "the engine answered with an error status"): told(
        EngineRefused(ENGINES_STATUS, b'{"error": {"message": "no"}}', NOW), before=HEAD_SENT
    ),
    ("engine_error", "the engine sent an error frame"): Case(
        [error(code=ENGINES_STATUS)],
        [EngineAnswered(json.dumps({"error": {"message": "no", "code": ENGINES_STATUS}}).encode(), NOW)],
    ),
    ("engine_error", "finish reason `error`"): ended("error"),
    ("engine_error", "finish reason `abort`"): ended("abort"),
    ("engine_error", "a chunk that is not JSON"): Case([b"data: nonsense\n\n"], [EngineAnswered(b"nonsense", NOW)]),
    ("engine_error", "a line over `limits.line_bytes`"): Case([frame("x" * 4096)], bounds={"line_bytes": 2048}),
    ("engine_error", "`[DONE]` before every choice finished"): Case([DONE], [EngineAnswered(whole(), NOW)]),
    ("engine_gone", "the engine closed before every choice finished"): Case([EngineClosed(None, NOW)]),
    ("engine_gone", "the connection broke"): closed(EngineError("engine_gone", "broke")),
    ("engine_gone", "no connection"): closed(EngineError("engine_unreachable", "no way"), before=HEAD_SENT),
    ("engine_gone", "no engine to choose"): told(
        NoEngineLeft(EngineError("no_engine", "none", status=503), NOW), before=HEAD_SENT
    ),
    ("engine_gone", "silent, and its health check fails"): closed(EngineError("engine_stalled", "silent", status=504)),
    ("halted", "a classifier fails, and its policy is `closed`"): Case(
        [content("STOP", tokens=2), VerdictReached(1, 0, "failed", "", NOW)],
        [EngineAnswered(whole({"content": "Hello STOP"}), NOW), VerdictReached(1, 0, "failed", "", NOW)],
        bounds={"watching": Watching((Watch("guard", False, False, frozenset({"answer"})),), 4, 0, 1.0, 99)},
    ),
    ("halted", "a rule halts"): Case(
        [content("STOP", tokens=2)],
        [EngineAnswered(whole({"content": "Hello STOP"}), NOW)],
        bounds={"policy": policy({"id": "no", "literal": "STOP", "action": "halt"})},
    ),
    ("draining", "the drain time is over"): told(Draining(NOW)),
    ("store_lost", "Redis is gone, and `store.on_failure` is `end`"): told(StoreLost(True, NOW)),
    ("taken_over", "another replica took this one for dead"): told(TakenOver(NOW)),
    ("our_bug", "Penstock failed"): told(Broke(NOW)),
}
# Not ended by its exchange, which died.
LOST = ("replica_lost", "the replica died, and another one ends its stream")


def table(heading: str) -> dict[Key, Row]:
    """The rows under a heading, by ending and what happened; a dash is an empty cell."""
    section = PAGE.read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = [dict(zip(names, cells, strict=True)) for cells in rows]
    return {(row["ending"].strip("`"), row["what happened"]): {k: bare(v) for k, v in row.items()} for row in found}


def bare(cell: str) -> str:
    return "" if cell == "–" else re.sub(r"^`([^`]*)`$", r"\1", cell)


SAID = table("What a stream says")
STATUSES = table("Where nothing was sent yet")


def test_every_ending_has_its_rows() -> None:
    assert {ending for ending, _ in SAID} == {ending.value for ending in Ending}
    assert SAID.keys() == STATUSES.keys() == CASES.keys() | {LOST}


def run(case: Case, dialect: Any, steps: Sequence[Step]) -> Outcome:
    return play(ask(**case.body), steps, dialect=dialect, **case.bounds)


def test_what_is_said_of_a_stream_whose_replica_died() -> None:
    row, status = SAID[LOST], STATUSES[LOST]
    before = play(ask(), HELLO).data
    closing = close_lost(before.splitlines()[1:], Form.NDJSON, "NativeNdjson", STREAM_ID, 4, EPOCH_MS)
    events = parse_events(before + closing.data)
    assert verify(events) == []
    assert [event["code"] for event in events if event["type"] == "error"] == [row["`error`"]]
    assert [event["reason"] for event in events if event["type"] == "finish"] == [row["`finish`"]]
    assert events[-1]["status"] == row["`stream.end`"]
    assert closing.record.ending.value == LOST[0]
    assert closing.record.usage.estimated is (row["bill"] == "estimated")
    assert span_status(closing.record) == row["span"]
    assert {str(replica_lost().status)} == {status["stream"], status["folded"], status["unstreamed chat"]}
    chunks = close_lost([], Form.FOREIGN, "ChatStream", STREAM_ID, 4, EPOCH_MS)
    error, end = chunks.data.split(b"\n\n")[:2]
    assert b'"code":"replica_lost"' in error
    assert end == b"data: [DONE]"


@pytest.mark.parametrize("key", CASES, ids=str)
def test_what_a_stream_says(key: Key) -> None:
    case, row = CASES[key], SAID[key]
    outcome = run(case, "ndjson", [*case.before, *case.last])
    events = outcome.events if outcome.events and outcome.events[-1]["type"] == "stream.end" else []
    assert outcome.record.ending.value == key[0]
    assert "".join(event["code"] for event in events if event["type"] == "error") == row["`error`"]
    assert "".join(event["status"] for event in events[-1:]) == row["`stream.end`"]
    assert "".join(event["reason"] for event in events if event["type"] == "finish") == row["`finish`"]
    assert outcome.count(AbortEngine) == (row["abort"] == "yes")
    assert outcome.record.usage.estimated is (row["bill"] == "estimated")
    assert span_status(outcome.record) == row["span"]


@pytest.mark.parametrize("key", CASES, ids=str)
def test_what_a_chat_client_sees_last(key: Key) -> None:
    case = CASES[key]
    chunks = run(case, "chat", [*case.before, *case.last]).chat_chunks()
    if SAID[key]["chat ends with"] == "nothing":
        assert "[DONE]" not in chunks
        return
    *_, last, end = chunks
    assert isinstance(last, dict)
    assert end == "[DONE]"
    assert SAID[key]["chat ends with"] == ("error" if "error" in last else "finish")
    assert "error" in last or last["choices"][0]["finish_reason"] == SAID[key]["`finish`"]


@pytest.mark.parametrize("key", CASES, ids=str)
def test_where_nothing_was_sent_yet(key: Key) -> None:
    case, row = CASES[key], STATUSES[key]
    assert status_of(run(case, "ndjson", case.last)) == row["stream"]
    assert status_of(run(case, "folded", [*case.before, *case.last])) == row["folded"]
    if case.unstreamed is None:
        assert row["unstreamed chat"] == ""
    else:
        assert status_of(run(case, "chat_whole", case.unstreamed)) == row["unstreamed chat"]


def status_of(outcome: Outcome) -> str:
    """The HTTP status that the client gets, as the page writes it."""
    for command in outcome.commands:
        if isinstance(command, OpenClient):
            return "200"
        if isinstance(command, Respond):
            return "the engine's" if command.status == ENGINES_STATUS else str(command.status)
    return ""


def span_status(record: RecordUsage) -> str:
    """The status of the spans that tell of this ending; both have the same."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace = Telemetry(provider).begin({}, "/v1/streams", "st_1")
    trace.finish(record)
    [span] = exporter.get_finished_spans()
    provider.shutdown()
    return "error" if span.status.status_code is StatusCode.ERROR else "ok"
