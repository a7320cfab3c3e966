"""The composition root: the one place where classes meet settings."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web

from penstock.settings import Settings, SettingsError
from penstock.shell.auth import Gatekeeper
from penstock.shell.books import Books
from penstock.shell.cluster import Cluster, Resolve
from penstock.shell.engine import look_up
from penstock.shell.police import Police
from penstock.shell.server import Server
from penstock.shell.stores.log import Store
from penstock.shell.stores.memory import MemoryStore
from penstock.shell.telemetry import Telemetry
from penstock.shell.tls import TlsFiles
from penstock.shell.tools import Toolbox
from penstock.shell.watched import Reloadable, watch

_log = logging.getLogger("penstock")


@asynccontextmanager
async def running(
    settings: Settings, look_now: asyncio.Event | None = None, resolve: Resolve = look_up
) -> AsyncIterator[tuple[Server, str]]:
    """Penstock, listening; yields the server and its URL. Leaving the block drains and closes it.

    Once `look_now` is set, the files that may change are read again at once.
    """
    tls = await asyncio.to_thread(TlsFiles.load, settings.listen.tls) if settings.listen.tls else None
    certificates = bool(settings.listen.tls and settings.listen.tls.client_ca_file)
    gatekeeper = await Gatekeeper.load(settings.auth, certificates=certificates)
    if gatekeeper.lets_anybody_in and not settings.is_loopback:
        _log.warning(
            "listening on %s WITHOUT API KEYS (auth.allow_anonymous): anybody who reaches this port uses the engine",
            settings.listen.host,
        )
    async with AsyncExitStack() as stack:
        telemetry = Telemetry.from_environment()
        stack.push_async_callback(asyncio.to_thread, telemetry.close)
        cluster = Cluster(settings, resolve)
        stack.push_async_callback(cluster.close)
        await cluster.looked_up()
        books = await stack.enter_async_context(Books.opened(settings))
        police = await stack.enter_async_context(Police.opened(settings))
        store = _open_store(settings)
        stack.push_async_callback(store.close)
        toolbox = Toolbox(settings.tools)
        stack.push_async_callback(toolbox.close)
        server = Server(settings, gatekeeper, cluster, telemetry, store, books, police, toolbox)
        stack.push_async_callback(gatekeeper.close)
        watched: list[Reloadable] = [gatekeeper, *([tls] if tls else [])]
        looking = watch(watched, settings.auth.reload_seconds, look_now or asyncio.Event())
        stack.callback(asyncio.create_task(looking).cancel)
        # The handler of a caller that leaves is cancelled at once; without it aiohttp tells only at the next write.
        runner = web.AppRunner(
            server.application(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1,
            # Of a connection whose request line and headers have not come, too: who sends them byte by byte is dropped.
            keepalive_timeout=settings.timing.keepalive_seconds,
        )
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        listening = _listen(settings.listen.host, settings.listen.port, settings.slow_client.socket_bytes)
        await web.SockSite(runner, listening, ssl_context=tls.context if tls else None).start()
        yield server, _url(listening, "https" if tls else "http")
        await server.drain()


def _open_store(settings: Settings) -> Store:
    if settings.store.url is None:
        return MemoryStore(settings.store.memory_bytes, settings.store.retention_seconds)
    try:
        from penstock.shell.stores.redis.store import RedisStore
    except ModuleNotFoundError:
        remedy = "install it with pip install 'penstock[redis]', or leave store.url out"
        raise SettingsError(f"store.url: needs the package redis, which is not installed; {remedy}") from None
    return RedisStore(settings.store, settings.limits.stream_seconds, settings.timing.first_byte_seconds)


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains. `announce` is called with the URL once it listens."""
    stop, look_now = _stop_signal(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look_now.set)
    async with running(settings, look_now) as (server, url):
        announce(url)
        await stop.wait()
        _log.info("stopping: %d streams are open", server.open_streams)


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until it ends or SIGTERM or SIGINT comes; process 1 of a container gets no default handler."""
    stop = _stop_signal()
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _listen(host: str, port: int, socket_bytes: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Handed on to every connection that it accepts (socket(7)). Left to itself the kernel takes up to 4 MB a client.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, socket_bytes)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        remedy = (
            "choose another with --port" if error.errno == errno.EADDRINUSE else "check listen.host and listen.port"
        )
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    return listening


def _url(listening: socket.socket, scheme: str) -> str:
    host, port = listening.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
