"""Engines that are not: recorded ones that misbehave on request, and ones that a test makes of a few lines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from penstock.shell.replay import load_recordings, make_app, serving
from support.http_client import Caller, calling
from support.sidecar import Sidecar, sidecar

# Read while importing: inside a test's loop it would count as a blocking call.
_RECORDINGS = load_recordings([Path(__file__).parents[1] / "vectors" / "vllm-0.32"])
SSE_TYPE = "text/event-stream; charset=utf-8"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Setup:
    """Penstock with a caller before it and an engine behind it."""

    caller: Caller
    sidecar: Sidecar
    engine_url: str


@asynccontextmanager
async def in_front_of(
    engine: web.Application, upstream: dict[str, Any] | None = None, **flags: Any
) -> AsyncIterator[Setup]:
    """Penstock in front of an engine in this process; `flags` as `sidecar` takes them."""
    async with (
        serving(engine) as engine_url,
        sidecar(engine_url, upstream, **flags) as running,
        calling(running.url) as caller,
    ):
        yield Setup(caller, running, engine_url)


def replay() -> web.Application:
    """The mock engine with every recording; a request names one by `replayed`."""
    return make_app(_RECORDINGS, speed=0)


def replayed(name: str, fault: str | None = None, **fields: Any) -> dict[str, Any]:
    """Fields of a chat request that the mock answers with the recording `name`, as fast as it can."""
    return {"vllm_xargs": {"replay": name, **({"replay_fault": fault} if fault else {})}, **fields}


@dataclass
class Seen:
    """What came to an engine of `engine_app`: the last chat request, and how its answers ended; and how it feels."""

    body: bytes = b""
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    models_headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    requests: int = 0
    open: int = 0
    left: int = 0
    healthy: bool = True
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny"}])
    load: tuple[int, int] | None = None
    """Requests that run and that wait, in its metrics; None for an engine without metrics."""


def engine_app(answer: Handler) -> tuple[web.Application, Seen]:
    """An engine whose chat route is `answer`; it has a list of models and is healthy."""
    seen = Seen()

    async def chat(request: web.Request) -> web.StreamResponse:
        seen.body, seen.headers = await request.read(), request.headers.copy()
        seen.requests += 1
        seen.open += 1
        try:
            return await answer(request)
        except (asyncio.CancelledError, ConnectionError):
            seen.left += 1
            raise
        finally:
            seen.open -= 1

    async def models(request: web.Request) -> web.Response:
        seen.models_headers = request.headers.copy()
        return web.json_response({"object": "list", "data": seen.models})

    async def metrics(_: web.Request) -> web.Response:
        if seen.load is None:
            raise web.HTTPNotFound
        running, waiting = seen.load
        labels = '{engine="0",model_name="tiny"}'
        text = f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{labels} {running}.0\n"
        return web.Response(text=f"{text}vllm:num_requests_waiting{labels} {waiting}.0\n")

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=200 if seen.healthy else 503)

    app = web.Application(client_max_size=32 * 2**20)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat),
            web.get("/v1/models", models),
            web.get("/health", health),
            web.get("/metrics", metrics),
        ]
    )
    return app, seen


def saying(*pieces: bytes) -> Handler:
    """A streamed answer of these pieces, each a write of its own."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        for piece in pieces:
            await response.write(piece)
        return response

    return answer


def answering(body: bytes, status: int = 200, content_type: str = "application/json") -> Handler:
    """A whole answer."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body, content_type=content_type)

    return answer


async def opened(request: web.Request) -> web.StreamResponse:
    """A streamed answer whose head was sent."""
    response = web.StreamResponse(headers={"Content-Type": SSE_TYPE})
    await response.prepare(request)
    return response


async def silence() -> None:
    """For ever; ends when the connection does."""
    await asyncio.get_running_loop().create_future()


# --- Several engines --------------------------------------------------------------------------------


class Stage:
    """Penstock, its caller, and what each engine saw."""

    def __init__(self, running: Sidecar, caller: Caller, seen: list[Seen]) -> None:
        self.sidecar = running
        self.caller = caller
        self.seen = seen

    @property
    def requests(self) -> list[int]:
        return [seen.requests for seen in self.seen]

    def make_busy(self, *numbers: int) -> None:
        """As if these engines had many streams, so that another is chosen."""
        for number in numbers:
            self.sidecar.server.cluster.members[number].others += 1000


@asynccontextmanager
async def in_front_of_all(answers: Sequence[Handler | str], **flags: Any) -> AsyncIterator[Stage]:
    """Penstock in front of an engine for each of `answers`; a text is the address of an engine that is elsewhere."""
    async with AsyncExitStack() as stack:
        urls, all_seen = [], []
        for answer in answers:
            app, seen = engine_app(answer) if callable(answer) else (web.Application(), Seen())
            urls.append(answer if isinstance(answer, str) else await stack.enter_async_context(serving(app)))
            all_seen.append(seen)
        running = await stack.enter_async_context(sidecar(urls, **flags))
        caller = await stack.enter_async_context(calling(running.url))
        yield Stage(running, caller, all_seen)
