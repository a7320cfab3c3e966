"""The audit: every intervention, and a share of the streams without one, found by stream and by trace.

An entry holds digests in the place of text, unless the settings ask for more. What matched is digested under a key:
a card number has too few digits for a bare hash to hide it.
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import orjson
from opentelemetry._logs import SeverityNumber

from penstock.core.commands import RecordUsage
from penstock.core.events import Intervention
from penstock.core.request import StreamRequest
from penstock.moderation_settings import AuditFile, AuditSettings
from penstock.shell.sinks import FileSink, Line, OtlpSink, Sink
from penstock.shell.telemetry import StreamTrace, logger_provider

_PURGE_SECONDS = 3600.0
_LETTER = re.compile(r"[^\W\d_]")
_DIGIT = re.compile(r"\d")
_STAY_IN_THE_FILE = frozenset({"text", "timeline"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line. `intervention` has the fields from `rule` to `text`, `stream` those from `ending` on.

    `start` and `length` are characters that the model wrote in that channel of the choice, `tokens` how many tokens the
    channel had cost before. `key` names the key of the digests, so that two are compared only under the same one.
    """

    time: str
    kind: Literal["intervention", "stream"]
    stream_id: str
    trace_id: str | None
    span_id: str | None
    principal: str
    model: str
    prompt: str
    key: str
    rules: str | None
    rule: str | None = None
    action: str | None = None
    category: str | None = None
    choice: int | None = None
    channel: str | None = None
    start: int | None = None
    length: int | None = None
    tokens: int | None = None
    digest: str | None = None
    text: str | None = None
    ending: str | None = None
    error: str | None = None
    interventions: int | None = None
    timeline: list[tuple[int, int, int, int]] | None = None

    def fields(self) -> dict[str, Any]:
        """Those that it has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Audit:
    """Where entries go. Without a file and without OTLP nothing is written."""

    def __init__(self, settings: AuditSettings, sinks: Sequence[Sink]) -> None:
        self._settings = settings
        given = settings.key.get_secret_value().encode() if settings.key is not None else secrets.token_bytes(32)
        self._key = given
        self.key_name = hashlib.sha256(given).hexdigest()[:8]
        self._lines = [Line(sink) for sink in sinks]

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: AuditSettings) -> AsyncIterator["Audit"]:
        """While the block runs entries are taken; leaving it writes what waits. Raises `SettingsError`."""
        audit = cls(settings, await asyncio.to_thread(_sinks, settings))
        tasks = [asyncio.create_task(line.keep_up()) for line in audit._lines]
        purge = asyncio.create_task(_purge_for_ever(settings.file)) if settings.file and settings.file.days else None
        try:
            yield audit
        finally:
            if purge is not None:
                purge.cancel()
            for line in audit._lines:
                line.close()
            await asyncio.gather(*tasks)

    @property
    def is_kept(self) -> bool:
        return bool(self._lines)

    def begin(
        self, stream_id: str, principal: str, request: StreamRequest, trace: StreamTrace, rules: str | None
    ) -> "StreamAudit":
        is_sampled = secrets.randbelow(1_000_000) < self._settings.sample * 1_000_000
        return StreamAudit(self, stream_id, principal, request, trace, rules, is_sampled=is_sampled)

    def add(self, entry: AuditEntry) -> None:
        for line in self._lines:
            line.add(entry)

    def digest(self, data: bytes) -> str:
        return "hmac-sha256:" + hmac.new(self._key, data, hashlib.sha256).hexdigest()

    def told(self, text: str, *, masks: bool) -> str | None:
        """What of the text an entry may hold."""
        if masks or self._settings.text == "digest":
            return None
        return text if self._settings.text == "plain" else _DIGIT.sub("9", _LETTER.sub("x", text))


class StreamAudit:
    """What is written about one stream."""

    def __init__(
        self,
        audit: Audit,
        stream_id: str,
        principal: str,
        request: StreamRequest,
        trace: StreamTrace,
        rules: str | None,
        *,
        is_sampled: bool,
    ) -> None:
        self._audit = audit
        self._stream_id = stream_id
        self._principal = principal
        self._request = request
        self._trace = trace
        self._rules = rules
        self._is_sampled = is_sampled
        self._count = 0

    def note(self, done: Intervention) -> None:
        self._count += 1
        self._trace.moderated(done)
        if not self._audit.is_kept:
            return
        self._add(
            "intervention",
            rule=done.rule,
            action=done.action,
            category=done.category,
            choice=done.choice,
            channel=done.channel,
            start=done.start,
            length=len(done.text),
            tokens=done.tokens,
            digest=self._audit.digest(done.text.encode("utf-8", "replace")),
            text=self._audit.told(done.text, masks=self._request.audit_masks),
        )

    def end(self, ended: RecordUsage) -> None:
        """An entry where a rule did something, the stream is in the sample, or its timeline was asked for."""
        is_wanted = self._count or self._is_sampled or ended.timeline is not None
        if self._audit.is_kept and is_wanted:
            self._add(
                "stream",
                ending=ended.ending.value,
                error=ended.error_code,
                interventions=self._count,
                timeline=ended.timeline,
            )

    def _add(self, kind: Literal["intervention", "stream"], **fields: Any) -> None:
        entry = AuditEntry(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            kind=kind,
            stream_id=self._stream_id,
            trace_id=self._trace.trace_id,
            span_id=self._trace.span_id,
            principal=self._principal,
            model=self._request.model,
            prompt=self._audit.digest(self._request.engine_body),
            key=self._audit.key_name,
            rules=self._rules,
            **fields,
        )
        self._audit.add(entry)


def _sinks(settings: AuditSettings) -> list[Sink]:
    sinks: list[Sink] = []
    if settings.file is not None:
        sinks.append(FileSink.checked(settings.file, "audit.file.path"))
        purge(settings.file)
    if settings.otlp:
        sinks.append(OtlpSink(logger_provider(os.environ), "penstock.audit", _says, hides=_STAY_IN_THE_FILE))
    return sinks


def _says(entry: AuditEntry) -> tuple[str, SeverityNumber]:
    return f"audit: {entry.kind}", SeverityNumber.WARN if entry.kind == "intervention" else SeverityNumber.INFO


# --- Retention ----------------------------------------------------------------------------------------


async def _purge_for_ever(settings: AuditFile) -> None:
    while True:
        await asyncio.sleep(_PURGE_SECONDS)
        await asyncio.to_thread(purge, settings)


def purge(settings: AuditFile) -> None:
    """Removes rotated files that hold nothing younger than `days`, and sets the file aside that began another day."""
    if settings.days is None:
        return
    sink, path = FileSink(settings), settings.path
    today = datetime.now(UTC)
    if (begun := _first_day(path)) is not None and begun != today.date().isoformat():
        sink.rotate()
    oldest = (today - timedelta(days=settings.days)).timestamp()
    for other in path.parent.glob(f"{path.name}.*"):
        if other.suffix[1:].isdigit() and other.stat().st_mtime < oldest:
            other.unlink(missing_ok=True)


def _first_day(path: Path) -> str | None:
    try:
        with path.open("rb") as lines:
            first = lines.readline()
        return str(orjson.loads(first)["time"])[:10] if first else None
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
