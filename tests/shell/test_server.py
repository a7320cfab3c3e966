"""The routes: what each answers, in which shape and with which headers, before and beside the streams."""

import gzip
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from penstock.core.verifier import parse_log, verify
from penstock.shell import serving
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Answer, Json, calling, chat
from support.sidecar import sidecar
from support.sockets import connections, raw_request, until
from support.upstreams import Setup, answering, engine_app, in_front_of, opened, replay, replayed, saying, silence

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

ROUTES = ["/v1/streams", "/v1/chat/completions"]
HELLO = chunks.answer_of(["Hello", "!"])


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    async with in_front_of(replay(), limits__request_bytes=4096) as running:
        yield running


def assert_error(answer: Answer, route: str, status: int, code: str) -> None:
    """The error of a Penstock route in the words of that route."""
    assert answer.status == status
    assert answer.headers["Content-Type"].startswith("application/json")
    error = answer.error
    assert error["code"] == code
    assert error["message"]
    if route == "/v1/chat/completions":
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
    else:
        assert error.keys() == {"code", "message", "param", "retryable", "origin"}
        assert (error["origin"], error["retryable"]) == ("client", False)


# --- The forms of an answer -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, SSE),
        ("", SSE),
        ("*/*", SSE),
        ("text/*", SSE),
        (SSE, SSE),
        ("TEXT/EVENT-STREAM", SSE),
        (NDJSON, NDJSON),
        (FOLDED, FOLDED),
        ("application/*", FOLDED),
        (f"{FOLDED};q=0.5, {NDJSON}", NDJSON),
        (f"{NDJSON}, {SSE}", NDJSON),
        (f"text/html, {NDJSON};q=0.1, image/png", NDJSON),
        (f"{SSE};q=0, {FOLDED}", FOLDED),
        (f"{SSE}; charset=utf-8", SSE),
    ],
)
async def test_accept_chooses_the_form(setup: Setup, accept: str | None, content_type: str) -> None:
    headers = {} if accept is None else {"Accept": accept}
    session = setup.caller.session
    skipped = ["Accept"] if accept is None else []
    async with session.post(
        f"{setup.caller.url}/v1/streams", json=chat(**replayed("plain")), headers=headers, skip_auto_headers=skipped
    ) as response:
        assert response.status == 200
        assert response.content_type == content_type
        assert b"Hello" in await response.read()


@pytest.mark.parametrize("accept", ["text/html", "image/*, text/plain", f"{SSE};q=0", f"{SSE};q=nonsense"])
async def test_an_accept_that_nothing_fits_is_a_406_that_says_what_does(setup: Setup, accept: str) -> None:
    answer = await setup.caller.stream(accept, **replayed("plain"))
    assert_error(answer, "/v1/streams", 406, "not_acceptable")
    assert NDJSON in answer.error["message"]


async def test_every_form_tells_the_same(setup: Setup) -> None:
    request = replayed("thinking-tool-parsed", tools=[])
    by_events = await setup.caller.stream(SSE, **request)
    by_lines = await setup.caller.stream(NDJSON, **request)
    folded = (await setup.caller.stream(FOLDED, **request)).json
    plain = [{**event, "stream_id": "", "ts": 0} for event in by_events.events]
    timeless = {"duration_ms": 0, "ttft_ms": 0}
    plain[-1] |= timeless
    plain[0]["resumable_until"] = by_lines.events[0]["resumable_until"]
    lines = [{**event, "stream_id": "", "ts": 0} for event in by_lines.events]
    lines[-1] |= timeless
    assert plain == lines
    [choice] = folded["choices"]
    assert choice["text"] == by_events.text()
    assert [block["type"] for block in choice["blocks"]] == ["reasoning", "text", "tool_call"]
    assert folded["last_seq"] == len(by_events.events)
    assert folded["status"] == "completed"


async def test_a_frame_names_its_type_and_its_place(setup: Setup) -> None:
    answer = await setup.caller.stream(**replayed("plain"))
    frames = [frame.split("\n") for frame in answer.body.decode().split("\n\n") if frame and frame[0] != ":"]
    for number, (event, name, data) in enumerate(frames, 1):
        fields = json.loads(data.removeprefix("data: "))
        assert event == f"event: {fields['type']}"
        assert name == f"id: {answer.headers['X-Stream-Id']}:{number}"


@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize("route", ROUTES)
async def test_the_head_of_a_stream_keeps_proxies_off_it(setup: Setup, route: str, accept: str) -> None:
    body = chat(**replayed("plain"), stream=True)
    answer = await setup.caller.post(route, body, {"Accept": accept, "Accept-Encoding": "gzip, deflate, br"})
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["X-Stream-Schema"] == "1.0"
    assert answer.headers["X-Stream-Id"].startswith("st_")
    assert len(answer.headers["X-Stream-Id"]) == len("st_") + 32
    assert "Content-Encoding" not in answer.headers


