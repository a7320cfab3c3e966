"""Behind real nginx, HAProxy and Envoy, run from the documented files, by HTTP/1.1 and HTTP/2.

Nothing is held back: the engine says its next word only once the client has read the last one, so an event that waits
in a proxy for company waits for ever. Quiet streams outlive the proxies' time-outs. A client that leaves stops the
engine.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from penstock.core.verifier import parse_log, verify
from support import chunks
from support.http_client import chat
from support.proxies import KINDS, VERSIONS, Answer, Kind, Proxy, Version, posted, proxy
from support.sockets import until
from support.upstreams import Handler, Setup, engine_app, in_front_of, opened, saying, silence

CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
WORDS = 60
# From the engine's write to the client's read, by way of Penstock and the proxy: a word may take this long on a busy
# machine, and half of them no longer than that. docs/how_to/run_behind_a_proxy.md states both.
MOST_SECONDS, HALF_SECONDS = 1.0, 0.05

kinds = pytest.mark.parametrize("kind", KINDS)
versions = pytest.mark.parametrize("version", VERSIONS)


@asynccontextmanager
async def behind(
    kind: Kind, engine: web.Application, folder: Path, idle: str = "120s", **flags: Any
) -> AsyncIterator[tuple[Proxy, Setup]]:
    async with in_front_of(engine, **flags) as setup, proxy(kind, setup.sidecar.url, folder, idle) as running:
        yield running, setup


class LockStep:
    """An engine that waits for its client after each word; `sent` are the times of its writes."""

    def __init__(self) -> None:
        self.was_read = asyncio.Event()
        self.sent: list[float] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        clock = asyncio.get_running_loop()
        response = await opened(request)
        for number in range(WORDS):
            self.was_read.clear()
            self.sent.append(clock.time())
            await response.write((chunks.role() if number == 0 else b"") + chunks.content(f"word {number} ", tokens=1))
            await self.was_read.wait()
        await response.write(chunks.finish() + chunks.final_usage(WORDS) + chunks.DONE)
        return response


async def read_until(answer: Answer, text: bytes) -> bytes:
    data = b""
    while text not in data:
        piece = await answer.read()
        assert piece, f"the stream ended after {data[-300:]!r}"
        data += piece
    return data


async def read_all(answer: Answer) -> bytes:
    data = b""
    while piece := await answer.read():
        data += piece
    return data


@versions
@kinds
@pytest.mark.parametrize("route", [STREAMS, CHAT])
async def test_no_event_is_held_back(kind: Kind, version: Version, route: str, tmp_path: Path) -> None:
    engine = LockStep()
    app, _ = engine_app(engine.answer)
    clock = asyncio.get_running_loop()
    async with behind(kind, app, tmp_path) as (proxy, _), posted(proxy, version, route, chat(stream=True)) as answer:
        assert answer.status == 200
        assert "content-encoding" not in answer.headers
        log, gaps = b"", []
        for number in range(WORDS):
            log += await read_until(answer, f"word {number} ".encode())
            gaps.append(clock.time() - engine.sent[number])
            engine.was_read.set()
        log += await read_all(answer)
    if route == STREAMS:
        assert verify(parse_log(log)) == []
    assert b"[DONE]" in log or b"stream.end" in log
    print(f"{kind} {version} {route}: median {median(gaps) * 1000:.1f} ms, most {max(gaps) * 1000:.1f} ms")
    assert median(gaps) < HALF_SECONDS
    assert max(gaps) < MOST_SECONDS


def silent_for(seconds: float) -> Handler:
    """An engine that thinks before its first word, and as long before its last."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await asyncio.sleep(seconds)
        await response.write(chunks.role() + chunks.content("thought", tokens=1))
        await asyncio.sleep(seconds)
        await response.write(chunks.finish() + chunks.final_usage(1) + chunks.DONE)
        return response

    return answer


@kinds
async def test_a_quiet_stream_outlives_the_proxys_time_out(kind: Kind, tmp_path: Path) -> None:
    async def log_of(proxy: Proxy, version: Version) -> bytes:
        async with posted(proxy, version, STREAMS, chat()) as answer:
            return await read_all(answer)

    app, _ = engine_app(silent_for(1.7))
    quick = {"timing__first_byte_seconds": 0.1, "timing__heartbeat_seconds": 0.3}
    async with behind(kind, app, tmp_path, idle="1s", **quick) as (proxy, _):
        logs = await asyncio.gather(*(log_of(proxy, version) for version in VERSIONS))
    for log in logs:
        events = parse_log(log)
        assert verify(events) == []
        assert events[-1]["status"] == "completed"
        assert log.count(b": heartbeat") > 6


@kinds
async def test_without_heartbeats_the_time_out_cuts(kind: Kind, tmp_path: Path) -> None:
    """So the test above is about something."""
    app, seen = engine_app(silent_for(8))
    async with behind(kind, app, tmp_path, idle="1s", timing__first_byte_seconds=0.1) as (proxy, _):
        cut = False
        try:
            async with posted(proxy, "HTTP/1.1", STREAMS, chat()) as answer:
                cut = b"stream.end" not in await read_all(answer)
        except (OSError, aiohttp.ClientError):
            cut = True
        assert cut
        await until(lambda: seen.left == 1)


async def goes_on(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await response.write(chunks.role() + chunks.content("Hello", tokens=1))
    await silence()
    return response


async def says_nothing(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await silence()
    return response


@versions
@kinds
@pytest.mark.parametrize("engine", [goes_on, says_nothing])
async def test_a_client_that_leaves_stops_the_engine(
    kind: Kind, version: Version, engine: Handler, tmp_path: Path
) -> None:
    app, seen = engine_app(engine)
    async with behind(kind, app, tmp_path, timing__first_byte_seconds=0.1) as (proxy, _):
        clock = asyncio.get_running_loop()
        async with posted(proxy, version, STREAMS, chat()) as answer:
            assert await answer.read()
            left = clock.time()
        await until(lambda: seen.left == 1)
        assert clock.time() - left < 1


@versions
@kinds
async def test_a_refusal_keeps_its_status_and_a_large_request_passes(
    kind: Kind, version: Version, tmp_path: Path
) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    long = [{"role": "user", "content": "x" * 3_000_000}]
    async with behind(kind, app, tmp_path) as (proxy, _):
        async with posted(proxy, version, STREAMS, chat(messages=long)) as answer:
            assert answer.status == 200
            assert b"Hello" in await read_all(answer)
        assert len(seen.body) > 3_000_000
        async with posted(proxy, version, STREAMS, b"{}") as answer:
            assert answer.status == 400
            assert b"invalid_request" in await read_all(answer)
