"""Three engines behind one Penstock, one killed, one slow, one that comes and goes; and both ways of reading composed.

The engines replay recordings of the real vLLM; the one that is killed is a process of its own.
"""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web

from penstock.shell import tagged
from penstock.shell.replay import load_recordings, make_app, serving
from support import chunks
from support.engine import Engine
from support.fake_plugin import PLAIN_ANSWER, fake_plugin
from support.http_client import NDJSON, Answer, Caller, calling, chat
from support.scripts import Script
from support.sidecar import Sidecar, sidecar
from support.sockets import until
from support.upstreams import engine_app, saying, silence

# Read while importing, not in the loop. The recording lasts a third of a second.
_HELLO = next(recording for recording in load_recordings() if recording.name == "hello")
_SECONDS = 5.0
_CLIENTS = 12


@asynccontextmanager
async def engine_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    command = [sys.executable, "-m", "penstock", "replay", "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        yield process, line.split(" on ")[1].split()[0]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def comes_and_goes(port: int, until_over: asyncio.Event) -> None:
    """An engine that serves for 0.4 s and is gone for 0.2 s, again and again; what it had begun is cut."""
    while not until_over.is_set():
        async with serving(make_app([_HELLO]), port=port):
            await asyncio.sleep(0.4)
        await asyncio.sleep(0.2)


async def ask_again_and_again(caller: Caller, deadline: float) -> list[Answer]:
    answers = []
    while asyncio.get_running_loop().time() < deadline:
        answers.append(await caller.stream(NDJSON, vllm_xargs={"replay": "hello"}))
    return answers


async def test_one_killed_one_slow_one_flapping() -> None:
    over = asyncio.Event()
    async with AsyncExitStack() as stack:
        victim, killed = await stack.enter_async_context(engine_process())
        slow = await stack.enter_async_context(serving(make_app([_HELLO], speed=0.3)))
        async with serving(make_app([_HELLO])) as flapping:  # to have a port
            pass
        flapper = asyncio.create_task(comes_and_goes(int(flapping.rpartition(":")[2]), over))
        # Twice, since two of three may fail a request before its first token.
        running = await stack.enter_async_context(
            sidecar([killed, slow, flapping], routing__retries=2, routing__health_seconds=0.2)
        )
        caller = await stack.enter_async_context(calling(running.url))
        started = asyncio.get_running_loop().time()
        clients = [asyncio.create_task(ask_again_and_again(caller, started + _SECONDS)) for _ in range(_CLIENTS)]
        await asyncio.sleep(_SECONDS / 3)
        victim.send_signal(signal.SIGKILL)
        answers = [answer for client in clients for answer in await client]
        over.set()
        await flapper

    # Nobody got an HTTP error: what failed before its first token succeeded elsewhere.
    assert {answer.status for answer in answers} == {200}
    endings: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        # Each log was verified: one end, and at most one error.
        upstream, status = answer.one("stream.start")["upstream"], answer.end["status"]
        endings[upstream, status] += 1
        if status == "completed":
            assert answer.text() == "Hello! How can I help you today?"
        else:
            assert answer.one("error")["code"] in ("engine_gone", "engine_incomplete")
            assert answer.of("delta.role"), "an error before anything was told would have been tried elsewhere"
    print(dict(sorted(endings.items())))
    assert endings["engine-1", "failed"] == 0, "the slow one is slow, but it works"
    assert endings["engine-1", "completed"] > 0
    assert endings["engine-0", "completed"] > 0


# --- Plain chunks and tagged tokens -----------------------------------------------------------------


async def hangs_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    await silence()
    return web.Response()


def make_busy(running: Sidecar, number: int) -> None:
    running.server.cluster.members[number].others += 1000


async def test_from_an_engine_that_fails_to_one_with_the_plugin() -> None:
    app, seen = engine_app(hangs_up)
    async with (
        serving(app) as failing,
        fake_plugin() as plugin,
        sidecar([failing, plugin.url], {"plugin": "auto"}) as running,
        calling(running.url) as caller,
    ):
        make_busy(running, 1)
        asked = asyncio.create_task(caller.stream())
        [stream] = await plugin.opened(1)
        await plugin.send(*stream.whole("Hello"))
        answer = await asked
        assert (answer.text(), answer.one("stream.start")["upstream"]) == ("Hello", "engine-1")
        assert (seen.requests, plugin.plain_requests()) == (1, 0)


@pytest.mark.parametrize("begun", [False, True])
async def test_from_an_engine_with_the_plugin_that_breaks_to_one_without(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun is not told: the plugin says so before the first token."""
    monkeypatch.setattr(tagged, "RETRY_SECONDS", (60.0,))
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with (
        serving(app) as other,
        fake_plugin() as plugin,
        sidecar([plugin.url, other], {"plugin": "auto"}) as running,
        calling(running.url) as caller,
    ):
        make_busy(running, 1)
        asked = asyncio.create_task(caller.stream())
        [stream] = await plugin.opened(1)
        if begun:
            await plugin.send(stream.begin())
        plugin.drop()
        answer = await asked
        assert (answer.text(), answer.one("stream.start")["upstream"]) == ("Hello", "engine-1")
        assert seen.requests == 1
        assert PLAIN_ANSWER not in answer.text()


async def test_from_one_plugin_to_another() -> None:
    async with (
        fake_plugin() as one,
        fake_plugin() as two,
        sidecar([one.url, two.url], {"plugin": "auto"}) as running,
        calling(running.url) as caller,
    ):
        make_busy(running, 1)
        asked = asyncio.create_task(caller.stream())
        [first] = await one.opened(1)
        await one.refuse(first, 503, {"error": {"message": "full", "type": "x", "param": None, "code": 503}})
        [second] = await two.opened(1)
        await two.send(*second.whole("Hello"))
        assert (await asked).text() == "Hello"


# --- The real engine ----------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("plugin", ["off", "auto"])
async def test_the_real_engine_takes_over(engine: Engine, script: Script, plugin: str) -> None:
    """From one that is not there and one that hangs up, to vLLM, by its own chunks and by tagged tokens."""
    app, seen = engine_app(hangs_up)
    async with (
        serving(app) as failing,
        # The real engine tells its load, and what it tells would take the place of the load that is made up here.
        sidecar(["http://127.0.0.1:9", failing, engine.url], {"plugin": plugin}, routing__read_load=False) as running,
        calling(running.url) as caller,
    ):
        make_busy(running, 2)
        answer = await caller.stream(NDJSON, **script("Hello there!"))
        assert (answer.text(), answer.one("stream.start")["upstream"]) == ("Hello there!", "engine-2")
        assert answer.end["status"] == "completed"
        assert answer.usage["estimated"] is False
        assert seen.requests == 1
        cluster = running.server.cluster
        await until(lambda: cluster.members[2].models is not None)
        assert cluster.members[2].models is not None
        assert chat()["model"] in cluster.members[2].models
        assert all(cluster.members[2].models.values()), "vLLM tells the context window of its models"
