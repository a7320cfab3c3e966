"""Where records go once they are written down: lines of JSON, OTLP logs, a stream in Redis.

Every sink has a queue of its own and is tried again until it takes what waits, so that one that is gone delays neither
answers nor the other sinks. A record may come twice after a failure.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import orjson
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider

from penstock import __version__
from penstock.access_settings import UsageFile
from penstock.settings import SettingsError
from penstock.shell.telemetry import context_of

_log = logging.getLogger("penstock")

# Records that wait for one sink; past it the oldest goes to the log instead.
_MOST_WAITING = 10_000
_MOST_AT_ONCE = 500
_PAUSE_SECONDS = 1.0
_LAST_PAUSES = (0.1, 0.4, 1.0, 2.0)  # between the last tries, when Penstock stops


class Record(Protocol):
    """What is written: with `time` (ISO 8601), `stream_id`, and the ids of its trace and span where it has them."""

    def fields(self) -> dict[str, Any]: ...


class Sink(Protocol):
    async def write(self, records: Sequence[Record]) -> None:
        """All of them or, where it raises, none."""

    async def close(self) -> None: ...


class Line:
    """What waits for one sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._waiting: deque[Record] = deque()
        self._has_work = asyncio.Event()
        self._is_closing = False
        self._loop = asyncio.get_running_loop()

    def add(self, record: Record) -> None:
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
    def _give_up(record: Record) -> None:
        _log.error("a record could not be written: %s", line_of(record).decode().rstrip())


def line_of(record: Record) -> bytes:
    """Its fields as JSON."""
    return orjson.dumps(record.fields(), option=orjson.OPT_APPEND_NEWLINE)


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

    async def write(self, records: Sequence[Record]) -> None:
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

    async def write(self, records: Sequence[Record]) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            for record in records:
                fields = {"stream_id": record.fields()["stream_id"], "record": line_of(record).rstrip()}
                pipeline.xadd(self._key, fields, maxlen=self._most, approximate=True)
            await pipeline.execute()

    async def close(self) -> None:
        await self._client.aclose()


class OtlpSink:
    """Log records with the trace's ids, by OpenTelemetry's own batches: its queue is bounded and drops by itself.

    `event` names them and their attributes. `says` is a record's body and how grave it is; `hides` are fields that do
    not leave the process this way.
    """

    def __init__(
        self,
        provider: LoggerProvider,
        event: str,
        says: Callable[[Any], tuple[str, SeverityNumber]],
        hides: frozenset[str] = frozenset(),
    ) -> None:
        self._provider = provider
        self._logger = provider.get_logger("penstock", __version__)
        self._event = event
        self._says = says
        self._hides = hides

    async def write(self, records: Sequence[Record]) -> None:
        for record in records:
            values = record.fields()
            context = context_of(values.pop("trace_id", None), values.pop("span_id", None))
            at = int(datetime.fromisoformat(values.pop("time")).timestamp() * 1e9)
            shown = {name: value for name, value in values.items() if value is not None and name not in self._hides}
            body, severity = self._says(record)
            self._logger.emit(
                LogRecord(
                    timestamp=at,
                    observed_timestamp=at,
                    context=context,
                    severity_number=severity,
                    event_name=self._event,
                    body=body,
                    attributes={f"{self._event}.{name}": value for name, value in shown.items()},
                )
            )

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)
