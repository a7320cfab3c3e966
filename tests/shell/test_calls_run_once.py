"""A replica is killed while it runs a tool: two `penstock serve` on one Redis, and a tool that counts."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import ClientError

from penstock.shell.replay import serving as serving_app
from support import chunks, commands
from support.http_client import SSE, Caller, Json, calling, chat
from support.redis_server import redis_server
from support.sockets import until
from support.tools import COUNT, CountingService, Model, call, calling_turn
from support.upstreams import engine_app

STREAMS = "/v1/streams"
LEASE_SECONDS = 0.6
ONCE = (calling_turn(call(0), before="Let me count."), chunks.answer_of(["It ", "is 7."]))
KEYED = {"Accept": SSE, "Idempotency-Key": "k1"}


@dataclass
class Stage:
    replicas: list[commands.Serving]
    callers: list[Caller]
    tool: CountingService
    model: Model


@asynccontextmanager
async def two_replicas(folder: Path, tool: CountingService, *, shares_redis: bool) -> AsyncIterator[Stage]:
    model = Model(*ONCE)
    async with AsyncExitStack() as stack:
        store: Json = {}
        if shares_redis:
            redis = await stack.enter_async_context(redis_server(folder))
            store = {"url": redis.url, "lease_seconds": LEASE_SECONDS}
        tool_url = await stack.enter_async_context(serving_app(tool.app()))
        engine_url = await stack.enter_async_context(serving_app(engine_app(model.answer)[0]))
        settings: Json = {
            "upstreams": [{"url": engine_url, "plugin": "off"}],
            "listen": {"port": 0},
            "store": store,
            "tools": {
                "bindings": [{"tools": ["count"], "url": f"{tool_url}/tool"}],
                "loop": {"allow_networks": ["127.0.0.0/8"]},
            },
        }
        config = folder / "penstock.json"
        config.write_text(json.dumps(settings))
        replicas = [
            await stack.enter_async_context(commands.serving("serve", "--config", str(config))) for _ in range(2)
        ]
        callers = [await stack.enter_async_context(calling(replica.url)) for replica in replicas]
        yield Stage(replicas, callers, tool, model)


async def killed_in_the_tool(stage: Stage, headers: dict[str, str]) -> str:
    """A request whose replica dies while its tool works; the stream's id."""
    async with stage.callers[0].opened(STREAMS, chat(tools=[COUNT]), headers) as response:
        stream_id: str = response.headers["X-Stream-Id"]
        await until(lambda: stage.tool.running == 1)
        stage.replicas[0].send(signal.SIGKILL)
        with pytest.raises(ClientError):
            await response.read()
    await until(lambda: stage.tool.running == 0)
    return stream_id


@pytest.mark.parametrize("how", ["resume", "retry"])
async def test_the_tool_of_a_killed_replica_is_not_run_again(tmp_path: Path, how: str) -> None:
    """The tool keeps no keys, so every request that reached it would count."""
    tool = CountingService(knows_keys=False, delay=1)
    async with two_replicas(tmp_path, tool, shares_redis=True) as stage:
        headers = KEYED if how == "retry" else {"Accept": SSE}
        stream_id = await killed_in_the_tool(stage, headers)
        answers = []
        for _ in range(3):
            if how == "retry":
                answers.append(await stage.callers[1].post(STREAMS, chat(tools=[COUNT]), headers))
            else:
                answers.append(await stage.callers[1].get(f"{STREAMS}/{stream_id}/events", headers))
    first = answers[0]
    assert all((answer.status, answer.body) == (200, first.body) for answer in answers)
    assert {event["stream_id"] for event in first.events} == {stream_id}
    assert first.one("tool_call.ready")["arguments"] == {"by": 1}
    assert (first.one("error")["code"], first.end["status"]) == ("replica_lost", "failed")
    assert first.of("tool_call.result") == []
    assert (len(tool.requests), len(stage.model.asked)) == (1, 1)
    assert tool.executed.total() <= 1


async def test_without_a_shared_store_a_retry_asks_the_tool_again_with_the_same_key(tmp_path: Path) -> None:
    tool = CountingService(delay=1)
    async with two_replicas(tmp_path, tool, shares_redis=False) as stage:
        await killed_in_the_tool(stage, KEYED)
        answer = await stage.callers[1].post(STREAMS, chat(tools=[COUNT]), KEYED)
    assert answer.text() == "Let me count.It is 7."
    assert len(tool.requests) == 2
    assert len({headers["Idempotency-Key"] for headers in tool.headers}) == 1
    assert tool.executed.total() == 1
