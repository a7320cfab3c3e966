"""The connection to one vLLM server."""

import asyncio
import io
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from penstock.core.errors import EngineError, Problem
from penstock.settings import Timing, Upstream
from penstock.shell.tagged import PluginConnection

# How long an answer about the engine's health is good for a stream that asks, and how long to wait for one.
_HEALTH_SECONDS = 1.0
_HEALTH_TIMEOUT = 2.0
_LARGE_BYTES = 2**20
# A list of models is some kilobytes; an engine that says more is not believed the rest.
_MOST_SMALL_BYTES = 4 * 2**20

# How long an idle connection is kept for the next request. uvicorn, and so vLLM, closes one after 5 s; a request
# sent in that very moment would fail, and nobody could tell whether the engine has seen it.
_IDLE_SECONDS = 3.0


# vLLM's gauges, a line for each model and engine core.
_COUNTS = re.compile(rb"^vllm:num_requests_(running|waiting)(?:\{[^}\n]*\})? ([0-9.e+]+)$", re.MULTILINE)


class Engine:
    """One upstream. Make it inside a running loop; `close` it when the last answer is over.

    `note` is told of each request whether the engine worked, as soon as it said anything or failed.
    """

    def __init__(
        self,
        upstream: Upstream,
        timing: Timing,
        note: Callable[[bool], None] = lambda _works: None,
        at: str | None = None,
    ) -> None:
        """`at` is the address to reach it at, where the name in its URL has several."""
        self.upstream = upstream
        self.label = upstream.label if at is None else f"{upstream.label} at {at}"
        self.note = note
        self._base = URL(upstream.url)
        # No limit on connections: admission is ours, not the pool's. aiohttp sets TCP_NODELAY by itself.
        # No overall or read time-out either: a silent engine is met by heartbeats and the stream's time limit.
        self._session = aiohttp.ClientSession(
            connector=_connector(upstream.socket, at),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timing.connect_seconds),
            headers={"Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._health = (float("-inf"), False)
        self.plugin: PluginConnection | None = None
        self._plugin_task: asyncio.Task[None] | None = None
        if upstream.plugin == "auto":
            self.plugin = PluginConnection(self._session, self._base, self._authorization({}), self.label)
            self._plugin_task = asyncio.create_task(self.plugin.run())

    @property
    def address(self) -> str:
        return self._base.host or ""

    @property
    def port(self) -> int | None:
        return self._base.port

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer, whatever its status; leaving the block closes the connection if it is not read out.

        Raises `EngineError` where the engine cannot be reached or the connection breaks, inside the block too.
        """
        merged = {"Content-Type": "application/json", **self._authorization(headers), **headers}
        try:
            # A file is sent in pieces; aiohttp warns of as much in one write, which would hold up all other streams.
            data = body if len(body) <= _LARGE_BYTES else io.BytesIO(body)
            async with self._session.request(method, self._base.joinpath(path), data=data, headers=merged) as answer:
                self.note(answer.status < 500)
                yield answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.note(False)
            raise _problem(error, self.label) from error

    async def get(self, path: str, headers: Mapping[str, str], seconds: float = 30.0) -> tuple[int, str, bytes]:
        """Status, content type and body of a small answer. Raises `EngineError`."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        merged = {**self._authorization(headers), **headers}
        try:
            async with self._session.get(self._base.joinpath(path), headers=merged, timeout=timeout) as answer:
                return answer.status, answer.content_type, await read_up_to(answer, _MOST_SMALL_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _problem(error, self.label) from error

    async def is_healthy(self, at_most: float = _HEALTH_SECONDS) -> bool:
        """Whether the engine's `/health` answers 200; an answer not older than `at_most` seconds is good enough."""
        now = asyncio.get_running_loop().time()
        asked, healthy = self._health
        if now - asked < at_most:
            return healthy
        timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT)
        try:
            async with self._session.get(self._base.joinpath("health"), timeout=timeout) as answer:
                healthy = answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            healthy = False
        self._health = (now, healthy)
        return healthy

    async def models(self) -> dict[str, int | None] | None:
        """Each model's context window in tokens, None where it is not told. None where the engine does not say."""
        try:
            status, _, body = await self.get("v1/models", {})
            cards = orjson.loads(body)["data"] if status == 200 else None
            return None if cards is None else {str(card["id"]): _window(card) for card in cards}
        except (EngineError, orjson.JSONDecodeError, KeyError, TypeError):
            return None

    async def load(self) -> tuple[int, int] | None:
        """How many requests run and how many wait, of all clients. None where the engine does not say."""
        try:
            status, _, body = await self.get("metrics", {})
        except EngineError:
            return None
        counts = dict.fromkeys((b"running", b"waiting"), 0.0)
        found = _COUNTS.findall(body) if status == 200 else []
        for name, value in found:
            counts[name] += float(value)
        return (int(counts[b"running"]), int(counts[b"waiting"])) if found else None

    async def close(self) -> None:
        if self._plugin_task is not None:
            self._plugin_task.cancel()
            await asyncio.wait({self._plugin_task})
        await self._session.close()

    def _authorization(self, headers: Mapping[str, str]) -> dict[str, str]:
        key = self.upstream.api_key
        if key is None or "Authorization" in headers:
            return {}
        return {"Authorization": f"Bearer {key.get_secret_value()}"}


class _Pinned(AbstractResolver):
    """Every name leads to one address, so that the host of the URL stays what TLS and the engine see."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(self, host: str, port: int = 0, *_family: Any, **_families: Any) -> list[ResolveResult]:
        found = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return [
            ResolveResult(
                hostname=host, host=self._address, port=port, family=found, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        pass


async def look_up(host: str) -> list[str]:
    """The addresses of a name, as this machine's own resolver knows them. Raises `OSError` where there is no answer."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


class EngineConnection(ResponseHandler):
    """aiohttp's connection, which tells at once that something came: no future is made and no task woken for a token.

    `on_data` is called when the body of the answer may have more to read, and never from within such a read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.on_data: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.on_data is not None:
            self.on_data()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp says this with each read of a body, and would feed its parser with nothing each time."""
        if not self._reading_paused:
            return
        if resume_parser:
            self._loop.call_soon(self._read_on)
        else:
            super().resume_reading(resume_parser)

    def _read_on(self) -> None:
        if self._reading_paused and self.transport is not None:
            super().resume_reading()


@contextmanager
def heard(answer: aiohttp.ClientResponse, read: Callable[[], None]) -> Iterator[None]:
    """While `read` is called whenever the body may have more to read; what is there already it has to look for."""
    if answer.connection is None:  # the whole body came with the head
        yield
        return
    connection = answer.connection.protocol
    assert isinstance(connection, EngineConnection), "_connector saw to it"
    connection.on_data = read
    try:
        yield
    finally:
        if connection.on_data is read:  # else it brings another answer by now
            connection.on_data = None


def _connector(path: Path | None, at: str | None) -> aiohttp.BaseConnector:
    connector: aiohttp.BaseConnector
    if path is not None:
        connector = aiohttp.UnixConnector(str(path), limit=0, keepalive_timeout=_IDLE_SECONDS)
    elif at is not None:
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_IDLE_SECONDS, resolver=_Pinned(at), use_dns_cache=False
        )
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
    # No public door leads there. An aiohttp without it must be noticed when Penstock starts, not by streams that hang.
    if not hasattr(connector, "_factory"):
        raise RuntimeError(
            f"aiohttp {aiohttp.__version__} makes its connections in a way that is not known; install 3.14"
        )
    connector._factory = partial(EngineConnection, asyncio.get_running_loop())  # type: ignore[assignment] # invariant
    return connector


async def read_up_to(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The body, or its first `most` bytes and what came in the same read."""
    pieces: list[bytes] = []
    size = 0
    async for data in answer.content.iter_any():
        pieces.append(data)
        size += len(data)
        if size >= most:
            break
    return b"".join(pieces)


def _window(card: dict[str, object]) -> int | None:
    window = card.get("max_model_len")
    return window if isinstance(window, int) else None


def _problem(error: Exception, name: str) -> Problem:
    if isinstance(error, aiohttp.ServerTimeoutError | TimeoutError):
        return EngineError("engine_timeout", f"the engine {name} did not answer in time", status=504)
    if isinstance(error, aiohttp.ClientConnectorError):
        return EngineError("engine_unreachable", f"the engine {name} cannot be reached; is it running?")
    return EngineError("engine_gone", f"the connection to the engine {name} broke in the middle of its answer")
