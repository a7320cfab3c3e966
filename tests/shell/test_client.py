"""Clients that read slowly or not at all: the engine waits for them, memory is bounded, and none stays for ever."""

import asyncio
import gc
import socket
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from penstock.core.verifier import parse_log, verify
from support import chunks
from support.http_client import NDJSON, chat
from support.sockets import RawClient, connections, settled, unread, until
from support.upstreams import Setup, answering, engine_app, in_front_of, opened, saying

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
async def test_a_client_that_reads_nothing_costs_its_buffer_and_little_more(setup: Setup, tap: Tap, route: str) -> None:
    """Counted is what Python allocates, the engine of this test included."""
    async with unread(setup.caller.url, route, chat(stream=True)):
        await until(lambda: tap.sent > 0)
        await settled(lambda: tap.sent)
    await until(lambda: setup.sidecar.server.open_streams == 0)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        sent = tap.sent
        async with unread(setup.caller.url, route, chat(stream=True)):
            await until(lambda: tap.sent > sent)
            await settled(lambda: tap.sent)
            held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tap.sent - sent > 10
    assert held - before < 256 * 1024 + 2_000_000


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


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_takes_nothing_is_cut_off_after_the_stall_time(tap: Tap, route: str) -> None:
    bounds = {"limits__stream_bytes": 2**30, "slow_client__stall_seconds": 0.4, "timing__closing_seconds": 0.2}
    async with in_front_of(tap.app, None, **bounds, store__linger_seconds=0) as setup:
        neighbour = asyncio.create_task(setup.caller.post(route, chat(stream=True)))
        async with unread(setup.caller.url, route, chat(stream=True)):
            await until(lambda: tap.seen.requests == 2)
            assert (await neighbour).body.count(b"x") >= PIECES * len(TEXT)
            await until(lambda: setup.sidecar.server.open_streams == 0)
            assert tap.seen.left == 1
    assert tap.sent < 2 * PIECES


async def test_a_client_that_was_cut_off_can_read_why(tap: Tap) -> None:
    bounds = {"limits__stream_bytes": 2**30, "slow_client__stall_seconds": 0.4, "timing__closing_seconds": 10}
    async with (
        in_front_of(tap.app, None, **bounds, store__linger_seconds=0) as setup,
        unread(setup.caller.url, "/v1/streams", chat()) as client,
    ):
        await until(lambda: tap.seen.left == 1)
        answer = await client.read_until(b"0\r\n\r\n")
    assert b'"code":"client_stalled"' in answer
    assert b'"retryable":true' in answer
    assert answer.count(b'"type":"stream.end"') == 1


async def test_where_a_client_was_cut_off_the_stream_goes_on_and_is_resumed() -> None:
    tap = Tap(pieces=40)
    bounds = {"slow_client__stall_seconds": 0.4, "timing__closing_seconds": 10}
    async with (
        in_front_of(tap.app, None, **bounds) as setup,
        unread(setup.caller.url, "/v1/streams", chat()) as client,
    ):
        head = await client.read_head()
        [stream_id] = [line.split(b": ")[1].decode() for line in head.split(b"\r\n") if line.startswith(b"X-Stream-Id")]
        await until(lambda: tap.sent == 40)
        await until(lambda: setup.sidecar.server.open_streams == 0)
        received = await client.read_until(b"0\r\n\r\n")
        [error] = [line for line in received.split(b"\n") if line.startswith(b"data: ") and b'"type":"error"' in line]
        assert b'"code":"client_stalled"' in error
        assert b'"seq"' not in error
        assert b"stream.end" not in received
        assert await client.read_all() == b"", "the connection ends with it"
        whole = await setup.caller.get(f"/v1/streams/{stream_id}/events")
    assert len(whole.text()) == 40 * len(TEXT)
    assert whole.end["status"] == "completed"
    last = received.rpartition(b"\nid: ")[2].partition(b"\n")[0]
    seen = int(last.rpartition(b":")[2])
    assert 1 < seen < len(whole.events), "it had got a part, and knows which"


