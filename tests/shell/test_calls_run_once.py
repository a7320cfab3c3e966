"""Every call runs once: clients that come and go, and replicas that are killed, in front of a tool that counts."""

import asyncio
import json
import random
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientResponse, web

from penstock.core.verifier import parse_log, verify
from penstock.shell.replay import serving as serving_app
from support import chunks, commands
from support.http_client import SSE, Caller, Json, calling, chat
from support.redis_server import redis_server
from support.sockets import settled, until
from support.tools import COUNT, CountingService, Model, call, calling_turn
from support.upstreams import engine_app, in_front_of

STREAMS = "/v1/streams"
LEASE_SECONDS = 0.6
ANSWER = chunks.answer_of(["It ", "is 7."])
ONCE = (calling_turn(call(0), before="Let me count."), ANSWER)
KEYED = {"Accept": SSE, "Idempotency-Key": "k1"}


@dataclass
class Stage:
    """Replicas of one deployment, before a model and a tool."""

    tool: CountingService
    model: Model
    command: tuple[str, ...]
    processes: AsyncExitStack
    replicas: list[commands.Serving] = field(default_factory=list)
    callers: list[Caller] = field(default_factory=list)

    async def start_another(self) -> None:
        replica = await self.processes.enter_async_context(commands.serving(*self.command))
        self.callers.append(await self.processes.enter_async_context(calling(replica.url)))
        self.replicas.append(replica)

    def kill_the_oldest(self) -> None:
        del self.callers[0]
        self.replicas.pop(0).send(signal.SIGKILL)


@asynccontextmanager
async def two_replicas(
    folder: Path, tool: CountingService, model: Model, *, shares_redis: bool = True, retries: int = 0
) -> AsyncIterator[Stage]:
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
                "bindings": [{"tools": ["count"], "url": f"{tool_url}/tool", "retries": retries}],
                "loop": {"allow_networks": ["127.0.0.0/8"]},
            },
        }
        config = folder / "penstock.json"
        config.write_text(json.dumps(settings))
        stage = Stage(tool, model, ("serve", "--config", str(config)), stack)
        for _ in range(2):
            await stage.start_another()
        yield stage


async def killed_in_the_tool(stage: Stage, headers: dict[str, str]) -> str:
    """A request whose replica dies while its tool works; the stream's id."""
    async with stage.callers[0].opened(STREAMS, chat(tools=[COUNT]), headers) as response:
        stream_id: str = response.headers["X-Stream-Id"]
        await until(lambda: stage.tool.running == 1)
        stage.kill_the_oldest()
        with pytest.raises(ClientError):
            await response.read()
    await until(lambda: stage.tool.running == 0)
    return stream_id


@pytest.mark.parametrize("how", ["resume", "retry"])
async def test_the_tool_of_a_killed_replica_is_not_run_again(tmp_path: Path, how: str) -> None:
    """The tool keeps no keys, so every request that reached it would count."""
    tool = CountingService(knows_keys=False, delay=1)
    async with two_replicas(tmp_path, tool, Model(*ONCE)) as stage:
        headers = KEYED if how == "retry" else {"Accept": SSE}
        stream_id = await killed_in_the_tool(stage, headers)
        [caller] = stage.callers
        answers = []
        for _ in range(3):
            if how == "retry":
                answers.append(await caller.post(STREAMS, chat(tools=[COUNT]), headers))
            else:
                answers.append(await caller.get(f"{STREAMS}/{stream_id}/events", headers))
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
    async with two_replicas(tmp_path, tool, Model(*ONCE), shares_redis=False) as stage:
        await killed_in_the_tool(stage, KEYED)
        answer = await stage.callers[0].post(STREAMS, chat(tools=[COUNT]), KEYED)
    assert answer.text() == "Let me count.It is 7."
    assert list(tool.asked.values()) == [2]
    assert tool.executed.total() == 1


async def test_no_tool_is_asked_before_the_log_has_what_was_sent(tmp_path: Path) -> None:
    """Else a replica could die between the two, and a retry would be a new attempt that asks the tool again."""
    tool, model = CountingService(), Model(*ONCE)
    async with redis_server(tmp_path) as redis, serving_app(tool.app()) as url:

        async def answer(request: web.Request) -> web.StreamResponse:
            if not model.asked:
                redis.pause()
            return await model.answer(request)

        app, seen = engine_app(answer)
        flags: Json = {
            "store__url": redis.url,
            "store__timeout_seconds": 30,
            "tools__bindings": [{"tools": ["count"], "url": f"{url}/tool"}],
            "tools__loop__allow_networks": ["127.0.0.0/8"],
        }
        async with in_front_of(app, **flags) as setup:
            asking = asyncio.create_task(setup.caller.post(STREAMS, chat(tools=[COUNT]), KEYED))
            await until(lambda: (seen.requests, seen.open) == (1, 0))
            too_early = await settled(lambda: len(tool.requests))
            redis.go_on()
            said = await asking
    assert too_early == 0
    assert said.text() == "Let me count.It is 7."
    assert len(tool.requests) == 1


# --- Many ----------------------------------------------------------------------------------------------


