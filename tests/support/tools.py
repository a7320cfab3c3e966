"""Services behind tools: one that counts what it executes, and a model that calls a tool and then answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from support import chunks
from support.upstreams import opened

Json = dict[str, Any]


@dataclass
class CountingService:
    """A tool over HTTP. `executed` counts by key where it de-duplicates, and every request where it does not."""

    knows_keys: bool = True
    delay: float = 0.0
    status: int = 200
    fails_first: int = 0
    loses: float = 0.0
    """The share of answers that are lost: it has acted, and says 503."""
    body: bytes | None = None
    requests: list[Json] = field(default_factory=list)
    executed: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by key."""
    left: int = 0
    running: int = 0
    most_running: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/tool", self._answer)
        app.router.add_get("/moved", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        key = request.headers["Idempotency-Key"]
        self.headers.append(dict(request.headers))
        self.asked[key] += 1
        self.requests.append(await request.json())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.running -= 1
        if len(self.requests) <= self.fails_first:
            return web.Response(status=503)
        if not (self.knows_keys and self.executed[key]):
            self.executed[key] += 1
        if self.loses and random.Random(f"{key}{self.asked[key]}").random() < self.loses:
            return web.Response(status=503)
        if self.status != 200:
            return web.Response(status=self.status, headers={"Location": "/moved"})
        return web.Response(body=self.body if self.body is not None else json.dumps({"n": 7}).encode())


def call(index: int, name: str = "count", arguments: str = '{"by": 1}', call_id: str | None = None) -> list[bytes]:
    """A call as vLLM's own parser cuts it."""
    half = len(arguments) // 2
    return [
        chunks.tool(index, call_id=call_id or f"c{index}", name=name, arguments="", tokens=index * 10 + 1),
        chunks.tool(index, arguments=arguments[:half], tokens=index * 10 + 2),
        chunks.tool(index, arguments=arguments[half:], tokens=index * 10 + 3),
    ]


class Model:
    """An engine that says its turns one after the other, told apart by the messages that it is asked with.

    A turn may be made of the request. `doubles` repeats every chunk of a call, as some engines do.
    """

    def __init__(self, *turns: Sequence[bytes] | Callable[[Json], Sequence[bytes]], doubles: bool = False) -> None:
        self._turns = turns
        self._doubles = doubles
        self.asked: list[Json] = []
        self.ids: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.ids.append(request.headers.get("X-Request-Id", ""))
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        response = await opened(request)
        said = self._turns[min(turn, len(self._turns) - 1)]
        for piece in said(body) if callable(said) else said:
            again = 2 if self._doubles and b'"tool_calls"' in piece else 1
            for _ in range(again):
                await response.write(piece)
        return response


def calling_turn(*pieces: Sequence[bytes], before: str = "") -> list[bytes]:
    said = [chunks.content(before)] if before else []
    return chunks.answer(*said, *(piece for one in pieces for piece in one), reason="tool_calls", completion=9)


COUNT: Json = {
    "type": "function",
    "function": {"name": "count", "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}}},
}
