"""The two ways an engine's answer reaches an exchange: vLLM's own chunks, or the plugin's tagged tokens."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import aiohttp
import orjson

from penstock.core.errors import EngineError, LimitReached, Problem
from penstock.core.families import Family
from penstock.core.frames import Record
from penstock.core.signals import (
    EngineAnswered,
    EngineChosen,
    EngineClosed,
    EngineRefused,
    EngineSpoke,
    EngineTagged,
    NoEngineLeft,
    Signal,
)
from penstock.core.tagged_stream import TaggedReader
from penstock.shell.cluster import Cluster, Member, Wish, cost_nothing, no_engine
from penstock.shell.engine import Engine, heard, read_up_to
from penstock.shell.tagged import PluginConnection

# An engine's error page is read up to here; what it says beyond is not worth the memory.
_MOST_ERROR_BYTES = 64 * 1024
# How the plugin refuses what only an engine that writes the text itself can answer.
_NEEDS_TEXT = (422, "penstock_needs_text")


class Ear(Protocol):
    """What a source tells: the driver."""

    @property
    def is_over(self) -> bool: ...

    def hear(self, signal: Signal) -> None:
        """Takes a signal without waiting: what the client has no room for is held, up to the stream's bound."""

    async def wait_until_closed(self) -> None: ...

    async def logged(self) -> None:
        """Until what was sent so far is in the log, where the stream has one."""


class Answer(Protocol):
    """One answer of an engine. `speak` tells all of it; `abort` makes the engine stop, at any time, more than once.

    Between `pause` and `resume` nothing more is read, where the answer has a connection of its own.
    """

    async def speak(self, ear: Ear) -> None: ...

    def abort(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Source(Answer, Protocol):
    """Where a stream's answer comes from, whoever it is that gives it."""

    def try_another(self, problem: Problem) -> None:
        """Whoever speaks failed before the first token: somebody else shall, or `NoEngineLeft` is told."""

    async def is_healthy(self) -> bool:
        """Whether whoever speaks is still there, however silent."""


class PlainAnswer:
    """vLLM's own answer on its chat route, streamed or whole."""

    def __init__(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str], *, streams: bool, most_bytes: int
    ) -> None:
        self._engine = engine
        self._path = path
        self._body = body
        self._headers = headers
        self._streams = streams
        self._most_bytes = most_bytes
        self._now = asyncio.get_running_loop().time
        self._answer: aiohttp.ClientResponse | None = None
        self._read: Callable[[], None] | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def speak(self, ear: Ear) -> None:
        ear.hear(await self._listen(ear))

    def pause(self) -> None:
        """aiohttp reads on until its buffer is full, then the kernel's fills; vLLM merges what it may not send."""
        self._flowing.clear()

    def resume(self) -> None:
        """What has come meanwhile is told in the loop's next turn: whoever resumes is busy with a signal."""
        self._flowing.set()
        if self._read is not None:
            asyncio.get_running_loop().call_soon(self._read)

    def abort(self) -> None:
        """Closes the connection, which is how vLLM learns that nobody waits any more."""
        if self._answer is not None:
            self._answer.close()
        self._flowing.set()

    async def _listen(self, ear: Ear) -> Signal:
        """Everything the engine says; returns the last thing to tell about it."""
        try:
            async with self._engine.request("POST", self._path, self._body, self._headers) as answer:
                self._answer = answer
                if answer.status != 200:
                    error = await read_up_to(answer, _MOST_ERROR_BYTES)
                    return EngineRefused(answer.status, error, self._now())
                if not self._streams or answer.content_type == "application/json":
                    return EngineAnswered(await self._read_whole(answer), self._now())
                await self._pass_on(answer, ear)
                return EngineClosed(None, self._now())
        except Problem as problem:
            return EngineClosed(problem, self._now())

    async def _pass_on(self, answer: aiohttp.ClientResponse, ear: Ear) -> None:
        """The body, each read in the turn of the loop in which it comes, until it is over or the stream is."""
        content, now = answer.content, self._now

        def read() -> None:
            if not self._flowing.is_set() or ear.is_over or content.exception() is not None:
                return
            if data := content.read_nowait():
                ear.hear(EngineSpoke(data, now()))
                if ear.is_over:
                    answer.close()  # which ends the wait for the end of the body

        with heard(answer, read):
            self._read = read
            read()
            try:
                if (broken := content.exception()) is not None:
                    raise broken  # which aiohttp does only for those who wait already
                await content.wait_eof()
            except aiohttp.ClientError:
                if not ear.is_over:
                    raise
            while not (ear.is_over or content.at_eof()):  # it was paused before all was read
                await self._flowing.wait()
                read()

    async def _read_whole(self, answer: aiohttp.ClientResponse) -> bytes:
        body = await read_up_to(answer, self._most_bytes + 1)
        if len(body) > self._most_bytes:
            message = f"the engine's answer is larger than {self._most_bytes} bytes (limits.stream_bytes)"
            raise LimitReached("stream_bytes_limit", message)
        return body


