"""A stop on SIGTERM loses no stream within the drain time, and ends the rest with an error that says why."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest
from aiohttp import web

from penstock.shell.replay import serving as serving_engine
from support import chunks
from support.commands import Serving, serving
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, calling, chat
from support.sockets import settled, unread, until
from support.upstreams import engine_app, opened

ROUTES = [("/v1/streams", SSE), ("/v1/streams", NDJSON), ("/v1/chat/completions", "*/*")]


class Slow:
    """An engine that says a word and goes on when it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.app, self.seen = engine_app(self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello", tokens=1))
        await self.go_on.wait()
        await response.write(chunks.content("!") + chunks.finish() + chunks.final_usage(2) + chunks.DONE)
        return response


class Flood(Slow):
    """An engine that writes as fast as it is read, without end."""

    written = 0

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role())
        while True:
            await response.write(chunks.content("x" * 64_000))
            self.written += 1


@dataclass(frozen=True)
class Stage:
    engine: Slow
    process: Serving
    caller: Caller


@asynccontextmanager
async def on_stage(drain_seconds: float, engine: Slow | None = None, **variables: str) -> AsyncIterator[Stage]:
    """`penstock serve` in front of an engine that waits, unless another is given."""
    engine = engine or Slow()
    environment = {"PENSTOCK_TIMING__DRAIN_SECONDS": str(drain_seconds), **variables}
    async with (
        serving_engine(engine.app) as url,
        serving("serve", "--upstream", url, "--port", "0", environment=environment) as process,
        calling(process.url) as caller,
    ):
        yield Stage(engine, process, caller)


async def is_draining(caller: Caller) -> bool:
    return (await caller.get("/readyz")).status == 503


@pytest.mark.parametrize("stop", [Serving.terminate, Serving.interrupt], ids=["SIGTERM", "SIGINT"])
async def test_open_streams_finish_and_new_ones_go_elsewhere(stop: object) -> None:
    async with on_stage(20) as stage:
        bodies = {route: chat(stream=True) for route, _ in ROUTES}
        asked = [
            asyncio.create_task(stage.caller.post(route, bodies[route], {"Accept": accept})) for route, accept in ROUTES
        ]
        await until(lambda: stage.engine.seen.open == len(ROUTES))
        assert callable(stop)
        stop(stage.process)
        await until(lambda: is_draining(stage.caller))

        assert (await stage.caller.get("/readyz")).body == b"draining\n"
        assert (await stage.caller.get("/healthz")).status == 200
        for refused in (await stage.caller.stream(), await stage.caller.chat()):
            assert (refused.status, refused.error["code"]) == (503, "draining")
            assert refused.headers["Retry-After"] == "1"
        assert stage.process.is_running

        stage.engine.go_on.set()
        events, lines, openai = await asyncio.gather(*asked)
        for answer in (events, lines):
            assert (answer.text(), answer.end["status"]) == ("Hello!", "completed")
        assert openai.body.endswith(b"data: [DONE]\n\n")
        assert (await stage.process.ended()).status == 0


async def test_what_is_open_after_the_drain_time_is_told() -> None:
    async with on_stage(0.2) as stage, AsyncExitStack() as open_answers:
        started = [
            await begin(open_answers, stage.caller, route, accept) for route, accept in ROUTES
        ]  # their first word is through
        folded = asyncio.create_task(stage.caller.stream(FOLDED))
        await until(lambda: stage.engine.seen.open == len(ROUTES) + 1)
        stage.process.terminate()
        events, lines, openai = [Answer(200, {}, said + await rest.content.read()) for said, rest in started]
        for answer in (events, lines):
            error = answer.one("error")
            assert (error["code"], error["origin"], error["retryable"]) == ("draining", "proxy", True)
            assert answer.text() == "Hello"
            assert answer.end["status"] == "failed"
        assert openai.chunks[-1]["error"]["code"] == "draining"
        assert ((await folded).status, (await folded).error["code"]) == (503, "draining")
        outcome = await stage.process.ended()
        assert outcome.status == 0
        assert "drain time is over: ending 4 open streams" in outcome.errors
        await until(lambda: stage.engine.seen.open == 0)


async def begin(
    open_answers: AsyncExitStack, caller: Caller, route: str, accept: str
) -> tuple[bytes, aiohttp.ClientResponse]:
    """An open answer and what it said up to the first word."""
    opening = caller.opened(route, chat(stream=True), {"Accept": accept})
    response = await open_answers.enter_async_context(opening)
    return await response.content.readuntil(b"Hello"), response


async def test_without_streams_it_stops_at_once() -> None:
    async with on_stage(20) as stage:
        stage.process.terminate()
        outcome = await stage.process.ended()
        assert outcome.status == 0
        assert "stopping: 0 streams are open" in outcome.errors


async def test_a_client_that_never_reads_does_not_hold_up_the_stop() -> None:
    variables = {"PENSTOCK_TIMING__CLOSING_SECONDS": "0.2", "PENSTOCK_LIMITS__STREAM_BYTES": "1000000000"}
    flood = Flood()
    async with (
        on_stage(0.2, flood, **variables) as stage,
        unread(stage.process.url, "/v1/streams", chat()),
    ):
        await until(lambda: flood.written > 0)
        await settled(lambda: flood.written)
        stage.process.terminate()
        assert (await stage.process.ended()).status == 0
        await until(lambda: flood.seen.open == 0)
