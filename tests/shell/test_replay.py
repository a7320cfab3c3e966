"""The mock engine over real connections: what is replayed, every fault, and aborts as its metrics show."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from penstock.core.recording import FAULTS, Recording, RecordingError, ReplayError, parse_fault
from penstock.shell.replay import load_recordings, make_app, run_replay, serving

PATIENCE = 10.0


def sse(**delta: object) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [choice]}, ensure_ascii=False)}\n\n"


ROLE, SMILE, TOOL = sse(role="assistant"), sse(content="né😀"), sse(tool_calls=[{"index": 0, "id": "c1"}])
DONE = "data: [DONE]\n\n"
EVENTS = [ROLE, SMILE, TOOL, DONE]
STREAM = "".join(EVENTS).encode()
WHOLE = '{"object": "chat.completion", "choices": []}'


def write_recording(
    directory: Path, name: str, request: dict[str, Any], reads: Sequence[tuple[float, str]], **more: object
) -> Path:
    header = {
        "recording": 1,
        "name": name,
        "engine": "vllm 0.32.0 (cpu)",
        "about": "Made by a test.",
        "request": {"messages": [{"role": "user", "content": name}], **request},
        "status": 200,
        "content_type": "text/event-stream; charset=utf-8",
        **more,
    }
    file = directory / f"{name}.jsonl"
    lines = [header, *({"ms": ms, "text": text} for ms, text in reads)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Three recordings: a quick stream, a slow one of a minute, a whole document."""
    write_recording(tmp_path, "quick", {"model": "tiny", "stream": True}, [(1, ROLE + SMILE), (2, TOOL), (3, DONE)])
    minute = [(0, ROLE), (30_000, SMILE), (60_000, TOOL + DONE)]
    write_recording(tmp_path, "minute", {"model": "tiny", "stream": True}, minute)
    document = {"content_type": "application/json"}
    write_recording(tmp_path, "whole", {"model": 'small "one"'}, [(1, WHOLE)], **document)
    return tmp_path


