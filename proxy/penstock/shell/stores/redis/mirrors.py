"""The streams that other replicas carry, as far as somebody reads them here, and the words between replicas."""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, cast

import orjson
from redis.exceptions import RedisError

from penstock.core.dialects import Form
from penstock.core.errors import Overloaded
from penstock.shell.stores.log import LogOwner, NoteFate, OnNote, OnWord, StreamInfo, StreamLog, Whole
from penstock.shell.stores.memory import MemoryStore
from penstock.shell.stores.redis.link import LISTEN_SECONDS, RETRY_SECONDS, Link, place

_log = logging.getLogger("penstock")

_PAGE = 256
# The cursor before the first entry.
_NOTHING = "0-0"
Fields = Mapping[bytes, bytes]


class Nobody:
    """Owns a log that is read once and not kept."""

    def grew(self, size: int) -> None: ...

    def ended(self, log: StreamLog) -> None: ...


class Mirror(StreamLog):
    """A log that another replica writes."""

    def __init__(self, info: StreamInfo, owner: LogOwner, replica: str) -> None:
        super().__init__(info, owner)
        self.replica = replica
        self.cursor = _NOTHING
        self.is_over_there = False
        self.idle_since = asyncio.get_running_loop().time()

    def take(self, entry_id: bytes, fields: Fields) -> None:
        """What was taken before is not taken again: whoever follows the log and whoever asks for it read it both."""
        if place(entry_id) <= place(self.cursor.encode()):
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


