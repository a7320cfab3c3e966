"""Several sidecars that share a Redis, in the test's own loop, and an engine that waits in the middle of its answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from penstock.shell.replay import serving
from penstock.shell.stores.redis.link import stopped
from penstock.shell.stores.redis.store import RedisStore
from support import chunks
from support.http_client import SSE, Caller, Json, calling
from support.sidecar import Sidecar, sidecar
from support.upstreams import engine_app, opened

STREAMS = "/v1/streams"
LEASE = 0.6


@dataclass
class Replicas:
    callers: list[Caller]
    sidecars: list[Sidecar]

    def store(self, number: int) -> RedisStore:
        store = self.sidecars[number].server.store
        assert isinstance(store, RedisStore)
        return store

    async def kill(self, number: int) -> None:
        """As a dead process would be: nothing of its store runs any more, and what it had said to Redis stays."""
        await stopped(self.store(number).tasks.values())


@asynccontextmanager
async def replicas(engine: web.Application, redis_urls: list[str], **flags: Any) -> AsyncIterator[Replicas]:
    """One replica for each way to Redis."""
    settings = {
        "store__lease_seconds": LEASE,
        "store__timeout_seconds": 0.5,
        "timing__closing_seconds": 0.5,
        **flags,
    }
    async with AsyncExitStack() as stack:
        engine_url = await stack.enter_async_context(serving(engine))
        found = [await stack.enter_async_context(sidecar(engine_url, **settings, store__url=url)) for url in redis_urls]
        callers = [await stack.enter_async_context(calling(running.url)) for running in found]
        yield Replicas(callers, found)


def frames(data: bytes) -> list[bytes]:
    return [frame + b"\n\n" for frame in data.split(b"\n\n")[:-1] if not frame.startswith(b":")]


async def resumed(caller: Caller, stream_id: str, after: int = 0, accept: str = SSE) -> Any:
    return await caller.get(f"{STREAMS}/{stream_id}/events?after={after}", {"Accept": accept})


class Word:
    """An engine that says two words, waits until it may go on, and says the rest."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.app, self.seen = engine_app(self.answer)
        self._more: asyncio.Queue[str] = asyncio.Queue()

    def say(self, text: str) -> None:
        """A word on top, while it waits."""
        self._more.put_nowait(text)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello", tokens=1))
        await asyncio.sleep(0.02)
        await response.write(chunks.content(" you", tokens=2))
        while not self.may_go_on.is_set():
            await asyncio.sleep(0.01)
            while not self._more.empty():
                await response.write(chunks.content(self._more.get_nowait(), tokens=3))
        await response.write(chunks.content("!", tokens=4))
        await asyncio.sleep(0.1)
        await response.write(chunks.finish(tokens=5) + chunks.final_usage(5) + chunks.DONE)
        return response


@asynccontextmanager
async def begun(
    caller: Caller, body: Json, route: str = STREAMS, **headers: str
) -> AsyncIterator[tuple[Any, bytearray]]:
    """A stream of which two words were read."""
    async with caller.opened(STREAMS, body) as response:
        data = bytearray()
        while b'you"' not in data or not data.endswith(b"\n\n"):
            data += await response.content.readany()
        yield response, data
