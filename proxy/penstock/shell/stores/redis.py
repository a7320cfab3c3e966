"""Logs that every replica finds, in Redis Streams; a replica that dies is noticed and its streams are ended.

A replica writes ahead: what all drivers say in one turn of the loop goes to Redis in one pipeline, and is sent to
clients when Redis has it. The entry that starts with event N has the id `N-0`, so that Redis itself refuses a second
writer of the same event: whoever is refused has lost the stream.

    {prefix}:{id}:meta       JSON: who owns the stream, what form it has, which replica carries it
    {prefix}:{id}:log        stream: `d` bytes, `n` the last event in them, `e` on the last entry, `w` an answer's head
    {prefix}:key:…           JSON: the stream that answers an idempotency key
    {prefix}:replicas        set of replica names
    {prefix}:at:{replica}    its lease: gone where the replica is
    {prefix}:at:{replica}:open      set of the streams that it carries
    {prefix}:at:{replica}:control   stream of what others ask of it: cancel, watch
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from penstock.core.dialects import Form
from penstock.core.errors import Overloaded
from penstock.core.lost import close_lost, refusal_of, replica_lost
from penstock.core.resuming import bodies
from penstock.settings import StoreSettings
from penstock.shell.stores.log import Claim, DeferredLog, LogOwner, OnLost, OnWord, StreamInfo, StreamLog, Whole
from penstock.shell.stores.memory import MemoryStore

_log = logging.getLogger("penstock")

# Bytes of one stream that may wait for Redis before its engine waits too.
_MOST_WAITING = 64 * 1024
_PAGE = 256
_RETRY_SECONDS = 1.0
_Fields = Mapping[bytes, bytes]


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

    def __init__(self, info: StreamInfo, store: "RedisStore") -> None:
        super().__init__(info, store.local)
        self._store = store
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
        """Redis has it, or there is no Redis any more."""
        if draft.pieces:
            self.append(b"".join(draft.pieces), draft.last)
            self.waiting_bytes -= sum(map(len, draft.pieces))
        if draft.sent:
            self.deliver(b"".join(draft.sent))
        if self.whole is not None and not self.is_open:
            super().answer(self.whole)
        if draft.is_last:
            super().end()
        self._wake()

    def abandon(self) -> None:
        """Another replica has ended the stream: what was not committed here was never said."""
        self.waiting_bytes, self._draft, self._is_ended = 0, None, True
        self._store.local.drop(self.info.stream_id)
        self._wake()
        self.taken_over()

    def _next_draft(self) -> _Draft:
        if self._draft is None:
            self._draft = _Draft(self._said + 1, self._said)
            self._store.wants(self)
        return self._draft


class RedisStore:
    """Keeps logs in Redis, and in memory what this replica has seen of them lately."""

    def __init__(self, settings: StoreSettings, open_seconds: float, first_byte_seconds: float) -> None:
        """`open_seconds`: no stream lives longer. `first_byte_seconds`: no head waits longer."""
        assert settings.url is not None
        self._settings = settings
        self._lifetime = int(open_seconds + settings.retention_seconds) + 60
        self._first_byte_seconds = first_byte_seconds
        self.local = MemoryStore(settings.memory_bytes, settings.retention_seconds)
        self.replica = secrets.token_hex(8)
        self._prefix = settings.prefix
        url, limit = settings.url.get_secret_value(), settings.timeout_seconds
        self._redis: Redis = Redis.from_url(url, socket_timeout=limit, socket_connect_timeout=limit)
        # Of its own, since it waits inside Redis.
        self._ear: Redis = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=limit)
        self._drafts: dict[str, RedisLog] = {}
        self._something_to_write = asyncio.Event()
        self._mirrors: dict[str, _Mirror] = {}
        self._down_until = 0.0
        self._disowned: set[str] = set()  # streams that went on without Redis, and that Redis still knows
        self._loop = asyncio.get_running_loop()
        self._judges_from = self._loop.time() + settings.lease_seconds
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._on_word: OnWord = lambda _word, _stream_id, _seconds: None
        self._on_lost: OnLost = lambda _info, _record: None

    # -- what is asked of a store ------------------------------------------------------------------

    def start(self, on_word: OnWord, on_lost: OnLost) -> None:
        self._on_word, self._on_lost = on_word, on_lost
        for name, work in (("write", self._write()), ("beat", self._beat()), ("listen", self._listen())):
            self.tasks[name] = asyncio.create_task(work)

    async def create(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        if self._loop.time() < self._down_until:
            return await self._create_alone(info, claim)
        try:
            if claim is not None and (held := await self._claim(claim)) is not None:
                return held
            meta = orjson.dumps({**_to_meta(info), "replica": self.replica, "key": claim and claim.key})
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(self._name(info.stream_id, "meta"), meta, ex=self._lifetime)
            pipe.sadd(self._at(self.replica, "open"), info.stream_id)
            await pipe.execute()
        except (RedisError, OSError) as error:
            self._is_down(error)
            return await self._create_alone(info, claim)
        log = RedisLog(info, self)
        self.local.adopt(log)
        return log

    async def find(self, stream_id: str) -> StreamLog | None:
        if (log := await self.local.find(stream_id)) is not None:
            return log
        try:
            return await self._mirror(stream_id)
        except (RedisError, OSError) as error:
            self._is_down(error)
            message = "the store that knows the stream cannot be reached; ask again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"}) from None

    async def tell(self, stream_id: str, principal: str, word: str) -> None:
        """Passes a word on to the replica that carries the stream: `cancel`, or `watch` for the time of a lease."""
        try:
            meta = await self._meta(stream_id)
            if meta is None or meta["principal"] != principal or meta["replica"] == self.replica:
                return
            control = self._at(meta["replica"], "control")
            said: dict[Any, Any] = {"word": word, "id": stream_id, "seconds": self._settings.lease_seconds}
            await self._redis.xadd(control, said, maxlen=10_000, approximate=True)
        except (RedisError, OSError) as error:
            self._is_down(error)

    async def close(self) -> None:
        await stopped(self.tasks.values())
        try:
            await self._flush()
            # Whoever leaves in good order leaves nothing open behind.
            pipe = self._redis.pipeline(transaction=False)
            pipe.srem(self._name("replicas"), self.replica)
            pipe.delete(self._at(self.replica), self._at(self.replica, "open"), self._at(self.replica, "control"))
            await pipe.execute()
        except (RedisError, OSError):
            pass
        await self._redis.aclose()
        await self._ear.aclose()
        await self.local.close()

    # -- writing -----------------------------------------------------------------------------------

    def wants(self, log: RedisLog) -> None:
        """`log` has something to be written. Without Redis it is committed in the next turn of the loop."""
        self._drafts[log.info.stream_id] = log
        self._something_to_write.set()

    async def _write(self) -> None:
        while True:
            await self._something_to_write.wait()
            self._something_to_write.clear()
            try:
                await self._flush()
            except Exception:
                _log.exception("writing to the store failed")

    async def _flush(self) -> None:
        logs, self._drafts = self._drafts, {}
        drafts = [(log, draft) for log in logs.values() if (draft := log.take()) is not None]
        kept = [(log, draft) for log, draft in drafts if log.is_replicated]
        for log, draft in drafts:
            if not log.is_replicated:
                log.commit(draft)
        if not kept:
            return
        pipe = self._redis.pipeline(transaction=False)
        marks = [self._add(pipe, log, draft) for log, draft in kept]
        try:
            answers = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            self._is_down(error)
            for log, draft in kept:
                self._lose(log, draft)
            return
        for (log, draft), mark in zip(kept, marks, strict=True):
            self._settle(log, draft, answers[mark])

    def _add(self, pipe: Any, log: RedisLog, draft: _Draft) -> int:
        """Puts the commands of one draft into the pipeline; tells the place of the one whose answer counts."""
        stream_id, name = log.info.stream_id, self._name(log.info.stream_id, "log")
        mark = len(pipe.command_stack)
        fields: dict[Any, Any] = {"n": draft.last}
        if log.whole is not None:
            fields["w"] = orjson.dumps({"status": log.whole.status, "headers": log.whole.headers})
            fields["d"] = log.whole.body
        elif draft.pieces:
            fields["d"] = draft.pieces[0] if len(draft.pieces) == 1 else b"".join(draft.pieces)
        if draft.is_last:
            fields["e"] = 1
        pipe.xadd(name, fields, id=f"{draft.first}-0")
        if draft.first == 1:
            pipe.expire(name, self._lifetime)
        if draft.is_last:
            self._bury(pipe, stream_id, log.answers or draft.last > 0)
            pipe.srem(self._at(self.replica, "open"), stream_id)
        return mark

    def _bury(self, pipe: Any, stream_id: str, answers: bool) -> None:
        """The stream is over: it is kept for the retention time, or not at all where it answers nothing."""
        seconds = max(1, int(self._settings.retention_seconds)) if answers else 1
        for part in ("log", "meta"):
            pipe.expire(self._name(stream_id, part), seconds)

    def _settle(self, log: RedisLog, draft: _Draft, answer: Any) -> None:
        if isinstance(answer, ResponseError) and "equal or smaller" in str(answer):
            _log.warning("stream %s was ended by another replica", log.info.stream_id)
            log.abandon()
        elif isinstance(answer, Exception):
            self._is_down(answer)
            self._lose(log, draft)
        else:
            log.commit(draft)

    def _lose(self, log: RedisLog, draft: _Draft) -> None:
        """Redis does not have it: this log goes on in memory, or its stream ends, as the setting says."""
        log.is_replicated = False
        self._disowned.add(log.info.stream_id)
        log.commit(draft)
        if not log.is_over:
            log.lost(self._settings.on_failure == "end")

    def _is_down(self, error: Exception) -> None:
        if self._loop.time() >= self._down_until:
            _log.error("the store does not answer: %s; streams are resumable at their own replica only", error)
        self._down_until = self._loop.time() + _RETRY_SECONDS
        # The others could not renew their leases either.
        self._judges_from = self._loop.time() + self._settings.lease_seconds

    async def _create_alone(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        if self._settings.on_failure == "end":
            message = "the store that logs the streams is gone, and nothing is sent here that is not logged; try again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"})
        created = await self.local.create(info, claim)
        if isinstance(created, StreamLog):
            created.is_alone = True
        return created

    # -- idempotency keys --------------------------------------------------------------------------

    async def _claim(self, claim: Claim) -> Claim | None:
        name = self._key(claim.principal, claim.key)
        wanted = orjson.dumps({"digest": claim.digest, "stream_id": claim.stream_id})
        for _ in range(2):
            if await self._redis.set(name, wanted, nx=True, ex=self._lifetime):
                return None
            held = await self._redis.get(name)
            if held is None:
                continue  # it was given free in between
            found = orjson.loads(held)
            if await self._is_answer(found["stream_id"]):
                return Claim(claim.principal, claim.key, found["digest"], found["stream_id"])
            await self._redis.delete(name)
        return Claim(claim.principal, claim.key, claim.digest, claim.stream_id)

    async def _is_answer(self, stream_id: str) -> bool:
        """Whether the stream runs, or its log is still there."""
        for _ in range(20):
            if await self._redis.exists(self._name(stream_id, "meta")):
                return True
            await asyncio.sleep(0.01)  # claimed a moment ago, and about to be created
        return False

    # -- reading what other replicas write ---------------------------------------------------------

    async def _meta(self, stream_id: str) -> dict[str, Any] | None:
        raw = await self._redis.get(self._name(stream_id, "meta"))
        return None if raw is None else orjson.loads(raw)

    async def _mirror(self, stream_id: str) -> StreamLog | None:
        meta = await self._meta(stream_id)
        if meta is None:
            return None
        mirror = _Mirror(_from_meta(stream_id, meta), self.local, meta["replica"])
        await self._catch_up(mirror)
        if (log := await self.local.find(stream_id)) is not None:
            return log  # somebody else was faster
        self.local.adopt(mirror)
        if mirror.is_over_there:
            mirror.finish()
            return mirror
        self._mirrors[stream_id] = mirror
        if mirror.info.form is not Form.WHOLE:
            opened = mirror.info.started_ms / 1000 + self._first_byte_seconds - time.time()
            self._loop.call_later(max(0.0, opened) + 0.1, mirror.open)
        await self._redis.xadd(self._at(self.replica, "control"), {"word": "follow"}, maxlen=10_000, approximate=True)
        await self.tell(stream_id, mirror.info.principal, "watch")
        return mirror

    async def _catch_up(self, mirror: "_Mirror") -> None:
        while True:
            entries: Any = await self._redis.xrange(
                self._name(mirror.info.stream_id, "log"), min=f"({mirror.cursor}", count=_PAGE
            )
            for entry_id, fields in entries:
                mirror.take(entry_id, fields)
            if len(entries) < _PAGE:
                return

    async def _listen(self) -> None:
        """One reader for all streams of other replicas, and for what they ask of this one."""
        control, heard = self._at(self.replica, "control"), "0"
        while True:
            names = {self._name(stream_id, "log"): mirror for stream_id, mirror in self._mirrors.items()}
            cursors: dict[Any, Any] = {control: heard, **{name: mirror.cursor for name, mirror in names.items()}}
            try:
                answer: Any = await self._ear.xread(cursors, count=_PAGE, block=1000)
            except (RedisError, OSError) as error:
                self._is_down(error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            for name, entries in answer or ():
                if name.decode() == control:
                    heard = entries[-1][0].decode()
                    self._obey(fields for _, fields in entries)
                elif (mirror := names.get(name.decode())) is not None:
                    for entry_id, fields in entries:
                        mirror.take(entry_id, fields)
            self._forget_mirrors()

    def _obey(self, words: Iterator[_Fields]) -> None:
        for fields in words:
            word = fields[b"word"].decode()
            if word != "follow":
                self._on_word(word, fields[b"id"].decode(), float(fields[b"seconds"]))

    def _forget_mirrors(self) -> None:
        for stream_id, mirror in list(self._mirrors.items()):
            if mirror.is_over_there:
                del self._mirrors[stream_id]
                mirror.finish()
            elif mirror.readers == 0 and mirror.idle_since + 2 * self._settings.lease_seconds < self._loop.time():
                del self._mirrors[stream_id]
                self.local.drop(stream_id)

    # -- who lives ---------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Says that this replica lives, and looks for those that do not."""
        while True:
            try:
                await self._say_alive()
                await self._disown()
                await self._watch_mirrors()
                replicas: Any = await self._redis.smembers(self._name("replicas"))
                for replica in replicas if self._loop.time() >= self._judges_from else ():
                    await self._look_after(replica.decode())
            except (RedisError, OSError) as error:
                self._is_down(error)
            except Exception:
                _log.exception("the store's heartbeat failed")
            await asyncio.sleep(self._settings.lease_seconds / 3)

    async def _say_alive(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(self._at(self.replica), int(time.time()), px=int(self._settings.lease_seconds * 1000))
        pipe.sadd(self._name("replicas"), self.replica)
        pipe.expire(self._at(self.replica, "control"), self._lifetime)
        pipe.expire(self._at(self.replica, "open"), self._lifetime)
        await pipe.execute()

    async def _disown(self) -> None:
        """What went on without Redis is not whole there: nobody shall follow it, nor end it."""
        for stream_id in list(self._disowned):
            pipe = self._redis.pipeline(transaction=False)
            pipe.delete(self._name(stream_id, "meta"), self._name(stream_id, "log"))
            pipe.srem(self._at(self.replica, "open"), stream_id)
            await pipe.execute()
            self._disowned.discard(stream_id)

    async def _watch_mirrors(self) -> None:
        for stream_id, mirror in list(self._mirrors.items()):
            if not await self._redis.exists(self._name(stream_id, "meta")):
                del self._mirrors[stream_id]
                self.local.drop(stream_id)
                mirror.break_off()
            elif mirror.readers:
                await self.tell(stream_id, mirror.info.principal, "watch")

    async def _look_after(self, replica: str) -> None:
        if replica == self.replica or await self._redis.exists(self._at(replica)):
            return
        if not await self._redis.set(self._at(replica, "heir"), self.replica, nx=True, ex=30):
            return
        left: Any = await self._redis.smembers(self._at(replica, "open"))
        _log.warning("replica %s is gone and leaves %d streams", replica, len(left))
        for stream_id in left:
            await self._end_lost(stream_id.decode())
        pipe = self._redis.pipeline(transaction=False)
        pipe.srem(self._name("replicas"), replica)
        pipe.delete(self._at(replica, "open"), self._at(replica, "control"), self._at(replica, "heir"))
        await pipe.execute()

    async def _end_lost(self, stream_id: str) -> None:
        """Ends a stream whose replica died; the write is refused where it, or another heir, was faster."""
        meta = await self._meta(stream_id)
        if meta is None:
            return
        info = _from_meta(stream_id, meta)
        found = _Mirror(info, _Nobody(), meta["replica"])
        await self._catch_up(found)
        if found.is_over_there:
            return
        native = [body for entry in found for body in bodies(entry.data, info.form)] if info.has_cursors else []
        ts = int(time.time() * 1000)
        closing = await asyncio.to_thread(close_lost, native, info.form, info.dialect, stream_id, found.last, ts)
        if closing is None:
            return
        fields: dict[Any, Any] = {"n": closing.last, "e": 1}
        if closing.data:
            fields["d"] = closing.data
        elif found.last == 0:
            problem = replica_lost()
            fields["w"] = orjson.dumps({"status": problem.status, "headers": {}})
            fields["d"] = refusal_of(info.dialect)
        try:
            await self._redis.xadd(self._name(stream_id, "log"), fields, id=f"{found.last + 1}-0")
        except ResponseError:
            return
        pipe = self._redis.pipeline(transaction=False)
        self._bury(pipe, stream_id, answers=found.last > 0)
        if meta["key"] and found.last == 0:
            pipe.delete(self._key(info.principal, meta["key"]))
        await pipe.execute()
        self._on_lost(info, closing.record)

    # -- names -------------------------------------------------------------------------------------

    def _name(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _at(self, replica: str, *parts: str) -> str:
        return self._name("at", replica, *parts)

    def _key(self, principal: str, key: str) -> str:
        return self._name("key", orjson.dumps([principal, key]).decode())


class _Nobody:
    """Owns a log that is read once and not kept."""

    def grew(self, size: int) -> None: ...

    def ended(self, log: StreamLog) -> None: ...


class _Mirror(StreamLog):
    """A log that another replica writes."""

    def __init__(self, info: StreamInfo, owner: LogOwner, replica: str) -> None:
        super().__init__(info, owner)
        self.replica = replica
        self.cursor = "0-0"
        self.is_over_there = False
        self.idle_since = asyncio.get_running_loop().time()

    def take(self, entry_id: bytes, fields: _Fields) -> None:
        self.cursor = entry_id.decode()
        self.idle_since = asyncio.get_running_loop().time()
        data = fields.get(b"d")
        if b"w" in fields:
            whole = orjson.loads(fields[b"w"])
            self.answer(Whole(whole["status"], data or b"", whole["headers"]))
        elif data:
            self.is_open = True
            self.append(data, int(fields[b"n"]))
        if b"e" in fields:
            self.is_over_there = True

    def finish(self) -> None:
        self.end()


async def stopped(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels them. A cancellation that meets redis-py's own time limit is lost in it (8.1): it is said until heard."""
    while running := {task for task in tasks if not task.done()}:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=0.1)


def _to_meta(info: StreamInfo) -> dict[str, Any]:
    return {
        "principal": info.principal,
        "form": info.form.value,
        "dialect": info.dialect,
        "content_type": info.content_type,
        "started_ms": info.started_ms,
        "asked": info.asked,
    }


def _from_meta(stream_id: str, meta: Mapping[str, Any]) -> StreamInfo:
    form = Form(meta["form"])
    return StreamInfo(
        stream_id,
        meta["principal"],
        form,
        meta["dialect"],
        meta["content_type"],
        meta["started_ms"],
        meta.get("asked", ""),  # a replica of an older version wrote none
    )
