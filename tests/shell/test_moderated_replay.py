"""What is kept of a moderated stream holds nothing of a match: in memory, in Redis, in a resume, in a retry.

Every character of the secret stands nowhere else in what is sent, so that one byte of a match would be seen.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from redis.asyncio import Redis

from penstock.core.verifier import parse_log, verify
from penstock.shell.replay import serving
from penstock.shell.stores.memory import MemoryStore
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Caller, Json, calling, chat
from support.redis_server import redis_server
from support.sidecar import sidecar
from support.sockets import until
from support.upstreams import engine_app, opened, saying

STREAMS = "/v1/streams"
CHAT = "/v1/chat/completions"
SECRET = "§¶¤÷×"
HALTING = "±«»"
RULES = [{"id": "secret", "literal": SECRET}, {"id": "stop", "literal": HALTING, "action": "halt"}]
# Characters as they are and as JSON escapes them; the second also where JSON stands in a string of JSON.
TRACES = [form for letter in SECRET + HALTING for form in (letter.encode(), f"u{ord(letter):04x}".encode())]

REASONING, ANSWER = f"I know {SECRET}.", f"It is {SECRET}, {SECRET}!"
ARGUMENTS = json.dumps({"say": SECRET})  # escaped
PIECES = [
    chunks.role(),
    *map(chunks.reasoning, REASONING),
    *map(chunks.content, ANSWER),
    chunks.tool(call_id="call_1", name="tell", arguments=""),
    *(chunks.tool(arguments=letter) for letter in ARGUMENTS),
    chunks.finish("tool_calls"),
    chunks.final_usage(60),
    chunks.DONE,
]

Raw = Callable[[str], Awaitable[list[bytes]]]


@dataclass(frozen=True)
class Kept:
    """Penstock before an engine, a second caller who may be at another replica, and all that is kept of a stream."""

    caller: Caller
    other: Caller
    raw: Raw


def assert_clean(*kept: bytes) -> None:
    assert [trace for data in kept for trace in TRACES if trace in data.lower()] == []


@asynccontextmanager
async def keeping(store: str, engine: web.Application, folder: Path) -> AsyncIterator[Kept]:
    async with AsyncExitStack() as stack:
        engine_url = await stack.enter_async_context(serving(engine))
        if store == "memory":
            only = await stack.enter_async_context(sidecar(engine_url, moderation__rules=RULES))
            caller = await stack.enter_async_context(calling(only.url))
            held = only.server.store
            assert isinstance(held, MemoryStore)
            yield Kept(caller, caller, lambda stream_id: in_memory(held, stream_id))
            return
        redis = await stack.enter_async_context(redis_server(folder))
        flags: Json = {"store__url": redis.url, "moderation__rules": RULES}
        both = [await stack.enter_async_context(sidecar(engine_url, **flags)) for _ in range(2)]
        callers = [await stack.enter_async_context(calling(running.url)) for running in both]
        here, there = callers
        yield Kept(here, there, lambda _: in_redis(redis.url, folder))


async def in_memory(store: MemoryStore, stream_id: str) -> list[bytes]:
    log = await store.find(stream_id)
    assert log is not None
    whole = b"" if log.whole is None else log.whole.body + repr(log.whole.headers).encode()
    return [b"".join(entry.data for entry in log) + whole + repr(log.info).encode()]


async def in_redis(url: str, folder: Path) -> list[bytes]:
    """Every key as it is now, and every command that ever wrote one, as they stand in Redis's own file."""
    async with Redis.from_url(url) as redis:
        values = [key + flat(await value_of(redis, key)) async for key in redis.scan_iter()]
    commands = await asyncio.to_thread(lambda: [path.read_bytes() for path in folder.rglob("*.aof")])
    return [b"\n".join(values), b"".join(commands)]


def flat(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        return flat([*value.keys(), *value.values()])
    return b"\n".join(map(flat, value)) if isinstance(value, list | tuple | set) else repr(value).encode()


async def value_of(redis: Any, key: bytes) -> Any:
    readers = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"stream": redis.xrange,
        b"set": redis.smembers,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
    }
    return await readers[await redis.type(key)](key)


each_store = pytest.mark.parametrize("store", ["memory", "redis"])


