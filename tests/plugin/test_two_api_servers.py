"""An engine as a large pod runs it: two API server processes, a Unix socket, and a key.

`--api-key` guards the plugin's routes as it guards vLLM's own, and each process serves its share of the tagged streams.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle, islice
from typing import Any

import aiohttp
import pytest

from conftest import EngineHolder
from support.engine import Engine, running_engine
from support.fake_plugin import socket_path
from support.http_client import NDJSON, Answer, Caller, calling, chat
from support.plugin_client import connected, ids
from support.record import EMOJI, THINKING
from support.scripts import Script
from support.sidecar import Sidecar, sidecar
from support.sockets import until

pytestmark = pytest.mark.engine

KEY = {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def guarded(engine_holder: EngineHolder) -> Iterator[Engine]:
    engine_holder.stop()
    with socket_path() as path:
        # 2112 tokens: one request of the longest kind, or two of the tests' that then drive each other out.
        cache = ("--num-gpu-blocks-override", "66")
        arguments = ("--api-key", "the-key", "--uds", str(path), "--api-server-count", "2", *cache)
        with running_engine(*arguments, environment={"VLLM_PLUGINS": "penstock"}) as engine:
            yield engine


@pytest.fixture
async def session(guarded: Engine) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(guarded.unix_socket))) as opened:
        yield opened


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}])
async def test_nothing_is_served_without_the_key(
    session: aiohttp.ClientSession, guarded: Engine, headers: dict[str, str]
) -> None:
    for route in ("capabilities", "tokenizer"):
        async with session.get(f"{guarded.url}/v1/penstock/{route}", headers=headers) as answer:
            assert answer.status == 401
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await session.ws_connect(f"{guarded.url}/v1/penstock/streams", headers=headers)
    # An ASGI server has no better word for a handshake that the application turns down.
    assert refused.value.status in (401, 403)


async def test_all_is_served_with_it(session: aiohttp.ClientSession, guarded: Engine) -> None:
    async with session.get(f"{guarded.url}/v1/penstock/capabilities", headers=KEY) as answer:
        assert (answer.status, (await answer.json())["hooks"]["output_tap"]) == (200, True)
    async with session.get(f"{guarded.url}/v1/penstock/tokenizer", headers=KEY) as answer:
        assert answer.status == 200
    async with connected(guarded.url, unix_socket=guarded.unix_socket, headers=KEY) as client:
        await client.over(await client.open(**chat(max_tokens=3)))


@pytest.fixture
async def penstocks(guarded: Engine) -> AsyncIterator[list[Sidecar]]:
    """Two sidecars, each connected to both processes."""
    upstream = {"plugin": "auto", "socket": str(guarded.unix_socket), "api_key": "the-key", "parses_tools": False}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(sidecar("http://vllm", upstream)) for _ in range(2)]
        for penstock in running:
            await until(partial(reads_from_both, penstock))
        yield running


@pytest.fixture
async def callers(penstocks: list[Sidecar]) -> AsyncIterator[list[Caller]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(calling(penstock.url)) for penstock in penstocks]


def reads_from_both(penstock: Sidecar) -> bool:
    return len(loads(penstock)) == 2


def loads(penstock: Sidecar) -> dict[str, int]:
    plugin = penstock.server.cluster.members[0].engine.plugin
    assert plugin is not None
    return plugin.loads


async def open_streams(session: aiohttp.ClientSession, guarded: Engine) -> dict[str, int]:
    """What each process says of itself. Who answers is vLLM's own choice, so both are asked until they have."""
    told: dict[str, int] = {}
    async with asyncio.timeout(30):
        while len(told) < 2:
            closing = {**KEY, "Connection": "close"}
            async with session.get(f"{guarded.url}/v1/penstock/capabilities", headers=closing) as answer:
                said = await answer.json()
            assert said["processes"] == 2
            told[said["instance"]] = said["open_streams"]
    return told


async def running_requests(guarded: Engine) -> int:
    return await asyncio.to_thread(guarded.running_requests)


def endless(guarded: Engine) -> dict[str, Any]:
    return chat(**Script(guarded)("on and on ", eos=False, pause_ms=20), max_tokens=1500)


async def test_each_process_serves_its_share_of_the_streams_of_each_sidecar(
    guarded: Engine, penstocks: list[Sidecar], callers: list[Caller], session: aiohttp.ClientSession
) -> None:
    assert set(loads(penstocks[0])) == set(loads(penstocks[1])) == set(await open_streams(session, guarded))
    asked = [
        asyncio.create_task(caller.post("/v1/streams", endless(guarded), {"Accept": NDJSON}))
        for caller in callers
        for _ in range(4)
    ]
    await until(lambda: _run(guarded, 8))
    assert [sorted(loads(penstock).values()) for penstock in penstocks] == [[2, 2], [2, 2]]
    assert list((await open_streams(session, guarded)).values()) == [4, 4]
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await until(lambda: _run(guarded, 0))
    assert list((await open_streams(session, guarded)).values()) == [0, 0]


async def _run(guarded: Engine, count: int) -> bool:
    return await running_requests(guarded) == count


async def test_every_token_arrives_and_every_end_is_counted(guarded: Engine, callers: list[Caller]) -> None:
    script = Script(guarded)
    before = await asyncio.to_thread(ends, guarded)
    texts = [f"{text} {number}" for text, number in zip(cycle((THINKING, EMOJI)), range(16), strict=False)]
    answers = await asyncio.gather(
        *(caller.stream(NDJSON, **script(text)) for text, caller in zip(texts, cycle(callers), strict=False))
    )
    assert [said(answer) for answer in answers] == texts
    assert await asyncio.to_thread(ends, guarded) - before == 16


def said(answer: Answer) -> str:
    thought = answer.reasoning()
    return f"<think>{thought}</think>{answer.text()}" if thought else answer.text()


def ends(guarded: Engine) -> float:
    """Of both processes together; there is no such metric before the first end."""
    try:
        return guarded.metric("penstock_request_ends_total")
    except LookupError:
        return 0


async def test_what_is_driven_out_of_a_full_cache_goes_on_where_it_was(guarded: Engine) -> None:
    """Preemption: vLLM reckons a request anew when there is room again, and tells none of its ids twice."""
    script = Script(guarded)
    before = await asyncio.to_thread(guarded.metric, "vllm:num_preemptions_total")
    requests = [script(f"Number {number} goes on and on. ", eos=False, max_tokens=900) for number in range(4)]
    async with connected(guarded.url, unix_socket=guarded.unix_socket, headers=KEY) as client:
        numbers = [await client.open(**chat(**request)) for request in requests]
        for number, request in zip(numbers, requests, strict=True):
            assert ids(await client.over(number)) == list(islice(cycle(request["vllm_xargs"]["script"]), 900))
    assert await asyncio.to_thread(guarded.metric, "vllm:num_preemptions_total") > before


async def test_a_process_that_dies_is_one_error_in_each_of_its_streams(guarded: Engine, callers: list[Caller]) -> None:
    """vLLM itself ends the other processes then; until it has, their streams go on."""
    asked = [
        asyncio.create_task(callers[0].post("/v1/streams", endless(guarded), {"Accept": NDJSON})) for _ in range(4)
    ]
    await until(lambda: _run(guarded, 4))
    guarded.kill_api_server()
    for answer in await asyncio.gather(*asked):
        assert answer.end["status"] == "failed"
        assert answer.one("error")["origin"] == "upstream"
    await until(lambda: not guarded.is_alive())
