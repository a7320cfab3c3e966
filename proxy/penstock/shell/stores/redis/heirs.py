"""The streams of replicas that died: noticed when a lease runs out, ended once, and billed by who ended them."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import orjson
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from penstock.core.commands import RecordUsage
from penstock.core.lost import Closing, close_lost, refusal_of, replica_lost
from penstock.core.resuming import bodies
from penstock.shell.stores.log import OnLost, StreamInfo
from penstock.shell.stores.redis.link import Link, again
from penstock.shell.stores.redis.mirrors import Mirror, Nobody, catch_up, from_meta
from penstock.shell.stores.redis.scripts import END_LOST

_log = logging.getLogger("penstock")


class Heirs:
    """Ends what dead replicas left open."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._end_as_heir = link.redis.register_script(END_LOST)
        self._inherited: dict[str, tuple[StreamInfo, RecordUsage]] = {}  # ended as heir, unless the answer was no
        self._on_lost: OnLost = lambda _info, _record: None

    def start(self, on_lost: OnLost) -> None:
        self._on_lost = on_lost

    async def inherit(self) -> None:
        """Looks for replicas that do not live; who did not say so for long itself may have slept with all of them."""
        if self._link.slept:
            return
        await self.bill_inherited()
        replicas: Any = await self._link.redis.smembers(self._link.name("replicas"))
        for replica in replicas if self._link.may_judge else ():
            await self._look_after(replica.decode())

    async def bill_inherited(self) -> None:
        """What was ended by this heir, which did not hear of it, or not at all."""
        for stream_id in list(self._inherited):
            heir = await self._link.redis.get(self._link.name(stream_id, "heir"))
            info, record = self._inherited.pop(stream_id)
            if heir == self._link.replica.encode():
                self._on_lost(info, record)

    def settle_for_good(self) -> None:
        """This replica goes, and Redis does not say who ended the stream: it is billed, rather twice than never."""
        while self._inherited:
            _, (info, record) = self._inherited.popitem()
            self._on_lost(info, record)

    async def _look_after(self, replica: str) -> None:
        if replica == self._link.replica or await self._link.redis.exists(self._link.at(replica)):
            return
        office = self._link.at(replica, "heir")
        is_first = await self._link.redis.set(office, self._link.replica, nx=True, ex=30)
        if not is_first and await self._link.redis.get(office) != self._link.replica.encode():
            return
        left: Any = await self._link.redis.smembers(self._link.at(replica, "open"))
        _log.warning("replica %s is gone and leaves %d streams", replica, len(left))
        for stream_id in left:
            try:
                await self._end_lost(stream_id.decode(), replica)
            except (RedisConnectionError, RedisTimeout, OSError):
                raise
            except Exception:
                _log.exception("stream %s, which replica %s left, cannot be ended", stream_id.decode(), replica)
        # It may live after all, and carry what it was faster with.
        if not await self._link.redis.exists(self._link.at(replica), self._link.at(replica, "open")):
            pipe = self._link.redis.pipeline(transaction=False)
            pipe.srem(self._link.name("replicas"), replica)
            pipe.delete(self._link.at(replica, "control"))
            await pipe.execute()
        await self._link.redis.delete(office)

    async def _end_lost(self, stream_id: str, replica: str) -> None:
        """Ends a stream whose replica died; the write is refused where it, or another heir, was faster."""
        meta, open_streams = await self._link.meta(stream_id), self._link.at(replica, "open")
        if meta is None or (lost := await self._lost(stream_id, meta)) is None:
            await self._link.redis.srem(open_streams, stream_id)
            return
        info, last, closing = lost
        fields: list[Any] = ["n", closing.last, "e", 1]
        if closing.data:
            fields += ["d", closing.data]
        elif last == 0:
            problem = replica_lost()
            fields += ["w", orjson.dumps({"status": problem.status, "headers": {}}), "d", refusal_of(info.dialect)]
        keys = [*self._link.parts(stream_id), open_streams, self._link.at(replica)]
        if meta["key"] and last == 0:
            keys.append(self._link.key(info.principal, meta["key"]))
        times = [self._link.lifetime, self._link.seconds_kept(last > 0)]
        args: list[Any] = [stream_id, self._link.replica, *times, f"{last + 1}-0", *fields]
        self._inherited[stream_id] = info, closing.record
        is_ours = await again(lambda: self._end_as_heir(keys=keys, args=args))
        del self._inherited[stream_id]
        if is_ours:
            self._on_lost(info, closing.record)

    async def _lost(self, stream_id: str, meta: Mapping[str, Any]) -> tuple[StreamInfo, int, Closing] | None:
        """What is to be said to the end of the stream, and its last event before that; None where it has ended.

        One that has said all may lack only the mark behind it, for which its readers and its bill wait.
        """
        info = from_meta(stream_id, meta)
        found = Mirror(info, Nobody(), meta["replica"])
        await catch_up(self._link, found)
        if found.is_over_there:
            return None
        native = [body for entry in found for body in bodies(entry.data, info.form)] if info.has_cursors else []
        ts = int(time.time() * 1000)
        closing = await asyncio.to_thread(close_lost, native, info.form, info.dialect, stream_id, found.last, ts)
        return info, found.last, closing
