"""Logs that every replica finds, in Redis Streams; a replica that dies is noticed and its streams are ended.

A replica writes ahead: what all drivers say in one turn of the loop goes to Redis in one pipeline, and is sent to
clients when Redis has it. The entry that starts with event N has the id `N-0`, so that Redis itself refuses a second
writer of the same event, and that a write may be repeated. A write that fails says nothing about Redis, since it may
be this process that slept: Redis is asked what it has, and only where it does not answer that either does a log go on
alone. Once Redis is back it gets what it missed, and says whether somebody else has ended the stream meanwhile.

    {prefix}:{id}:meta       JSON: who owns the stream, what form it has, which replica carries it
    {prefix}:{id}:log        stream: `d` bytes, `n` the last event in them, `e` on the last entry, `w` an answer's head
    {prefix}:{id}:heir       the replica that has ended the stream of another one, and bills it
    {prefix}:key:…           JSON: the stream that answers an idempotency key
    {prefix}:replicas        set of replica names
    {prefix}:at:{replica}    its lease: gone where the replica is
    {prefix}:at:{replica}:open      set of the streams that it carries
    {prefix}:at:{replica}:control   stream of what others ask of it: cancel, watch, annotate; and of their answers
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from penstock.core.commands import RecordUsage
from penstock.core.dialects import Form
from penstock.core.errors import Overloaded
from penstock.core.lost import Closing, close_lost, refusal_of, replica_lost
from penstock.core.resuming import bodies
from penstock.settings import StoreSettings
from penstock.shell.stores.log import (
    Claim,
    DeferredLog,
    Evicted,
    LogOwner,
    NoteFate,
    OnLost,
    OnNote,
    OnWord,
    StreamInfo,
    StreamLog,
    Whole,
)
from penstock.shell.stores.memory import MemoryStore
from penstock.shell.stores.scripts import BEGIN, END_LOST, GIVE_UP

_log = logging.getLogger("penstock")

# Bytes of one stream that may wait for Redis before its engine waits too.
_MOST_WAITING = 64 * 1024
_PAGE = 256
# Of what replicas ask of one that does not listen any more.
_MOST_WORDS = 10_000
_RETRY_SECONDS = 1.0
# How often a write is sent whose fate Redis, when asked, does not explain.
_TRIES = 3
_LISTEN_SECONDS = 1.0
_RESTORED_AT_ONCE = 64 * 1024
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

    def __init__(self, info: StreamInfo, store: "RedisStore", claim: Claim | None) -> None:
        super().__init__(info, store.local)
        self.claim = claim
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
        self._store.local.drop(self.info.stream_id)
        self.break_off()
        self.decide(True)
        self.taken_over()

    def _next_draft(self) -> _Draft:
        if self._draft is None:
            self._draft = _Draft(self._said + 1, self._said)
            self._store.wants(self)
        return self._draft


_Write = tuple[RedisLog, _Draft]


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
        self._ear: Redis = Redis.from_url(url, socket_timeout=_LISTEN_SECONDS + limit, socket_connect_timeout=limit)
        self._begin = self._redis.register_script(BEGIN)
        self._end_as_heir = self._redis.register_script(END_LOST)
        self._give_up = self._redis.register_script(GIVE_UP)
        self._drafts: dict[str, RedisLog] = {}
        self._something_to_write = asyncio.Event()
        self._mirrors: dict[str, _Mirror] = {}
        self._down_until = 0.0
        self._is_reachable = True
        self._behind: dict[str, RedisLog] = {}  # streams that Redis may know, and that went on without it
        self._orphans: set[str] = set()  # streams that were begun in Redis, perhaps, and that nobody carries
        self._inherited: dict[str, tuple[StreamInfo, RecordUsage]] = {}  # ended as heir, unless the answer was no
        self._loop = asyncio.get_running_loop()
        self._alive_at = self._loop.time()
        self._judges_from = self._alive_at + settings.lease_seconds
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._questions = count(1)
        self._asked: dict[int, asyncio.Future[NoteFate]] = {}  # other replicas, by the number of the question
        self._on_word: OnWord = lambda _word, _stream_id, _seconds: None
        self._on_note: OnNote = lambda _stream_id, _principal, _note: "no_such_stream"
        self._on_lost: OnLost = lambda _info, _record: None

    # -- what is asked of a store ------------------------------------------------------------------

    def start(self, on_word: OnWord, on_note: OnNote, on_lost: OnLost) -> None:
        self._on_word, self._on_note, self._on_lost = on_word, on_note, on_lost
        # Apart from each other, so that thousands of streams to follow, restore or inherit do not delay the heartbeat.
        thrice = {
            "beat": self._beat,
            "watch": self._watch_mirrors,
            "restore": self._restore,
            "inherit": self._inherit,
        }
        works = {name: self._three_times_a_lease(work) for name, work in thrice.items()}
        works |= {"write": self._write(), "listen": self._listen()}
        self.tasks.update({name: asyncio.create_task(work) for name, work in works.items()})

    async def create(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        if claim is not None and (held := self.local.held(claim)) is not None:
            return held  # taken while Redis was away
        if not await self._answers():
            return await self._create_alone(info, claim)
        try:
            begun = await self._begun(info, claim)
        except (RedisError, OSError) as error:
            self._is_down(error)
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

    async def find(self, stream_id: str) -> StreamLog | None:
        log, mirror = await self.local.find(stream_id), self._mirrors.get(stream_id)
        if log is not None and mirror is None:
            return log
        try:
            if mirror is None:
                return await self._mirror(stream_id)
            # Whoever asks may have heard more from the stream's own replica than was heard of here.
            await self._catch_up(mirror)
            return mirror
        except (RedisError, OSError) as error:
            await self._doubt(error)
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
            await self._redis.xadd(control, said, maxlen=_MOST_WORDS, approximate=True)
        except (RedisError, OSError) as error:
            await self._doubt(error)

    @property
    def is_behind(self) -> bool:
        """Whether Redis has not heard yet of all that was said here."""
        return bool(self._behind)

    async def annotate(self, stream_id: str, principal: str, note: bytes) -> NoteFate:
        """A question on the other's control stream; the answer comes on ours, within the time that Redis gets."""
        number = next(self._questions)
        answer: asyncio.Future[NoteFate] = self._loop.create_future()
        self._asked[number] = answer
        try:
            meta = await self._meta(stream_id)
            if meta is None or meta["principal"] != principal:
                return "no_such_stream"
            if not await self._redis.exists(self._at(meta["replica"])):
                return "no_such_stream"  # its end is about to be written
            said: dict[Any, Any] = {"word": "annotate", "id": stream_id, "principal": principal, "note": note}
            control = self._at(meta["replica"], "control")
            await self._redis.xadd(control, {**said, "from": self.replica, "number": number}, maxlen=_MOST_WORDS)
            async with asyncio.timeout(self._settings.timeout_seconds):
                return await answer
        except TimeoutError:
            message = "the replica that carries the stream does not answer; whether it took the annotation is not known"
            raise Overloaded("replica_silent", message, headers={"Retry-After": "1"}) from None
        except (RedisError, OSError) as error:
            await self._doubt(error)
            message = "the store that knows where the stream runs cannot be reached; ask again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"}) from None
        finally:
            del self._asked[number]

    async def close(self) -> None:
        await stopped(self.tasks.values())
        try:
            await self._flush()
            await self._catch_redis_up()
            # Whoever leaves in good order leaves nothing open behind.
            pipe = self._redis.pipeline(transaction=False)
            pipe.srem(self._name("replicas"), self.replica)
            pipe.delete(self._at(self.replica), self._at(self.replica, "open"), self._at(self.replica, "control"))
            await pipe.execute()
        except (RedisError, OSError):
            pass
        for log in self._behind.values():
            log.decide(False)  # rather billed twice than never
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
        shared = [(log, draft) for log, draft in drafts if log.is_replicated]
        for log, draft in drafts:
            if not log.is_replicated:
                log.commit(draft)
        if shared:
            await self._share(shared)

    async def _share(self, writes: list[_Write]) -> None:
        """Until Redis has all of them, or has said why not, or does not answer at all."""
        problem: Exception = RedisError("it refuses what is written")
        for _ in range(_TRIES):
            writes = await self._put(writes)
            if not writes:
                return
            try:
                writes = await self._explained(writes)
            except (RedisError, OSError) as error:
                problem = error
                break
        if writes:
            self._is_down(problem)
        for log, draft in writes:
            self._lose(log, draft)

    async def _put(self, writes: list[_Write]) -> list[_Write]:
        """Returns those that Redis has not confirmed."""
        pipe = self._redis.pipeline(transaction=False)
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
        pipe = self._redis.pipeline(transaction=False)
        for log, _ in writes:
            pipe.get(self._name(log.info.stream_id, "heir"))
            pipe.xrevrange(self._name(log.info.stream_id, "log"), count=1)
        answers = await pipe.execute()
        missing: list[_Write] = []
        for (log, draft), heir, tail in zip(writes, answers[::2], answers[1::2], strict=True):
            if heir is not None:
                _log.warning("stream %s was ended by another replica", log.info.stream_id)
                log.abandon()
            elif not tail:
                self._lose(log, draft)  # Redis has forgotten the stream
            elif _place(tail[0][0])[0] < draft.first:
                missing.append((log, draft))
            else:
                log.commit(draft)
        return missing

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
        pipe.xadd(name, fields, id=f"{draft.first}-0", nomkstream=True)
        if draft.is_last:
            self._bury(pipe, stream_id, log.answers or draft.last > 0)
        return mark

    def _bury(self, pipe: Any, stream_id: str, answers: bool) -> None:
        """The stream is over."""
        for part in ("log", "meta"):
            pipe.expire(self._name(stream_id, part), self._seconds_kept(answers))
        pipe.srem(self._at(self.replica, "open"), stream_id)

    def _seconds_kept(self, answers: bool) -> int:
        """A log is kept for the retention time, or not at all where it answers nothing."""
        return max(1, int(self._settings.retention_seconds)) if answers else 1

    def _lose(self, log: RedisLog, draft: _Draft) -> None:
        """Redis does not have it: this log goes on in memory, or its stream ends, as the setting says."""
        log.is_replicated = False
        self._behind[log.info.stream_id] = log
        log.commit(draft)
        if not log.is_over:
            log.lost(self._settings.on_failure == "end")

    def _is_down(self, error: Exception) -> None:
        if self._loop.time() >= self._down_until:
            _log.error("the store does not answer: %s; streams are resumable at their own replica only", error)
        self._is_reachable, self._down_until = False, self._loop.time() + _RETRY_SECONDS
        # The others could not renew their leases either.
        self._judges_from = self._loop.time() + self._settings.lease_seconds

    async def _doubt(self, error: Exception) -> None:
        """Redis did not answer, or it is this process that slept."""
        try:
            await self._redis.ping()
        except (RedisError, OSError):
            self._is_down(error)

    async def _answers(self) -> bool:
        """Whether Redis can be reached; where it could not, it is asked again after a while."""
        if not self._is_reachable and self._loop.time() >= self._down_until:
            try:
                self._is_reachable = bool(await self._redis.ping())
            except (RedisError, OSError) as error:
                self._is_down(error)
        return self._is_reachable

    # -- beginning a stream ------------------------------------------------------------------------

    async def _begun(self, info: StreamInfo, claim: Claim | None) -> bool | Claim | None:
        """True where the stream is open now; else the claim that had the key before, or None where an heir ended it."""
        meta = orjson.dumps({**_to_meta(info), "replica": self.replica, "key": claim and claim.key})
        keys = [*self._parts(info.stream_id), self._at(self.replica, "open")]
        wanted = orjson.dumps({"digest": claim.digest, "stream_id": info.stream_id}) if claim is not None else b""
        if claim is not None:
            keys.append(self._key(claim.principal, claim.key))
        first, last = self._name(""), ":meta"
        args: list[Any] = [meta, self._lifetime, info.stream_id, wanted, first, last]
        answer: Any = await _again(lambda: self._begin(keys=keys, args=args))
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
        if self._settings.on_failure == "end":
            message = "the store that logs the streams is gone, and nothing is sent here that is not logged; try again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"})

    # -- after Redis was away ----------------------------------------------------------------------

    async def _catch_redis_up(self) -> None:
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
        name = self._name(log.info.stream_id, "log")
        tail: Any = await self._redis.xrevrange(name, count=1)
        after, is_ended = int(tail[0][1].get(b"n", 0)), b"e" in tail[0][1]
        try:
            while log.last > after:
                after = await self._rewrite(log, after)
        except Evicted:
            return await self._drop_there(log.info.stream_id)
        except ResponseError:
            return None
        if log.is_over and not is_ended:
            draft = _Draft(log.last + 1, log.last, is_last=True)
            pipe = self._redis.pipeline(transaction=False)
            mark = self._add(pipe, log, draft)
            if not isinstance((await pipe.execute(raise_on_error=False))[mark], bytes):
                return None
        log.is_replicated = True
        return False

    async def _rewrite(self, log: RedisLog, after: int) -> int:
        """Some of what Redis misses; returns the number of its last event then."""
        entries, first = log.read(after, _RESTORED_AT_ONCE)
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            fields: dict[Any, Any] = {"n": entry.last, "d": entry.data}
            pipe.xadd(self._name(log.info.stream_id, "log"), fields, id=f"{first}-0", nomkstream=True)
            first = entry.last + 1
        if None in await pipe.execute():
            raise ResponseError("the log is gone again")
        return first - 1

    async def _drop_there(self, stream_id: str) -> bool:
        """Nobody shall follow the stream any more, nor end it; True where somebody has ended it before."""
        keys = [*self._parts(stream_id), self._at(self.replica, "open")]
        return bool(await _again(lambda: self._give_up(keys=keys, args=[stream_id])))

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
        control = self._at(self.replica, "control")
        await self._redis.xadd(control, {"word": "follow"}, maxlen=_MOST_WORDS, approximate=True)
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
                answer: Any = await self._ear.xread(cursors, count=_PAGE, block=int(_LISTEN_SECONDS * 1000))
            except (RedisError, OSError) as error:
                await self._doubt(error)
                await asyncio.sleep(0 if self._is_reachable else _RETRY_SECONDS)
                continue
            for name, entries in answer or ():
                if name.decode() == control:
                    heard = entries[-1][0].decode()
                    await self._reply(heard, list(self._obey(fields for _, fields in entries)))
                elif (mirror := names.get(name.decode())) is not None:
                    for entry_id, fields in entries:
                        mirror.take(entry_id, fields)
            self._forget_mirrors()

    def _obey(self, words: Iterator[_Fields]) -> Iterator[tuple[str, dict[Any, Any]]]:
        """Does what others ask; gives the answers, each with the replica that waits for it."""
        for fields in words:
            match word := fields[b"word"].decode():
                case "cancel" | "watch":
                    self._on_word(word, fields[b"id"].decode(), float(fields[b"seconds"]))
                case "annotate":
                    fate = self._on_note(fields[b"id"].decode(), fields[b"principal"].decode(), fields[b"note"])
                    yield fields[b"from"].decode(), {"word": "answer", "number": fields[b"number"], "fate": fate}
                case "answer":
                    answer = self._asked.get(int(fields[b"number"]))
                    if answer is not None and not answer.done():
                        answer.set_result(cast(NoteFate, fields[b"fate"].decode()))

    async def _reply(self, heard: str, answers: list[tuple[str, dict[Any, Any]]]) -> None:
        """Answers, and lets go of what was heard, since notes are long."""
        pipe = self._redis.pipeline(transaction=False)
        for replica, answer in answers:
            pipe.xadd(self._at(replica, "control"), answer, maxlen=_MOST_WORDS, approximate=True)
        pipe.xtrim(self._at(self.replica, "control"), minid=heard, approximate=False)
        try:
            await pipe.execute()
        except (RedisError, OSError) as error:
            await self._doubt(error)

    def _forget_mirrors(self) -> None:
        for stream_id, mirror in list(self._mirrors.items()):
            if mirror.is_over_there:
                del self._mirrors[stream_id]
                mirror.finish()
            elif mirror.readers == 0 and mirror.idle_since + 2 * self._settings.lease_seconds < self._loop.time():
                del self._mirrors[stream_id]
                self.local.drop(stream_id)

    # -- who lives ---------------------------------------------------------------------------------

    async def _three_times_a_lease(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except (RedisError, OSError) as error:
                await self._doubt(error)
            except Exception:
                _log.exception("work at the store failed")
            await asyncio.sleep(self._settings.lease_seconds / 3)

    async def _beat(self) -> None:
        await _again(self._say_alive)
        now = self._loop.time()
        if now - self._alive_at > self._settings.lease_seconds:
            # Maybe the whole machine slept, and the others with it.
            self._judges_from = now + self._settings.lease_seconds
        self._is_reachable, self._alive_at = True, now

    async def _restore(self) -> None:
        for stream_id in self._behind.keys() - self.local.ids():
            self._behind[stream_id].forget()
        if await self._answers():
            await self._catch_redis_up()

    async def _inherit(self) -> None:
        """Looks for replicas that do not live; who did not say so for long itself may have slept with all of them."""
        if self._loop.time() - self._alive_at > self._settings.lease_seconds:
            return
        for stream_id in list(self._inherited):
            await self._bill_inherited(stream_id)
        replicas: Any = await self._redis.smembers(self._name("replicas"))
        for replica in replicas if self._loop.time() >= self._judges_from else ():
            await self._look_after(replica.decode())

    async def _say_alive(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(self._at(self.replica), int(time.time()), px=int(self._settings.lease_seconds * 1000))
        pipe.sadd(self._name("replicas"), self.replica)
        pipe.expire(self._at(self.replica, "control"), self._lifetime)
        pipe.expire(self._at(self.replica, "open"), self._lifetime)
        await pipe.execute()

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
        place = self._at(replica, "heir")
        is_first = await self._redis.set(place, self.replica, nx=True, ex=30)
        if not is_first and await self._redis.get(place) != self.replica.encode():
            return
        left: Any = await self._redis.smembers(self._at(replica, "open"))
        _log.warning("replica %s is gone and leaves %d streams", replica, len(left))
        for stream_id in left:
            await self._end_lost(stream_id.decode(), replica)
        # It may live after all, and carry what it was faster with.
        if not await self._redis.exists(self._at(replica), self._at(replica, "open")):
            pipe = self._redis.pipeline(transaction=False)
            pipe.srem(self._name("replicas"), replica)
            pipe.delete(self._at(replica, "control"))
            await pipe.execute()
        await self._redis.delete(place)

    async def _end_lost(self, stream_id: str, replica: str) -> None:
        """Ends a stream whose replica died; the write is refused where it, or another heir, was faster."""
        meta, open_streams = await self._meta(stream_id), self._at(replica, "open")
        if meta is None or (lost := await self._lost(stream_id, meta)) is None:
            await self._redis.srem(open_streams, stream_id)
            return
        info, last, closing = lost
        fields: list[Any] = ["n", closing.last, "e", 1]
        if closing.data:
            fields += ["d", closing.data]
        elif last == 0:
            problem = replica_lost()
            fields += ["w", orjson.dumps({"status": problem.status, "headers": {}}), "d", refusal_of(info.dialect)]
        keys = [*self._parts(stream_id), open_streams, self._at(replica)]
        if meta["key"] and last == 0:
            keys.append(self._key(info.principal, meta["key"]))
        times = [self._lifetime, self._seconds_kept(last > 0)]
        args: list[Any] = [stream_id, self.replica, *times, f"{last + 1}-0", *fields]
        self._inherited[stream_id] = info, closing.record
        is_ours = await _again(lambda: self._end_as_heir(keys=keys, args=args))
        del self._inherited[stream_id]
        if is_ours:
            self._on_lost(info, closing.record)

    async def _lost(self, stream_id: str, meta: Mapping[str, Any]) -> tuple[StreamInfo, int, Closing] | None:
        """What is to be said to the end of the stream, and its last event before that; None where it has ended.

        One that has said all may lack only the mark behind it, for which its readers and its bill wait.
        """
        info = _from_meta(stream_id, meta)
        found = _Mirror(info, _Nobody(), meta["replica"])
        await self._catch_up(found)
        if found.is_over_there:
            return None
        native = [body for entry in found for body in bodies(entry.data, info.form)] if info.has_cursors else []
        ts = int(time.time() * 1000)
        closing = await asyncio.to_thread(close_lost, native, info.form, info.dialect, stream_id, found.last, ts)
        return info, found.last, closing

    async def _bill_inherited(self, stream_id: str) -> None:
        """It was ended by this heir, which did not hear of it, or not at all."""
        heir = await self._redis.get(self._name(stream_id, "heir"))
        info, record = self._inherited.pop(stream_id)
        if heir == self.replica.encode():
            self._on_lost(info, record)

    # -- names -------------------------------------------------------------------------------------

    def _name(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _parts(self, stream_id: str) -> list[str]:
        """What Redis knows of a stream, in the order of the scripts."""
        return [self._name(stream_id, part) for part in ("meta", "log", "heir")]

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
        """What was taken before is not taken again: whoever follows the log and whoever asks for it read it both."""
        if _place(entry_id) <= _place(self.cursor.encode()):
            return
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


async def _again(ask: Callable[[], Awaitable[Any]]) -> Any:
    """Sends what may be sent twice a second time where no answer came: it may be this process that slept."""
    try:
        return await ask()
    except (RedisError, OSError):
        return await ask()


def _place(entry_id: bytes) -> tuple[int, int]:
    """Where an entry stands in its log: the event that it starts with, and a second number."""
    first, _, second = entry_id.partition(b"-")
    return int(first), int(second)


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
