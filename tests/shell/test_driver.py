"""One stream between an engine that misbehaves and a client that does: one ending, in time, and nothing is left."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from penstock.core.engine_stream import ChatReader
from penstock.core.events import Event
from penstock.core.verifier import parse_log, verify
from penstock.shell import engine as shell_engine
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, calling, chat
from support.sidecar import sidecar
from support.sockets import connections, open_sockets, until
from support.upstreams import (
    Handler,
    Setup,
    answering,
    engine_app,
    in_front_of,
    opened,
    replay,
    replayed,
    saying,
    silence,
)

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
HELLO = chunks.answer_of(["Hello", "!"])
FORMS = [(STREAMS, SSE), (STREAMS, NDJSON), (CHAT, "*/*")]
forms = pytest.mark.parametrize(("route", "accept"), FORMS, ids=["events", "lines", "chunks"])


async def never(request: web.Request) -> web.StreamResponse:
    """An engine that does not even send its head."""
    await silence()
    return web.Response()


async def headers_only(request: web.Request) -> web.StreamResponse:
    """vLLM in a long prefill: the head came at once."""
    response = await opened(request)
    await silence()
    return response


async def two_words(request: web.Request) -> web.StreamResponse:
    """An engine that stops in the middle."""
    response = await opened(request)
    await response.write(chunks.role() + chunks.content("Hello", tokens=1))
    await asyncio.sleep(0.02)
    await response.write(chunks.content(" you", tokens=2))
    await silence()
    return response


# --- The first byte and heartbeats ------------------------------------------------------------------


@forms
@pytest.mark.parametrize("answer", [never, headers_only])
async def test_the_head_waits_for_the_engine_but_not_long(route: str, accept: str, answer: Handler) -> None:
    app, _ = engine_app(answer)
    async with (
        in_front_of(app, timing__first_byte_seconds=0.05) as setup,
        setup.caller.opened(route, chat(stream=True), {"Accept": accept}) as response,
    ):
        assert response.status == 200
        assert await response.content.readany() == (b"\n" if accept == NDJSON else b": ok\n\n")


@forms
async def test_silence_is_filled_with_heartbeats(route: str, accept: str) -> None:
    app, _ = engine_app(headers_only)
    beat = b"\n" if accept == NDJSON else b": heartbeat\n\n"
    first = b"\n" if accept == NDJSON else b": ok\n\n"
    async with (
        in_front_of(app, timing__first_byte_seconds=0.02, timing__heartbeat_seconds=0.05) as setup,
        setup.caller.opened(route, chat(stream=True), {"Accept": accept}) as response,
    ):
        wanted = first + 3 * beat
        assert await response.content.readexactly(len(wanted)) == wanted


async def test_a_stream_that_speaks_needs_no_heartbeat() -> None:
    async def steady(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        for piece in chunks.answer_of(["a"] * 10):
            await response.write(piece)
            await asyncio.sleep(0.02)
        return response

    app, _ = engine_app(steady)
    async with in_front_of(app, timing__heartbeat_seconds=0.2) as setup:
        assert b": heartbeat" not in (await setup.caller.stream()).body


async def test_a_whole_answer_has_no_heartbeat_and_waits() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.Response(body=chunks.whole({"content": "Hello!"}), content_type="application/json")

    app, _ = engine_app(slow)
    async with in_front_of(app, timing__first_byte_seconds=0.02, timing__heartbeat_seconds=0.02) as setup:
        assert (await setup.caller.chat()).json["choices"][0]["message"]["content"] == "Hello!"
        folded = await setup.caller.stream(FOLDED)
        assert (folded.status, folded.json["choices"][0]["text"]) == (200, "Hello!")


@forms
async def test_a_refusal_that_comes_after_the_head_is_an_error_in_the_stream(route: str, accept: str) -> None:
    refusal = {"error": {"message": "No.", "type": "BadRequestError", "param": None, "code": 400}}

    async def late(request: web.Request) -> web.Response:
        await asyncio.sleep(0.15)
        return web.json_response(refusal, status=400)

    app, _ = engine_app(late)
    async with in_front_of(app, timing__first_byte_seconds=0.02) as setup:
        answer = await setup.caller.post(route, chat(stream=True), {"Accept": accept})
        assert answer.status == 200
        if route == CHAT:
            assert answer.chunks == [refusal]
            assert answer.body.endswith(b"data: [DONE]\n\n")
        else:
            error = answer.one("error")
            assert (error["code"], error["message"], error["origin"]) == ("engine_refused", "No.", "upstream")


# --- Caps -------------------------------------------------------------------------------------------


async def test_a_line_over_the_cap_ends_the_stream() -> None:
    app, _ = engine_app(saying(chunks.role(), chunks.content("x" * 5000), *HELLO))
    async with in_front_of(app, limits__line_bytes=2048) as setup:
        answer = await setup.caller.stream()
        error = answer.one("error")
        assert (error["code"], error["origin"]) == ("engine_line_too_long", "upstream")
        assert "limits.line_bytes" in error["message"]


async def test_a_line_without_end_is_not_collected() -> None:
    async def one_line(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + b"data: ")
        while True:
            await response.write(b"x" * 65536)

    app, seen = engine_app(one_line)
    async with in_front_of(app, limits__line_bytes=2**20) as setup:
        assert (await setup.caller.stream()).one("error")["code"] == "engine_line_too_long"
        await until(lambda: seen.open == 0)


@forms
async def test_bytes_over_the_cap_end_the_stream(route: str, accept: str) -> None:
    app, seen = engine_app(endlessly)
    async with in_front_of(app, limits__stream_bytes=50_000) as setup:
        answer = await setup.caller.post(route, chat(stream=True), {"Accept": accept})
        assert 50_000 < len(answer.body) < 200_000
        assert_failed(answer, route, "stream_bytes_limit")
        await until(lambda: seen.open == 0)


async def endlessly(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await response.write(chunks.role())
    while True:
        await response.write(chunks.content("Hello, world! "))
        await asyncio.sleep(0)


def assert_failed(answer: Answer, route: str, code: str) -> None:
    if route == CHAT:
        assert answer.chunks[-1]["error"]["code"] == code
        assert answer.body.count(b"[DONE]") == 1
        assert answer.body.endswith(b"data: [DONE]\n\n")
    else:
        assert answer.one("error")["code"] == code
        assert answer.end["status"] == "failed"
        assert answer.finish()["reason"] == "error"


async def test_a_whole_answer_over_the_cap_is_an_error() -> None:
    app, seen = engine_app(answering(chunks.whole({"content": "x" * 5000})))
    async with in_front_of(app, limits__stream_bytes=2048) as setup:
        answer = await setup.caller.chat()
        assert (answer.status, answer.error["code"]) == (413, "stream_bytes_limit")
        await until(lambda: seen.open == 0)


@forms
async def test_time_over_the_cap_ends_the_stream(route: str, accept: str) -> None:
    app, seen = engine_app(two_words)
    async with in_front_of(app, limits__stream_seconds=0.8) as setup:
        answer = await setup.caller.post(route, chat(stream=True), {"Accept": accept})
        assert_failed(answer, route, "stream_time_limit")
        assert b"Hello" in answer.body
        await until(lambda: seen.open == 0)


@pytest.mark.parametrize(
    ("route", "body", "accept"),
    [(STREAMS, {}, SSE), (STREAMS, {}, FOLDED), (CHAT, {}, "*/*"), (CHAT, {"stream": True}, SSE)],
)
async def test_time_over_the_cap_before_the_first_token_is_a_504(route: str, body: Json, accept: str) -> None:
    app, seen = engine_app(never)
    async with in_front_of(app, limits__stream_seconds=0.1) as setup:
        answer = await setup.caller.post(route, chat(**body), {"Accept": accept})
        assert (answer.status, answer.error["code"]) == (504, "stream_time_limit")
        await until(lambda: seen.open == 0)


async def test_the_folded_answer_keeps_what_there_was() -> None:
    app, _ = engine_app(two_words)
    async with in_front_of(app, limits__stream_seconds=0.8) as setup:
        answer = await setup.caller.stream(FOLDED)
        assert (answer.status, answer.json["status"]) == (504, "failed")
        assert answer.json["choices"][0]["text"] == "Hello you"
        assert answer.json["error"]["code"] == "stream_time_limit"
        assert answer.json["usage"]["completion_tokens"] == 2
        assert answer.json["usage"]["estimated"] is True


# --- An engine that stalls --------------------------------------------------------------------------


def with_health(app: web.Application, statuses: list[int]) -> web.Application:
    """The engine's health answers each of `statuses` once, the last for ever."""
    other = web.Application()

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=statuses.pop(0) if len(statuses) > 1 else statuses[0])

    other.router.add_get("/health", health)
    for route in app.router.routes():
        if route.method == "POST":
            other.router.add_post("/v1/chat/completions", route.handler)
    return other


