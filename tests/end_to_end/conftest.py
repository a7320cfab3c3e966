"""What the tests with the real engine share: a caller of Penstock in front of it, and requests that script it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.engine import Engine
from support.http_client import Caller, calling
from support.sidecar import sidecar

Json = dict[str, Any]


class Script:
    """Makes the engine say given texts: `script("Hi!", pause_ms=5)` are fields for a chat request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self, *texts: str, eos: bool = True, bytewise: bool = False, pause_ms: float = 0, **fields: Any
    ) -> Json:
        """One text per choice; `bytewise` makes every byte a token. `fields` are more fields of the request."""
        ids = [self._engine.script(text, eos=eos, bytewise=bytewise) for text in texts]
        more = {f"script_{choice}": script for choice, script in enumerate(ids) if choice}
        several = {"n": len(ids), "seed": 0, "temperature": 1} if len(ids) > 1 else {}
        xargs = {"script": ids[0], **more, **({"script_pause_ms": pause_ms} if pause_ms else {})}
        return {**several, "vllm_xargs": xargs, **fields}


@pytest.fixture
def script(engine: Engine) -> Script:
    return Script(engine)


@pytest.fixture
async def penstock(engine: Engine) -> AsyncIterator[Caller]:
    """Penstock in front of the engine as it is deployed with vLLM's parsers on."""
    async with sidecar(engine.url) as running, calling(running.url) as caller:
        yield caller


@pytest.fixture
async def inline_penstock(engine: Engine) -> AsyncIterator[Caller]:
    """The same for an engine without a tool parser: Penstock reads the calls from the text."""
    async with sidecar(engine.url, {"parses_tools": False}) as running, calling(running.url) as caller:
        yield caller


@pytest.fixture
async def direct(engine: Engine) -> AsyncIterator[Caller]:
    """The engine itself, without Penstock."""
    async with calling(engine.url) as caller:
        yield caller
