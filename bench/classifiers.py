"""What a classifier that takes 100 ms costs: `.venv/bin/python bench/classifiers.py`.

All in one process on loopback: an engine of a few lines, Penstock, a classifier that sleeps 100 ms and flags the word
VIOLATION, and the callers. Printed: from the engine's write of that word to the caller's last byte (p50, p99), and
tokens per second of answers without it, with the classifier on and off by turns, as a ratio.
"""

import asyncio
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from aiohttp import web

from penstock import app
from penstock.settings import load_settings
from penstock.shell.replay import serving

VERDICT_SECONDS = 0.1
TOKEN_SECONDS = 0.02
STREAMS = 16
ROUNDS = 3
TOKENS = 400


def chunk(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return b"data: " + json.dumps({"id": "c", "model": "m", "choices": [choice]}).encode() + b"\n\n"


END = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Engine:
    def __init__(self) -> None:
        self.violated: dict[str, float] = {}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = (await request.json())["messages"][0]["content"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk(role="assistant", content=""))
        for number in range(TOKENS):
            is_bad = asked != "fine" and number == 30
            await response.write(chunk(content=" VIOLATION" if is_bad else " word"))
            if is_bad:
                self.violated[asked] = time.perf_counter()
            await asyncio.sleep(TOKEN_SECONDS if asked != "fine" else 0.005)
        await response.write(END)
        return response


async def judge(request: web.Request) -> web.Response:
    text = (await request.json())["input"]
    await asyncio.sleep(VERDICT_SECONDS)
    return web.json_response({"results": [{"flagged": "VIOLATION" in text, "categories": {}}]})


async def healthy(_request: web.Request) -> web.Response:
    return web.Response()


async def ask(session: aiohttp.ClientSession, url: str, content: str) -> float:
    """When the last byte came."""
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    async with session.post(f"{url}/v1/streams", json=body) as answer:
        async for _ in answer.content.iter_any():
            last = time.perf_counter()
    return last


async def main() -> None:
    engine = Engine()
    engine_app, judge_app = web.Application(), web.Application()
    engine_app.add_routes([web.post("/v1/chat/completions", engine.chat), web.get("/health", healthy)])
    judge_app.add_routes([web.post("/v1/moderations", judge)])
    async with AsyncExitStack() as stack:
        engine_url = await stack.enter_async_context(serving(engine_app))
        judge_url = await stack.enter_async_context(serving(judge_app))
        base = {"upstreams": [{"url": engine_url, "plugin": "off"}], "listen.port": 0}
        watched = {**base, "moderation.classifiers": [{"url": f"{judge_url}/v1/moderations"}]}
        _, off = await stack.enter_async_context(app.running(load_settings(environment={}, flags=base)))
        _, on = await stack.enter_async_context(app.running(load_settings(environment={}, flags=watched)))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        lags = []
        for turn in range(ROUNDS):
            names = [f"{turn}/{n}" for n in range(STREAMS)]
            ends = await asyncio.gather(*(ask(session, on, name) for name in names))
            lags += [(end - engine.violated[name]) * 1000 for name, end in zip(names, ends, strict=True)]
        lags.sort()
        print(f"violation to last byte, ms: p50 {lags[len(lags) // 2]:.0f}, p99 {lags[int(len(lags) * 0.99)]:.0f}")
        rates: dict[str, list[float]] = {"off": [], "on": []}
        for _ in range(ROUNDS):
            for name, url in (("off", off), ("on", on)):
                begun = time.perf_counter()
                await asyncio.gather(*(ask(session, url, "fine") for _ in range(STREAMS)))
                rates[name].append(STREAMS * TOKENS / (time.perf_counter() - begun))
        best = {name: max(values) for name, values in rates.items()}
        print(f"tokens/s off {best['off']:.0f}, on {best['on']:.0f}: ratio {best['on'] / best['off']:.3f}")


if __name__ == "__main__":
    asyncio.run(main())