class Caller:
    """A client of one mock engine."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    def ask(self, body: object, request_id: str | None = None) -> Any:
        """POST a chat request; use with `async with`."""
        headers = {"X-Request-Id": request_id} if request_id else {}
        return self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    def replay(self, name: str = "quick", **xargs: object) -> Any:
        """Ask for a recording by name; use with `async with`."""
        return self.ask({"stream": True, "vllm_xargs": {"replay": name, **xargs}})

    async def error(self, vllm_xargs: object) -> tuple[int, dict[str, Any]]:
        async with self.ask({"vllm_xargs": vllm_xargs}) as response:
            return response.status, (await response.json())["error"]

    async def get(self, path: str) -> str:
        async with self.session.get(self.url + path) as response:
            assert response.status == 200
            return await response.text()

    async def metric(self, name: str) -> int:
        lines = (await self.get("/metrics")).splitlines()
        return int(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])

    async def wait_for(self, name: str, value: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                if await self.metric(name) == value:
                    return
                await asyncio.sleep(0.005)


RUNNING = 'vllm:num_requests_running{model_name="tiny"}'
ABORTED = "penstock_replay_aborted_total"


@asynccontextmanager
async def calling(app: web.Application) -> AsyncIterator[Caller]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with serving(app) as url, aiohttp.ClientSession(timeout=timeout) as session:
        yield Caller(url, session)


@pytest.fixture
async def caller(shelf: Path) -> AsyncIterator[Caller]:
    async with calling(make_app(load_recordings([shelf]), speed=0)) as caller:
        yield caller


async def until_broken(response: aiohttp.ClientResponse) -> bytes:
    """The bytes that came before the transfer broke."""
    received = bytearray()
    with pytest.raises(aiohttp.ClientError):
        await collect(response.content.readany, received)
    return bytes(received)


async def collect(read: Callable[[], Awaitable[bytes]], received: bytearray) -> None:
    while data := await read():
        received += data


@asynccontextmanager
async def raw_reply(caller: Caller, fault: str) -> AsyncIterator[asyncio.StreamReader]:
    """What comes below HTTP when a replay with this fault is asked for."""
    place = urlsplit(caller.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    body = json.dumps({"vllm_xargs": {"replay": "quick", "replay_fault": fault}})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    async with asyncio.timeout(PATIENCE):
        yield reader
    writer.close()


# --- Answers ----------------------------------------------------------------------------------------


async def test_a_stream_is_replayed_byte_for_byte(caller: Caller) -> None:
    async with caller.ask({"vllm_xargs": {"replay": "quick"}}, request_id="r-7") as response:
        assert await response.read() == STREAM
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["X-Request-Id"] == "r-7"
        assert response.headers["Transfer-Encoding"] == "chunked"


async def test_the_request_picks_the_recording(caller: Caller) -> None:
    async with caller.ask({"stream": True, "messages": [{"role": "user", "content": "quick"}]}) as response:
        assert await response.read() == STREAM
        assert "X-Request-Id" not in response.headers
    async with caller.ask({"messages": [{"role": "user", "content": "anything"}]}) as response:
        assert await response.text() == WHOLE
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["Content-Length"] == str(len(WHOLE))


async def test_an_unknown_name_is_a_404_that_lists_the_known_ones(caller: Caller) -> None:
    status, error = await caller.error({"replay": "nope"})

    assert (status, error["code"], error["type"]) == (404, 404, "NotFoundError")
    assert "known: minute, quick, whole" in error["message"]


async def test_a_recorded_refusal_keeps_its_status(tmp_path: Path) -> None:
    reads = [(1.0, '{"error": {}}')]
    write_recording(tmp_path, "bad", {}, reads, status=400, content_type="application/json")
    async with calling(make_app(load_recordings([tmp_path]))) as caller, caller.ask({}) as response:
        assert response.status == 400
        assert await response.text() == '{"error": {}}'


@pytest.mark.parametrize(
    ("xargs", "complaint"),
    [
        ({"replay_fault": "explode"}, "known: stall:after=:seconds=, drop:after="),
        ({"replay_fault": "drop:after=99"}, "has 4 events"),
        ({"replay_speed": -1}, "must be 0 (as fast as possible) or a positive number"),
        ("nonsense", "vllm_xargs must be a JSON object"),
    ],
)
async def test_what_cannot_be_followed_is_a_400_that_says_why(caller: Caller, xargs: object, complaint: str) -> None:
    wishes = {"replay": "quick", **xargs} if isinstance(xargs, dict) else xargs
    status, error = await caller.error(wishes)

    assert (status, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert complaint in error["message"]


@pytest.mark.parametrize(("body", "status"), [(b"{nonsense", 400), (b"[]", 400), (b" " * 33_554_433, 413)])
async def test_a_body_that_is_no_request_is_refused(caller: Caller, body: bytes, status: int) -> None:
    async with caller.session.post(f"{caller.url}/v1/chat/completions", data=io.BytesIO(body)) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == status


# --- Other routes -----------------------------------------------------------------------------------


async def test_models_version_and_health_are_those_of_an_engine(caller: Caller) -> None:
    models = json.loads(await caller.get("/v1/models"))
    assert [card["id"] for card in models["data"]] == ["tiny", 'small "one"']
    assert json.loads(await caller.get("/version")) == {"version": "0.32.0"}
    assert await caller.get("/health") == ""


async def test_an_engine_without_a_version_number_is_named_whole(tmp_path: Path) -> None:
    write_recording(tmp_path, "old", {}, [(0, "x")], engine="handmade")
    async with calling(make_app(load_recordings([tmp_path]))) as caller:
        assert json.loads(await caller.get("/version")) == {"version": "handmade"}
        assert json.loads(await caller.get("/v1/models"))["data"] == []


async def test_metrics_count_what_runs(caller: Caller) -> None:
    before = await caller.get("/metrics")
    assert f"{RUNNING} 0\n" in before
    assert 'vllm:num_requests_running{model_name="small \\"one\\""} 0\n' in before
    assert 'vllm:num_requests_waiting{model_name="tiny"} 0\n' in before
    assert "# TYPE penstock_replay_requests_total counter\n" in before

    async with caller.replay(replay_fault="stall:after=1") as response:
        await response.content.readuntil(b"\n\n")
        assert await caller.metric(RUNNING) == 1
    await caller.wait_for(RUNNING, 0)
    assert await caller.metric("penstock_replay_requests_total") == 1


async def test_a_finished_answer_is_no_abort(caller: Caller) -> None:
    async with caller.replay() as response:
        assert await response.read() == STREAM

    assert await caller.metric(RUNNING) == 0
    assert await caller.metric(ABORTED) == 0


async def test_small_writes_are_not_held_back(shelf: Path) -> None:
    async def no_delay(request: web.Request) -> web.Response:
        assert request.transport is not None
        peer = request.transport.get_extra_info("socket")
        return web.json_response(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0)

    app = make_app(load_recordings([shelf]))
    app.router.add_get("/no-delay", no_delay)
    async with calling(app) as caller:
        assert await caller.get("/no-delay") == "true"


async def test_the_shipped_recordings_answer_streamed_and_not() -> None:
    async with calling(make_app(await asyncio.to_thread(load_recordings), speed=0)) as caller:
        for stream, content_type in ((True, "text/event-stream"), (False, "application/json")):
            async with caller.ask({"stream": stream, "messages": [{"role": "user", "content": "hi"}]}) as response:
                assert (response.status, response.content_type) == (200, content_type)
                assert b"Hello" in await response.read()


# --- Time -------------------------------------------------------------------------------------------


async def test_recorded_time_is_kept(tmp_path: Path) -> None:
    write_recording(tmp_path, "slow", {"stream": True}, [(0, ROLE), (60, SMILE), (120, DONE)])
    clock = asyncio.get_running_loop()
    async with calling(make_app(load_recordings([tmp_path]))) as caller:
        asked = clock.time()
        async with caller.ask({"stream": True}) as response:
            came = [clock.time() - asked async for _ in response.content.iter_chunks()]

    assert len(came) == 3
    assert came[1] >= 0.059
    assert came[2] >= 0.119


@pytest.mark.parametrize("speed", [0, 6000])
async def test_the_request_may_ask_for_another_speed(shelf: Path, speed: float) -> None:
    app = make_app(load_recordings([shelf]))
    async with calling(app) as caller, caller.replay("minute", replay_speed=speed) as response:
        assert await response.read() == STREAM


# --- Faults -----------------------------------------------------------------------------------------


async def test_stall_stops_sending_and_goes_on_after_the_seconds(caller: Caller) -> None:
    clock = asyncio.get_running_loop()
    asked = clock.time()
    async with caller.replay(replay_fault="stall:after=1:seconds=0.2") as response:
        assert await response.content.readuntil(b"\n\n") == ROLE.encode()
        assert ROLE.encode() + await response.read() == STREAM
    assert clock.time() - asked >= 0.199


async def test_stall_may_last_for_ever(caller: Caller) -> None:
    async with caller.replay(replay_fault="stall:after=2") as response:
        expected = (ROLE + SMILE).encode()
        assert await response.content.readexactly(len(expected)) == expected
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.1)


async def test_drop_ends_cleanly_without_finish_or_done(caller: Caller) -> None:
    async with caller.replay(replay_fault="drop:after=2") as response:
        assert await response.read() == (ROLE + SMILE).encode()


async def test_drop_closes_the_connection_after_the_last_chunk(caller: Caller) -> None:
    async with raw_reply(caller, "drop:after=1") as reader:
        received = await reader.read()

    assert received.endswith(ROLE.encode() + b"\r\n0\r\n\r\n")


async def test_reset_is_a_tcp_reset_and_no_abort_of_the_client(caller: Caller) -> None:
    received = bytearray()
    async with raw_reply(caller, "reset:after=1") as reader:
        with pytest.raises(ConnectionResetError):
            await collect(lambda: reader.read(65536), received)

    assert ROLE.encode() in received
    assert b"\r\n0\r\n\r\n" not in received
    assert await caller.metric(ABORTED) == 0
    assert await caller.metric(RUNNING) == 0


async def test_reset_breaks_the_transfer_after_the_events_were_read(caller: Caller) -> None:
    async with caller.replay(replay_fault="reset:after=2") as response:
        assert await until_broken(response) == (ROLE + SMILE).encode()


async def test_cut_ends_inside_a_character(caller: Caller) -> None:
    async with caller.replay(replay_fault="cut:after=1") as response:
        received = await response.read()

    assert received == STREAM[: STREAM.index("é".encode()) + 1]


async def test_error_sends_vllms_frame_and_done(caller: Caller) -> None:
    async with caller.replay(replay_fault="error:after=1") as response:
        frames = (await response.text()).split("\n\n")

    error = json.loads(frames[1].removeprefix("data: "))["error"]
    assert error == {
        "message": "Internal server error",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert frames[2:] == ["data: [DONE]", ""]


async def test_no_done_leaves_the_last_frame_out(caller: Caller) -> None:
    async with caller.replay(replay_fault="no_done") as response:
        assert await response.text() == ROLE + SMILE + TOOL


async def test_double_tools_repeats_tool_call_chunks(caller: Caller) -> None:
    async with caller.replay(replay_fault="double_tools") as response:
        assert await response.text() == ROLE + SMILE + TOOL + TOOL + DONE


async def test_refuse_answers_with_the_status(caller: Caller) -> None:
    status, error = await caller.error({"replay_fault": "refuse:status=503"})

    assert (status, error["code"], error["type"]) == (503, 503, "ServiceUnavailableError")


async def test_slow_headers_hold_the_headers_back(caller: Caller) -> None:
    clock = asyncio.get_running_loop()
    asked = clock.time()
    async with caller.replay(replay_fault="slow_headers:seconds=0.2") as response:
        assert clock.time() - asked >= 0.199
        assert await response.read() == STREAM


async def test_slow_first_sends_headers_before_the_first_event(caller: Caller) -> None:
    async with caller.replay(replay_fault="slow_first:seconds=forever") as response:
        assert response.status == 200
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.1)


async def test_bytes_come_one_by_one(caller: Caller) -> None:
    async with caller.replay(replay_fault="bytes:size=1") as response:
        pieces = [data async for data, _ in response.content.iter_chunks()]

    assert b"".join(pieces) == STREAM
    assert {len(piece) for piece in pieces} == {1}


async def test_the_default_fault_holds_unless_the_request_asks_for_another(shelf: Path) -> None:
    app = make_app(load_recordings([shelf]), parse_fault("no_done"), 0)
    async with calling(app) as caller:
        async with caller.replay() as response:
            assert await response.text() == ROLE + SMILE + TOOL
        async with caller.replay(replay_fault="bytes:size=5") as response:
            assert await response.read() == STREAM


# --- Aborts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["slow_headers", "slow_first", "stall:after=1"])
async def test_a_client_that_leaves_is_counted_as_an_abort(caller: Caller, fault: str) -> None:
    async def call() -> None:
        async with caller.replay(replay_fault=fault) as response:
            await response.read()

    leaving = asyncio.create_task(call())
    await caller.wait_for(RUNNING, 1)
    leaving.cancel()

    await caller.wait_for(RUNNING, 0)
    assert await caller.metric(ABORTED) == 1


async def test_a_client_that_stops_reading_and_leaves_is_counted_as_an_abort(tmp_path: Path) -> None:
    flood = [(0.0, f"data: {'x' * 1_000_000}\n\n")] * 30
    write_recording(tmp_path, "flood", {"model": "tiny", "stream": True}, flood)
    async with calling(make_app(load_recordings([tmp_path]))) as caller:
        response = await caller.replay("flood")
        assert await caller.metric(RUNNING) == 1
        response.close()

        await caller.wait_for(ABORTED, 1)
        assert await caller.metric(RUNNING) == 0


async def test_a_write_that_notices_first_that_the_client_left_is_an_abort_too(shelf: Path) -> None:
    @web.middleware
    async def lose_the_client(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.method == "POST":
            await request.read()
            assert request.transport is not None
            asyncio.get_running_loop().call_soon(request.transport.abort)
        return await handler(request)

    app = make_app(load_recordings([shelf]), speed=0)
    app.middlewares.append(lose_the_client)
    async with calling(app) as caller:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await caller.replay()

        assert await caller.metric(RUNNING) == 0
        assert await caller.metric(ABORTED) == 1


# --- Running it -------------------------------------------------------------------------------------


def test_recordings_are_read_from_files_and_directories(shelf: Path, tmp_path_factory: Any) -> None:
    extra = write_recording(tmp_path_factory.mktemp("more"), "extra", {}, [(0, "x")])

    assert [one.name for one in load_recordings([extra, shelf])] == ["extra", "minute", "quick", "whole"]


def test_without_paths_the_packages_own_recordings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recordings").mkdir()
    write_recording(tmp_path / "recordings", "own", {}, [(0, "x")])
    monkeypatch.setattr("importlib.resources.files", {"penstock": tmp_path}.__getitem__)

    assert [one.name for one in load_recordings()] == ["own"]


def test_recordings_that_cannot_be_used_are_refused(shelf: Path) -> None:
    (shelf / "empty").mkdir()
    broken = shelf / "broken.jsonl"
    twin = write_recording(shelf / "empty", "quick", {}, [(0, "x")])
    with pytest.raises(RecordingError, match=r"missing\.jsonl: cannot be read: No such file"):
        load_recordings([shelf / "missing.jsonl"])
    with pytest.raises(RecordingError, match=r"quick\.jsonl: the name quick is taken by .*quick\.jsonl"):
        load_recordings([shelf, twin])
    twin.unlink()
    with pytest.raises(RecordingError, match=r"empty: no recording here; recordings are files called NAME"):
        load_recordings([shelf / "empty"])
    broken.write_text("{}")
    with pytest.raises(RecordingError, match=r"broken\.jsonl, line 1: a header has"):
        load_recordings([shelf])
    with pytest.raises(RecordingError, match="there is no recording to replay"):
        make_app([])


async def test_run_replay_announces_its_address_and_serves_until_cancelled(shelf: Path) -> None:
    announced: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def announce(url: str, recordings: Sequence[Recording]) -> None:
        assert [one.name for one in recordings] == ["minute", "quick", "whole"]
        announced.set_result(url)

    running = asyncio.create_task(run_replay([shelf], "localhost", 0, 0.0, "no_done", announce))
    url = await asyncio.wait_for(announced, PATIENCE)
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
        assert response.status == 200
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, PATIENCE)


async def test_run_replay_refuses_a_wrong_fault_or_speed_before_it_listens(shelf: Path) -> None:
    def announce(url: str, recordings: Sequence[Recording]) -> None:
        raise AssertionError("it must not listen")

    with pytest.raises(ReplayError, match='Unknown fault "explode"'):
        await run_replay([shelf], "127.0.0.1", 0, 1.0, "explode", announce)
    with pytest.raises(ReplayError, match="speed is -1"):
        await run_replay([shelf], "127.0.0.1", 0, -1, None, announce)


async def test_a_port_in_use_is_an_os_error(shelf: Path) -> None:
    app = make_app(load_recordings([shelf]))
    async with calling(app) as caller:
        taken = urlsplit(caller.url).port
        assert taken is not None
        with pytest.raises(OSError, match="address already in use"):
            async with serving(make_app(load_recordings([shelf])), port=taken):
                raise AssertionError("it must not listen")


async def test_a_stop_cuts_stalled_streams(shelf: Path) -> None:
    async with aiohttp.ClientSession() as session:
        async with asyncio.timeout(PATIENCE), serving(make_app(load_recordings([shelf]))) as url:
            response = await Caller(url, session).replay("minute", replay_fault="stall:after=1")
        async with response:
            assert await until_broken(response) == ROLE.encode()


async def test_addresses_of_ipv6_have_their_brackets(shelf: Path) -> None:
    async with serving(make_app(load_recordings([shelf])), "::1") as url:
        assert url.startswith("http://[::1]:")


def test_the_reference_names_every_fault_with_its_parameters() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/replay.md").read_text()
    for kind, row in FAULTS.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{kind}`"))
        for parameter in row.takes:
            assert f"`{parameter}" in line
