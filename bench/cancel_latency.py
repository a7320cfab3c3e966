"""From a client's leaving, or its `DELETE`, to the engine's letting go: 500 cancels in three windows, the real vLLM.

Half of them where Penstock reads vLLM's own chunks, half where it reads the plugin's tagged tokens.

The engine (CPU build, tiny model) says it itself: its running and waiting requests and its used KV cache, read from
its metrics as fast as it answers, some milliseconds each. `docs/explanation/cost.md` has the figures of one run.
"""

import argparse
import asyncio
import re
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

# The other scripts and the tests' helpers, wherever this one is started from.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.cpu_per_token import free_port, running  # noqa: E402
from bench.stalled_client import percentile  # noqa: E402

from support.engine import Engine, running_engine  # noqa: E402
from support.http_client import chat  # noqa: E402
from support.record import LONG  # noqa: E402
from support.scripts import Script  # noqa: E402

CHAT, STREAMS = "/v1/chat/completions", "/v1/streams"
PLUGIN = {"plain chunks": "off", "tagged tokens": "auto"}
BEFORE, MIDDLE, QUEUE = WINDOWS = ["before the first token", "in the middle", "in the queue"]
STEP_MS = 10
GIVE_UP_SECONDS = 10.0
_METRICS = re.compile(rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)", re.M)

Body = dict[str, Any]