async def test_two_streams_have_two_ids(setup: Setup) -> None:
    ids = {(await setup.caller.stream(**replayed("plain"))).headers["X-Stream-Id"] for _ in range(5)}
    assert len(ids) == 5


async def test_small_writes_are_not_held_back_on_either_side() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello"))
        await silence()
        return response

    app, _ = engine_app(answer)
    async with in_front_of(app) as setup, setup.caller.opened("/v1/streams", chat()) as response:
        await response.content.readany()
        to_clients = connections(local_port=port_of(setup.caller.url))
        to_engine = connections(peer_port=port_of(setup.engine_url))
        assert to_clients
        assert to_engine
        for connection in to_clients + to_engine:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            connection.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


# --- Requests that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{nonsense", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b"", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b'{"messages": []}', "invalid_request", "model"),
        (b'{"model": 7, "messages": []}', "invalid_request", "model"),
        (b'{"model": "tiny"}', "invalid_request", "messages"),
        (b'{"model": "tiny", "messages": [], "penstock": 1}', "invalid_request", "penstock"),
        (b'{"model": "tiny", "messages": [], "penstock": {"loud": 1}}', "invalid_request", "penstock.loud"),
        (
            b'{"model": "tiny", "messages": [], "penstock": {"reasoning": "x"}}',
            "invalid_request",
            "penstock.reasoning",
        ),
        (b'{"model": "tiny", "messages": [], "penstock": {"family": "x"}}', "invalid_request", "penstock.family"),
        (b'{"model": "tiny", "messages": [], "penstock": {"stop": []}}', "invalid_request", "penstock.stop"),
    ],
)
async def test_a_body_that_is_no_request_is_a_400(
    setup: Setup, route: str, body: bytes, code: str, param: str | None
) -> None:
    answer = await setup.caller.post(route, body)
    assert_error(answer, route, 400, code)
    assert answer.error["param"] == param


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_over_the_cap_is_a_413(setup: Setup, route: str) -> None:
    answer = await setup.caller.post(route, chat(messages=[{"role": "user", "content": "x" * 5000}]))
    assert_error(answer, route, 413, "request_too_large")
    assert "limits.request_bytes" in answer.error["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_over_the_cap_is_a_413_even_if_it_does_not_say_how_long_it_is(setup: Setup, route: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async with setup.caller.session.post(setup.caller.url + route, data=endless()) as response:
        assert response.status == 413


@pytest.mark.parametrize("route", ROUTES)
async def test_another_method_is_a_405_that_says_which(setup: Setup, route: str) -> None:
    answer = await setup.caller.get(route)
    assert_error(answer, route, 405, "no_such_route")
    assert answer.headers["Allow"] == "POST"


async def test_another_path_is_a_404(setup: Setup) -> None:
    assert_error(await setup.caller.get("/v1/nothing"), "/v1/nothing", 404, "no_such_route")


@pytest.mark.parametrize(
    ("line", "header", "status"),
    [
        (b"GET /v1/%ff HTTP/1.1", b"Accept: */*", 404),
        (b"POST /v1/streams HTTP/1.1", b"Accept: \xff", 406),
        (b"POST /v1/streams HTTP/1.1", b"Traceparent: \xff", 400),
        (b"POST /v1/chat/completions HTTP/1.1", b"Baggage: \xff=\xff", 400),
    ],
)
async def test_bytes_that_are_no_text_are_the_callers_fault(
    setup: Setup, line: bytes, header: bytes, status: int
) -> None:
    async with raw_request(setup.caller.url, line, header, b"Connection: close") as client:
        head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"), [(b"no gzip at all", 400), (gzip.compress(b" " * 100_000), 413), (gzip.compress(b"{}"), 400)]
)
async def test_a_compressed_body_is_judged_by_what_is_in_it(setup: Setup, body: bytes, status: int) -> None:
    answer = await setup.caller.post("/v1/streams", body, {"Content-Encoding": "gzip"})
    assert answer.status == status
    assert answer.error["origin"] == "client"


async def test_an_old_client_gets_a_stream_that_ends_with_its_connection(setup: Setup) -> None:
    body = json.dumps(chat(**replayed("plain"))).encode()
    async with raw_request(setup.caller.url, b"POST /v1/streams HTTP/1.0", body=body) as client:
        head, _, log = (await client.read_all()).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert verify(parse_log(log)) == []


# --- What the engine refuses ------------------------------------------------------------------------

REFUSALS = {"error-bad-request": 400, "error-unknown-model": 404, "error-context": 400, "error-no-tool-parser": 400}


