"""The streams that are carried here: begun in Redis, written ahead, and caught up with once Redis is back.

What all drivers say in one turn of the loop goes to Redis in one pipeline. A write that fails says nothing about
Redis, since it may be this process that slept: Redis is asked what it has, and only where it does not answer that
either does a log go on alone.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import orjson
from redis.exceptions import RedisError, ResponseError

from penstock.core.errors import Overloaded
from penstock.core.lost import replica_lost
from penstock.shell.stores.log import Claim, DeferredLog, Evicted, StreamInfo, StreamLog, Whole
from penstock.shell.stores.memory import MemoryStore
from penstock.shell.stores.redis.link import Link, again, place
from penstock.shell.stores.redis.scripts import BEGIN, GIVE_UP

_log = logging.getLogger("penstock")

# Bytes of one stream that may wait for Redis before its engine waits too.
_MOST_WAITING = 64 * 1024
# How often a write is sent whose fate Redis, when asked, does not explain.
_TRIES = 3
_RESTORED_AT_ONCE = 64 * 1024


@dataclass(slots=True)
class _Draft:
    """What one stream has said since the last pipeline."""

    first: int
    last: int
    pieces: list[bytes] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)  # of these, what its own client has not been sent
    is_last: bool = False


class RedisLog(DeferredLog):
    """The log of a stream that is carried here. It is appended to when Redis has it."""

    def __init__(self, info: StreamInfo, carried: "Carried", claim: Claim | None) -> None:
        super().__init__(info, carried.local)
        self.claim = claim
        self._carried = carried
        self._draft: _Draft | None = None
        self._said = 0  # number of the last event that was handed in
        self._is_ended = False
        self._is_hopeless = False
        self.is_replicated = True

    @property
    def has_room(self) -> bool:
        return self.waiting_bytes < _MOST_WAITING

    def append_later(self, data: bytes, last: int, *, send: bool) -> None:
        draft = self._next_draft()
        draft.pieces.append(data)
        draft.last = self._said = last
        if send:
            draft.sent.append(data)
        self.waiting_bytes += len(data)

    def answer(self, whole: Whole) -> None:
        self.whole = whole
        self._next_draft()

    def end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._next_draft().is_last = True

    async def settled(self) -> None:
        while (self._draft is not None or self.waiting_bytes) and not self._is_hopeless:
            await self.changed(60)

    def give_up(self) -> None:
        self._is_hopeless = True
        self._wake()

    def take(self) -> _Draft | None:
        draft, self._draft = self._draft, None
        return draft

    def commit(self, draft: _Draft) -> None:
        """Redis has it, or cannot be reached; then it is open who has the last word on the stream."""
        if draft.pieces:
            self.append(b"".join(draft.pieces), draft.last)
            self.waiting_bytes -= sum(map(len, draft.pieces))
        if draft.sent:
            self.deliver(b"".join(draft.sent))
        if self.whole is not None and not self.is_open:
            super().answer(self.whole)
        if draft.is_last:
            super().end()
            if self.is_replicated:
                self.decide(False)
        self._wake()

    def forget(self) -> None:
        """Its entries are no longer kept here."""
        self.break_off()
        self._entries.clear()

    def abandon(self) -> None:
        """Another replica has ended the stream: what was not committed here was never said."""
        self.waiting_bytes, self._draft, self._is_ended = 0, None, True
        self._carried.local.drop(self.info.stream_id)
        self.break_off()
        self.decide(True)
        self.taken_over()

    def _next_draft(self) -> _Draft:
        if self._draft is None:
            self._draft = _Draft(self._said + 1, self._said)
            self._carried.wants(self)
        return self._draft


_Write = tuple[RedisLog, _Draft]


class Carried:
    """Writes the logs of this replica's streams."""

    def __init__(self, link: Link, local: MemoryStore) -> None:
        self._link = link
        self.local = local
        self._begin = link.redis.register_script(BEGIN)
        self._give_up = link.redis.register_script(GIVE_UP)
        self._drafts: dict[str, RedisLog] = {}
        self._something_to_write = asyncio.Event()
        self._behind: dict[str, RedisLog] = {}  # streams that Redis may know, and that went on without it
        self._orphans: set[str] = set()  # streams that were begun in Redis, perhaps, and that nobody carries

    @property
    def is_behind(self) -> bool:
        """Whether Redis has not heard yet of all that was said here."""
        return bool(self._behind)

    async def create(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        if claim is not None and (held := self.local.held(claim)) is not None:
            return held  # taken while Redis was away
        if not await self._link.answers():
            return await self._create_alone(info, claim)
        try:
            begun = await self._begun(info, claim)
        except (RedisError, OSError) as error:
            self._link.is_down(error)
            return self._create_in_doubt(info, claim)
        except asyncio.CancelledError:
            self._orphans.add(info.stream_id)
            raise
        if begun is None:
            raise replica_lost()
        if isinstance(begun, Claim):
            return begun
        log = RedisLog(info, self, claim)
        self.local.adopt(log)
        return log

    async def _begun(self, info: StreamInfo, claim: Claim | None) -> bool | Claim | None:
        """True where the stream is open now; else the claim that had the key before, or None where an heir ended it."""
        meta = orjson.dumps({**_to_meta(info), "replica": self._link.replica, "key": claim and claim.key})
        keys = [*self._link.parts(info.stream_id), self._link.at(self._link.replica, "open")]
        wanted = orjson.dumps({"digest": claim.digest, "stream_id": info.stream_id}) if claim is not None else b""
        if claim is not None:
            keys.append(self._link.key(claim.principal, claim.key))
        first, last = self._link.name(""), ":meta"
        args: list[Any] = [meta, self._link.lifetime, info.stream_id, wanted, first, last]
        answer: Any = await again(lambda: self._begin(keys=keys, args=args))
        if claim is None or isinstance(answer, int):
            return True if answer else None
        held = orjson.loads(answer)
        return Claim(claim.principal, claim.key, held["digest"], held["stream_id"])

    async def _create_alone(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        """Redis is known to be away, and will never hear of this stream."""
        self._refuse_alone()
        created = await self.local.create(info, claim)
        if isinstance(created, StreamLog):
            created.is_alone = True
        return created

    def _create_in_doubt(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        """Redis may have opened the stream, and does not answer."""
        self._orphans.add(info.stream_id)
        self._refuse_alone()
        if claim is not None and (held := self.local.claim(claim)) is not None:
            return held
        self._orphans.discard(info.stream_id)
        log = self._behind[info.stream_id] = RedisLog(info, self, claim)
        log.is_alone, log.is_replicated = True, False
        self.local.adopt(log)
        return log

    def _refuse_alone(self) -> None:
        if self._link.settings.on_failure == "end":
            message = "the store that logs the streams is gone, and nothing is sent here that is not logged; try again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"})

    # -- writing -----------------------------------------------------------------------------------

    def wants(self, log: RedisLog) -> None:
        """`log` has something to be written. Without Redis it is committed in the next turn of the loop."""
        self._drafts[log.info.stream_id] = log
        self._something_to_write.set()

    async def write(self) -> None:
        while True:
            await self._something_to_write.wait()
            self._something_to_write.clear()
            try:
                await self.flush()
            except Exception:
                _log.exception("writing to the store failed")

    async def flush(self) -> None:
        logs, self._drafts = self._drafts, {}
        drafts = [(log, draft) for log in logs.values() if (draft := log.take()) is not None]
        shared = [(log, draft) for log, draft in drafts if log.is_replicated]
        for log, draft in drafts:
            if not log.is_replicated:
                log.commit(draft)
        if shared:
            await self._share(shared)

    async def _share(self, writes: list[_Write]) -> None:
        """Until Redis has all of them, or has said why not, or does not answer at all."""
        problem: Exception = RedisError("it refuses what is written")
        try:
            for _ in range(_TRIES):
                writes = await self._put(writes)
                if not writes:
                    return
                try:
                    writes = await self._explained(writes)
                except (RedisError, OSError) as error:
                    problem = error
                    break
        except asyncio.CancelledError:
            # This replica stops and does not hear what became of them: Redis is caught up with before it goes.
            for log, draft in writes:
                self._keep(log, draft)
            raise
        if writes:
            self._link.is_down(problem)
        for log, draft in writes:
            self._lose(log, draft)

    async def _put(self, writes: list[_Write]) -> list[_Write]:
        """Returns those that Redis has not confirmed."""
        pipe = self._link.redis.pipeline(transaction=False)
        marks = [self._add(pipe, log, draft) for log, draft in writes]
        try:
            answers = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError):
            return writes
        doubtful: list[_Write] = []
        for (log, draft), mark in zip(writes, marks, strict=True):
            if isinstance(answers[mark], bytes):
                log.commit(draft)
            else:
                doubtful.append((log, draft))
        return doubtful

    async def _explained(self, writes: list[_Write]) -> list[_Write]:
        """Asks what became of them; returns those that never came."""
        pipe = self._link.redis.pipeline(transaction=False)
        for log, _ in writes:
            pipe.get(self._link.name(log.info.stream_id, "heir"))
            pipe.xrevrange(self._link.name(log.info.stream_id, "log"), count=1)
        answers = await pipe.execute()
        missing: list[_Write] = []
        for (log, draft), heir, tail in zip(writes, answers[::2], answers[1::2], strict=True):
            if heir is not None:
                _log.warning("stream %s was ended by another replica", log.info.stream_id)
                log.abandon()
            elif not tail:
                self._lose(log, draft)  # Redis has forgotten the stream
            elif place(tail[0][0])[0] < draft.first:
                missing.append((log, draft))
            else:
                log.commit(draft)
        return missing

    def _add(self, pipe: Any, log: RedisLog, draft: _Draft) -> int:
        """Puts the commands of one draft into the pipeline; tells the place of the one whose answer counts."""
        stream_id, name = log.info.stream_id, self._link.name(log.info.stream_id, "log")
        mark = len(pipe.command_stack)
        fields: dict[Any, Any] = {"n": draft.last}
        if log.whole is not None:
            fields["w"] = orjson.dumps({"status": log.whole.status, "headers": log.whole.headers})
            fields["d"] = log.whole.body
        elif draft.pieces:
            fields["d"] = draft.pieces[0] if len(draft.pieces) == 1 else b"".join(draft.pieces)
        if draft.is_last:
            fields["e"] = 1
        pipe.xadd(name, fields, id=f"{draft.first}-0", nomkstream=True)
        if draft.is_last:
            self._bury(pipe, stream_id, log.answers or draft.last > 0)
        return mark

    def _bury(self, pipe: Any, stream_id: str, answers: bool) -> None:
        """The stream is over."""
        for part in ("log", "meta"):
            pipe.expire(self._link.name(stream_id, part), self._link.seconds_kept(answers))
        pipe.srem(self._link.at(self._link.replica, "open"), stream_id)

    def _lose(self, log: RedisLog, draft: _Draft) -> None:
        """Redis does not have it: this log goes on in memory, or its stream ends, as the setting says."""
        self._keep(log, draft)
        if not log.is_over:
            log.lost(self._link.settings.on_failure == "end")

    def _keep(self, log: RedisLog, draft: _Draft) -> None:
        """Until Redis can be told, it is said here only."""
        log.is_replicated = False
        self._behind[log.info.stream_id] = log
        log.commit(draft)

    # -- after Redis was away ----------------------------------------------------------------------

    async def restore(self) -> None:
        for stream_id in self._behind.keys() - self.local.ids():
            self._behind[stream_id].forget()
        if await self._link.answers():
            await self.catch_redis_up()

    async def catch_redis_up(self) -> None:
        """What went on without Redis is written there, so that others can read it, or is nobody's but ours."""
        for stream_id in list(self._orphans):
            await self._drop_there(stream_id)
            self._orphans.discard(stream_id)
        for stream_id, log in list(self._behind.items()):
            if (fate := await self._restored(log)) is None:
                continue
            del self._behind[stream_id]
            if fate or log.is_over or not log.is_replicated:
                log.decide(fate)

    async def _restored(self, log: RedisLog) -> bool | None:
        """Whether an heir has ended the stream; None where Redis took up something else meanwhile: ask again."""
        begun = await self._begun(log.info, log.claim)
        if begun is None:
            _log.warning("stream %s went on alone; another replica has ended and billed it", log.info.stream_id)
            return True
        if isinstance(begun, Claim):
            return await self._drop_there(log.info.stream_id)  # the same was asked again elsewhere
        name = self._link.name(log.info.stream_id, "log")
        tail: Any = await self._link.redis.xrevrange(name, count=1)
        after, is_ended = int(tail[0][1].get(b"n", 0)), b"e" in tail[0][1]
        try:
            while log.last > after:
                after = await self._rewrite(log, after)
        except Evicted:
            return await self._drop_there(log.info.stream_id)
        except ResponseError:
            return None
        if log.is_over and not await self._ended(log, had_arrived=is_ended):
            return None
        log.is_replicated = True
        return False

    async def _ended(self, log: RedisLog, *, had_arrived: bool) -> bool:
        """Ends it there, or only says again for how long it is kept, since it was begun again to look at it."""
        pipe, mark = self._link.redis.pipeline(transaction=False), None
        if had_arrived:
            self._bury(pipe, log.info.stream_id, log.answers)
        else:
            mark = self._add(pipe, log, _Draft(log.last + 1, log.last, is_last=True))
        answers = await pipe.execute(raise_on_error=False)
        return mark is None or isinstance(answers[mark], bytes)

    async def _rewrite(self, log: RedisLog, after: int) -> int:
        """Some of what Redis misses; returns the number of its last event then."""
        entries, first = log.read(after, _RESTORED_AT_ONCE)
        pipe = self._link.redis.pipeline(transaction=False)
        for entry in entries:
            fields: dict[Any, Any] = {"n": entry.last, "d": entry.data}
            pipe.xadd(self._link.name(log.info.stream_id, "log"), fields, id=f"{first}-0", nomkstream=True)
            first = entry.last + 1
        if None in await pipe.execute():
            raise ResponseError("the log is gone again")
        return first - 1

    async def _drop_there(self, stream_id: str) -> bool:
        """Nobody shall follow the stream any more, nor end it; True where somebody has ended it before."""
        keys = [*self._link.parts(stream_id), self._link.at(self._link.replica, "open")]
        return bool(await again(lambda: self._give_up(keys=keys, args=[stream_id])))

    def settle_for_good(self) -> None:
        """This replica goes while Redis is away: what it carried is billed, rather twice than never."""
        for log in self._behind.values():
            log.decide(False)


def _to_meta(info: StreamInfo) -> dict[str, Any]:
    return {
        "principal": info.principal,
        "form": info.form.value,
        "dialect": info.dialect,
        "content_type": info.content_type,
        "started_ms": info.started_ms,
        "asked": info.asked,
    }
