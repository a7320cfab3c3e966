"""A client that leaves or cancels ends the generation, as the engine's own metrics tell, whenever it happens.

That it happens within 200 ms is measured in `bench/`; here it has to happen.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from support.engine import Engine
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, calling, chat
from support.record import LONG
from support.scripts import Script
from support.sidecar import sidecar
from support.sockets import until

pytestmark = pytest.mark.engine

# A full engine on a busy machine answers late, its metrics too; less than what a caller waits for an answer.
BUSY_SECONDS = 25.0

ROUTES: dict[str, tuple[str, str, bool]] = {
    "events": ("/v1/streams", SSE, False),
    "lines": ("/v1/streams", NDJSON, False),
    "folded": ("/v1/streams", FOLDED, False),
    "chunks": ("/v1/chat/completions", "*/*", True),
    "whole": ("/v1/chat/completions", "*/*", False),
}


@pytest.fixture
async def impatient(engine: Engine, plugin: str) -> AsyncIterator[Caller]:
    """Penstock that sends its head, and with it the stream's id, without waiting for the engine's first word."""
    upstream = {"plugin": plugin}
    async with (
        sidecar(engine.url, upstream, timing__first_byte_seconds=0.05) as running,
        calling(running.url) as caller,
    ):
        yield caller


async def is_idle(engine: Engine) -> bool:
    counts = (engine.running_requests, engine.waiting_requests, engine.kv_cache_usage)
    return not any([await asyncio.to_thread(count) for count in counts])


async def generated_tokens(engine: Engine) -> float:
    return await asyncio.to_thread(engine.metric, "vllm:generation_tokens_total")


async def assert_given_up(engine: Engine) -> None:
    """The engine holds nothing of the request any more, and generates nothing more."""
    await until(lambda: is_idle(engine), BUSY_SECONDS)
    generated = await generated_tokens(engine)
    await asyncio.sleep(0.1)
    assert await generated_tokens(engine) == generated


def slow_to_start(script: Script) -> Json:
    """A prompt that no cache knows, computed in several steps of 150 ms before the first token."""
    prompt = f"{secrets.token_hex(8)} {LONG[:3000]}"
    said = script("Hello!", pause_ms=150, messages=[{"role": "user", "content": prompt}])
    return chat(**{**said, "max_tokens": 16})


def endless(script: Script) -> Json:
    """A generation of some 20 s."""
    return chat(**script("Hello! ", eos=False, pause_ms=10, max_tokens=2000))


@asynccontextmanager
async def asking(caller: Caller, route: str, body: Json) -> AsyncIterator["asyncio.Task[Answer]"]:
    """A request in flight; leaving the block closes its connection, and waits for nothing."""
    path, accept, streams = ROUTES[route]
    task = asyncio.create_task(caller.post(path, {**body, "stream": streams}, {"Accept": accept}))
    yield task
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_leaves_before_the_first_token(
    impatient: Caller, engine: Engine, script: Script, route: str
) -> None:
    body = slow_to_start(script)
    generated = await generated_tokens(engine)
    async with asking(impatient, route, body):
        await until(lambda: holds_requests(engine), BUSY_SECONDS)
    await assert_given_up(engine)
    assert await generated_tokens(engine) - generated <= 1


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_leaves_in_the_middle(
    impatient: Caller, engine: Engine, script: Script, route: str
) -> None:
    before = await generated_tokens(engine)
    async with asking(impatient, route, endless(script)):
        await until(lambda: has_generated(engine, before + 5))
    await assert_given_up(engine)
    assert await generated_tokens(engine) - before < 1500


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_leaves_while_its_request_waits_for_its_turn(
    impatient: Caller, engine: Engine, script: Script, route: str
) -> None:
    # Without a seed every choice says the script of the first, and 64 of them fill the engine.
    crowd = chat(**script("Hello! ", eos=False, pause_ms=20, max_tokens=2000, n=64, temperature=1), stream=True)
    async with impatient.opened("/v1/chat/completions", crowd):
        await until(lambda: asyncio.to_thread(lambda: engine.running_requests() == 64), BUSY_SECONDS)
        async with asking(impatient, route, chat(**script("Hello!"))):
            await until(lambda: asyncio.to_thread(lambda: engine.waiting_requests() == 1), BUSY_SECONDS)
        await until(lambda: asyncio.to_thread(lambda: engine.waiting_requests() == 0), BUSY_SECONDS)
        assert await asyncio.to_thread(engine.running_requests) == 64
    await assert_given_up(engine)


async def holds_requests(engine: Engine) -> bool:
    return await asyncio.to_thread(engine.running_requests) > 0


async def has_generated(engine: Engine, tokens: float) -> bool:
    return await generated_tokens(engine) >= tokens


@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize("moment", ["before the first token", "in the middle"])
async def test_a_delete_ends_the_stream_as_cancelled(
    impatient: Caller, engine: Engine, script: Script, moment: str, accept: str
) -> None:
    early = moment == "before the first token"
    body = slow_to_start(script) if early else endless(script)
    async with impatient.opened("/v1/streams", body, {"Accept": accept}) as response:
        received = b""
        while not early and received.count(b"delta.text") < 5:
            received += await response.content.readany()
        if early:
            await until(lambda: holds_requests(engine), BUSY_SECONDS)
        deleted = await impatient.delete(response.headers["X-Stream-Id"])
        answer = Answer(200, {}, received + await response.content.read())
    assert (deleted.status, deleted.body) == (204, b"")
    assert answer.end["status"] == "cancelled"
    assert (answer.finish()["reason"], answer.finish()["cause"]) == ("cancelled", "abort")
    assert answer.usage["estimated"] is True
    assert answer.of("error") == []
    assert (await impatient.delete(response.headers["X-Stream-Id"])).status == 204
    await assert_given_up(engine)


async def test_a_delete_ends_an_openai_stream_with_an_error(impatient: Caller, engine: Engine, script: Script) -> None:
    body = {**endless(script), "stream": True}
    async with impatient.opened("/v1/chat/completions", body) as response:
        received = b""
        while received.count(b'"content":"') < 5:
            received += await response.content.readany()
        await impatient.delete(response.headers["X-Stream-Id"])
        answer = Answer(200, {}, received + await response.content.read())
    assert answer.chunks[-1]["error"]["code"] == "cancelled"
    assert answer.body.endswith(b"data: [DONE]\n\n")
    await assert_given_up(engine)
