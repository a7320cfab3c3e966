"""Clients that read slowly or not at all: the engine waits for them, memory is bounded, and none stays for ever."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from penstock.core.verifier import parse_log, verify
from support import chunks
from support.http_client import NDJSON, chat
from support.sockets import settled, unread, until
from support.upstreams import Setup, engine_app, in_front_of, opened

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

ROUTES = ["/v1/streams", "/v1/chat/completions"]
TEXT = "x" * 64_000
PIECES = 800  # some 50 MB, far more than all the sockets on the way hold


class Tap:
    """An engine that writes as fast as it is read, and counts."""

    def __init__(self, pieces: int = PIECES) -> None:
        self.sent = 0
        self._pieces = pieces
        self.app, self.seen = engine_app(self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role())
        for _ in range(self._pieces):
            await response.write(chunks.content(TEXT))
            self.sent += 1
        await response.write(chunks.finish() + chunks.final_usage(7) + chunks.DONE)
        return response


@pytest.fixture
def tap() -> Tap:
    return Tap()


@pytest.fixture
async def setup(tap: Tap) -> AsyncIterator[Setup]:
    async with in_front_of(tap.app, limits__stream_bytes=2**30) as running:
        yield running


@pytest.mark.parametrize("route", ROUTES)
async def test_an_engine_is_read_no_faster_than_its_client_reads(setup: Setup, tap: Tap, route: str) -> None:
    async with unread(setup.caller.url, route, chat(stream=True)) as client:
        await until(lambda: tap.sent > 0)
        # The kernel's buffers on loopback take some MB; beyond them nothing is collected anywhere.
        assert await settled(lambda: tap.sent) < PIECES / 2
        assert setup.sidecar.server.open_streams == 1
        assert tap.seen.open == 1
        answer = await client.read_until(b"0\r\n\r\n")
    assert answer.count(b"x") >= PIECES * len(TEXT)
    assert tap.sent == PIECES
    await until(lambda: setup.sidecar.server.open_streams == 0)


async def test_a_client_that_reads_slowly_gets_everything(setup: Setup, tap: Tap) -> None:
    async with setup.caller.opened("/v1/streams", chat(), {"Accept": NDJSON}) as response:
        received = bytearray()
        async for data in response.content.iter_chunked(500_000):
            received += data
            await asyncio.sleep(0.001)
    log = parse_log(bytes(received))
    assert verify(log) == []
    assert sum(len(event["text"]) for event in log if event["type"] == "delta.text") == PIECES * len(TEXT)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_never_reads_is_dropped_in_time(tap: Tap, route: str) -> None:
    bounds = {"limits__stream_bytes": 2**30, "limits__stream_seconds": 0.5, "timing__closing_seconds": 0.2}
    async with (
        in_front_of(tap.app, None, **bounds) as setup,
        unread(setup.caller.url, route, chat(stream=True)) as client,
    ):
        await until(lambda: tap.sent > 0)
        await until(lambda: tap.seen.open == 0)
        await until(lambda: setup.sidecar.server.open_streams == 0)
        assert not (await client.read_all()).endswith(b"0\r\n\r\n")
    assert tap.sent < PIECES


async def test_a_delete_stops_the_engine_of_a_client_that_never_reads(tap: Tap) -> None:
    bounds = {"limits__stream_bytes": 2**30, "timing__closing_seconds": 0.2}
    async with (
        in_front_of(tap.app, None, **bounds) as setup,
        unread(setup.caller.url, "/v1/streams", chat()) as client,
    ):
        await settled(lambda: tap.sent)
        head = await client.read_head()
        [stream_id] = [line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"X-Stream-Id")]
        assert (await setup.caller.delete(stream_id.decode())).status == 204
        await until(lambda: tap.seen.open == 0)
        await until(lambda: setup.sidecar.server.open_streams == 0)