class Bench:
    """Cancels one request after the other and times the engine."""

    def __init__(self, engine: Engine, penstock: str, session: aiohttp.ClientSession, *, tagged: bool) -> None:
        self._engine = engine
        self._penstock = penstock
        self._session = session
        self._is_tagged = tagged
        self._script = Script(engine)

    async def held(self) -> tuple[float, float, float]:
        """Running requests, waiting requests and the share of the KV cache in use."""
        async with self._session.get(self._engine.url + "/metrics") as answer:
            told = {name: float(value) for name, value in _METRICS.findall(await answer.read())}
        return told[b"num_requests_running"], told[b"num_requests_waiting"], told[b"kv_cache_usage_perc"]

    async def check_way(self) -> None:
        """Ends the run where a stream does not come from the engine the way that the figures are said to be of."""
        body = chat(**self._script("Hello! ", eos=False, pause_ms=STEP_MS, max_tokens=2000))
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while True:
            async with self.asked(STREAMS, body) as answer:
                await answer.content.readany()
                await self.until(lambda running, _waiting, _cache: running > 0)
                async with self._session.get(self._engine.url + "/v1/penstock/capabilities") as told:
                    tagged = int((await told.json())["open_streams"])
            await self.until(lambda running, waiting, cache: not (running or waiting or cache))
            if bool(tagged) == self._is_tagged:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{tagged} tagged streams are open in the engine, and the way is the other one")

    async def until(self, condition: Callable[[float, float, float], bool]) -> float:
        """When it came true; a monotonic time."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while not condition(*await self.held()):
            if time.monotonic() > deadline:
                raise SystemExit(f"the engine did not get there within {GIVE_UP_SECONDS:g} s: {await self.held()}")
        return time.monotonic()

    @asynccontextmanager
    async def asked(self, route: str, body: Body, url: str | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._session.post((url or self._penstock) + route, json={**body, "stream": True}) as answer:
            if answer.status != 200:
                raise SystemExit(f"refused: {answer.status} {await answer.text()}")
            yield answer

    async def cancel(self, route: str, answer: aiohttp.ClientResponse) -> float:
        """Leaves on the chat route, deletes on the native one; returns when that began."""
        began = time.monotonic()
        if route == CHAT:
            answer.close()
        else:
            stream = f"{self._penstock}{STREAMS}/{answer.headers['X-Stream-Id']}"
            async with self._session.delete(stream) as deleted:
                assert deleted.status == 204
        return began

    async def in_the_middle(self, route: str) -> float:
        body = chat(**self._script("Hello! ", eos=False, pause_ms=STEP_MS, max_tokens=2000))
        async with self.asked(route, body) as answer:
            heard = b""
            while heard.count(b"Hello") < 2:
                heard += await answer.content.readany()
            began = await self.cancel(route, answer)
            return await self.until(lambda running, waiting, cache: not (running or waiting or cache)) - began

    async def before_the_first_token(self, route: str) -> float:
        prompt = f"{secrets.token_hex(8)} {LONG[:3000]}"
        said = self._script("Hello! ", eos=False, pause_ms=3 * STEP_MS, messages=[{"role": "user", "content": prompt}])
        async with self.asked(route, chat(**{**said, "max_tokens": 200})) as answer:
            await self.until(lambda running, _waiting, _cache: running > 0)
            began = await self.cancel(route, answer)
            return await self.until(lambda running, waiting, cache: not (running or waiting or cache)) - began

    async def in_the_queue(self, route: str) -> float:
        """Behind a crowd that fills the engine, which the caller sees to."""
        async with self.asked(route, chat(**self._script("Hello!"))) as answer:
            await self.until(lambda _running, waiting, _cache: waiting == 1)
            began = await self.cancel(route, answer)
            return await self.until(lambda running, waiting, _cache: waiting == 0 and running == 64) - began

    @asynccontextmanager
    async def crowd(self) -> AsyncIterator[None]:
        # Short enough that all 64 fit the KV cache to their end: one that is preempted would wait in the queue too.
        body = chat(**self._script("Hello! ", eos=False, pause_ms=3 * STEP_MS, max_tokens=600, n=64, temperature=1))
        # Straight to the engine: nobody reads it, and a client that reads nothing is work for Penstock.
        async with self.asked(CHAT, body, self._engine.url):
            await self.until(lambda running, _waiting, _cache: running == 64)
            yield
        await self.until(lambda running, waiting, cache: not (running or waiting or cache))


def row(window: str, route: str, way: str, values: list[float]) -> str:
    ms = [1000 * value for value in (statistics.median(values), percentile(values, 0.99), max(values))]
    how = {CHAT: f"leaves, {CHAT}", STREAMS: f"DELETE, {STREAMS}"}.get(route, route)
    return f"| {window} | {how} | {way} | {len(values)} | {ms[0]:.0f} | {ms[1]:.0f} | {ms[2]:.0f} |"


async def measure(bench: Bench, way: str, windows: list[str], count: int) -> list[float]:
    """`count` cancels, dealt out over the routes and the windows."""
    await bench.check_way()
    every: list[float] = []
    places = [(route, window) for route in (CHAT, STREAMS) for window in windows]
    for number, (route, window) in enumerate(places):
        share = count * (number + 1) // len(places) - count * number // len(places)
        values: list[float] = []
        if window == QUEUE:
            while len(values) < share:
                async with bench.crowd():  # of some 20 s
                    values += [await bench.in_the_queue(route) for _ in range(min(40, share - len(values)))]
        else:
            cancel = bench.in_the_middle if window == MIDDLE else bench.before_the_first_token
            values = [await cancel(route) for _ in range(share)]
        print(row(window, route, way, values), flush=True)
        every += values
    return every


async def run(engine: Engine, ways: dict[str, str], windows: list[str], count: int) -> None:
    print("| window | cancelled by | from the engine | cancels | p50, ms | p99, ms | most, ms |")
    print("|---|---|---|---|---|---|---|")
    every: list[float] = []
    timeout, connector = aiohttp.ClientTimeout(total=60), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for way, penstock in ways.items():
            bench = Bench(engine, penstock, session, tagged=way == "tagged tokens")
            every += await measure(bench, way, windows, count // len(ways))
    print(row("all", "both", "both", every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="cancels in all (default 500)")
    parser.add_argument("--ways", nargs="+", choices=PLUGIN, default=list(PLUGIN), help="how the engine is read")
    parser.add_argument("--windows", nargs="+", choices=WINDOWS, default=WINDOWS, help="when it is cancelled")
    asked = parser.parse_args()
    # A head that does not wait for the engine, so that a client that has no token yet has its stream's id.
    with running_engine(environment={"VLLM_PLUGINS": "penstock"}) as engine, ExitStack() as stack:
        ways: dict[str, str] = {}
        for way in asked.ways:
            port = free_port()
            environment = {
                "PENSTOCK_UPSTREAMS": f"[{{url: '{engine.url}', plugin: '{PLUGIN[way]}'}}]",
                "PENSTOCK_TIMING__FIRST_BYTE_SECONDS": "0.01",
            }
            command = [sys.executable, "-m", "penstock", "serve", "--port", str(port)]
            stack.enter_context(running(command, port, environment))
            ways[way] = f"http://127.0.0.1:{port}"
        asyncio.run(run(engine, ways, asked.windows, asked.count))


if __name__ == "__main__":
    main()
