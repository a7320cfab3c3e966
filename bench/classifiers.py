"""What a classifier that takes 100 ms costs: `.venv/bin/python bench/classifiers.py`.

An engine of a few lines, a classifier that sleeps 100 ms and flags the word VIOLATION, Penstock without it, Penstock
with it, and the callers: each is a process of its own, so that the classifier's work is not taken for Penstock's.
Printed: from the engine's write of that word to the caller's last byte (p50, p99; one clock for all processes), and
tokens per second of answers without that word, with the classifier off and on by turns; the ratio is of the best turns.
"""

import asyncio
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.cpu_per_token import free_port, running

VERDICT_SECONDS = 0.1
TOKEN_SECONDS = 0.02
FAST_SECONDS = 0.005
STREAMS = 16
ROUNDS = 3
TOKENS = 400
BAD_AT = 30


def chunk(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return b"data: " + json.dumps({"id": "c", "model": "m", "choices": [choice]}).encode() + b"\n\n"


END = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Engine:
    """Says words; asked for anything but "fine", it says VIOLATION too, and tells at /violated when it wrote that."""

    def __init__(self) -> None:
        self.violated: dict[str, float] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self.chat), web.get("/violated", self.tell)])
        app.add_routes([web.get("/health", healthy)])
        return app

    async def tell(self, _request: web.Request) -> web.Response:
        return web.json_response(self.violated)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = (await request.json())["messages"][0]["content"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk(role="assistant", content=""))
        for number in range(TOKENS):
            is_bad = asked != "fine" and number == BAD_AT
            await response.write(chunk(content=" VIOLATION" if is_bad else " word"))
            if is_bad:
                self.violated[asked] = time.monotonic()
            await asyncio.sleep(TOKEN_SECONDS if asked != "fine" else FAST_SECONDS)
        await response.write(END)
        return response


async def judge(request: web.Request) -> web.Response:
    text = (await request.json())["input"]
    await asyncio.sleep(VERDICT_SECONDS)
    return web.json_response({"results": [{"flagged": "VIOLATION" in text, "categories": {}}]})


async def healthy(_request: web.Request) -> web.Response:
    return web.Response()


def classifier_app() -> web.Application:
    app = web.Application()
    app.add_routes([web.post("/v1/moderations", judge)])
    return app


PARTS = {"engine": lambda: Engine().app(), "classifier": classifier_app}


def serve(part: str, port: int) -> None:
    web.run_app(PARTS[part](), host="127.0.0.1", port=port, print=None, access_log=None)


async def ask(session: aiohttp.ClientSession, url: str, content: str) -> float:
    """When the last byte came."""
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    async with session.post(f"{url}/v1/streams", json=body) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            last = time.monotonic()
    return last


async def measure(engine: str, off: str, on: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session, url, "fine") for url in (off, on)))  # both have met their engine
        ends: dict[str, float] = {}
        for turn in range(ROUNDS):
            names = [f"{turn}/{n}" for n in range(STREAMS)]
            ends |= zip(names, await asyncio.gather(*(ask(session, on, name) for name in names)), strict=True)
        async with session.get(f"{engine}/violated") as answer:
            violated = await answer.json()
        lags = sorted((ends[name] - violated[name]) * 1000 for name in ends)
        print(f"violation to last byte, ms: p50 {lags[len(lags) // 2]:.0f}, p99 {lags[int(len(lags) * 0.99)]:.0f}")
        rates: dict[str, list[float]] = {"off": [], "on": []}
        for _ in range(ROUNDS):
            for name, url in (("off", off), ("on", on)):
                begun = time.monotonic()
                await asyncio.gather(*(ask(session, url, "fine") for _ in range(STREAMS)))
                rates[name].append(STREAMS * TOKENS / (time.monotonic() - begun))
        best = {name: max(values) for name, values in rates.items()}
        print(f"tokens/s off {best['off']:.0f}, on {best['on']:.0f}: ratio {best['on'] / best['off']:.3f}")
        print("turns: " + ", ".join(f"{name} {[round(rate) for rate in found]}" for name, found in rates.items()))


def main() -> None:
    with ExitStack() as stack:

        def start(*command: str | Path, **settings: Any) -> str:
            port = free_port()
            told = [str(port) if word == "PORT" else str(word) for word in command]
            environment = os.environ | {f"PENSTOCK_{name}": json.dumps(value) for name, value in settings.items()}
            stack.enter_context(running([sys.executable, *told], port, environment))
            return f"http://127.0.0.1:{port}"

        engine = start(__file__, "engine", "PORT")
        judged = start(__file__, "classifier", "PORT")
        serving = ("-m", "penstock", "serve", "--port", "PORT")
        upstreams = [{"url": engine, "plugin": "off"}]
        off = start(*serving, UPSTREAMS=upstreams)
        on = start(*serving, UPSTREAMS=upstreams, MODERATION__CLASSIFIERS=[{"url": f"{judged}/v1/moderations"}])
        asyncio.run(measure(engine, off, on))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(sys.argv[1], int(sys.argv[2]))
    else:
        main()
