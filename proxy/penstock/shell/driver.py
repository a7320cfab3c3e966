"""Carries one exchange: tells it what happened on both connections and does what it answers."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import assert_never

from penstock.core.commands import (
    AbortEngine,
    AskEngineHealth,
    Close,
    Command,
    OpenClient,
    RecordUsage,
    Respond,
    SendToClient,
    TryAnotherEngine,
    WakeAt,
)
from penstock.core.errors import EngineError
from penstock.core.exchange import Exchange
from penstock.core.signals import Broke, ClientLagged, ClientLeft, ClockTicked, EngineClosed, Signal
from penstock.shell.client import ClientGone
from penstock.shell.sources import Source
from penstock.shell.streams import Outlet

_log = logging.getLogger("penstock")

_Write = OpenClient | SendToClient | Respond | Close


class Driver:
    """One stream from its first byte to its bill. `run` it once; `tell` it what comes from elsewhere."""

    def __init__(
        self,
        exchange: Exchange,
        client: Outlet,
        source: Source,
        *,
        stream_id: str,
        closing_seconds: float,
        buffer_bytes: int,
        record: Callable[[RecordUsage], None],
    ) -> None:
        self._exchange = exchange
        self._client = client
        self._source = source
        self._stream_id = stream_id
        self._closing_seconds = closing_seconds
        self._buffer_bytes = buffer_bytes
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._conversation: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_call: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[None]] = set()
        # Writes that wait for a client without room, and the bytes in them: at most `buffer_bytes` and one ending.
        self._inbox: deque[list[_Write]] = deque()
        self._waiting_bytes = 0
        self._emptying = False
        self._closed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self._exchange.is_over

    def leave(self) -> None:
        """Nobody reads the stream and nobody is waited for: the engine is aborted, and `run` ends soon."""
        self._client_left()

    async def run(self) -> None:
        """Until the answer is over and told."""
        self._conversation = asyncio.create_task(self._converse())
        try:
            await asyncio.wait({self._conversation})
            while self._background:
                await asyncio.wait(self._background)
        except asyncio.CancelledError:
            self._client_left()
            await asyncio.wait({self._conversation})
            raise
        finally:
            for timer in (self._timer, self._last_call):
                if timer is not None:
                    timer.cancel()

    async def tell(self, signal: Signal) -> None:
        """A signal from outside the conversation: the clock, a `DELETE`, the drain. Raises nothing of its client's."""
        await self._quietly(self._take(signal))

    async def _take(self, signal: Signal) -> None:
        was_over = self._exchange.is_over
        commands = self._exchange.receive(signal)
        if self._emptying:
            self._keep(commands)
            return
        await self._obey(commands)
        if self._exchange.is_over and not was_over and self._conversation is not None:
            self._conversation.cancel()

    # -- what the source tells ---------------------------------------------------------------------

    async def hear(self, signal: Signal) -> None:
        """The hot path of plain chunks: one read, one walk through the core, one write."""
        commands = self._exchange.receive(signal)
        if commands and not self._sent_at_once(commands):
            await self._obey(commands)

    def hear_now(self, signal: Signal) -> None:
        """The hot path of tagged tokens, in the task of the connection that all streams share."""
        try:
            commands = self._exchange.receive(signal)
            if commands and (self._emptying or not self._sent_at_once(commands)):
                self._keep(commands)
        except ClientGone:
            self._client_left()
        except Exception:
            self._break()

    async def wait_until_closed(self) -> None:
        await self._closed.wait()

    def _sent_at_once(self, commands: list[Command]) -> bool:
        if len(commands) != 1:
            return False
        command = commands[0]
        return isinstance(command, SendToClient) and self._client.send_now(command.data, command.seq)

    def _keep(self, commands: list[Command]) -> None:
        """Acts, and puts the writes behind those that wait; a client that lets more wait than its cap is cut off."""
        writes = self._act(commands)
        if not writes:
            return
        self._inbox.append(writes)
        self._waiting_bytes += _size(writes)
        if self._exchange.is_over:
            # Whoever does not take the last bytes in time loses them; dropping the client ends the waiting write.
            self._last_call = self._loop.call_later(self._closing_seconds, self._client.abort)
        elif self._waiting_bytes > self._buffer_bytes:
            self._keep(self._exchange.receive(ClientLagged(self._loop.time())))
        if not self._emptying:
            self._emptying = True
            self._in_background(self._empty_inbox())

    async def _empty_inbox(self) -> None:
        try:
            while self._inbox:
                writes = self._inbox.popleft()
                await self._write(writes)
                self._waiting_bytes -= _size(writes)
        finally:
            self._emptying = False

    # -- the conversation --------------------------------------------------------------------------

    async def _converse(self) -> None:
        try:
            await self._obey(self._exchange.start())
            await self._source.speak(self)
        except ClientGone:
            self._client_left()
        except asyncio.CancelledError:
            if not self._exchange.is_over:
                raise
        except Exception:
            self._break()

    def _break(self) -> None:
        _log.exception("stream %s: internal error", self._stream_id)
        self._keep(self._exchange.receive(Broke(self._loop.time())))

    async def _obey(self, commands: list[Command]) -> None:
        await self._write(self._act(commands))

    def _act(self, commands: list[Command]) -> list[_Write]:
        """Does what needs no waiting, at once, and returns the rest: what goes to the client, in order."""
        writes: list[_Write] = []
        for command in commands:
            match command:
                case OpenClient() | SendToClient() | Respond() | Close():
                    writes.append(command)
                case WakeAt():
                    self._wake_at(command.when)
                case AbortEngine():
                    self._source.abort()
                case TryAnotherEngine():
                    self._source.try_another(command.problem)
                case AskEngineHealth():
                    self._in_background(self._ask_engine_health())
                case RecordUsage():
                    self._record(command)
                case _:
                    assert_never(command)
        return writes

    async def _write(self, writes: list[_Write]) -> None:
        """The bytes of one list are one write, so that those of no other list get between."""
        before, data, seq, whole, closing = b"", b"", 0, None, False
        for write in writes:
            match write:
                case SendToClient(seq=0) | OpenClient():
                    if isinstance(write, OpenClient):
                        await self._client.open(self._exchange.content_type)
                    before += write.data
                case SendToClient():
                    data, seq = data + write.data, write.seq
                case Respond():
                    whole = write
                case Close():
                    closing = True
        if closing:
            await self._close(before, data, seq, whole)
        elif data or before:
            await self._client.send(data, seq, before)

    async def _close(self, before: bytes, data: bytes, seq: int, whole: Respond | None) -> None:
        """The last bytes, within the time that a caller gets to take them; then the connection is dropped."""
        try:
            async with asyncio.timeout(self._closing_seconds):
                if whole is not None:
                    await self._client.respond(whole.status, whole.body, "application/json", whole.headers)
                    return
                if data:
                    await self._client.send(data, seq, before)
                await self._client.finish()
        except TimeoutError:
            self._client.abort()
        finally:
            self._closed.set()

    # -- time and the rest -------------------------------------------------------------------------

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._tick)

    def _tick(self) -> None:
        self._in_background(self.tell(ClockTicked(self._loop.time())))

    async def _ask_engine_health(self) -> None:
        if not await self._source.is_healthy():
            message = "the engine has gone silent in the middle of its answer and its health check fails"
            problem = EngineError("engine_stalled", message, status=504)
            await self.tell(EngineClosed(problem, self._loop.time()))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(self._quietly(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _quietly(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except ClientGone:
            self._client_left()
        except Exception:
            self._break()

    def _client_left(self) -> None:
        """Nobody is there to be told but the log; the engine is stopped and the bill is written."""
        waiting = [write for writes in self._inbox for write in writes]
        self._inbox.clear()
        for write in waiting + self._act(self._exchange.receive(ClientLeft(self._loop.time()))):
            if isinstance(write, SendToClient):
                self._client.keep(write.data, write.seq)
        self._client.end()
        self._source.abort()
        self._closed.set()
        if self._conversation is not None and self._conversation is not asyncio.current_task():
            self._conversation.cancel()


def _size(writes: list[_Write]) -> int:
    return sum(len(write.data) for write in writes if isinstance(write, SendToClient | OpenClient))