@forms
async def test_a_silent_engine_whose_health_fails_is_gone(route: str, accept: str) -> None:
    app, seen = engine_app(two_words)
    async with in_front_of(with_health(app, [503]), timing__engine_silence_seconds=0.1) as setup:
        answer = await setup.caller.post(route, chat(stream=True), {"Accept": accept})
        assert_failed(answer, route, "engine_stalled")
        await until(lambda: seen.open == 0)


async def test_a_silent_engine_that_is_healthy_is_waited_for() -> None:
    async def pausing(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(HELLO[0] + HELLO[1])
        await asyncio.sleep(0.4)
        await response.write(b"".join(HELLO[2:]))
        return response

    app, _ = engine_app(pausing)
    async with in_front_of(app, timing__engine_silence_seconds=0.05) as setup:
        assert (await setup.caller.stream()).end["status"] == "completed"


# --- Every fault of the mock engine -----------------------------------------------------------------

# What Penstock makes of a fault in the middle of the answer: the error's code, or None where it completes.
FAULTS = {
    "stall:after=4": "stream_time_limit",
    "drop:after=4": "engine_incomplete",
    "reset:after=4": "engine_gone",
    "cut:after=4": "engine_incomplete",
    "error:after=4": "engine_error",
    "no_done": None,
    "slow_headers:seconds=0.1": None,
    "slow_first:seconds=0.1": None,
    "bytes:size=1": None,
    "bytes:size=7": None,
}
# The same before anything was sent: an HTTP status.
EARLY_FAULTS = {
    "stall:after=0": (504, "stream_time_limit"),
    "drop:after=0": (502, "engine_incomplete"),
    "reset:after=0": (502, "engine_gone"),
    "error:after=0": (500, "engine_error"),
    "refuse:status=503": (503, "engine_refused"),
    "slow_headers:seconds=forever": (504, "stream_time_limit"),
}


@pytest.fixture
def fault() -> str:
    """What the engine does wrong in a test that is not about one fault."""
    return ""


@pytest.fixture
async def misbehaving(fault: str) -> AsyncIterator[Setup]:
    """The mock engine, and little time where its fault lasts for ever."""
    lasting = fault.startswith("stall") or fault.endswith("forever")
    async with in_front_of(replay(), limits__stream_seconds=0.8 if lasting else 600) as setup:
        yield setup


@forms
@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_ends_in_one_way(misbehaving: Setup, route: str, accept: str, fault: str) -> None:
    request = chat(**replayed("emoji", fault), stream=True)
    answer = await misbehaving.caller.post(route, request, {"Accept": accept})
    assert answer.status == 200
    code = FAULTS[fault]
    if route == CHAT:
        assert answer.body.count(b"[DONE]") == 1
        errors = [chunk for chunk in answer.chunks if "error" in chunk]
        finishes = [
            c["finish_reason"] for chunk in answer.chunks for c in chunk.get("choices", []) if c["finish_reason"]
        ]
        assert (len(errors), finishes) == ((0, ["stop"]) if code is None else (1, []))
    else:
        assert [error["code"] for error in answer.of("error")] == ([] if code is None else [code])
        assert answer.end["status"] == ("completed" if code is None else "failed")
        assert answer.usage["estimated"] is (code is not None)
        assert [warning["code"] for warning in answer.of("warning")] == (["missing_done"] if fault == "no_done" else [])
    await assert_idle(misbehaving)


@pytest.mark.parametrize("fault", ["no_done", "bytes:size=1", "bytes:size=100"])
async def test_a_fault_that_completes_loses_nothing(misbehaving: Setup, fault: str) -> None:
    expected = await misbehaving.caller.stream(**replayed("emoji"))
    answer = await misbehaving.caller.stream(**replayed("emoji", fault))
    assert (answer.reasoning(), answer.text()) == (expected.reasoning(), expected.text())


@pytest.mark.parametrize("fault", ["drop:after=4", "reset:after=4", "cut:after=30"])
async def test_what_came_before_a_fault_was_delivered(misbehaving: Setup, fault: str) -> None:
    expected = await misbehaving.caller.stream(**replayed("emoji"))
    answer = await misbehaving.caller.stream(**replayed("emoji", fault))
    everything = expected.reasoning() + expected.text()
    assert everything.startswith(answer.reasoning() + answer.text())
    assert answer.reasoning()


@forms
@pytest.mark.parametrize("fault", EARLY_FAULTS)
async def test_every_fault_before_the_first_byte_is_a_status(
    misbehaving: Setup, route: str, accept: str, fault: str
) -> None:
    request = chat(**replayed("emoji", fault), stream=True)
    answer = await misbehaving.caller.post(route, request, {"Accept": accept})
    status, code = EARLY_FAULTS[fault]
    assert answer.status == status
    assert answer.error["code"] == (code if route == STREAMS or not fault.startswith(("error", "refuse")) else status)
    await assert_idle(misbehaving)


STATUSES = {"stream_time_limit": 504, "engine_incomplete": 502, "engine_gone": 502, "engine_error": 500}


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_ends_a_folded_answer(misbehaving: Setup, fault: str) -> None:
    answer = await misbehaving.caller.stream(FOLDED, **replayed("emoji", fault))
    code = FAULTS[fault]
    if code is None:
        assert (answer.status, answer.json["status"], answer.json["error"]) == (200, "completed", None)
    else:
        assert (answer.status, answer.json["status"], answer.error["code"]) == (STATUSES[code], "failed", code)
        assert answer.json["choices"][0]["blocks"][0]["status"] == "incomplete"
    await assert_idle(misbehaving)


@pytest.mark.parametrize("fault", ["drop:after=0", "reset:after=0", "refuse:status=500"])
async def test_faults_of_a_whole_answer_are_a_status(misbehaving: Setup, fault: str) -> None:
    answer = await misbehaving.caller.chat(**replayed("whole", fault))
    assert answer.status >= 500
    assert answer.error["message"]
    await assert_idle(misbehaving)


@pytest.mark.parametrize("name", ["tool-parsed", "tools-parsed", "thinking-tool-parsed"])
async def test_doubled_tool_calls_become_ready_once(misbehaving: Setup, name: str) -> None:
    tools = [{"type": "function", "function": {"name": tool}} for tool in ("get_weather", "get_time")]
    whole = await misbehaving.caller.stream(**replayed(name, tools=tools))
    assert whole.of("tool_call.ready")
    answer = await misbehaving.caller.stream(**replayed(name, "double_tools", tools=tools))
    calls = [[(event["name"], event["arguments"]) for event in one.of("tool_call.ready")] for one in (whole, answer)]
    assert calls[0] == calls[1]
    assert {event["code"] for event in answer.of("warning")} == {"doubled_delta"}


async def assert_idle(setup: Setup) -> None:
    """Nothing runs any more, here or there."""

    async def is_idle() -> bool:
        async with setup.caller.session.get(f"{setup.engine_url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return all(line.endswith(" 0") for line in lines if line.startswith("vllm:num_requests_running"))

    await until(is_idle)
    await until(lambda: setup.sidecar.server.open_streams == 0)


# --- The connection to the engine -------------------------------------------------------------------


async def test_an_idle_connection_is_closed_before_the_engine_would(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell_engine._IDLE_SECONDS < 5, "uvicorn closes after 5 s"
    monkeypatch.setattr(shell_engine, "_IDLE_SECONDS", 0.1)
    app, _ = engine_app(saying(*HELLO))
    async with in_front_of(app, {"plugin": "off"}) as setup:
        await setup.caller.stream()
        await until(lambda: not connections_to(setup.engine_url))


def connections_to(url: str) -> int:
    found = connections(peer_port=int(url.rpartition(":")[2]))
    for connection in found:
        connection.close()
    return len(found)


async def test_an_engine_that_takes_no_connection_is_a_504_in_time() -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)  # one waits to be accepted, another in the queue; the rest gets no answer at all
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with sidecar(url, timing__connect_seconds=0.2) as running, calling(running.url) as caller:
            answer = await caller.stream()
            assert (answer.status, answer.error["code"], answer.error["retryable"]) == (504, "engine_timeout", True)


# --- Our own faults ---------------------------------------------------------------------------------


@forms
async def test_a_fault_of_our_own_ends_the_stream_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, route: str, accept: str
) -> None:
    app, seen = engine_app(two_words)
    break_down_at(monkeypatch, b" you")
    async with in_front_of(app) as setup:
        answer = await setup.caller.post(route, chat(stream=True), {"Accept": accept})
        assert_failed(answer, route, "internal_error")
        assert b"Hello" in answer.body
        assert f"stream {answer.headers['X-Stream-Id']}: internal error" in caplog.text
        assert "out of order" in caplog.text
        await until(lambda: seen.open == 0)
        await until(lambda: setup.sidecar.server.open_streams == 0)


def break_down_at(monkeypatch: pytest.MonkeyPatch, words: bytes) -> None:
    """Makes the reader of engines fail as soon as it sees `words`."""
    feed = ChatReader.feed

    def broken(reader: ChatReader, data: bytes) -> list[Event]:
        if words in data:
            raise RuntimeError("out of order")
        return feed(reader, data)

    monkeypatch.setattr(ChatReader, "feed", broken)


# --- Many at once -----------------------------------------------------------------------------------


async def test_hundreds_of_streams_at_once_leave_nothing_behind() -> None:
    tasks_before, sockets_before = len(asyncio.all_tasks()), open_sockets()
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    recordings = [
        *(replayed(name) for name in ("plain", "thinking", "emoji", "logprobs")),
        *(replayed(name, tools=tools) for name in ("tool-parsed", "merged-parsed")),
        replayed("choices", n=2),
    ]
    async with in_front_of(replay()) as setup:
        asked = itertools.islice(itertools.cycle(itertools.product(recordings, [SSE, NDJSON])), 300)
        requests = [setup.caller.stream(accept, **recording) for recording, accept in asked]
        answers = await asyncio.gather(*requests)
        assert {answer.status for answer in answers} == {200}
        for answer in answers:
            log = parse_log(answer.body)
            assert verify(log) == []
            assert log[-1]["status"] == "completed"
        assert len({answer.headers["X-Stream-Id"] for answer in answers}) == 300
        await assert_idle(setup)
    await until(lambda: len(asyncio.all_tasks()) == tasks_before)
    await until(lambda: open_sockets() == sockets_before)


async def test_hundreds_of_clients_that_leave_leave_nothing_behind() -> None:
    tasks_before, sockets_before = len(asyncio.all_tasks()), open_sockets()
    app, seen = engine_app(two_words)
    async with in_front_of(app) as setup:
        asking = [asyncio.create_task(leave_in_the_middle(setup.caller, number)) for number in range(200)]
        await asyncio.gather(*asking)
        await until(lambda: setup.sidecar.server.open_streams == 0)
        await until(lambda: seen.open == 0)
        assert seen.left == 200
    await until(lambda: len(asyncio.all_tasks()) == tasks_before)
    await until(lambda: open_sockets() == sockets_before)


async def leave_in_the_middle(caller: Caller, number: int) -> None:
    route, accept = FORMS[number % len(FORMS)]
    async with caller.opened(route, chat(stream=True), {"Accept": accept}) as response:
        received = b""
        while b"you" not in received:
            received += await response.content.readany()
