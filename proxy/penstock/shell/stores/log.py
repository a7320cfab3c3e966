"""The log of one stream, and what a store must do that keeps many."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from penstock.core.commands import RecordUsage
from penstock.core.dialects import Form

# What an entry costs beside its bytes: the bytes object, the entry, its place in the list (121 by tracemalloc).
ENTRY_OVERHEAD = 128
# A write that takes longer was given up, or nearly so.
_UNDER_WAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a stream from its start. `dialect` is its class's name, `started_ms` Unix time."""

    stream_id: str
    principal: str
    form: Form
    dialect: str
    content_type: str
    started_ms: int
    asked: str = ""
    """The digest of the request without its `penstock`, by which a continuation of the answer is known."""

    @property
    def has_cursors(self) -> bool:
        return self.form in (Form.SSE, Form.NDJSON)


@dataclass(frozen=True, slots=True)
class Claim:
    """A caller's idempotency key, the digest of the request it came with and the stream that answers it."""

    principal: str
    key: str
    digest: str
    stream_id: str


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that was not streamed."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Entry:
    """What one write brought. `last` is the number of its last event; it starts behind the entry before it."""

    last: int
    data: bytes


class Evicted(Exception):
    """The log no longer goes back to the cursor; it starts at event `earliest`."""

    def __init__(self, earliest: int) -> None:
        super().__init__(f"the log starts at event {earliest}")
        self.earliest = earliest


