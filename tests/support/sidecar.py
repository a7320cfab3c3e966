"""Penstock in the test's own event loop, over real sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from penstock import app
from penstock.settings import load_settings
from penstock.shell.server import Server


@dataclass(frozen=True)
class Sidecar:
    url: str
    server: Server


@asynccontextmanager
async def sidecar(
    engine_url: str | list[str], upstream: dict[str, Any] | None = None, **flags: Any
) -> AsyncIterator[Sidecar]:
    """Penstock in front of `engine_url`, or of several, which are then called engine-0 and so on.

    `flags` are settings with `__` for the dot, like `limits__stream_bytes`. A free port, and no time for draining
    unless a test asks for it, so that a failing test ends at once. Plain chunks, unless `upstream` says
    `plugin: auto`; then the plugin was looked for before the first request.
    """
    named = {"engine": engine_url} if isinstance(engine_url, str) else _numbered(engine_url)
    settings = {
        "upstreams": [{"url": url, "name": name, "plugin": "off", **(upstream or {})} for name, url in named.items()],
        "listen.port": 0,
        "timing.drain_seconds": 0,
        **{name.replace("__", "."): value for name, value in flags.items()},
    }
    async with app.running(load_settings(environment={}, flags=settings)) as (server, url):
        await server.cluster.settled()
        yield Sidecar(url, server)


def _numbered(urls: list[str]) -> dict[str, str]:
    return {f"engine-{number}": url for number, url in enumerate(urls)}