class Mirrors:
    """Follows the logs of others: one reader for all of them."""

    def __init__(self, link: Link, local: MemoryStore, first_byte_seconds: float) -> None:
        """`first_byte_seconds`: no head waits longer."""
        self._link = link
        self._local = local
        self._first_byte_seconds = first_byte_seconds
        self._loop = asyncio.get_running_loop()
        self._mirrors: dict[str, Mirror] = {}
        self._questions = count(1)
        self._asked: dict[int, asyncio.Future[NoteFate]] = {}  # other replicas, by the number of the question
        self._on_word: OnWord = lambda _word, _stream_id, _seconds: None
        self._on_note: OnNote = lambda _stream_id, _principal, _note: "no_such_stream"

    def start(self, on_word: OnWord, on_note: OnNote) -> None:
        self._on_word, self._on_note = on_word, on_note

    async def find(self, stream_id: str) -> StreamLog | None:
        log, mirror = await self._local.find(stream_id), self._mirrors.get(stream_id)
        if log is not None and mirror is None:
            return log
        try:
            if mirror is None:
                return await self._mirror(stream_id)
            # Whoever asks may have heard more from the stream's own replica than was heard of here.
            mirror.idle_since = self._link.now()  # so that it is not forgotten meanwhile
            await catch_up(self._link, mirror)
            return mirror
        except (RedisError, OSError) as error:
            await self._link.doubt(error)
            message = "the store that knows the stream cannot be reached; ask again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"}) from None

    async def _mirror(self, stream_id: str) -> StreamLog | None:
        meta = await self._link.meta(stream_id)
        if meta is None:
            return None
        mirror = Mirror(from_meta(stream_id, meta), self._local, meta["replica"])
        await catch_up(self._link, mirror)
        if mirror.cursor == _NOTHING:
            return None  # a log begins with its stream, so this one is gone
        if (log := await self._local.find(stream_id)) is not None:
            return log  # somebody else was faster
        self._local.adopt(mirror)
        if mirror.is_over_there:
            mirror.finish()
            return mirror
        self._mirrors[stream_id] = mirror
        if mirror.info.form is not Form.WHOLE:
            opened = mirror.info.started_ms / 1000 + self._first_byte_seconds - time.time()
            self._loop.call_later(max(0.0, opened) + 0.1, mirror.open)
        await self._link.word(self._link.replica, {"word": "follow"})
        await self.tell(stream_id, mirror.info.principal, "watch")
        return mirror

    async def watch(self) -> None:
        """Tells the others what is still read here, and forgets what they have given up."""
        for stream_id, mirror in list(self._mirrors.items()):
            if await self._link.redis.exists(*(self._link.name(stream_id, part) for part in ("meta", "log"))) < 2:
                self._drop(mirror)
            elif mirror.readers:
                await self.tell(stream_id, mirror.info.principal, "watch")

    def _drop(self, mirror: Mirror) -> None:
        self._mirrors.pop(mirror.info.stream_id, None)
        self._local.drop(mirror.info.stream_id)
        mirror.break_off()

    def _forget(self) -> None:
        for stream_id, mirror in list(self._mirrors.items()):
            if mirror.is_over_there:
                del self._mirrors[stream_id]
                mirror.finish()
            elif mirror.readers == 0 and mirror.idle_since + 2 * self._link.settings.lease_seconds < self._link.now():
                del self._mirrors[stream_id]
                self._local.drop(stream_id)

    # -- words -------------------------------------------------------------------------------------

    async def tell(self, stream_id: str, principal: str, word: str) -> None:
        """Passes a word on to the replica that carries the stream: `cancel`, or `watch` for the time of a lease."""
        try:
            meta = await self._link.meta(stream_id)
            if meta is None or meta["principal"] != principal or meta["replica"] == self._link.replica:
                return
            said = {"word": word, "id": stream_id, "seconds": self._link.settings.lease_seconds}
            await self._link.word(meta["replica"], said)
        except (RedisError, OSError) as error:
            await self._link.doubt(error)

    async def annotate(self, stream_id: str, principal: str, note: bytes) -> NoteFate:
        """A question on the other's control stream; the answer comes on ours, within the time that Redis gets."""
        number = next(self._questions)
        answer: asyncio.Future[NoteFate] = self._loop.create_future()
        self._asked[number] = answer
        try:
            meta = await self._link.meta(stream_id)
            if meta is None or meta["principal"] != principal:
                return "no_such_stream"
            if not await self._link.redis.exists(self._link.at(meta["replica"])):
                return "no_such_stream"  # its end is about to be written
            said = {"word": "annotate", "id": stream_id, "principal": principal, "note": note}
            await self._link.word(meta["replica"], {**said, "from": self._link.replica, "number": number})
            async with asyncio.timeout(self._link.settings.timeout_seconds):
                return await answer
        except TimeoutError:
            message = "the replica that carries the stream does not answer; whether it took the annotation is not known"
            raise Overloaded("replica_silent", message, headers={"Retry-After": "1"}) from None
        except (RedisError, OSError) as error:
            await self._link.doubt(error)
            message = "the store that knows where the stream runs cannot be reached; ask again"
            raise Overloaded("store_lost", message, headers={"Retry-After": "1"}) from None
        finally:
            del self._asked[number]

    async def listen(self) -> None:
        """One reader for all streams of other replicas, and for what they ask of this one."""
        control, heard = self._link.at(self._link.replica, "control"), "0"
        has_failed = False
        while True:
            names = {self._link.name(stream_id, "log"): mirror for stream_id, mirror in self._mirrors.items()}
            cursors: dict[Any, Any] = {control: heard, **{name: mirror.cursor for name, mirror in names.items()}}
            try:
                answer: Any = await self._link.ear.xread(cursors, count=_PAGE, block=int(LISTEN_SECONDS * 1000))
            except (RedisError, OSError) as error:
                await self._link.doubt(error)
                # At once where it may only be this process that slept.
                await asyncio.sleep(RETRY_SECONDS if has_failed or not self._link.is_reachable else 0)
                has_failed = True
                continue
            has_failed = False
            for name, entries in answer or ():
                if name.decode() == control:
                    heard = entries[-1][0].decode()
                    await self._reply(heard, list(self._obey(fields for _, fields in entries)))
                elif (mirror := names.get(name.decode())) is not None:
                    self._follow(mirror, entries)
            self._forget()

    def _follow(self, mirror: Mirror, entries: list[tuple[bytes, Fields]]) -> None:
        """Takes what its replica has written; its readers are cut off at what is not understood."""
        try:
            for entry_id, fields in entries:
                mirror.take(entry_id, fields)
        except Exception:
            _log.exception("stream %s cannot be followed", mirror.info.stream_id)
            self._drop(mirror)

    def _obey(self, words: Iterator[Fields]) -> Iterator[tuple[str, dict[Any, Any]]]:
        """Does what others ask; gives the answers, each with the replica that waits for it."""
        for fields in words:
            try:
                yield from self._answers(fields)
            except Exception:
                _log.exception("a word of another replica failed")

    def _answers(self, fields: Fields) -> Iterator[tuple[str, dict[Any, Any]]]:
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
        pipe = self._link.redis.pipeline(transaction=False)
        for replica, answer in answers:
            self._link.add_word(pipe, replica, answer)
        pipe.xtrim(self._link.at(self._link.replica, "control"), minid=heard, approximate=False)
        try:
            await pipe.execute()
        except (RedisError, OSError) as error:
            await self._link.doubt(error)


async def catch_up(link: Link, mirror: Mirror) -> None:
    """Until it has all that Redis has."""
    while True:
        entries: Any = await link.redis.xrange(
            link.name(mirror.info.stream_id, "log"), min=f"({mirror.cursor}", count=_PAGE
        )
        for entry_id, fields in entries:
            mirror.take(entry_id, fields)
        if len(entries) < _PAGE:
            return


def from_meta(stream_id: str, meta: Mapping[str, Any]) -> StreamInfo:
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
