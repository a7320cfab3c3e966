"""Several engines behind one Penstock, over real sockets: who is asked, and what becomes of requests to the broken."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from penstock.app import running as app_running
from penstock.settings import load_settings
from penstock.shell.engine import look_up
from penstock.shell.replay import serving
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Json, calling, chat
from support.sidecar import Sidecar, sidecar
from support.sockets import until
from support.upstreams import Handler, Stage, answering, engine_app, in_front_of_all, opened, saying, silence

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
HELLO = chunks.answer_of(["Hello", "!"])
FORMS = [(STREAMS, SSE), (STREAMS, NDJSON), (STREAMS, FOLDED), (CHAT, "*/*")]
forms = pytest.mark.parametrize(("route", "accept"), FORMS, ids=["events", "lines", "folded", "chunks"])
NOWHERE = "http://127.0.0.1:9"


async def hangs_up(request: web.Request) -> web.StreamResponse:
    """Takes the request and closes the connection without a word."""
    assert request.transport is not None
    request.transport.abort()
    await silence()
    return web.Response()


async def dies_after_the_head(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    assert request.transport is not None
    request.transport.close()
    return response


async def dies_in_the_middle(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await response.write(chunks.role() + chunks.content("Hel", tokens=1))
    await asyncio.sleep(0.02)
    assert request.transport is not None
    request.transport.abort()
    return response


async def never(request: web.Request) -> web.StreamResponse:
    await silence()
    return web.Response()


FAILURES: dict[str, Handler | str] = {
    "not there": NOWHERE,
    "hangs up": hangs_up,
    "dies after the head": dies_after_the_head,
    "an empty stream": saying(),
    "500": answering(b'{"error": {"message": "engine core died", "code": 500}}', 500),
    "503": answering(b"", 503, "text/plain"),
    "429": answering(b'{"error": {"message": "full", "code": 429}}', 429),
    "an error frame": saying(chunks.error(code=500)),
}


# --- Before the first token -------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("failure", FAILURES.values(), ids=list(FAILURES))
async def test_a_request_that_fails_before_its_first_token_succeeds_elsewhere(
    route: str, accept: str, failure: Handler | str
) -> None:
    async with in_front_of_all([failure, saying(*HELLO)]) as stage:
        stage.make_busy(1)
        answer = await stage.caller.post(route, chat(stream=True), {"Accept": accept})
        assert answer.status == 200
        assert b"Hello" in answer.body
        assert b"error" not in answer.body.replace(b'"error":null', b"")
        assert stage.requests == [0 if isinstance(failure, str) else 1, 1]
        if accept in (SSE, NDJSON):
            assert answer.one("stream.start")["upstream"] == "engine-1"


async def test_an_engine_that_falls_silent_and_fails_its_health_is_left_after_the_head_too() -> None:
    async with in_front_of_all(
        [never, saying(*HELLO)], timing__engine_silence_seconds=0.1, timing__first_byte_seconds=0.02
    ) as stage:
        stage.make_busy(1)
        async with stage.caller.opened(STREAMS, chat()) as response:
            assert await response.content.readany() == b": ok\n\n"

            async def dead(at_most: float = 0.0) -> bool:
                return False

            stage.sidecar.server.cluster.members[0].engine.is_healthy = dead  # type: ignore[method-assign]  # it died
            assert b"Hello" in await response.read()
        await until(lambda: stage.seen[0].left == 1)


async def test_the_last_failure_is_told_where_all_fail() -> None:
    failure = answering(b'{"error": {"message": "no room", "code": 503}}', 503)
    async with in_front_of_all([failure, failure, failure]) as stage:
        answer = await stage.caller.chat()
        assert (answer.status, answer.json["error"]["message"]) == (503, "no room")
        assert stage.requests == [1, 1, 1]


async def test_a_request_that_kills_engines_is_not_given_to_all_of_them() -> None:
    async with in_front_of_all([hangs_up] * 4) as stage:
        answer = await stage.caller.stream()
        assert (answer.status, answer.error["code"]) == (502, "engine_gone")
        assert sorted(stage.requests) == [0, 0, 1, 1]


async def test_engines_that_were_never_reached_do_not_count_as_tries() -> None:
    async with in_front_of_all([NOWHERE, NOWHERE + "9", NOWHERE + "8", saying(*HELLO)], routing__retries=0) as stage:
        stage.make_busy(3)
        assert (await stage.caller.stream()).text() == "Hello!"


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
async def test_what_is_the_callers_fault_is_not_tried_elsewhere(status: int) -> None:
    refusal = answering(b'{"error": {"message": "no", "code": 400}}', status)
    async with in_front_of_all([refusal, refusal]) as stage:
        assert (await stage.caller.stream()).status == status
        assert sum(stage.requests) == 1


# --- After the first token --------------------------------------------------------------------------


async def test_a_stream_in_flight_gets_its_one_error() -> None:
    async with in_front_of_all([dies_in_the_middle, saying(*HELLO)]) as stage:
        stage.make_busy(1)
        answer = await stage.caller.stream()
        assert answer.text() == "Hel"
        assert answer.one("error")["code"] == "engine_gone"
        assert answer.end["status"] == "failed"
        assert stage.requests == [1, 0]


# --- The choice -------------------------------------------------------------------------------------


async def test_streams_go_to_the_least_loaded() -> None:
    async with (
        in_front_of_all([never, never, never], timing__first_byte_seconds=0.01) as stage,
        AsyncExitStack() as open_,
    ):
        for _ in range(9):
            await open_.enter_async_context(stage.caller.opened(STREAMS, chat()))
        await until(lambda: stage.requests == [3, 3, 3])
        assert [member.in_flight for member in stage.sidecar.server.cluster.members] == [3, 3, 3]
        await open_.aclose()
        await until(lambda: [seen.left for seen in stage.seen] == [3, 3, 3])
        assert [member.in_flight for member in stage.sidecar.server.cluster.members] == [0, 0, 0]


async def test_an_engine_that_keeps_failing_is_asked_no_more() -> None:
    failing = answering(b"", 500, "text/plain")
    async with in_front_of_all([failing, saying(*HELLO)], routing__circuit_failures=3) as stage:
        stage.make_busy(1)
        for _ in range(10):
            assert (await stage.caller.stream()).text() == "Hello!"
        assert stage.requests == [3, 10]


async def test_an_engine_whose_health_fails_is_asked_no_more_until_it_is_well_again() -> None:
    async with in_front_of_all([saying(*HELLO), saying(*HELLO)], routing__health_seconds=0.02) as stage:
        stage.make_busy(1)
        sick = stage.sidecar.server.cluster.members[0]
        stage.seen[0].healthy = False
        await until(lambda: not sick.checks.is_healthy)
        await stage.caller.stream()
        assert stage.requests == [0, 1]
        stage.seen[0].healthy = True
        await until(lambda: sick.checks.is_healthy)
        await stage.caller.stream()
        assert stage.requests == [1, 1]


async def test_where_no_engine_is_healthy_they_are_asked_all_the_same() -> None:
    """Some upstreams have no /health; Penstock is not ready then, but it works."""
    async with in_front_of_all([saying(*HELLO)], routing__health_seconds=0.02) as stage:
        stage.seen[0].healthy = False
        await until(lambda: not stage.sidecar.server.cluster.members[0].checks.is_healthy)
        assert (await stage.caller.get("/readyz")).status == 503
        assert (await stage.caller.stream()).text() == "Hello!"


async def test_penstock_is_ready_while_one_engine_is() -> None:
    async with in_front_of_all([NOWHERE, saying(*HELLO)], routing__health_seconds=0.02) as stage:
        await until(lambda: not stage.sidecar.server.cluster.members[0].checks.is_healthy)
        assert (await stage.caller.get("/readyz")).status == 200


# --- Affinity ---------------------------------------------------------------------------------------


def conversation(number: int, turns: int = 1) -> list[Json]:
    """A conversation with an opening of its own and this many questions."""
    messages = [{"role": "user", "content": f"My name is {number}."}]
    for turn in range(1, turns):
        messages += [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": f"question {turn}"}]
    return messages


async def engine_of(stage: Stage, messages: list[Json], **headers: str) -> str:
    answer = await stage.caller.stream(NDJSON, headers=headers, messages=messages)
    upstream: str = answer.one("stream.start")["upstream"]
    return upstream


async def test_a_conversation_stays_with_its_engine_while_it_grows() -> None:
    async with in_front_of_all([saying(*HELLO)] * 3, routing__affinity="prefix") as stage:
        first = [await engine_of(stage, conversation(number)) for number in range(20)]
        assert len(set(first)) == 3
        for turns in (2, 3):
            assert [await engine_of(stage, conversation(number, turns)) for number in range(20)] == first


async def test_a_session_stays_with_its_engine_whatever_it_says() -> None:
    async with in_front_of_all([saying(*HELLO)] * 3, routing__affinity="session") as stage:
        places = {
            session: await engine_of(stage, conversation(0), **{"X-Session-Id": session}) for session in "abcdefg"
        }
        assert len(set(places.values())) > 1
        for session, place in places.items():
            assert await engine_of(stage, conversation(7), **{"X-Session-Id": session}) == place


async def test_affinity_holds_through_an_engines_death_and_return() -> None:
    """Of 40 conversations only those of the dead engine move, and they come back to it."""
    settings = {"routing__affinity": "prefix", "routing__health_seconds": 0.02}
    async with in_front_of_all([saying(*HELLO)] * 3, **settings) as stage:
        sick = stage.sidecar.server.cluster.members[0]
        before = [await engine_of(stage, conversation(number)) for number in range(40)]
        stage.seen[0].healthy = False
        await until(lambda: not sick.checks.is_healthy)
        during = [await engine_of(stage, conversation(number)) for number in range(40)]
        moved = [old for old, new in zip(before, during, strict=True) if old != new]
        assert set(moved) == {"engine-0"}
        assert len(moved) == before.count("engine-0")
        stage.seen[0].healthy = True
        await until(lambda: sick.checks.is_healthy)
        assert [await engine_of(stage, conversation(number)) for number in range(40)] == before


# --- Zones and load ---------------------------------------------------------------------------------


@asynccontextmanager
async def two_zones(**flags: Any) -> AsyncIterator[Stage]:
    """engine-0 stands in zone a, engine-1 in zone b."""
    async with AsyncExitStack() as stack:
        apps = [engine_app(saying(*HELLO)) for _ in range(2)]
        urls = [await stack.enter_async_context(serving(app)) for app, _ in apps]
        upstreams = [
            {"url": url, "name": f"engine-{number}", "plugin": "off", "zone": "ab"[number]}
            for number, url in enumerate(urls)
        ]
        running = await stack.enter_async_context(sidecar(urls[0], upstreams=upstreams, **flags))
        caller = await stack.enter_async_context(calling(running.url))
        yield Stage(running, caller, [seen for _, seen in apps])


async def test_the_own_zone_is_preferred_until_requests_wait_there() -> None:
    async with two_zones(routing__zone="b", routing__health_seconds=0.02) as stage:
        stage.make_busy(1)
        for _ in range(5):
            assert await engine_of(stage, conversation(0)) == "engine-1"
        stage.seen[1].load = (4, 3)
        await until(lambda: stage.sidecar.server.cluster.members[1].waiting == 3)
        assert await engine_of(stage, conversation(0)) == "engine-0"


async def test_a_trusted_proxy_names_the_callers_zone() -> None:
    async with two_zones(routing__zone="a", routing__zone_header="X-Zone") as stage:
        assert await engine_of(stage, conversation(0)) == "engine-0"
        assert await engine_of(stage, conversation(0), **{"X-Zone": "b"}) == "engine-1"
        assert await engine_of(stage, conversation(0), **{"X-Zone": "nowhere"}) in ("engine-0", "engine-1")


async def test_what_others_run_on_an_engine_counts() -> None:
    async with in_front_of_all([saying(*HELLO), saying(*HELLO)], routing__health_seconds=0.02) as stage:
        stage.seen[0].load, stage.seen[1].load = (30, 0), (2, 0)
        members = stage.sidecar.server.cluster.members
        await until(lambda: [member.others for member in members] == [30, 2])
        for _ in range(5):
            assert await engine_of(stage, conversation(0)) == "engine-1"


# --- Models and windows -----------------------------------------------------------------------------


def knows_models(stage: Stage) -> bool:
    return all(member.models is not None for member in stage.sidecar.server.cluster.members)


async def test_a_request_goes_to_an_engine_that_serves_its_model() -> None:
    settings = {"routing__health_seconds": 0.02, "routing__models_seconds": 0.02}
    async with in_front_of_all([saying(*HELLO), saying(*HELLO)], **settings) as stage:
        stage.seen[1].models = [{"id": "tiny"}, {"id": "adapter"}]
        await until(lambda: stage.sidecar.server.cluster.members[1].models == {"tiny": None, "adapter": None})
        for _ in range(4):
            assert (await stage.caller.stream(model="adapter")).status == 200
        assert stage.requests == [0, 4]
        assert (await stage.caller.stream(model="unknown")).status == 200, "for the engine to refuse"


@pytest.mark.parametrize("route", [STREAMS, CHAT])
async def test_a_prompt_that_fits_no_window_is_refused_before_any_engine_sees_it(route: str) -> None:
    window = [{"id": "tiny", "max_model_len": 100}]
    async with in_front_of_all([saying(*HELLO), saying(*HELLO)], routing__health_seconds=0.02) as stage:
        for member, seen in zip(stage.sidecar.server.cluster.members, stage.seen, strict=True):
            seen.models, member.models_asked = window, -1e9
        await until(lambda: stage.sidecar.server.cluster.window("tiny") == 100)
        long = [{"role": "user", "content": "word " * 400}]
        answer = await stage.caller.post(route, chat(messages=long))
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "at least 100 tokens" in answer.error["message"]
        assert answer.error["param"] == "messages"
        assert stage.requests == [0, 0]
        shorter = [{"role": "user", "content": "word " * 390}]
        assert (await stage.caller.post(route, chat(messages=shorter, stream=True))).status == 200


# --- Engines found by DNS ---------------------------------------------------------------------------


class Names:
    """A name server of one name."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.fails = False

    async def look_up(self, name: str) -> list[str]:
        assert name == "vllm.test"
        if self.fails:
            raise OSError("Temporary failure in name resolution")
        return self.addresses