class TaggedAnswer:
    """The plugin's records of one stream. They come with all other streams', so nothing here may wait.

    A request that the plugin cannot answer in tokens, which it alone may know, is answered by `plain`.
    """

    def __init__(
        self,
        connection: PluginConnection,
        body: bytes,
        headers: Mapping[str, str],
        family: Family,
        plain: Answer,
        note: Callable[[bool], None],
    ) -> None:
        self._connection = connection
        self._body = body
        self._headers = headers
        self._family = family
        self._plain = plain
        self._needs_text = asyncio.Event()
        self._number: int | None = None
        self._note: Callable[[bool], None] | None = note
        self._hear: Callable[[Signal], None] | None = None
        self._now = asyncio.get_running_loop().time

    async def speak(self, ear: Ear) -> None:
        self._hear = ear.hear
        try:
            self._number = self._connection.open(self._body, self._headers, self._family, self)
        except EngineError as problem:
            ear.hear(EngineClosed(problem, self._now()))
            return
        await _first_of(ear.wait_until_closed(), self._needs_text.wait())
        if self._needs_text.is_set() and not ear.is_over:
            await self._plain.speak(ear)

    def abort(self) -> None:
        if self._number is not None:
            self._connection.abort(self._number)
        self._plain.abort()

    def pause(self) -> None:
        """The connection of the tokens brings the streams of other clients too, so only `plain` is ever paused."""
        self._plain.pause()

    def resume(self) -> None:
        self._plain.resume()

    def records(self, records: list[Record], now: float) -> None:
        if self._note is not None:
            self._note(True)
            self._note = None
        if self._hear is not None:
            self._hear(EngineTagged(records, now))

    def refused(self, status: int, body: bytes) -> None:
        if self._note is not None:
            self._note(status < 500)
        if (status, _error_type(body)) == _NEEDS_TEXT:
            self._needs_text.set()
        else:
            self._tell(EngineRefused(status, body, self._now()))

    def broke(self, problem: EngineError) -> None:
        self._tell(EngineClosed(problem, self._now()))

    def _tell(self, signal: Signal) -> None:
        if self._hear is not None:
            self._hear(signal)


async def _first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _error_type(body: bytes) -> object:
    try:
        return orjson.loads(body)["error"]["type"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


Ask = Callable[[Engine], tuple[TaggedReader | None, Answer]]
"""Puts the request to an engine; the reader is there where the answer is tagged tokens."""


class ClusterAnswer:
    """The answer of the engine that the cluster chooses, and of another where that one fails before its first token.

    Each engine is asked once. Failures in which an engine may have worked on the request use up `retries`: a request
    that kills engines must not be handed on until none is left. `gave_up` is told of each engine that failed so.
    """

    def __init__(
        self, cluster: Cluster, wish: Wish, ask: Ask, retries: int, gave_up: Callable[[Problem], None]
    ) -> None:
        self._cluster = cluster
        self._wish = wish
        self._ask = ask
        self._retries = retries
        self._gave_up = gave_up
        self._now = asyncio.get_running_loop().time
        self._engine: Engine | None = None
        self._answer: Answer | None = None
        self._attempt: asyncio.Task[None] | None = None
        self._failed = False

    async def speak(self, ear: Ear) -> None:
        tried: set[Member] = set()
        while self._retries >= 0 and (member := self._cluster.choose(self._wish, tried)) is not None:
            tried.add(member)
            self._failed = False
            with self._cluster.serving(member):
                await self._speak_for(member.engine, ear)
            if not self._failed:
                return
        ear.hear(NoEngineLeft(no_engine(), self._now()))

    def abort(self) -> None:
        if self._answer is not None:
            self._answer.abort()

    def pause(self) -> None:
        if self._answer is not None:
            self._answer.pause()

    def resume(self) -> None:
        if self._answer is not None:
            self._answer.resume()

    def try_another(self, problem: Problem) -> None:
        self._retries -= not cost_nothing(problem)
        self._failed = True
        self._gave_up(problem)
        self.abort()
        if self._attempt is not None:
            self._attempt.cancel()

    async def is_healthy(self) -> bool:
        return self._engine is None or await self._engine.is_healthy()

    async def _speak_for(self, engine: Engine, ear: Ear) -> None:
        """In a task of its own: one that fell silent is left in the middle of its wait."""
        self._engine = engine
        reader, self._answer = self._ask(engine)
        ear.hear(EngineChosen(engine.label, reader, self._now()))
        self._attempt = asyncio.create_task(self._answer.speak(ear))
        try:
            await asyncio.wait({self._attempt})
        except asyncio.CancelledError:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)
            raise
        if not self._attempt.cancelled():
            self._attempt.result()
