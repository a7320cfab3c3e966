"""Several engines behind one Penstock, over real sockets: who is asked, and what becomes of requests to the broken."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from penstock.shell.replay import serving
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Caller, calling, chat
from support.sidecar import Sidecar, sidecar
from support.sockets import until
from support.upstreams import Handler, Seen, answering, engine_app, opened, saying, silence

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
HELLO = chunks.answer_of(["Hello", "!"])
FORMS = [(STREAMS, SSE), (STREAMS, NDJSON), (STREAMS, FOLDED), (CHAT, "*/*")]
forms = pytest.mark.parametrize(("route", "accept"), FORMS, ids=["events", "lines", "folded", "chunks"])
NOWHERE = "http://127.0.0.1:9"


class Stage:
    """Penstock, its caller, and what each engine saw."""

    def __init__(self, running: Sidecar, caller: Caller, seen: list[Seen]) -> None:
        self.sidecar = running
        self.caller = caller
        self.seen = seen

    @property
    def requests(self) -> list[int]:
        return [seen.requests for seen in self.seen]

    def make_busy(self, *numbers: int) -> None:
        """As if these engines had many streams, so that another is chosen."""
        for number in numbers:
            self.sidecar.server.cluster.members[number].others += 1000


@asynccontextmanager
async def in_front_of_all(answers: Sequence[Handler | str], **flags: Any) -> AsyncIterator[Stage]:
    """Penstock in front of an engine for each of `answers`; a text is the address of an engine that is elsewhere."""
    async with AsyncExitStack() as stack:
        urls, all_seen = [], []
        for answer in answers:
            app, seen = engine_app(answer) if callable(answer) else (web.Application(), Seen())
            urls.append(answer if isinstance(answer, str) else await stack.enter_async_context(serving(app)))
            all_seen.append(seen)
        running = await stack.enter_async_context(sidecar(urls, **flags))
        caller = await stack.enter_async_context(calling(running.url))
        yield Stage(running, caller, all_seen)


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
