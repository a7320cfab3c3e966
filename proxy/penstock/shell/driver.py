"""Carries one exchange: tells it what happened on both connections and does what it answers."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import assert_never

import aiohttp

from penstock.core.commands import (
    AbortEngine,
    AskEngineHealth,
    Close,
    Command,
    OpenClient,
    RecordUsage,
    Respond,
    SendToClient,
    WakeAt,
)
from penstock.core.errors import EngineError, LimitReached, Problem
from penstock.core.exchange import Exchange
from penstock.core.signals import (
    Broke,
    ClientLeft,
    ClockTicked,
    EngineAnswered,
    EngineClosed,
    EngineRefused,
    EngineSpoke,
    Signal,
)
from penstock.shell.client import ClientConnection, ClientGone
from penstock.shell.engine import Engine

_log = logging.getLogger("penstock")

# An engine's error page is read up to here; what it says beyond is not worth the memory.
_MOST_ERROR_BYTES = 64 * 1024


class Driver:
    """One stream from its first byte to its bill. `run` it once; `tell` it what comes from elsewhere."""

    def __init__(
        self,
        exchange: Exchange,
        client: ClientConnection,
        engine: Engine,
        *,
        stream_id: str,
        content_type: str,
        closing_seconds: float,
        whole_bytes: int,
        record: Callable[[RecordUsage], None],
    ) -> None:
        self._exchange = exchange
        self._client = client
        self._engine = engine
        self._stream_id = stream_id
        self._content_type = content_type
        self._closing_seconds = closing_seconds
        self._whole_bytes = whole_bytes
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._conversation: asyncio.Task[None] | None = None
        self._answer: aiohttp.ClientResponse | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._telling: set[asyncio.Task[None]] = set()

    async def run(self, path: str, body: bytes, headers: Mapping[str, str], *, streams: bool) -> None:
        """Until the answer is over and told. If the caller leaves, this task is cancelled: the engine is aborted."""
        self._conversation = asyncio.create_task(self._converse(path, body, headers, streams=streams))
        try:
            await asyncio.wait({self._conversation})
            if self._telling:
                await asyncio.wait(self._telling)
        except asyncio.CancelledError:
            self._client_left()
            await asyncio.wait({self._conversation})
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def tell(self, signal: Signal) -> None:
        """A signal from outside the conversation: the clock, a `DELETE`, the drain."""
        was_over = self._exchange.is_over
        await self._obey(self._exchange.receive(signal))
        if self._exchange.is_over and not was_over and self._conversation is not None:
            self._conversation.cancel()

    async def _converse(self, path: str, body: bytes, headers: Mapping[str, str], *, streams: bool) -> None:
        try:
            await self._obey(self._exchange.start())
            await self._obey(self._exchange.receive(await self._listen(path, body, headers, streams=streams)))
        except ClientGone:
            self._client_left()
        except asyncio.CancelledError:
            if not self._exchange.is_over:
                raise
        except Exception:
            _log.exception("stream %s: internal error", self._stream_id)
            await self._obey(self._exchange.receive(Broke(self._loop.time())))

    async def _listen(self, path: str, body: bytes, headers: Mapping[str, str], *, streams: bool) -> Signal:
        """Everything the engine says; returns the last thing to tell about it."""
        try:
            async with self._engine.post(path, body, headers) as answer:
                self._answer = answer
                if answer.status != 200:
                    error = await answer.content.read(_MOST_ERROR_BYTES)
                    return EngineRefused(answer.status, error, self._loop.time())
                if not streams or answer.content_type == "application/json":
                    return EngineAnswered(await self._read_whole(answer), self._loop.time())
                await self._pass_on(answer)
                return EngineClosed(None, self._loop.time())
        except Problem as problem:
            return EngineClosed(problem, self._loop.time())

    async def _pass_on(self, answer: aiohttp.ClientResponse) -> None:
        """The hot path: one read, one walk through the core, one write."""
        receive, time = self._exchange.receive, self._loop.time
        async for data in answer.content.iter_any():
            commands = receive(EngineSpoke(data, time()))
            if len(commands) == 1 and isinstance(commands[0], SendToClient):
                await self._client.send(commands[0].data)
            elif commands:
                await self._obey(commands)
            if self._exchange.is_over:
                return

    async def _read_whole(self, answer: aiohttp.ClientResponse) -> bytes:
        pieces: list[bytes] = []
        size = 0
        async for data in answer.content.iter_any():
            size += len(data)
            if size > self._whole_bytes:
                message = f"the engine's answer is larger than {self._whole_bytes} bytes (limits.stream_bytes)"
                raise LimitReached("stream_bytes_limit", message)
            pieces.append(data)
        return b"".join(pieces)

    async def _obey(self, commands: list[Command]) -> None:
        """What needs no waiting first, then the bytes of the whole list in one write, so that no other gets between."""
        data, whole, closing = b"", None, False
        for command in commands:
            match command:
                case SendToClient():
                    data += command.data
                case OpenClient():
                    await self._client.open(self._content_type)
                    data += command.data
                case WakeAt():
                    self._wake_at(command.when)
                case AbortEngine():
                    self._abort_engine()
                case AskEngineHealth():
                    self._in_background(self._ask_engine_health())
                case RecordUsage():
                    self._record(command)
                case Respond():
                    whole = command
                case Close():
                    closing = True
                case _:
                    assert_never(command)
        if closing:
            await self._close(data, whole)
        elif data:
            await self._client.send(data)

    async def _close(self, data: bytes, whole: Respond | None) -> None:
        """The last bytes, within the time that a caller gets to take them; then the connection is dropped."""
        try:
            async with asyncio.timeout(self._closing_seconds):
                if whole is not None:
                    await self._client.respond(whole.status, whole.body, "application/json", whole.headers)
                    return
                if data:
                    await self._client.send(data)
                await self._client.finish()
        except TimeoutError:
            self._client.abort()

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._tick)

    def _tick(self) -> None:
        self._in_background(self._tell_quietly(ClockTicked(self._loop.time())))

    async def _ask_engine_health(self) -> None:
        if not await self._engine.is_healthy():
            message = "the engine has gone silent in the middle of its answer and its health check fails"
            problem = EngineError("engine_stalled", message, status=504)
            await self._tell_quietly(EngineClosed(problem, self._loop.time()))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell_quietly(self, signal: Signal) -> None:
        try:
            await self.tell(signal)
        except ClientGone:
            self._client_left()

    def _client_left(self) -> None:
        for command in self._exchange.receive(ClientLeft(self._loop.time())):
            if isinstance(command, RecordUsage):
                self._record(command)
        self._abort_engine()
        if self._conversation is not None and self._conversation is not asyncio.current_task():
            self._conversation.cancel()

    def _abort_engine(self) -> None:
        """Closes the connection, which is how vLLM learns that nobody waits any more."""
        if self._answer is not None:
            self._answer.close()