def counted_by_number(request: Json) -> Sequence[bytes]:
    """A call that says whose it is."""
    return calling_turn(call(0, arguments=json.dumps({"by": int(request["user"])})), before="Let me count.")


class Visitor:
    """A client that is cut off at random and comes again, to any replica, until it has the end of its stream."""

    def __init__(self, stage: Stage, number: int) -> None:
        self._stage = stage
        self._number = number
        self._random = random.Random(number)
        self._stream_id: str | None = None
        self._frames: list[bytes] = []

    async def log(self) -> list[Json]:
        async with asyncio.timeout(120):
            while not self._frames or b'"type":"stream.end"' not in self._frames[-1]:
                with suppress(ClientError):  # its replica was killed
                    await self._visit()
        return parse_log(b"".join(self._frames))

    async def _visit(self) -> None:
        caller, can_resume = self._random.choice(self._stage.callers), self._stream_id is not None and self._frames
        if can_resume and self._random.random() < 0.5:
            after = parse_log(self._frames[-1])[0]["seq"]
            request = caller.session.get(f"{caller.url}{STREAMS}/{self._stream_id}/events?after={after}")
        else:
            self._frames.clear()  # a retry is answered from the beginning
            body, key = chat(tools=[COUNT], user=str(self._number)), {"Idempotency-Key": f"k{self._number}"}
            request = caller.session.post(caller.url + STREAMS, json=body, headers=key)
        async with request as response:
            if response.status == 200:
                self._stream_id = response.headers["X-Stream-Id"]
                await self._read(response, self._random.choice([0, 300, 1000, 3000, None, None]))
            else:  # the replica of the attempt died before its first event, so there may be another one
                assert response.status in (404, 502), await response.text()
                self._stream_id = None

    async def _read(self, response: ClientResponse, most: int | None) -> None:
        """Whole frames, to the end of the stream, or until about `most` bytes were read."""
        read, rest = 0, b""
        while (most is None or read < most) and (data := await response.content.readany()):
            read += len(data)
            *frames, rest = (rest + data).split(b"\n\n")
            self._frames += [frame + b"\n\n" for frame in frames if not frame.startswith(b":")]


async def many(stage: Stage, count: int, kills: int) -> list[list[Json]]:
    """The logs of so many streams, 40 at a time; between them replicas are killed, and others take their place."""
    places = asyncio.Semaphore(40)
    begun = 0

    async def one(number: int) -> list[Json]:
        nonlocal begun
        async with places:
            begun += 1
            return await Visitor(stage, number).log()

    async def kill(after: int) -> None:
        await until(lambda: begun > after and stage.tool.running >= 10, seconds=600)
        stage.kill_the_oldest()
        await stage.start_another()

    async def kill_all() -> None:
        for turn in range(kills):
            await kill(count * (turn + 1) // (kills + 2))

    killing = asyncio.create_task(kill_all())
    logs = await asyncio.gather(*map(one, range(count)))
    await killing
    return logs


async def count_calls(folder: Path, count: int, *, kills: int, retries: int) -> None:
    """A tool without keys is asked once at most, unless retries are configured; one with keys executes once."""
    tool = CountingService(knows_keys=retries > 0, delay=0.2, loses=0.3 if retries else 0)
    model = Model(counted_by_number, ANSWER, doubles=True)
    async with two_replicas(folder, tool, model, retries=retries) as stage:
        logs = await many(stage, count, kills)
    keys: dict[int, set[str]] = defaultdict(set)
    for request, headers in zip(tool.requests, tool.headers, strict=True):
        keys[request["by"]].add(headers["Idempotency-Key"])
    lost = 0
    for number, log in enumerate(logs):
        types = Counter(event["type"] for event in log)
        assert verify(log) == [], number
        assert len(keys[number]) <= 1, number
        executed = sum(tool.executed[key] for key in keys[number])
        asked = sum(tool.asked[key] for key in keys[number])
        if log[-1]["status"] == "completed":
            assert (types["tool_call.ready"], types["tool_call.result"], executed) == (1, 1, 1), number
        else:
            lost += 1
            assert [event["code"] for event in log if event["type"] == "error"] == ["replica_lost"], number
            assert (types["tool_call.ready"] <= 1, executed <= 1) == (True, True), number
        assert asked <= 1 + retries, number
    asked, executed = tool.asked.total(), tool.executed.total()
    print(f"{count} streams, {kills} kills: {lost} lost, {asked} requests, {executed} executed")
    assert lost < count / 2
    assert lost or kills == 1, "several replicas were killed, and no stream was on any of them"
    assert asked > executed or not retries


@pytest.mark.parametrize("retries", [0, 2])
async def test_every_call_is_executed_once_whatever_clients_and_replicas_do(tmp_path: Path, retries: int) -> None:
    await count_calls(tmp_path, 50, kills=1, retries=retries)


@pytest.mark.soak
@pytest.mark.parametrize("retries", [0, 2])
async def test_two_thousand_streams(tmp_path: Path, retries: int) -> None:
    await count_calls(tmp_path, 2000, kills=6, retries=retries)
