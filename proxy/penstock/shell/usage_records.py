"""What each stream cost, written down once it is over. A record may come twice; `stream_id` is unique."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry._logs import SeverityNumber

from penstock.access_settings import UsageSettings
from penstock.core.commands import RecordUsage
from penstock.core.events import Usage
from penstock.shell.sinks import Line, Sink
from penstock.shell.telemetry import StreamTrace

_log = logging.getLogger("penstock")

Bill = Literal["generated", "delivered"]


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One stream's bill. `time` is when it ended; `trace_id` and `stream_id` are those of its spans and its answer."""

    time: str
    stream_id: str
    trace_id: str | None
    span_id: str | None
    principal: str
    route: str
    upstream: str
    model: str | None
    ending: str
    error: str | None
    bill: Bill
    billed_tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    tool_tokens: int
    delivered_tokens: int
    wasted_tokens_after_cancel: int
    estimated: bool
    ttft_seconds: float | None
    duration_seconds: float

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def billed_tokens(usage: Usage, bill: Bill) -> int:
    """The prompt, and of the answer what was generated or what was sent."""
    return usage.prompt_tokens + (usage.completion_tokens if bill == "generated" else usage.delivered_tokens)


def usage_record(ended: RecordUsage, bill: Bill, *, stream_id: str, trace: StreamTrace, principal: str) -> UsageRecord:
    usage = ended.usage
    return UsageRecord(
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        stream_id=stream_id,
        trace_id=trace.trace_id,
        span_id=trace.span_id,
        principal=principal,
        route=trace.route,
        upstream=ended.upstream,
        model=ended.model,
        ending=ended.ending.value,
        error=ended.error_code,
        bill=bill,
        billed_tokens=billed_tokens(usage, bill),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        answer_tokens=usage.answer_tokens,
        tool_tokens=usage.tool_tokens,
        delivered_tokens=usage.delivered_tokens,
        wasted_tokens_after_cancel=usage.wasted_tokens_after_cancel,
        estimated=usage.estimated,
        ttft_seconds=None if ended.ttft_seconds is None else round(ended.ttft_seconds, 6),
        duration_seconds=round(ended.duration_seconds, 6),
    )


class UsageRecords:
    """Hands every record to every sink."""

    def __init__(self, settings: UsageSettings, sinks: Sequence[Sink]) -> None:
        self.bill: Bill = settings.bill
        self._lines = [Line(sink) for sink in sinks]

    def add(self, record: UsageRecord) -> None:
        for line in self._lines:
            line.add(record)

    async def keep_up(self) -> None:
        """Writes what comes; returns once `close` was called and what waited is written or given to the log."""
        async with asyncio.TaskGroup() as group:
            for line in self._lines:
                group.create_task(line.keep_up())

    def close(self) -> None:
        for line in self._lines:
            line.close()


def says_of_usage(_record: UsageRecord) -> tuple[str, SeverityNumber]:
    """The body of an OTLP log, and how grave it is."""
    return "a stream ended", SeverityNumber.INFO
