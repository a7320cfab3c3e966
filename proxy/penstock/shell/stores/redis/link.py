"""The connection to Redis: names, whether it answers, and whether this replica said in time that it lives."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from penstock.settings import StoreSettings

_log = logging.getLogger("penstock")

RETRY_SECONDS = 1.0
LISTEN_SECONDS = 1.0
# Of what replicas ask of one that does not listen any more.
MOST_WORDS = 10_000


class Link:
    """What all parts of the store share."""

    def __init__(self, settings: StoreSettings, open_seconds: float) -> None:
        """`open_seconds`: no stream lives longer."""
        assert settings.url is not None
        self.settings = settings
        self.lifetime = int(open_seconds + settings.retention_seconds) + 60
        self.replica = secrets.token_hex(8)
        url, limit = settings.url.get_secret_value(), settings.timeout_seconds
        self.redis: Redis = Redis.from_url(url, socket_timeout=limit, socket_connect_timeout=limit)
        # Of its own, since it waits inside Redis.
        self.ear: Redis = Redis.from_url(url, socket_timeout=LISTEN_SECONDS + limit, socket_connect_timeout=limit)
        self.now = asyncio.get_running_loop().time
        self.is_reachable = True
        self._down_until = 0.0
        self._alive_at = self.now()
        self._judges_from = self._alive_at + settings.lease_seconds

    # -- whether it answers ------------------------------------------------------------------------

    def is_down(self, error: Exception) -> None:
        if self.now() >= self._down_until:
            _log.error("the store does not answer: %s; streams are resumable at their own replica only", error)
        self.is_reachable, self._down_until = False, self.now() + RETRY_SECONDS
        # The others could not renew their leases either.
        self._judges_from = self.now() + self.settings.lease_seconds

    async def doubt(self, error: Exception) -> None:
        """Redis did not answer, or it is this process that slept."""
        try:
            await self.redis.ping()
        except (RedisError, OSError):
            self.is_down(error)

    async def answers(self) -> bool:
        """Whether Redis can be reached; where it could not, it is asked again after a while."""
        if not self.is_reachable and self.now() >= self._down_until:
            try:
                self.is_reachable = bool(await self.redis.ping())
            except (RedisError, OSError) as error:
                self.is_down(error)
        return self.is_reachable

    @property
    def slept(self) -> bool:
        """Whether it has not said for longer than a lease that it lives, so that others may have ended its streams."""
        return self.now() - self._alive_at > self.settings.lease_seconds

    @property
    def may_judge(self) -> bool:
        """Whether others had the time to say that they live."""
        return self.now() >= self._judges_from

    async def beat(self) -> None:
        """Says that this replica lives."""
        await again(self._say_alive)
        if self.slept:
            # Maybe the whole machine did, and the others with it.
            self._judges_from = self.now() + self.settings.lease_seconds
        self.is_reachable, self._alive_at = True, self.now()

    async def _say_alive(self) -> None:
        pipe = self.redis.pipeline(transaction=False)
        pipe.set(self.at(self.replica), int(time.time()), px=int(self.settings.lease_seconds * 1000))
        pipe.sadd(self.name("replicas"), self.replica)
        pipe.expire(self.at(self.replica, "control"), self.lifetime)
        pipe.expire(self.at(self.replica, "open"), self.lifetime)
        await pipe.execute()

    async def word(self, replica: str, said: dict[Any, Any]) -> None:
        """Puts a word into the control stream of a replica."""
        pipe = self.redis.pipeline(transaction=False)
        self.add_word(pipe, replica, said)
        await pipe.execute()

    def add_word(self, pipe: Any, replica: str, said: dict[Any, Any]) -> None:
        """One that has left does not listen any more: what is said to it goes with time."""
        control = self.at(replica, "control")
        pipe.xadd(control, said, maxlen=MOST_WORDS, approximate=True)
        pipe.expire(control, self.lifetime)

    async def meta(self, stream_id: str) -> dict[str, Any] | None:
        """Who carries a stream and what it is."""
        raw = await self.redis.get(self.name(stream_id, "meta"))
        return None if raw is None else orjson.loads(raw)

    def seconds_kept(self, answers: bool) -> int:
        """A log is kept for the retention time, or not at all where it answers nothing."""
        return max(1, int(self.settings.retention_seconds)) if answers else 1

    async def leave(self) -> None:
        """Whoever leaves in good order leaves nothing open behind."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.srem(self.name("replicas"), self.replica)
        pipe.delete(self.at(self.replica), self.at(self.replica, "open"), self.at(self.replica, "control"))
        await pipe.execute()

    async def close(self) -> None:
        await self.redis.aclose()
        await self.ear.aclose()

    # -- names -------------------------------------------------------------------------------------

    def name(self, *parts: str) -> str:
        return ":".join((self.settings.prefix, *parts))

    def parts(self, stream_id: str) -> list[str]:
        """What Redis knows of a stream, in the order of the scripts."""
        return [self.name(stream_id, part) for part in ("meta", "log", "heir")]

    def at(self, replica: str, *parts: str) -> str:
        return self.name("at", replica, *parts)

    def key(self, principal: str, key: str) -> str:
        return self.name("key", orjson.dumps([principal, key]).decode())


async def stopped(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels them. A cancellation that meets redis-py's own time limit is lost in it (8.1): it is said until heard."""
    while running := {task for task in tasks if not task.done()}:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=0.1)


async def again(ask: Callable[[], Awaitable[Any]]) -> Any:
    """Sends what may be sent twice a second time where no answer came: it may be this process that slept."""
    try:
        return await ask()
    except (RedisError, OSError):
        return await ask()


def place(entry_id: bytes) -> tuple[int, int]:
    """Where an entry stands in its log: the event that it starts with, and a second number."""
    first, _, second = entry_id.partition(b"-")
    return int(first), int(second)