async def test_what_waits_for_a_client_counts_as_held(tap: Tap) -> None:
    """A replica whose clients read nothing takes no more of them than it has room for."""
    bounds = {"limits__stream_bytes": 2**30, "limits__held_bytes": 300_000}
    async with (
        in_front_of(tap.app, None, **bounds) as setup,
        unread(setup.caller.url, "/v1/streams", chat()),
        unread(setup.caller.url, "/v1/streams", chat()),
    ):
        await until(lambda: tap.seen.requests == 2)
        await settled(lambda: tap.sent)
        answer = await setup.caller.stream()
        assert (answer.status, answer.error["code"]) == (503, "too_many_bytes")
    await until(lambda: setup.sidecar.server.open_streams == 0)


async def test_a_client_that_takes_the_end_slowly_is_given_the_time() -> None:
    """Some 200 kB wait when the engine is done; they take far longer than one closing time, but they move."""
    app, _ = engine_app(saying(*chunks.answer_of(["x" * 20_000] * 10)))
    async with (
        in_front_of(app, None, timing__closing_seconds=0.3, slow_client__socket_bytes=4096) as setup,
        unread(setup.caller.url, "/v1/streams", chat()) as client,
    ):
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += await client.read_some(2000)
            await asyncio.sleep(0.01)
    assert received.count(b"x") >= 200_000
    assert b'"status":"completed","finish_reasons"' in received


async def test_a_client_that_does_not_take_the_end_is_dropped() -> None:
    app, _ = engine_app(saying(*chunks.answer_of(["x" * 20_000] * 10)))
    async with (
        in_front_of(app, None, timing__closing_seconds=0.3, slow_client__socket_bytes=4096) as setup,
        unread(setup.caller.url, "/v1/streams", chat()) as client,
    ):
        await until(lambda: setup.sidecar.server.open_streams == 1)
        await until(lambda: setup.sidecar.server.open_streams == 0)
        assert not (await client.read_all()).endswith(b"0\r\n\r\n")


async def sip(client: RawClient) -> None:
    """Reads on, but hardly."""
    data = b"first"
    while data:
        await asyncio.sleep(0.02)
        data = await client.read_some(200)


async def test_a_stop_does_not_wait_for_a_client_that_takes_the_end_slowly() -> None:
    app, _ = engine_app(saying(*chunks.answer_of(["x" * 20_000] * 10)))
    clock = asyncio.get_running_loop()
    async with (
        in_front_of(app, None, timing__closing_seconds=0.3, slow_client__socket_bytes=4096) as setup,
        unread(setup.caller.url, "/v1/streams", chat()) as client,
    ):
        assert b" 200 OK" in await client.read_head()
        sipping = asyncio.create_task(sip(client))
        started = clock.time()
        await setup.sidecar.server.drain()
        assert clock.time() - started < 2
        await sipping


async def test_the_whole_answer_of_a_client_that_never_reads_is_not_kept_for_ever() -> None:
    app, _ = engine_app(answering(chunks.whole({"content": "x" * 3_000_000})))
    async with (
        in_front_of(app, None, timing__closing_seconds=0.3) as setup,
        unread(setup.caller.url, "/v1/chat/completions", chat()),
    ):
        await until(lambda: setup.sidecar.server.open_streams == 1)
        await until(lambda: setup.sidecar.server.open_streams == 0)


async def test_every_connection_has_the_send_buffer_of_the_settings(tap: Tap) -> None:
    async with (
        in_front_of(tap.app, None, slow_client__socket_bytes=65536) as setup,
        unread(setup.caller.url, "/v1/streams", chat()),
    ):
        await until(lambda: setup.sidecar.server.open_streams == 1)
        found = connections(local_port=int(setup.caller.url.rpartition(":")[2]))
        sizes = {connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for connection in found}
        for connection in found:
            connection.close()
    assert sizes == {2 * 65536}, "the kernel doubles what it is asked for, for its own accounts"
