"""How late an abort takes effect in the engine, told by another stream of the same batch.

The request that is aborted makes every engine step last `STEP_MS`; the clock's own steps last a few milliseconds. So
the clock's tokens show which steps the aborted request was still part of.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, Final

from support.http_client import NDJSON, Caller, chat
from support.plugin_client import PluginClient
from support.scripts import Script

STEP_MS: Final = 60
_SLOW_SECONDS: Final = STEP_MS / 2000
_SETTLED_STEPS: Final = 20
# So long a slow request generates before it is aborted, where nobody sees its tokens.
_BEGUN_SECONDS: Final = 0.4

Abort = Callable[[], Awaitable[None]]
Begin = Callable[[], Awaitable[Abort]]


async def late_ms(clock: PluginClient, script: Script, begin: Begin) -> float:
    """How long after the abort a step with the aborted request began, in milliseconds; 0 if none did.

    `begin` starts a request, waits until it generates and returns what aborts it.
    """
    number = await clock.open(**chat(**script("tick ", eos=False), max_tokens=1900))
    await clock.tokens(number, 3)
    abort = await begin()
    aborted = asyncio.get_running_loop().time()
    await abort()
    seen = len(clock.heard_at)
    await clock.heard(lambda: _is_fast(clock.heard_at[seen:]))
    await clock.abort(number)
    slow = [start for start, end in pairwise(clock.heard_at) if end - start > _SLOW_SECONDS and end > aborted]
    return max([0.0, *((start - aborted) * 1000 for start in slow)])


def plugin_aborts(connection: PluginClient, script: Script) -> Begin:
    """On a connection of its own, other than the clock's."""

    async def begin() -> Abort:
        number = await connection.open(**_slow_request(script))
        await connection.tokens(number, 2)
        return lambda: connection.abort(number)

    return begin


def client_leaves(caller: Caller, script: Script) -> Begin:
    """A client of Penstock closes its connection."""

    async def begin() -> Abort:
        asked = asyncio.create_task(caller.post("/v1/streams", _slow_request(script), {"Accept": NDJSON}))
        await asyncio.sleep(_BEGUN_SECONDS)

        async def leave() -> None:
            asked.cancel()
            await asyncio.wait({asked})

        return leave

    return begin


def _slow_request(script: Script) -> dict[str, Any]:
    return chat(**script("slow ", eos=False, pause_ms=STEP_MS, max_tokens=500))


def _is_fast(heard_at: list[float]) -> bool:
    last = heard_at[-_SETTLED_STEPS:]
    return len(last) == _SETTLED_STEPS and all(end - start < _SLOW_SECONDS for start, end in pairwise(last))