@pytest.mark.parametrize("name", REFUSALS)
async def test_an_openai_client_reads_the_engines_own_refusal(setup: Setup, name: str) -> None:
    direct = await refusal_of_the_engine(setup, name)
    answer = await setup.caller.chat(**replayed(name), stream=True)
    assert (answer.status, answer.json) == (direct.status, direct.json)
    assert answer.status == REFUSALS[name]


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("accept", [SSE, NDJSON, FOLDED])
async def test_a_native_client_reads_it_in_penstocks_shape(setup: Setup, name: str, accept: str) -> None:
    direct = await refusal_of_the_engine(setup, name)
    answer = await setup.caller.stream(accept, **replayed(name))
    assert answer.status == REFUSALS[name]
    error = answer.error
    assert (error["code"], error["origin"], error["retryable"]) == ("engine_refused", "upstream", False)
    assert error["message"] == direct.error["message"]


async def refusal_of_the_engine(setup: Setup, name: str) -> Answer:
    async with calling(setup.engine_url) as direct:
        return await direct.chat(**replayed(name))


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_refusal_that_may_pass_is_retryable(setup: Setup, status: int) -> None:
    answer = await setup.caller.stream(**replayed("plain", f"refuse:status={status}"))
    assert (answer.status, answer.error["retryable"]) == (status, True)


async def test_an_error_page_that_is_no_json_becomes_one() -> None:
    app, _ = engine_app(answering(b"<h1>Bad gateway</h1>", 502, "text/html"))
    async with in_front_of(app) as setup:
        for answer in (await setup.caller.stream(), await setup.caller.chat(stream=True), await setup.caller.chat()):
            assert (answer.status, answer.error["code"]) == (502, "engine_refused")
            assert "Bad gateway" in answer.error["message"]


async def test_a_redirect_of_the_engine_is_a_502() -> None:
    async def redirect(_: web.Request) -> web.Response:
        return web.Response(status=304)

    app, _ = engine_app(redirect)
    async with in_front_of(app) as setup:
        assert (await setup.caller.stream()).status == 502


@pytest.mark.parametrize("route", ROUTES)
async def test_an_engine_that_is_not_there_is_a_502(route: str) -> None:
    async with sidecar("http://127.0.0.1:9") as running, calling(running.url) as caller:
        answer = await caller.post(route, chat(stream=True))
        assert (answer.status, answer.error["code"]) == (502, "engine_unreachable")
        assert "is it running?" in answer.error["message"]
        models = await caller.get("/v1/models")
        assert (models.status, models.error["type"], models.error["code"]) == (
            502,
            "upstream_error",
            "engine_unreachable",
        )
        ready = await caller.get("/readyz")
        assert (ready.status, b"engine" in ready.body) == (503, True)
        assert (await caller.get("/healthz")).status == 200


# --- The other routes -------------------------------------------------------------------------------


async def test_the_models_are_the_engines(setup: Setup) -> None:
    async with calling(setup.engine_url) as direct:
        assert (await setup.caller.get("/v1/models")).json == (await direct.get("/v1/models")).json


async def test_the_schema_is_served(setup: Setup) -> None:
    answer = await setup.caller.get("/v1/schema")
    assert answer.headers["Content-Type"] == "application/schema+json"
    assert answer.json["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"$ref": "#/$defs/stream.end"} in answer.json["oneOf"]


async def test_health_and_readiness(setup: Setup) -> None:
    assert ((await setup.caller.get("/healthz")).status, (await setup.caller.get("/readyz")).status) == (200, 200)


async def test_readiness_follows_the_engines_health() -> None:
    healthy = [True]
    asked = []

    async def health(_: web.Request) -> web.Response:
        asked.append(1)
        return web.Response(status=200 if healthy[0] else 503)

    app = web.Application()
    app.router.add_get("/health", health)
    async with in_front_of(app) as setup:
        assert (await setup.caller.get("/readyz")).status == 200
        healthy[0], before = False, len(asked)
        assert (await setup.caller.get("/readyz")).status == 200  # asked again at most once a second
        assert len(asked) == before

        async def is_seen() -> bool:
            return (await setup.caller.get("/readyz")).status == 503

        await until(is_seen)


async def test_the_engine_may_listen_on_a_unix_socket(tmp_path: Path) -> None:
    app, _ = engine_app(saying(*HELLO))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
    async with (
        sidecar("http://engine", {"socket": str(tmp_path / "engine.sock")}) as running,
        calling(running.url) as caller,
    ):
        assert (await caller.stream()).text() == "Hello!"
    await runner.cleanup()


# --- What goes to the engine ------------------------------------------------------------------------

WHOLE = chunks.whole({"content": "Hello!"})
SPACED = b'{ "model":"tiny",\n "messages" : [{"role":"user","content":"h\\u00ed"}], "temperature": 1.0, "extra": 1e2 }'


async def test_a_whole_request_reaches_the_engine_byte_for_byte() -> None:
    app, seen = engine_app(answering(WHOLE))
    async with in_front_of(app) as setup:
        answer = await setup.caller.post("/v1/chat/completions", SPACED)
        assert seen.body == SPACED
        assert answer.json == json.loads(WHOLE)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, {"include_usage": True, "continuous_usage_stats": True}),
        ({}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"include_usage": False, "other": 1}, {"include_usage": True, "continuous_usage_stats": True, "other": 1}),
    ],
)
async def test_of_a_streaming_request_only_the_stream_options_change(given: Json | None, sent: Json) -> None:
    app, seen = engine_app(saying(*HELLO))
    asked = {**json.loads(SPACED), "stream": True, **({"stream_options": given} if given is not None else {})}
    async with in_front_of(app) as setup:
        await setup.caller.post("/v1/chat/completions", asked)
        assert json.loads(seen.body) == {**asked, "stream_options": sent}
        await setup.caller.post("/v1/streams", {**asked, "stream": False})
        assert json.loads(seen.body) == {**asked, "stream_options": sent}


