"""What each stream cost, written down once it is over: lines of JSON, OTLP logs, a stream in Redis.

Every sink has a queue of its own and is tried again until it takes what waits, so that one that is gone delays neither
answers nor the other sinks. A record may come twice after a failure; `stream_id` is unique.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider

from penstock import __version__
from penstock.access_settings import UsageFile, UsageSettings
from penstock.core.commands import RecordUsage
from penstock.core.events import Usage
from penstock.settings import SettingsError
from penstock.shell.telemetry import StreamTrace, context_of

_log = logging.getLogger("penstock")

# Records that wait for one sink; past it the oldest goes to the log instead.
_MOST_WAITING = 10_000
_MOST_AT_ONCE = 500
_PAUSE_SECONDS = 1.0
_LAST_PAUSES = (0.1, 0.4, 1.0, 2.0)  # between the last tries, when Penstock stops

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


class Sink(Protocol):
    async def write(self, records: Sequence[Any]) -> None:
        """All of them or, where it raises, none."""

    async def close(self) -> None: ...


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


class Line:
    """What waits for one sink: records that are data classes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._waiting: deque[Any] = deque()
        self._has_work = asyncio.Event()
        self._is_closing = False
        self._loop = asyncio.get_running_loop()

    def add(self, record: Any) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._give_up(self._waiting.popleft())
        self._waiting.append(record)
        self._has_work.set()

    async def keep_up(self) -> None:
        while not self._is_closing:
            await self._has_work.wait()
            if not await self._write() and not self._is_closing:
                self._loop.call_later(_PAUSE_SECONDS, self._has_work.set)
        for pause in _LAST_PAUSES:
            if await self._write():
                break
            await asyncio.sleep(pause)
        while self._waiting:
            self._give_up(self._waiting.popleft())
        await self._sink.close()

    def close(self) -> None:
        self._is_closing = True
        self._has_work.set()

    async def _write(self) -> bool:
        """True where nothing waits any more."""
        self._has_work.clear()
        while self._waiting:
            batch = [self._waiting[n] for n in range(min(len(self._waiting), _MOST_AT_ONCE))]
            try:
                await self._sink.write(batch)
            except Exception as error:  # whatever a full disk or a store that is gone may raise
                _log.error("records wait, %d of them: %s: %s", len(self._waiting), type(error).__name__, error)
                return False
            for record in batch:  # the front may have been given up meanwhile
                if self._waiting and self._waiting[0] is record:
                    self._waiting.popleft()
        return True

    @staticmethod
    def _give_up(record: Any) -> None:
        _log.error("a record could not be written: %s", line_of(record).decode().rstrip())


def line_of(record: Any) -> bytes:
    """Its fields as JSON; an audit entry leaves out those that it does not have."""
    values = asdict(record)
    if not isinstance(record, UsageRecord):
        values = {name: value for name, value in values.items() if value is not None}
    return orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)


# --- The sinks ----------------------------------------------------------------------------------------


class FileSink:
    """Lines of JSON. The file is opened for every write, so that one that was moved away is simply begun anew."""

    def __init__(self, settings: UsageFile) -> None:
        self._settings = settings

    @classmethod
    def checked(cls, settings: UsageFile, key: str = "usage.file.path") -> "FileSink":
        """Raises `SettingsError` where the file cannot be written. Blocks."""
        sink = cls(settings)
        try:
            sink.append(b"")
        except OSError as error:
            remedy = "give a file in a folder that Penstock may write to"
            raise SettingsError(f"{key}: {settings.path}: {error.strerror}; {remedy}") from None
        return sink

    async def write(self, records: Sequence[Any]) -> None:
        await asyncio.to_thread(self.append, b"".join(map(line_of, records)))

    async def close(self) -> None: ...

    def append(self, data: bytes) -> None:
        """All of it or, where it raises, nothing: half a line would spoil the next one too."""
        path, most = self._settings.path, self._settings.rotate_bytes
        if most and path.exists() and path.stat().st_size + len(data) > most and path.stat().st_size:
            self.rotate()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            before = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def rotate(self) -> None:
        path = self._settings.path
        for number in range(self._settings.keep - 1, 0, -1):
            older = _numbered(path, number)
            if older.exists():
                older.replace(_numbered(path, number + 1))
        path.replace(_numbered(path, 1))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


class RedisSink:
    """Entries of a stream, each with the record as JSON in `record`; the oldest go when there are too many."""

    def __init__(self, client: Any, key: str, most: int) -> None:
        self._client = client
        self._key = key
        self._most = most

    async def write(self, records: Sequence[UsageRecord]) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            for record in records:
                fields = {"stream_id": record.stream_id, "record": line_of(record).rstrip()}
                pipeline.xadd(self._key, fields, maxlen=self._most, approximate=True)
            await pipeline.execute()

    async def close(self) -> None:
        await self._client.aclose()


class OtlpSink:
    """Log records with the trace's ids, by OpenTelemetry's own batches: its queue is bounded and drops by itself."""

    def __init__(self, provider: LoggerProvider) -> None:
        self._provider = provider
        self._logger = provider.get_logger("penstock", __version__)

    async def write(self, records: Sequence[UsageRecord]) -> None:
        for record in records:
            values = asdict(record)
            context = context_of(values.pop("trace_id"), values.pop("span_id"))
            ended = int(datetime.fromisoformat(values.pop("time")).timestamp() * 1e9)
            self._logger.emit(
                LogRecord(
                    timestamp=ended,
                    observed_timestamp=ended,
                    context=context,
                    severity_number=SeverityNumber.INFO,
                    event_name="penstock.usage",
                    body="a stream ended",
                    attributes={f"penstock.usage.{name}": value for name, value in values.items() if value is not None},
                )
            )

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)
