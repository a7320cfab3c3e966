"""Who is let in: streams and bytes, per key and in all, and how long a body may take."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from aiohttp import web

from penstock.shell.auth import hash_key
from support import chunks
from support.http_client import Answer, chat
from support.sockets import raw_request, until
from support.upstreams import Setup, engine_app, in_front_of, opened, silence

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

ROUTES = ["/v1/streams", "/v1/chat/completions"]
KEYS = {"auth__keys": {"alice": hash_key("a" * 32), "bob": hash_key("b" * 32)}}
ALICE, BOB = {"Authorization": f"Bearer {'a' * 32}"}, {"Authorization": f"Bearer {'b' * 32}"}


class Patient:
    """An engine that says a word to each request and keeps it open until it is let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.app, self.seen = engine_app(self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello", tokens=1))
        await self.let_go.wait()
        await response.write(chunks.finish() + chunks.final_usage(1) + chunks.DONE)
        return response


@pytest.fixture
def engine() -> Patient:
    return Patient()


@pytest.fixture
async def crowd() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def fill(crowd: AsyncExitStack, setup: Setup, count: int, headers: dict[str, str] | None = None) -> None:
    for _ in range(count):
        response = await crowd.enter_async_context(setup.caller.opened("/v1/streams", chat(), headers))
        assert response.status == 200


def assert_refused(answer: Answer, status: int, code: str, setting: str) -> None:
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.headers["Retry-After"] == "1"
    assert setting in answer.error["message"]
    assert "again" in answer.error["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_full_replica_answers_503_until_a_stream_ends(
    engine: Patient, crowd: AsyncExitStack, route: str
) -> None:
    async with in_front_of(engine.app, limits__streams=3) as setup:
        await fill(crowd, setup, 3)
        answer = await setup.caller.post(route, chat())
        assert_refused(answer, 503, "too_many_streams", "limits.streams")
        assert engine.seen.requests == 3
        engine.let_go.set()
        await until(lambda: setup.sidecar.server.open_streams == 0)
        assert (await setup.caller.post(route, chat(stream=True))).status == 200
        await crowd.aclose()


@pytest.mark.parametrize("route", ROUTES)
async def test_a_key_with_too_many_streams_gets_429_and_the_others_are_served(
    engine: Patient, crowd: AsyncExitStack, route: str
) -> None:
    async with in_front_of(engine.app, **KEYS, limits__streams_per_key=2) as setup:
        await fill(crowd, setup, 2, ALICE)
        assert_refused(
            await setup.caller.post(route, chat(), ALICE), 429, "too_many_streams_of_key", "limits.streams_per_key"
        )
        await fill(crowd, setup, 1, BOB)
        await crowd.aclose()
        await until(lambda: setup.sidecar.server.open_streams == 0)
        engine.let_go.set()
        assert (await setup.caller.post(route, chat(stream=True), ALICE)).status == 200


async def test_callers_without_keys_are_no_key(engine: Patient, crowd: AsyncExitStack) -> None:
    async with in_front_of(engine.app, limits__streams_per_key=1, limits__held_bytes_per_key=1024) as setup:
        await fill(crowd, setup, 3)
        engine.let_go.set()
        assert (await setup.caller.stream(user="x" * 2000)).status == 200
        await crowd.aclose()


async def test_the_bytes_of_all_streams_are_counted_until_they_end(engine: Patient, crowd: AsyncExitStack) -> None:
    async with in_front_of(engine.app, limits__held_bytes=10_000) as setup:
        large = crowd.enter_async_context(setup.caller.opened("/v1/streams", chat(user="x" * 8000)))
        assert (await large).status == 200
        answer = await setup.caller.stream(user="x" * 2000)
        assert_refused(answer, 503, "too_many_bytes", "limits.held_bytes")
        engine.let_go.set()
        await until(lambda: setup.sidecar.server.open_streams == 0)
        assert (await setup.caller.stream(user="x" * 2000)).status == 200
        await crowd.aclose()


async def test_the_bytes_of_one_key_are_its_own(engine: Patient, crowd: AsyncExitStack) -> None:
    async with in_front_of(engine.app, **KEYS, limits__held_bytes_per_key=10_000) as setup:
        large = crowd.enter_async_context(setup.caller.opened("/v1/streams", chat(user="x" * 8000), ALICE))
        assert (await large).status == 200
        answer = await setup.caller.stream(user="x" * 2000, headers=ALICE)
        assert_refused(answer, 429, "too_many_bytes_of_key", "limits.held_bytes_per_key")
        engine.let_go.set()
        assert (await setup.caller.stream(user="x" * 2000, headers=BOB)).status == 200
        await crowd.aclose()


async def test_a_refused_request_leaves_nothing_behind(engine: Patient) -> None:
    engine.let_go.set()
    async with in_front_of(engine.app, limits__streams=1, limits__held_bytes=4096) as setup:
        for _ in range(5):
            assert (await setup.caller.stream(user="x" * 5000)).error["code"] == "too_many_bytes"
            assert (await setup.caller.post("/v1/streams", b"no json")).status == 400
        assert (await setup.caller.stream()).end["status"] == "completed"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_that_never_comes_is_not_waited_for(engine: Patient, route: str) -> None:
    line = f"POST {route} HTTP/1.1".encode()
    async with (
        in_front_of(engine.app, timing__request_seconds=0.2) as setup,
        raw_request(setup.caller.url, line, b"Content-Length: 1000", b"Content-Type: application/json") as client,
    ):
        head, _, body = (await client.read_until(b"}}")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == "request_timeout"
    assert "timing.request_seconds" in error["message"]
    assert engine.seen.requests == 0


async def test_a_body_that_trickles_in_has_no_more_time_than_one_that_does_not(engine: Patient) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    async with in_front_of(engine.app, timing__request_seconds=0.3) as setup:
        url = setup.caller.url + "/v1/streams"
        async with setup.caller.session.post(url, data=trickle()) as response:
            assert response.status == 408
            assert "bytes had" in await response.text()


async def test_slow_bodies_count_as_open_streams(engine: Patient) -> None:
    line = b"POST /v1/streams HTTP/1.1"
    async with (
        in_front_of(engine.app, limits__streams=1, timing__request_seconds=30) as setup,
        raw_request(setup.caller.url, line, b"Content-Length: 1000"),
    ):

        async def is_full() -> bool:
            return (await setup.caller.post("/v1/streams", b"{}")).status == 503

        await until(is_full)


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_cap_is_refused_whether_it_says_so_or_not(engine: Patient, declared: bool) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 4096

    async with in_front_of(engine.app, limits__request_bytes=10_000) as setup:
        url, data = setup.caller.url + "/v1/streams", b" " * 20_000 if declared else endless()
        async with setup.caller.session.post(url, data=data) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (413, "request_too_large")
        bomb = gzip.compress(b" " * 10_000_000)
        answer = await setup.caller.post("/v1/streams", bomb, {"Content-Encoding": "gzip"})
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")


async def test_a_client_that_leaves_while_it_sends_gives_its_place_back(engine: Patient) -> None:
    engine.let_go.set()
    async with in_front_of(engine.app, limits__streams=1) as setup:
        async with raw_request(setup.caller.url, b"POST /v1/streams HTTP/1.1", b"Content-Length: 1000"):
            await asyncio.sleep(0.05)

        async def is_served() -> bool:
            return (await setup.caller.stream()).status == 200

        await until(is_served)


async def test_a_stream_that_fails_in_the_engine_gives_its_place_back() -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        await opened(request)
        assert request.transport is not None
        request.transport.abort()
        await silence()
        return web.Response()

    app, _ = engine_app(broken)
    async with in_front_of(app, limits__streams=1) as setup:
        for _ in range(3):
            assert (await setup.caller.stream()).status == 502