async def test_the_engine_never_sees_penstocks_own_options() -> None:
    app, seen = engine_app(answering(WHOLE))
    async with in_front_of(app) as setup:
        await setup.caller.post("/v1/chat/completions", {**json.loads(SPACED), "penstock": {"reasoning": "hide"}})
        assert json.loads(seen.body) == json.loads(SPACED)


async def test_an_engine_without_running_usage_is_not_asked_for_it() -> None:
    app, seen = engine_app(saying(*HELLO))
    async with in_front_of(app, {"running_usage": False}) as setup:
        await setup.caller.stream()
        assert json.loads(seen.body)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("choice", "sent"), [({}, "none"), ({"tool_choice": "auto"}, "none"), ({"tool_choice": "required"}, "required")]
)
async def test_an_engine_without_a_tool_parser_is_told_not_to_choose(choice: Json, sent: str) -> None:
    app, seen = engine_app(saying(*HELLO))
    tools = [{"type": "function", "function": {"name": "now"}}]
    async with in_front_of(app, {"parses_tools": False}) as setup:
        await setup.caller.stream(tools=tools, **choice)
        assert json.loads(seen.body)["tool_choice"] == sent


async def test_the_engine_gets_the_streams_id_and_its_own_key() -> None:
    app, seen = engine_app(saying(*HELLO))
    async with in_front_of(app, {"api_key": "the-engines-key"}) as setup:
        answer = await setup.caller.stream(headers={"Authorization": "Bearer somebody", "Cookie": "a=b"})
        assert seen.headers["X-Request-Id"] == answer.headers["X-Stream-Id"]
        assert seen.headers["Authorization"] == "Bearer the-engines-key"
        assert "Cookie" not in seen.headers
        assert seen.headers["Accept-Encoding"] == "identity"


async def test_without_keys_of_penstock_the_callers_key_is_the_engines_business() -> None:
    app, seen = engine_app(saying(*HELLO))
    async with in_front_of(app) as setup:
        await setup.caller.stream(headers={"Authorization": "Bearer somebody"})
        assert seen.headers["Authorization"] == "Bearer somebody"
        await setup.caller.get("/v1/models", {"Authorization": "Bearer somebody"})
        assert seen.headers["Authorization"] == "Bearer somebody"


async def test_an_engine_that_ignores_stream_is_understood() -> None:
    app, _ = engine_app(answering(WHOLE))
    async with in_front_of(app) as setup:
        assert (await setup.caller.stream()).text() == "Hello!"


async def test_a_client_may_leave_before_anything_was_answered() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await silence()
        return web.Response()

    app, seen = engine_app(answer)
    async with in_front_of(app) as setup:
        with pytest.raises(aiohttp.ServerTimeoutError):
            await setup.caller.session.post(
                f"{setup.caller.url}/v1/streams", json=chat(), timeout=aiohttp.ClientTimeout(sock_read=0.1)
            )
        await until(lambda: seen.left == 1)
        await until(lambda: setup.sidecar.server.open_streams == 0)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_fault_of_our_own_before_the_stream_is_a_500(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(serving, "read_request", broken)
    answer = await setup.caller.post(route, chat())
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert "out of order" not in answer.error["message"]
    assert "out of order" in caplog.text


async def test_the_log_of_a_stream_is_parsed_by_its_own_reader(setup: Setup) -> None:
    answer = await setup.caller.stream(**replayed("emoji"))
    assert parse_log(answer.body) == answer.events
