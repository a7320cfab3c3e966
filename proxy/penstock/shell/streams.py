"""The streams of this replica: where each one's bytes go, and who still reads them.

    driver -> Outlet -> log (first) -> the connection that opened the stream (then)
                         `-> any number of readers, each at its own cursor

A client that leaves is not the end of a stream: it ends when nobody reads it and its linger time, which is none by
default, is over.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Protocol

from penstock.core.signals import Annotated, Cancelled, Draining, ReadAgain, Signal, StoreLost, TakenOver, Unread
from penstock.shell.client import ClientConnection, ClientGone
from penstock.shell.stores.log import DeferredLog, NoteFate, StreamLog, Whole

_log = logging.getLogger("penstock")


class Carrier(Protocol):
    """What carries a stream: its driver."""

    @property
    def is_over(self) -> bool:
        """Whether everything was said, be it that the client has not taken all of it."""

    async def run(self) -> None: ...

    def hear(self, signal: Signal) -> None: ...

    async def tell(self, signal: Signal) -> None: ...

    def leave(self) -> None: ...


class GoesOn(Protocol):
    def __call__(self, *, was_cut: bool = False) -> bool: ...


class Outlet:
    """What a driver writes to. Every event is in the log before it is sent; without a log it is only sent."""

    def __init__(self, connection: ClientConnection, log: StreamLog | None, goes_on: "GoesOn") -> None:
        """`goes_on` is asked when the client is found to be gone, or was cut off: whether the stream goes on."""
        self._connection: ClientConnection | None = connection
        self._log = log
        self._goes_on = goes_on
        self._hanging_up: asyncio.Task[None] | None = None
        self._untold = False  # the client left, and the driver does not know yet
        self._is_full = False
        self._later = log if isinstance(log, DeferredLog) else None
        if self._later is not None:
            self._later.deliver = self._deliver

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client in its connection, or to be logged before they are sent."""
        waiting = self._later.waiting_bytes if self._later is not None else 0
        return waiting + (self._connection.unsent if self._connection is not None else 0)

    async def open(self, content_type: str, preamble: bytes) -> None:
        if self._log is not None:
            self._log.open()
        if self._connection is not None:
            try:
                await self._connection.open(content_type, preamble)
            except ClientGone:
                # Told with the first write: its events have their numbers already, so they must be in the log.
                self._connection, self._untold = None, True

    def send(self, data: bytes, seq: int) -> bool:
        """Keeps and sends, without waiting; False where more than its high mark waits for the client now."""
        if self._later is not None and seq:
            self._later.append_later(data, seq, send=True)
            if self._untold:
                self._lost()
            return self._later.has_room and not self._is_full
        self.keep(data, seq)
        if self._connection is not None:
            try:
                return self._connection.send(data)
            except ClientGone:
                self._lost()
        elif self._untold:
            self._lost()
        return True

    async def settled(self) -> None:
        """Until the log has all that was sent."""
        if self._later is not None:
            await self._later.settled()

    async def room(self) -> None:
        """Until no more than the low mark waits for the client, or it is gone and the stream goes on."""
        await self.settled()
        connection = self._connection
        try:
            if connection is not None:
                await connection.room()
                self._is_full = False
        except ClientGone:
            if self._connection is connection:
                self._lost()

    def keep(self, data: bytes, seq: int) -> None:
        """Puts events into the log; what has no number is none."""
        if self._later is not None and seq:
            self._later.append_later(data, seq, send=False)
        elif self._log is not None and seq:
            self._log.append(data, seq)

    def _deliver(self, data: bytes) -> None:
        """What was logged just now goes out."""
        if self._connection is not None:
            try:
                self._is_full = not self._connection.send(data)
            except ClientGone:
                self._connection, self._untold = None, True  # the driver is told with its next write

    async def respond(self, status: int, body: bytes, content_type: str, headers: dict[str, str]) -> None:
        if self._log is not None:
            self._log.answer(Whole(status, body, headers))
        await self._end()
        if self._connection is not None:
            await self._connection.respond(status, body, content_type, headers)

    async def finish(self) -> None:
        await self._end()
        if self._connection is not None:
            await self._connection.finish()

    async def _end(self) -> None:
        self.end()
        await self.settled()

    def end(self) -> None:
        if self._log is not None:
            self._log.end()

    def abort(self) -> None:
        """Ends every waiting: for the client, which is dropped, and for the log."""
        if self._later is not None:
            self._later.give_up()
        if self._connection is not None:
            self._connection.abort()

    def cut_off(self, data: bytes, seconds: float) -> None:
        """Closes the connection behind `data`, within `seconds`; the stream goes on without it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._goes_on(was_cut=True)
        with suppress(ClientGone):
            connection.send(data)
        self._hanging_up = asyncio.create_task(connection.hang_up(seconds))

    def detach(self) -> None:
        """The client is gone: from here on only the log is written."""
        self._connection = None

    def _lost(self) -> None:
        self._connection, self._untold = None, False
        if not self._goes_on():
            raise ClientGone


class LiveStream:
    """One stream that is carried here, with whoever reads it."""

    def __init__(
        self,
        stream_id: str,
        principal: str,
        connection: ClientConnection,
        log: StreamLog | None,
        *,
        linger_seconds: float,
        cut_linger_seconds: float,
    ) -> None:
        """It lingers for `linger_seconds` where its client leaves, for the other where Penstock cuts it off."""
        self.stream_id = stream_id
        self.principal = principal
        self.log = log
        self._notes = 0  # that backends have added
        self.outlet = Outlet(connection, log, self._opener_is_gone)
        self._linger_seconds = linger_seconds if log is not None else 0.0
        self._cut_linger_seconds = cut_linger_seconds if log is not None else 0.0
        self._loop = asyncio.get_running_loop()
        self._readers = 1  # who opened it
        self._has_opener = True
        self._lingering: asyncio.TimerHandle | None = None
        self._driver: Carrier | None = None
        self._watched_until = 0.0
        self._telling: set[asyncio.Task[None]] = set()
        if isinstance(log, DeferredLog):
            log.lost, log.taken_over = self._store_lost, self._taken_over

    async def carry(self, driver: Carrier) -> None:
        """Until the stream is over, whoever leaves."""
        self._driver = driver
        if self.log is not None and self.log.is_alone:
            self._store_lost(False)
        try:
            await driver.run()
        finally:
            self._stop_timer()

    def opener_left(self) -> bool:
        """Whether the stream goes on without who opened it; if not, it is being ended."""
        goes_on = self._opener_is_gone()
        if not goes_on and self._driver is not None:
            self._driver.leave()
        return goes_on

    async def tell(self, signal: Signal) -> None:
        if self._driver is not None:
            await self._driver.tell(signal)

    def annotate(self, note: Annotated, most: int) -> NoteFate:
        """Puts a note behind what was sent so far, where the stream has not said all and has fewer than `most`."""
        if self._driver is None or self._driver.is_over:
            return "no_such_stream"
        if self._notes >= most:
            return "too_many_annotations"
        self._notes += 1
        self._driver.hear(note)
        return "accepted"

    def tell_soon(self, signal: Callable[[float], Signal]) -> None:
        """`signal` is made when it is told, since another one may be told before it and time must not go back."""
        task = asyncio.create_task(self._tell_now(signal))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell_now(self, signal: Callable[[float], Signal]) -> None:
        await self.tell(signal(self._loop.time()))

    def watch(self, seconds: float) -> None:
        """Somebody reads it at another replica, and will for so long."""
        self._watched_until = self._loop.time() + seconds
        if self._lingering is not None:
            self._stop_timer()
            self._hear(ReadAgain(self._loop.time()))
            self._linger(at_once=True)

    def when_decided(self, tell: Callable[[bool], None]) -> None:
        """Calls `tell` once it is certain whether the stream's end is this replica's; True where it is another's."""
        if isinstance(self.log, DeferredLog):
            self.log.when_decided(tell)
        else:
            tell(False)

    def _store_lost(self, fatal: bool) -> None:
        self.tell_soon(partial(StoreLost, fatal))

    def _taken_over(self) -> None:
        """Its client must not be told another end than the log has: it is cut off and may resume."""
        self.outlet.abort()
        self.outlet.detach()
        self.tell_soon(TakenOver)

    @contextmanager
    def read(self) -> Iterator[None]:
        """While somebody reads its log."""
        self._readers += 1
        if self._lingering is not None:
            self._stop_timer()
            self._hear(ReadAgain(self._loop.time()))
        try:
            yield
        finally:
            self._leave()

    def outlives_client(self) -> bool:
        """Whether the stream goes on where its client is cut off."""
        return self._cut_linger_seconds > 0

    def _opener_is_gone(self, *, was_cut: bool = False) -> bool:
        """Whether the stream goes on without who opened it."""
        if self._has_opener:
            self._has_opener = False
            if was_cut:
                self._linger_seconds = max(self._linger_seconds, self._cut_linger_seconds)
            self.outlet.detach()
            self._leave(at_once=False)
        return self._readers > 0 or self._lingering is not None

    def _leave(self, *, at_once: bool = True) -> None:
        self._readers -= 1
        if not self._readers:
            self._linger(at_once=at_once)

    def _linger(self, *, at_once: bool) -> None:
        watched = self._watched_until - self._loop.time()
        seconds = max(self._linger_seconds, watched)
        if seconds > 0:
            self._lingering = self._loop.call_later(seconds, self._nobody_came)
            if watched <= 0:
                self._hear(Unread(self._loop.time()))
        elif at_once:
            self._nobody_came()

    def _hear(self, signal: Signal) -> None:
        if self._driver is not None:
            self._driver.hear(signal)

    def _nobody_came(self) -> None:
        self._lingering = None
        if self._driver is not None:
            self._driver.leave()

    def _stop_timer(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None


class Streams:
    """Every stream that is carried here, by its id."""

    def __init__(self) -> None:
        self._live: dict[str, LiveStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    def __len__(self) -> int:
        return len(self._live)

    def get(self, stream_id: str) -> LiveStream | None:
        return self._live.get(stream_id)

    async def carry(self, stream: LiveStream, driver: Carrier, until_over: ExitStack) -> None:
        """Until the stream is over; then `until_over` is closed.

        If the opener leaves, this is cancelled, and the stream may go on all the same.
        """
        self._live[stream.stream_id] = stream
        self._all_closed.clear()
        task = asyncio.create_task(stream.carry(driver))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._over(stream, task, until_over))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not stream.opener_left():
                await asyncio.wait({task})
            raise

    def _over(self, stream: LiveStream, task: asyncio.Task[None], until_over: ExitStack) -> None:
        until_over.close()
        self._tasks.discard(task)
        del self._live[stream.stream_id]
        if not self._live:
            self._all_closed.set()

    async def cancel(self, stream_id: str, principal: str) -> bool:
        """Cancels a stream of this caller; False where it is not carried here."""
        stream = self._live.get(stream_id)
        if stream is None:
            return False
        if stream.principal == principal:
            await stream.tell(Cancelled(asyncio.get_running_loop().time()))
        return True

    def annotate(self, stream_id: str, principal: str, note: Annotated, most: int) -> NoteFate | None:
        """What comes of a note for a stream of this caller; None where the stream is not carried here."""
        stream = self._live.get(stream_id)
        if stream is None:
            return None
        return stream.annotate(note, most) if stream.principal == principal else "no_such_stream"

    def obey(self, word: str, stream_id: str, seconds: float) -> None:
        """What another replica asks on behalf of the stream's own caller."""
        if (stream := self._live.get(stream_id)) is None:
            return
        if word == "cancel":
            stream.tell_soon(Cancelled)
        elif word == "watch":
            stream.watch(seconds)

    async def drain(self, seconds: float) -> None:
        """Until no stream is open; after `seconds` the rest is ended with an error event."""
        try:
            async with asyncio.timeout(seconds):
                await self._all_closed.wait()
        except TimeoutError:
            _log.warning("drain time is over: ending %d open streams", len(self._live))
            now = asyncio.get_running_loop().time()
            await asyncio.gather(*(stream.tell(Draining(now)) for stream in list(self._live.values())))
            await self._all_closed.wait()