class StreamLog:
    """The bytes of one stream, in order. Written by one, read by any number, each at its own cursor."""

    is_deferred: ClassVar[bool] = False
    """Whether what is handed in is in the log only later: then `DeferredLog` says more."""

    def __init__(self, info: StreamInfo, owner: "LogOwner") -> None:
        self.info = info
        self.is_open = False  # the head went out, or an answer is there
        self.is_over = False
        self.whole: Whole | None = None
        self.earliest = 1
        self.last = 0
        self.size = 0
        self.readers = 0
        self.is_alone = False  # it was to be shared with other replicas, and is not
        self._entries: list[Entry] = []
        self._owner = owner
        self._waiting: set[asyncio.Future[None]] = set()

    def open(self) -> None:
        self.is_open = True
        self._wake()

    def append(self, data: bytes, last: int) -> None:
        self._entries.append(Entry(last, data))
        self.last = last
        self._grow(len(data) + ENTRY_OVERHEAD)
        if self._waiting:
            self._wake()

    def answer(self, whole: Whole) -> None:
        self.whole, self.is_open = whole, True
        self._grow(len(whole.body) + ENTRY_OVERHEAD)
        self._wake()

    def end(self) -> None:
        """Nothing follows. May be said more than once."""
        if not self.is_over:
            self.is_open = self.is_over = True
            self._owner.ended(self)
            self._wake()

    @property
    def answers(self) -> bool:
        """Whether a retry may be answered with it: an attempt that was refused is none, and may be made again."""
        return self.last > 0 if self.whole is None else self.whole.status < 400

    def read(self, after: int, most: int) -> tuple[list[Entry], int]:
        """Entries behind the cursor, about `most` bytes, and the number of the first event in them.

        The first entry may start before the cursor. Raises `Evicted` where the log does not go back so far.
        """
        if after + 1 < self.earliest:
            raise Evicted(self.earliest)
        index = bisect_right(self._entries, after, key=lambda entry: entry.last)
        first = self._entries[index - 1].last + 1 if index else self.earliest
        taken: list[Entry] = []
        for entry in self._entries[index:]:
            taken.append(entry)
            most -= len(entry.data)
            if most <= 0:
                break
        return taken, first

    def break_off(self) -> None:
        """It is not to be read any further: readers are cut off, and may find it elsewhere."""
        self.earliest = self.last + 2
        self._wake()

    def forget_oldest(self, size: int) -> int:
        """Drops entries from the start, at least `size` bytes of them where there are so many; tells how many."""
        dropped = count = 0
        for entry in self._entries[:-1]:
            if dropped >= size:
                break
            dropped += len(entry.data) + ENTRY_OVERHEAD
            self.earliest = entry.last + 1
            count += 1
        del self._entries[:count]
        self.size -= dropped
        return dropped

    async def changed(self, seconds: float) -> bool:
        """Until something is added or the log ends; False where `seconds` passed without."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            async with asyncio.timeout(seconds):
                await waiting
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(waiting)
        return True

    async def reach(self, seq: int) -> None:
        """Until it has event `seq`, if that is on its way: who read it elsewhere may be faster than this process."""

    def _grow(self, size: int) -> None:
        self.size += size
        self._owner.grew(size)

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)


class DeferredLog(StreamLog):
    """A log that is written elsewhere first; what it then calls, whoever writes it sets."""

    is_deferred: ClassVar[bool] = True

    def __init__(self, info: StreamInfo, owner: "LogOwner") -> None:
        super().__init__(info, owner)
        self.deliver: Callable[[bytes], None] = lambda _: None
        """Takes bytes that were handed in with `send`, once they are in the log, in order."""
        self.lost: Callable[[bool], None] = lambda _: None
        """Told when the log goes on in this process only; True where the stream shall end for that."""
        self.taken_over: Callable[[], None] = lambda: None
        """Told when somebody else has ended the stream, and nothing more is said here."""

        self.waiting_bytes = 0
        """What was handed in and is not in the log yet."""

        self._is_anothers: bool | None = None
        self._to_tell: list[Callable[[bool], None]] = []

    def when_decided(self, tell: Callable[[bool], None]) -> None:
        """Calls `tell` once it is certain whose ending the stream has: True where another replica ended and billed it.

        That may be long after the end was said here, since it is only known where the others can be reached.
        """
        if self._is_anothers is None:
            self._to_tell.append(tell)
        else:
            tell(self._is_anothers)

    def decide(self, is_anothers: bool) -> None:
        """It is certain now; what is said later counts no more."""
        if self._is_anothers is None:
            self._is_anothers = is_anothers
            while self._to_tell:
                self._to_tell.pop(0)(is_anothers)

    @property
    def has_room(self) -> bool:
        """Whether little waits to be written."""
        raise NotImplementedError

    def append_later(self, data: bytes, last: int, *, send: bool) -> None:
        raise NotImplementedError

    async def reach(self, seq: int) -> None:
        while self.last < seq and self.waiting_bytes and await self.changed(_UNDER_WAY_SECONDS):
            continue

    async def settled(self) -> None:
        """Until everything that was handed in is in the log, or `give_up` was called."""
        raise NotImplementedError

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        raise NotImplementedError


class LogOwner(Protocol):
    """What a log tells the store that keeps it."""

    def grew(self, size: int) -> None: ...

    def ended(self, log: StreamLog) -> None: ...


OnWord = Callable[[str, str, float], None]
"""A word (`cancel`, or `watch` for so many seconds), the stream's id and the seconds."""
OnLost = Callable[[StreamInfo, RecordUsage], None]
NoteFate = Literal["accepted", "no_such_stream", "too_many_annotations"]
"""What came of a backend's note."""
OnNote = Callable[[str, str, bytes], NoteFate]
"""A note for a stream that is carried here: the stream's id, the caller whose it must be, and the note as it came."""


class Store(Protocol):
    """What keeps the logs. Everything else about streams is the same whatever keeps them."""

    async def create(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        """A new log; or the claim that had the key before, and no log is made.

        A key is free again when its attempt ended without an answer, and when the log of its stream is forgotten.
        """

    def start(self, on_word: OnWord, on_note: OnNote, on_lost: OnLost) -> None:
        """Call once. The first two hear what other replicas ask, `on_lost` the bills of streams that lost theirs."""

    async def tell(self, stream_id: str, principal: str, word: str) -> None:
        """Passes a word on to the replica that carries the stream; nothing if there is none or it is another's."""

    async def annotate(self, stream_id: str, principal: str, note: bytes) -> NoteFate:
        """Hands a note to the other replica that carries the stream. Those of one caller arrive in their order.

        Raises `Overloaded` where that replica does not say what came of it.
        """

    async def find(self, stream_id: str) -> StreamLog | None:
        """The log of a stream, running or over; None where there is none any more."""

    async def close(self) -> None: ...
