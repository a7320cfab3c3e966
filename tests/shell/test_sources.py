"""vLLM's own answer as it is heard: whole and in its order, however its reader pauses, and not a byte meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from penstock.core.signals import EngineClosed, EngineSpoke, Signal
from penstock.settings import Timing, Upstream
from penstock.shell.engine import Engine
from penstock.shell.replay import serving
from penstock.shell.sources import PlainAnswer
from support.sockets import until
from support.upstreams import opened

PIECES = [b"data: %d %b\n\n" % (number, b"x" * 20_000) for number in range(100)]


class Listener:
    """An ear that keeps what it hears; after `most` reads it is over."""

    def __init__(self, most: int | None = None) -> None:
        self.signals: list[Signal] = []
        self.latest: list[Signal] = []
        self._most = most
        self.answer: PlainAnswer | None = None
        self.pauses = False

    @property
    def is_over(self) -> bool:
        return self._most is not None and len(self.signals) >= self._most

    def hear(self, signal: Signal) -> None:
        self.signals.append(signal)
        self.latest.append(signal)
        if self.pauses and self.answer is not None:
            self.answer.pause()

    async def wait_until_closed(self) -> None:
        raise AssertionError("a plain answer does not wait for its client")

    async def logged(self) -> None:
        raise AssertionError("a plain answer does not wait for the log")

    @property
    def said(self) -> bytes:
        return b"".join(signal.data for signal in self.signals if isinstance(signal, EngineSpoke))


class MockEngine:
    """Says all pieces, in one turn each, once it is let; breaks off then where it is told to."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks = breaks
        self.told = 0
        self.requests = 0
        self.connections: set[object] = set()
        self.may_speak = asyncio.Event()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        self.connections.add(request.transport)
        response = await opened(request)
        await self.may_speak.wait()
        for piece in PIECES:
            await response.write(piece)
            self.told += 1
        if self.breaks:
            assert request.transport is not None
            request.transport.close()
        return response


@asynccontextmanager
async def asked(mock: MockEngine, listener: Listener) -> AsyncIterator[tuple[PlainAnswer, asyncio.Task[None], Engine]]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", mock.chat)
    async with serving(app) as url:
        engine = Engine(Upstream(url=url, plugin="off"), Timing())
        try:
            answer = plain(engine)
            listener.answer = answer
            yield answer, asyncio.create_task(answer.speak(listener)), engine
        finally:
            await engine.close()


def plain(engine: Engine) -> PlainAnswer:
    return PlainAnswer(engine, "v1/chat/completions", b"{}", {}, streams=True, most_bytes=1 << 20)


async def test_everything_is_heard_in_its_order() -> None:
    mock, listener = MockEngine(), Listener()
    async with asked(mock, listener) as (_, speaking, _engine):
        mock.may_speak.set()
        await speaking
    assert listener.said == b"".join(PIECES)
    assert isinstance(listener.signals[-1], EngineClosed)
    assert listener.signals[-1].problem is None


async def test_while_it_is_paused_nothing_is_heard() -> None:
    mock, listener = MockEngine(), Listener()
    listener.pauses = True
    async with asked(mock, listener) as (answer, speaking, _):
        mock.may_speak.set()
        while not speaking.done():
            await until(lambda: bool(listener.latest) or speaking.done())
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(listener.latest) <= 2  # one read, and the end
            listener.latest.clear()
            answer.resume()
        await speaking
    assert listener.said == b"".join(PIECES)


async def test_an_end_that_comes_during_a_pause_waits_for_what_was_said_before_it() -> None:
    mock, listener = MockEngine(), Listener()
    async with asked(mock, listener) as (answer, speaking, _):
        answer.pause()
        mock.may_speak.set()
        await until(lambda: mock.told >= 3)
        assert listener.signals == []
        answer.resume()
        await speaking
    assert listener.said == b"".join(PIECES)


async def test_a_connection_that_breaks_is_told_behind_what_it_brought() -> None:
    mock, listener = MockEngine(breaks=True), Listener()
    async with asked(mock, listener) as (_, speaking, _engine):
        mock.may_speak.set()
        await speaking
    last = listener.signals[-1]
    assert isinstance(last, EngineClosed)
    assert last.problem is not None
    assert last.problem.code == "engine_gone"
    assert b"".join(PIECES).startswith(listener.said)


async def test_a_stream_that_is_over_hears_no_more_and_is_no_fault_of_the_engine() -> None:
    mock, listener, works = MockEngine(), Listener(most=1), list[bool]()
    async with asked(mock, listener) as (_, speaking, engine):
        engine.note = works.append
        mock.may_speak.set()
        await speaking
    assert len(listener.said) < sum(map(len, PIECES))
    assert False not in works


async def test_a_connection_that_was_read_out_serves_the_next_answer() -> None:
    mock, listener = MockEngine(), Listener()
    async with asked(mock, listener) as (_, speaking, engine):
        mock.may_speak.set()
        await speaking
        for _ in range(3):
            later = Listener()
            await plain(engine).speak(later)
            assert later.said == b"".join(PIECES)
    assert len(mock.connections) == 1