@asynccontextmanager
async def found_by_name(names: Names, engines: int, **flags: Any) -> AsyncIterator[Stage]:
    """Engines at 127.0.0.1, 127.0.0.2 and so on, all at one port, as the pods of a headless service are."""
    async with AsyncExitStack() as stack:
        apps = [engine_app(saying(*HELLO)) for _ in range(engines)]
        first = await stack.enter_async_context(serving(apps[0][0]))
        port = int(first.rpartition(":")[2])
        for number, (app, _) in enumerate(apps[1:], 2):
            await stack.enter_async_context(serving(app, f"127.0.0.{number}", port))
        settings = {
            "upstreams": [{"url": f"http://vllm.test:{port}", "plugin": "off", "discover": "dns"}],
            "routing.dns_seconds": 0.02,
            "routing.affinity": "prefix",
            **{name.replace("__", "."): value for name, value in flags.items()},
        }
        loaded = load_settings(environment={}, flags={**settings, "listen.port": 0, "timing.drain_seconds": 0})
        server, url = await stack.enter_async_context(app_running(loaded, resolve=names.look_up))
        caller = await stack.enter_async_context(calling(url))
        yield Stage(Sidecar(url, server), caller, [seen for _, seen in apps])


async def test_each_address_of_a_name_is_an_engine() -> None:
    async with found_by_name(Names("127.0.0.1", "127.0.0.2", "127.0.0.3"), 3) as stage:
        for number in range(12):
            assert (await engine_of(stage, conversation(number))).startswith("vllm.test:")
        assert min(stage.requests) > 0
        assert stage.seen[1].headers["Host"].startswith("vllm.test:")


