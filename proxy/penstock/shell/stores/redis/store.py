"""The store of a deployment with Redis, put together from its parts."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from penstock.settings import StoreSettings
from penstock.shell.stores.log import Claim, NoteFate, OnLost, OnNote, OnWord, StreamInfo, StreamLog
from penstock.shell.stores.memory import MemoryStore
from penstock.shell.stores.redis.carried import Carried
from penstock.shell.stores.redis.heirs import Heirs
from penstock.shell.stores.redis.link import Link, stopped
from penstock.shell.stores.redis.mirrors import Mirrors

_log = logging.getLogger("penstock")


class RedisStore:
    """Keeps logs in Redis, and in memory what this replica has seen of them lately."""

    def __init__(self, settings: StoreSettings, open_seconds: float, first_byte_seconds: float) -> None:
        """`open_seconds`: no stream lives longer. `first_byte_seconds`: no head waits longer."""
        self.local = MemoryStore(settings.memory_bytes, settings.retention_seconds)
        self._link = Link(settings, open_seconds)
        self._carried = Carried(self._link, self.local)
        self._mirrors = Mirrors(self._link, self.local, first_byte_seconds)
        self._heirs = Heirs(self._link)
        self.tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def replica(self) -> str:
        return self._link.replica

    @property
    def is_behind(self) -> bool:
        """Whether Redis has not heard yet of all that was said here."""
        return self._carried.is_behind

    def start(self, on_word: OnWord, on_note: OnNote, on_lost: OnLost) -> None:
        self._mirrors.start(on_word, on_note)
        self._heirs.start(on_lost)
        # Apart from each other, so that thousands of streams to follow, restore or inherit do not delay the heartbeat.
        thrice = {
            "beat": self._link.beat,
            "watch": self._mirrors.watch,
            "restore": self._carried.restore,
            "inherit": self._heirs.inherit,
        }
        works = {name: self._three_times_a_lease(work) for name, work in thrice.items()}
        works |= {"write": self._carried.write(), "listen": self._mirrors.listen()}
        self.tasks.update({name: asyncio.create_task(work) for name, work in works.items()})

    async def create(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        return await self._carried.create(info, claim)

    async def find(self, stream_id: str) -> StreamLog | None:
        return await self._mirrors.find(stream_id)

    async def tell(self, stream_id: str, principal: str, word: str) -> None:
        await self._mirrors.tell(stream_id, principal, word)

    async def annotate(self, stream_id: str, principal: str, note: bytes) -> NoteFate:
        return await self._mirrors.annotate(stream_id, principal, note)

    async def close(self) -> None:
        await stopped(self.tasks.values())
        try:
            await self._carried.flush()
            await self._carried.catch_redis_up()
            await self._heirs.bill_inherited()
            await self._link.leave()
        except (RedisError, OSError):
            pass
        except Exception:
            _log.exception("leaving the store failed")
        finally:
            self._carried.settle_for_good()
            self._heirs.settle_for_good()
            await self._link.close()
            await self.local.close()

    async def _three_times_a_lease(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except (RedisError, OSError) as error:
                await self._link.doubt(error)
            except Exception:
                _log.exception("work at the store failed")
            await asyncio.sleep(self._link.settings.lease_seconds / 3)
