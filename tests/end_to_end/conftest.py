"""What the tests with the real engine share: callers of Penstock in front of it and of the engine itself."""

from collections.abc import AsyncIterator

import pytest
from blockbuster import BlockBuster

from support.engine import Engine
from support.http_client import Caller, calling
from support.scripts import Script
from support.sidecar import sidecar


@pytest.fixture
def script(engine: Engine) -> Script:
    return Script(engine)


@pytest.fixture(params=["off", "auto"], ids=["plain", "tagged"])
def plugin(request: pytest.FixtureRequest) -> str:
    """vLLM's own chunks, or the plugin's tagged tokens."""
    return str(request.param)


@pytest.fixture
async def penstock(engine: Engine, plugin: str, no_blocking_calls: BlockBuster) -> AsyncIterator[Caller]:
    """Penstock in front of the engine as it is deployed with vLLM's own parsers."""
    async with sidecar(engine.url, {"plugin": plugin}) as running, calling(running.url) as caller:
        yield caller


@pytest.fixture
async def inline_penstock(engine: Engine, plugin: str, no_blocking_calls: BlockBuster) -> AsyncIterator[Caller]:
    """The same for an engine without a tool parser: Penstock reads the calls from the text."""
    async with (
        sidecar(engine.url, {"parses_tools": False, "plugin": plugin}) as running,
        calling(running.url) as caller,
    ):
        yield caller


@pytest.fixture
async def direct(engine: Engine) -> AsyncIterator[Caller]:
    """The engine itself, without Penstock."""
    async with calling(engine.url) as caller:
        yield caller