async def test_engines_that_come_and_go_are_noticed_and_move_their_own_conversations_only() -> None:
    names = Names("127.0.0.1", "127.0.0.2", "127.0.0.3")
    async with found_by_name(names, 4) as stage:
        cluster = stage.sidecar.server.cluster
        before = [await engine_of(stage, conversation(number)) for number in range(60)]
        names.addresses.append("127.0.0.4")
        await until(lambda: len(cluster.members) == 4)
        after = [await engine_of(stage, conversation(number)) for number in range(60)]
        moved = [new for old, new in zip(before, after, strict=True) if old != new]
        assert 5 <= len(moved) <= 25, "a quarter is 15"
        assert all(place.endswith(" at 127.0.0.4") for place in moved)
        names.addresses.remove("127.0.0.4")
        await until(lambda: len(cluster.members) == 3)
        assert [await engine_of(stage, conversation(number)) for number in range(60)] == before


async def test_a_name_server_that_fails_takes_no_engine_away() -> None:
    names = Names("127.0.0.1")
    async with found_by_name(names, 1) as stage:
        names.fails = True
        await asyncio.sleep(0.1)
        assert (await stage.caller.stream()).text() == "Hello!"


async def test_a_name_without_addresses_is_a_503_until_there_is_one() -> None:
    names = Names()
    async with found_by_name(names, 1) as stage:
        answer = await stage.caller.stream()
        assert (answer.status, answer.error["code"]) == (503, "no_engine")
        assert answer.headers["Retry-After"] == "1"
        assert (await stage.caller.get("/readyz")).status == 503
        names.addresses.append("127.0.0.1")
        await until(lambda: len(stage.sidecar.server.cluster.members) == 1)
        assert (await stage.caller.stream()).text() == "Hello!"


async def test_a_stream_outlives_its_engines_name() -> None:
    """The pod is going down, but it still serves what it has begun."""
    names = Names("127.0.0.1")
    async with found_by_name(names, 1) as stage:
        asked = asyncio.create_task(stage.caller.stream())
        await until(lambda: stage.requests == [1] or asked.done())
        names.addresses.clear()
        assert (await asked).text() == "Hello!"
        await until(lambda: not stage.sidecar.server.cluster.members)


async def test_this_machines_own_resolver_is_asked() -> None:
    assert "127.0.0.1" in await look_up("localhost")
    with pytest.raises(OSError, match=r"."):
        await look_up("no-such-name.invalid")