@each_store
@pytest.mark.parametrize("accept", [SSE, NDJSON], ids=["events", "lines"])
async def test_a_resume_from_every_cursor(store: str, accept: str, tmp_path: Path) -> None:
    engine, _ = engine_app(saying(*PIECES))
    async with keeping(store, engine, tmp_path) as kept:
        first = await kept.caller.stream(accept, tools=[{"type": "function", "function": {"name": "tell"}}])
        assert first.reasoning() == "I know [redacted]."
        assert first.text() == "It is [redacted], [redacted]!"
        assert json.loads(first.arguments()) == {"say": "[redacted]"}
        assert_clean(first.body)
        stream_id = first.headers["X-Stream-Id"]
        for after in range(len(first.events)):
            path = f"{STREAMS}/{stream_id}/events?after={after}"
            rest = await kept.other.get(path, {"Accept": accept})
            assert parse_log(rest.body) == first.events[after:]
            assert_clean(rest.body)
        assert_clean((await kept.other.get(f"{STREAMS}/{stream_id}")).body)
        kinds = await kept.raw(stream_id)
        assert all(kind.count(b"[redacted]") >= 4 for kind in kinds), "it is the stream that was looked at"
        assert_clean(*kinds)


@each_store
@pytest.mark.parametrize("secret", [SECRET, HALTING], ids=["redact", "halt"])
async def test_a_stream_that_is_left_in_the_middle_of_a_match(store: str, secret: str, tmp_path: Path) -> None:
    may_go_on = asyncio.Event()

    async def slowly(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(b"".join([chunks.role(), chunks.content("It is "), chunks.content(secret[:2])]))
        await may_go_on.wait()
        for piece in chunks.answer_of([*secret[2:], "!"])[1:]:
            await response.write(piece)
        return response

    engine, _ = engine_app(slowly)
    async with keeping(store, engine, tmp_path) as kept:
        async with kept.caller.opened(STREAMS, chat(penstock={"on_disconnect": "linger"})) as response:
            stream_id, data = response.headers["X-Stream-Id"], b""
            while b"delta.text" not in data or not data.endswith(b"\n\n"):
                data += await response.content.readany()
        assert_clean(data)
        assert_clean(*await kept.raw(stream_id))
        rest = asyncio.create_task(kept.other.get(f"{STREAMS}/{stream_id}/events?after=0", {"Accept": SSE}))
        await asyncio.sleep(0.05)
        may_go_on.set()
        answer = await rest
        assert verify(answer.events) == []
        assert answer.text() == ("It is [redacted]!" if secret == SECRET else "It is ")
        assert answer.finish()["reason"] == ("stop" if secret == SECRET else "content_filter")
        assert_clean(answer.body)
        kinds = await kept.raw(stream_id)
        assert all(b"stream.end" in kind for kind in kinds)
        assert_clean(*kinds)


async def either(request: web.Request) -> web.StreamResponse:
    """Streams if it is asked to."""
    if (await request.json()).get("stream"):
        return await saying(*chunks.answer_of(list(ANSWER)))(request)
    return web.Response(body=chunks.whole({"content": ANSWER}), content_type="application/json")


@each_store
@pytest.mark.parametrize(
    ("route", "accept", "body"),
    [
        (STREAMS, SSE, {}),
        (STREAMS, FOLDED, {}),
        (CHAT, "*/*", {"stream": True}),
        (CHAT, "*/*", {"stream": False}),
    ],
    ids=["events", "folded", "chunks", "whole"],
)
async def test_an_idempotent_retry(store: str, route: str, accept: str, body: Json, tmp_path: Path) -> None:
    engine, seen = engine_app(either)
    async with keeping(store, engine, tmp_path) as kept:
        headers = {"Accept": accept, "Idempotency-Key": "k-1"}
        first = await kept.caller.post(route, chat(**body), headers)
        again = await kept.other.post(route, chat(**body), headers)
        assert (first.status, again.status, seen.requests) == (200, 200, 1)
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.body == first.body
        assert again.body.count(b"[redacted]") >= 2
        assert_clean(again.body)

        async def is_kept() -> bool:
            return all(kind.count(b"[redacted]") >= 2 for kind in await kept.raw(again.headers["X-Stream-Id"]))

        await until(is_kept)
        assert_clean(*await kept.raw(again.headers["X-Stream-Id"]))
