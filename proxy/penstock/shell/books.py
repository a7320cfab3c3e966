"""Who used how much, from admission to bill: one object that the server tells of every stream."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from penstock.core.commands import RecordUsage
from penstock.core.request import StreamRequest
from penstock.settings import Settings, SettingsError
from penstock.shell.callers import Caller
from penstock.shell.ledgers import RedisLedger, connected
from penstock.shell.rate_limits import Grant, RateLimits
from penstock.shell.sinks import FileSink, OtlpSink, RedisSink, Sink
from penstock.shell.telemetry import StreamTrace, logger_provider
from penstock.shell.usage_records import UsageRecords, billed_tokens, says_of_usage, usage_record

_log = logging.getLogger("penstock")

# What a token of text is long, in bytes, when nobody has counted: about right for English, too few for most others.
_BYTES_A_TOKEN = 4


def guessed_tokens(size: int) -> int:
    """About how many tokens so many bytes of text are."""
    return size // _BYTES_A_TOKEN


@dataclass(slots=True)
class Account:
    """One admitted stream, or request that is passed on.

    Close it once: by `settle`, then `bill`, or by `drop` where nothing was begun.
    """

    headers: dict[str, str]
    _books: "Books"
    _caller: Caller
    _grant: Grant
    _stream_id: str
    _trace: StreamTrace

    def settle(self, ended: RecordUsage) -> None:
        """What its caller's limits are told, as soon as it is over."""
        self._books.settle(self._grant, ended)

    def bill(self, ended: RecordUsage, is_anothers: bool) -> None:
        """Its record, once it is certain whether another replica has written one."""
        self._books.note(ended, self._stream_id, self._caller.name, self._trace, is_billed=is_anothers)

    def drop(self) -> None:
        self._books.limits.settle(self._grant, 0)


class Books:
    def __init__(self, limits: RateLimits, records: UsageRecords) -> None:
        self.limits = limits
        self._records = records

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> AsyncIterator["Books"]:
        """While the block runs they are kept; leaving it writes what waits. Raises `SettingsError`."""
        url = settings.store.url.get_secret_value() if settings.store.url is not None else None
        shared = RedisLedger(_redis(settings, url), prefix=settings.store.prefix) if url else None
        limits = RateLimits(shared, settings.limits.without_store, reserve_tokens=settings.limits.reserve_tokens)
        records = UsageRecords(settings.usage, await asyncio.to_thread(_sinks, settings, url))
        tasks = [asyncio.create_task(work) for work in (records.keep_up(), limits.keep_up())]
        try:
            yield cls(limits, records)
        finally:
            records.close()
            limits.close()
            await asyncio.gather(*tasks)
            if shared is not None:
                await shared.close()

    async def open(self, caller: Caller, stream_id: str, request: StreamRequest, trace: StreamTrace) -> Account:
        """Counts the request before it costs anything. Raises `Problem` where its caller may not have it now."""
        prompt = guessed_tokens(request.text_bytes)
        answer = None if request.max_tokens is None else max(0, request.max_tokens) * request.choices
        grant = await self.limits.admit(caller, stream_id, prompt, answer)
        return Account(grant.headers, self, caller, grant, stream_id, trace)

    async def open_passed(self, caller: Caller, request_id: str, size: int, trace: StreamTrace) -> Account:
        """The same for a request that is passed on as it is; `size` are the bytes of it that a model reads."""
        grant = await self.limits.admit(caller, request_id, guessed_tokens(size), 0)
        return Account(grant.headers, self, caller, grant, request_id, trace)

    def settle(self, grant: Grant, ended: RecordUsage) -> None:
        self.limits.settle(grant, billed_tokens(ended.usage, self._records.bill))

    def note(
        self, ended: RecordUsage, stream_id: str, principal: str, trace: StreamTrace, *, is_billed: bool = False
    ) -> None:
        """The record of a stream and its line in the log; here even where its replica died and nobody settles.

        `is_billed`: another replica has taken the stream over, and written the record.
        """
        bill, usage = self._records.bill, ended.usage
        if not is_billed:
            self._records.add(usage_record(ended, bill, stream_id=stream_id, trace=trace, principal=principal))
        _log.info(
            "stream %s ended %s: principal=%s model=%s prompt=%d completion=%d delivered=%d estimated=%s seconds=%.3f",
            stream_id,
            ended.ending.value if ended.error_code is None else ended.error_code,
            principal,
            ended.model,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.delivered_tokens,
            usage.estimated,
            ended.duration_seconds,
        )


def _sinks(settings: Settings, url: str | None) -> list[Sink]:
    usage = settings.usage
    sinks: list[Sink] = []
    if usage.file is not None:
        sinks.append(FileSink.checked(usage.file))
    if usage.redis_stream is not None and url:
        sinks.append(RedisSink(_redis(settings, url), usage.redis_stream, usage.redis_stream_records))
    if usage.otlp:
        sinks.append(OtlpSink(logger_provider(os.environ), "penstock.usage", says_of_usage))
    return sinks


def _redis(settings: Settings, url: str) -> Any:
    try:
        return connected(url, settings.store.timeout_seconds)
    except ImportError:
        raise SettingsError("store.url: needs the extra `redis`: pip install 'penstock[redis]'") from None
    except ValueError as error:
        raise SettingsError(f"store.url: {error}; give a URL like redis://redis:6379/0") from None
