"""Carries one exchange: tells it what happened on both connections and does what it answers."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import assert_never

from penstock.core.commands import (
    AbortEngine,
    AskAgain,
    AskEngineHealth,
    AskModerator,
    Close,
    Command,
    CutClient,
    KeepAnswer,
    NoteIntervention,
    OpenClient,
    PauseEngine,
    RecordUsage,
    Respond,
    ResumeEngine,
    RunTools,
    SendToClient,
    TryAnotherEngine,
    WakeAt,
)
from penstock.core.errors import EngineError
from penstock.core.events import Intervention
from penstock.core.exchange import Exchange
from penstock.core.kept_answer import KeptAnswer
from penstock.core.signals import (
    Broke,
    ClientBacklog,
    ClientLeft,
    ClockTicked,
    Draining,
    EngineClosed,
    Signal,
    VerdictReached,
)
from penstock.shell.client import ClientGone
from penstock.shell.sources import Source
from penstock.shell.streams import Outlet

_log = logging.getLogger("penstock")

_Write = OpenClient | SendToClient | Respond | Close


class Driver:
    """One stream from its first byte to its bill. `run` it once; `tell` it what comes from elsewhere.

    Nothing here waits for the client but the head and the end of its answer. `holds` is told how many bytes wait for
    a client that lags.
    """

    def __init__(
        self,
        exchange: Exchange,
        client: Outlet,
        source: Source,
        *,
        stream_id: str,
        closing_seconds: float,
        record: Callable[[RecordUsage], None],
        holds: Callable[[int], None],
        note: Callable[[Intervention], None],
        judge: Callable[[AskModerator, int], Awaitable[VerdictReached]],
        carry_on: Callable[[RunTools | AskAgain], None] | None = None,
        keep: Callable[[KeptAnswer], None] | None = None,
    ) -> None:
        self._exchange = exchange
        self._client = client
        self._source = source
        self._stream_id = stream_id
        self._closing_seconds = closing_seconds
        self._record = record
        self._holds = holds
        self._note = note
        self._carry_on = carry_on
        self._keep = keep
        self._judge = judge
        self._loop = asyncio.get_running_loop()
        self._conversation: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[None]] = set()
        # Writes behind one that has to be awaited: the head, a whole answer, the end.
        self._inbox: deque[list[_Write]] = deque()
        self._writing: asyncio.Task[None] | None = None  # empties the inbox
        self._watch: asyncio.Task[None] | None = None  # waits for a client that lags to have room
        self._hurried = asyncio.Event()
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
            if self._timer is not None:
                self._timer.cancel()

    async def tell(self, signal: Signal) -> None:
        """A signal from outside the conversation: a `DELETE`, the drain. Raises nothing of its client's."""
        if isinstance(signal, Draining):
            self._hurried.set()
        self._take(signal)

    def hear(self, signal: Signal) -> None:
        """The hot path: one read of the engine, one walk through the core, one write."""
        try:
            self._do(self._exchange.receive(signal))
        except ClientGone:
            self._client_left()
        except Exception:
            self._break()

    def _take(self, signal: Signal) -> None:
        """A signal that does not come from the source: if it ends the stream, the source is not listened to."""
        was_over = self._exchange.is_over
        self.hear(signal)
        if self._exchange.is_over and not was_over:
            self._stop_conversation()

    async def wait_until_closed(self) -> None:
        await self._closed.wait()

    async def logged(self) -> None:
        while self._writing is not None:  # events wait behind the head
            await asyncio.wait({self._writing})
        await self._client.settled()

    # -- what the exchange asks for ----------------------------------------------------------------

    def _do(self, commands: list[Command]) -> None:
        if len(commands) == 1 and self._writing is None:
            command = commands[0]
            if isinstance(command, SendToClient):
                if not self._client.send(command.data, command.seq):
                    self._watch_backlog()
                return
        if commands and (writes := self._act(commands)):
            self._put(writes)

    def _act(self, commands: list[Command]) -> list[_Write]:
        """Does what needs no client, and returns the rest: what goes to the client, in order."""
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
                case CutClient():
                    self._cut_off(command.data)
                case PauseEngine():
                    self._source.pause()
                case ResumeEngine():
                    self._source.resume()
                case RunTools() | AskAgain():
                    if self._carry_on is not None:
                        self._carry_on(command)
                case AskEngineHealth():
                    self._in_background(self._ask_engine_health())
                case RecordUsage():
                    self._record(command)
                case AskModerator():
                    for watch in command.watches:
                        self._in_background(self._ask_moderator(command, watch))
                case NoteIntervention():
                    self._note(command.intervention)
                case KeepAnswer():
                    if self._keep is not None:
                        self._keep(command.answer)
                case _:
                    assert_never(command)
        return writes

    def _put(self, writes: list[_Write]) -> None:
        """Writes at once, or behind what has to be awaited."""
        if self._writing is None and all(isinstance(write, SendToClient) for write in writes):
            self._send(writes)
            return
        self._inbox.append(writes)
        if self._writing is None:
            self._writing = self._in_background(self._empty_inbox())

    def _send(self, writes: list[_Write]) -> None:
        """The events of one list are one write."""
        data, seq, has_room = b"", 0, True
        for write in writes:
            if isinstance(write, SendToClient) and write.seq:
                data, seq = data + write.data, write.seq
            elif isinstance(write, SendToClient):
                has_room = self._client.send(write.data, 0)
        if data:
            has_room = self._client.send(data, seq)
        if not has_room:
            self._watch_backlog()

    async def _empty_inbox(self) -> None:
        try:
            while self._inbox:
                await self._write(self._inbox.popleft())
        finally:
            self._writing = None

    async def _write(self, writes: list[_Write]) -> None:
        for write in writes:
            if isinstance(write, OpenClient):
                await self._client.open(self._exchange.content_type, write.data)
        self._send(writes)
        for write in writes:
            if isinstance(write, Respond):
                answer = self._client.respond(write.status, write.body, "application/json", write.headers)
                await self._until_taken(answer, patient=False)
            elif isinstance(write, Close):
                await self._until_taken(self._client.finish(), patient=write.patient)
                self._closed.set()

    async def _until_taken(self, last: Coroutine[None, None, None], *, patient: bool) -> None:
        """The last bytes, within the time that a caller gets to take them; then the connection is dropped."""
        taking = asyncio.create_task(last)
        hurried = asyncio.create_task(self._hurried.wait())
        unsent = self._client.unsent
        try:
            while not taking.done():
                await asyncio.wait(
                    {taking, hurried}, timeout=self._closing_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if hurried.done() and not taking.done():
                    await asyncio.wait({taking}, timeout=self._closing_seconds)
                is_moving = patient and not hurried.done() and self._client.unsent < unsent
                if not taking.done() and not is_moving:
                    self._client.abort()
                    await asyncio.wait({taking})
                unsent = self._client.unsent
        finally:
            hurried.cancel()
            taking.cancel()
        await taking

    # -- a client that lags ------------------------------------------------------------------------

    def _watch_backlog(self) -> None:
        """More waits in the client's connection than its high mark: the exchange holds the rest until there is room."""
        self._tell_backlog()
        if self._watch is None and self._exchange.client_lags:
            self._watch = self._in_background(self._wait_for_room())

    def _tell_backlog(self) -> None:
        unsent = self._client.unsent
        self._take(ClientBacklog(unsent, self._loop.time()))
        self._holds(unsent + self._exchange.held_bytes)

    async def _wait_for_room(self) -> None:
        try:
            while self._exchange.client_lags:
                await self._client.room()
                self._tell_backlog()
            self._holds(0)
        finally:
            self._watch = None

    def _cut_off(self, data: bytes) -> None:
        self._client.cut_off(data, self._closing_seconds)
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()

    # -- the conversation --------------------------------------------------------------------------

    async def _converse(self) -> None:
        try:
            self._do(self._exchange.start())
            await self._source.speak(self)
        except asyncio.CancelledError:
            if not self._exchange.is_over:
                raise
        except Exception:
            self._break()

    def _stop_conversation(self) -> None:
        """The exchange is over, so nothing more is listened to, be it a connection that is still being made."""
        if self._conversation is not None and self._conversation is not asyncio.current_task():
            self._conversation.cancel()

    def _break(self) -> None:
        _log.exception("stream %s: internal error", self._stream_id)
        if writes := self._act(self._exchange.receive(Broke(self._loop.time()))):
            self._put(writes)
        self._stop_conversation()

    # -- time and the rest -------------------------------------------------------------------------

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._tick)

    def _tick(self) -> None:
        if self._exchange.client_lags:
            self._tell_backlog()
        self._take(ClockTicked(self._loop.time()))

    async def _ask_engine_health(self) -> None:
        if not await self._source.is_healthy():
            message = "the engine has gone silent in the middle of its answer and its health check fails"
            self._take(EngineClosed(EngineError("engine_stalled", message, status=504), self._loop.time()))

    async def _ask_moderator(self, question: AskModerator, watch: int) -> None:
        self._take(await self._judge(question, watch))

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._quietly(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

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
        self._stop_conversation()
