"""Two spans a stream, with GenAI's attributes, in the caller's trace, sent by OTLP where the environment says so."""

from collections.abc import AsyncIterator
from concurrent import futures
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from aiohttp import web
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import ConsoleSpanExporter

from penstock import __version__
from penstock.shell import serving as serving_streams
from penstock.shell import telemetry
from penstock.shell.replay import serving
from support import chunks
from support.http_client import FOLDED, chat
from support.otlp_receiver import CLIENT, ERROR, OK, SERVER, Receiver, receiving
from support.sockets import raw_request, until
from support.tools import COUNT, CountingService, Model, call, calling_turn
from support.upstreams import (
    Handler,
    answering,
    engine_app,
    in_front_of,
    in_front_of_all,
    opened,
    replay,
    replayed,
    saying,
    silence,
)

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FROM_A_CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "baggage": "user=7"}
HELLO = chunks.answer_of(["Hello", "!"])


@pytest.fixture(autouse=True)
def _no_tracing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    async with receiving() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        yield running


async def two_words(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await response.write(chunks.role() + chunks.content("Hello", tokens=1) + chunks.content(" you", tokens=2))
    await silence()
    return response


async def test_two_spans_tell_the_stream(receiver: Receiver) -> None:
    async with in_front_of(replay()) as setup:
        request = replayed("thinking-parsed", max_tokens=99, top_p=0.5, temperature=0.25)
        answer = await setup.caller.stream(**request)
    server, client = receiver.of_kind(SERVER), receiver.of_kind(CLIENT)
    assert (server.name, client.name) == ("POST /v1/streams", "chat tiny")
    assert (server.trace_id, server.parent_id) == (answer.one("stream.start")["trace_id"], "")
    assert (client.trace_id, client.parent_id) == (server.trace_id, server.span_id)
    assert (server.status, client.status) == (OK, OK)
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/streams",
        "penstock.stream.id": answer.headers["X-Stream-Id"],
        "penstock.ending": "completed",
    }
    usage = answer.usage
    measured = client.attributes["gen_ai.response.time_to_first_chunk"]
    assert 0 < measured < 10
    assert client.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 99,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.temperature": 0.25,
        "gen_ai.response.id": "chatcmpl-thinking-parsed",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": measured,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["cached_tokens"],
        "gen_ai.usage.reasoning.output_tokens": usage["reasoning_tokens"],
        "penstock.usage.estimated": False,
        "server.address": "127.0.0.1",
        "server.port": int(setup.engine_url.rpartition(":")[2]),
    }
    assert server.resource["service.name"] == "penstock"
    assert server.resource["service.version"] == __version__


@pytest.mark.parametrize("streams", [False, True])
async def test_openai_requests_are_traced_alike(receiver: Receiver, streams: bool) -> None:
    async with in_front_of(replay()) as setup:
        answer = await setup.caller.chat(**replayed("plain" if streams else "whole"), stream=streams)
    server, client = receiver.of_kind(SERVER), receiver.of_kind(CLIENT)
    assert server.name == "POST /v1/chat/completions"
    assert server.attributes["penstock.stream.id"] == answer.headers["X-Stream-Id"]
    assert client.attributes["gen_ai.usage.output_tokens"] == 8
    assert client.attributes["gen_ai.response.finish_reasons"] == ["stop"]


async def test_choices_are_counted(receiver: Receiver) -> None:
    async with in_front_of(replay()) as setup:
        await setup.caller.stream(**replayed("choices", n=2))
    client = receiver.of_kind(CLIENT)
    assert client.attributes["gen_ai.request.choice.count"] == 2
    assert client.attributes["gen_ai.response.finish_reasons"] == ["stop", "stop"]


async def test_one_trace_goes_from_the_caller_to_the_engine(receiver: Receiver) -> None:
    app, seen = engine_app(saying(*HELLO))
    async with in_front_of(app) as setup:
        answer = await setup.caller.stream(headers=FROM_A_CALLER)
    server, client = receiver.of_kind(SERVER), receiver.of_kind(CLIENT)
    assert (server.trace_id, server.parent_id) == (TRACE, PARENT)
    assert answer.one("stream.start")["trace_id"] == TRACE
    assert seen.headers["traceparent"] == f"00-{TRACE}-{client.span_id}-01"
    assert seen.headers["tracestate"] == "vendor=1"
    assert seen.headers["baggage"] == "user=7"


async def test_the_service_may_be_named(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gate")
    async with in_front_of(replay()) as setup:
        await setup.caller.stream(**replayed("plain"))
    assert receiver.of_kind(SERVER).resource["service.name"] == "gate"


# --- Failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ending", "code"),
    [
        (saying(chunks.role(), chunks.content("Hi"), chunks.error()), "engine_error", "engine_error"),
        (saying(chunks.role(), chunks.content("Hi")), "engine_gone", "engine_incomplete"),
        (answering(b'{"error": {"message": "No."}}', 400), "refused", "engine_refused"),
        (two_words, "time_limit", "stream_time_limit"),
    ],
)
async def test_a_failed_stream_is_an_error_on_both_spans(
    receiver: Receiver, answer: Handler, ending: str, code: str
) -> None:
    app, _ = engine_app(answer)
    async with in_front_of(app, limits__stream_seconds=0.8) as setup:
        await setup.caller.stream()
    server, client = receiver.of_kind(SERVER), receiver.of_kind(CLIENT)
    assert server.attributes["penstock.ending"] == ending
    for span in (server, client):
        assert (span.status, span.attributes["error.type"]) == (ERROR, code)


async def test_an_engine_that_was_given_up_has_an_error_on_its_own_span_only(receiver: Receiver) -> None:
    """The stream that another engine answered is none."""
    async with in_front_of_all([answering(b"", 503, "text/plain"), saying(*HELLO)]) as stage:
        stage.make_busy(1)
        assert (await stage.caller.stream()).text() == "Hello!"
    failed, answered = (span for span in receiver.spans if span.kind == CLIENT)
    server = receiver.of_kind(SERVER)
    assert (failed.status, failed.attributes["error.type"]) == (ERROR, "engine_refused")
    assert (answered.status, server.status) == (OK, OK)
    assert failed.parent_id == answered.parent_id == server.span_id


async def test_a_cancelled_stream_is_no_error_but_an_estimate(receiver: Receiver) -> None:
    app, _ = engine_app(two_words)
    async with in_front_of(app) as setup, setup.caller.opened("/v1/streams", chat()) as response:
        await response.content.readuntil(b"you")
        await setup.caller.delete(response.headers["X-Stream-Id"])
        await response.content.read()
    assert_no_error(receiver, "cancelled")


async def test_a_client_that_leaves_is_no_error_but_an_estimate(receiver: Receiver) -> None:
    app, _ = engine_app(two_words)
    async with in_front_of(app) as setup:
        async with setup.caller.opened("/v1/streams", chat()) as response:
            await response.content.readuntil(b"you")
        await until(lambda: setup.sidecar.server.open_streams == 0)
    assert_no_error(receiver, "client_gone")


def assert_no_error(receiver: Receiver, ending: str) -> None:
    server, client = receiver.of_kind(SERVER), receiver.of_kind(CLIENT)
    assert server.attributes["penstock.ending"] == ending
    for span in (server, client):
        assert (span.status, span.attributes.get("error.type")) == (OK, None)
    assert client.attributes["gen_ai.usage.output_tokens"] == 2
    assert client.attributes["penstock.usage.estimated"] is True


async def test_a_request_that_is_none_is_a_server_span_alone(receiver: Receiver) -> None:
    async with in_front_of(replay()) as setup:
        assert (await setup.caller.post("/v1/streams", b"nonsense")).status == 400
    [span] = receiver.spans
    assert (span.kind, span.name, span.status) == (SERVER, "POST /v1/streams", OK)
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("invalid_json", 400)


async def test_a_body_over_the_cap_is_a_server_span_alone(receiver: Receiver) -> None:
    async with in_front_of(replay(), limits__request_bytes=1024) as setup:
        assert (await setup.caller.stream(user="x" * 2000)).status == 413
    [span] = receiver.spans
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("request_too_large", 413)


async def test_a_client_that_leaves_while_it_asks_is_a_server_span_alone(receiver: Receiver) -> None:
    async with in_front_of(replay()) as setup:
        line, headers = b"POST /v1/streams HTTP/1.1", (b"Content-Length: 100", b"Expect: 100-continue")
        async with raw_request(setup.caller.url, line, *headers) as client:
            assert await client.read_head() == b"HTTP/1.1 100 Continue"
    [span] = receiver.spans
    assert (span.status, span.attributes["error.type"]) == (OK, "client_gone")


@pytest.mark.parametrize("broken", ["read_request", "Exchange"])
async def test_a_fault_of_ours_before_there_is_a_stream_is_an_error_of_the_server_span(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(serving_streams, broken, fails)
    async with in_front_of(replay()) as setup:
        assert (await setup.caller.stream(**replayed("plain"))).status == 500
    [span] = receiver.spans
    assert (span.kind, span.status) == (SERVER, ERROR)
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("internal_error", 500)


async def test_no_span_holds_the_conversation(receiver: Receiver) -> None:
    async with in_front_of(replay()) as setup:
        messages = [{"role": "user", "content": "a secret question"}]
        await setup.caller.stream(FOLDED, **replayed("plain", messages=messages))
    assert "secret question" not in str(receiver.spans)
    assert "How can I help" not in str(receiver.spans)


# --- Where to ---------------------------------------------------------------------------------------


async def test_what_is_passed_on_has_a_span_in_the_callers_trace(receiver: Receiver) -> None:
    seen: list[str] = []

    async def version(request: web.Request) -> web.Response:
        seen.append(request.headers["traceparent"].split("-")[1])
        return web.json_response({"version": "0"}, status=500 if seen[1:] else 200)

    app, _ = engine_app(saying(*HELLO))
    app.router.add_get("/version", version)
    async with in_front_of(app, passthrough=["GET /version"]) as setup:
        for _ in range(2):
            await setup.caller.get("/version", FROM_A_CALLER)
    assert [(span.name, span.trace_id, span.parent_id) for span in receiver.spans] == [
        ("GET /version", TRACE, PARENT)
    ] * 2
    assert [span.status for span in receiver.spans] == [OK, ERROR]
    assert seen == [TRACE, TRACE]


@pytest.mark.parametrize("off", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
async def test_without_an_exporter_nothing_is_sent_but_the_context_travels(
    monkeypatch: pytest.MonkeyPatch, off: dict[str, str]
) -> None:
    async with receiving() as receiver:
        for name, value in {**({"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url} if off else {}), **off}.items():
            monkeypatch.setenv(name, value)
        app, seen = engine_app(saying(*HELLO))
        async with in_front_of(app) as setup:
            await setup.caller.stream(headers=FROM_A_CALLER)
            assert seen.headers["traceparent"] == FROM_A_CALLER["traceparent"]
            assert seen.headers["baggage"] == "user=7"
            untraced = await setup.caller.stream()
            assert untraced.one("stream.start")["trace_id"] is None
            assert "traceparent" not in seen.headers
    assert receiver.spans == []


async def test_a_receiver_that_is_not_there_costs_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with in_front_of(replay()) as setup:
        assert (await setup.caller.stream(**replayed("plain"))).end["status"] == "completed"


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({}, type(None)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, type(None)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, HttpExporter),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}, HttpExporter),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, HttpExporter),
        ({"OTEL_TRACES_EXPORTER": "console"}, ConsoleSpanExporter),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, GrpcExporter),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, GrpcExporter),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            HttpExporter,
        ),
    ],
)
def test_the_variables_choose_the_exporter(environment: dict[str, str], exporter: type) -> None:
    chosen = telemetry._exporter(environment)
    assert type(chosen) is exporter
    if chosen is not None:
        chosen.shutdown()


async def test_spans_go_over_grpc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: object) -> object:  # noqa: N802
            receiver.remember(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    async with in_front_of(replay()) as setup:
        await setup.caller.stream(**replayed("plain"))
    server.stop(grace=None).wait()
    assert (receiver.of_kind(SERVER).status, receiver.of_kind(CLIENT).status) == (OK, OK)


async def test_tools_that_are_run_here_and_the_turns_around_them_are_one_trace(receiver: Receiver) -> None:
    service, model = CountingService(), Model(calling_turn(call(0)), HELLO)
    async with serving(service.app()) as url:
        flags: dict[str, Any] = {
            "tools__bindings": [{"tools": ["count"], "url": f"{url}/tool"}],
            "tools__loop__allow_networks": ["127.0.0.0/8"],
        }
        async with in_front_of(engine_app(model.answer)[0], None, **flags) as setup:
            answer = await setup.caller.stream(tools=[COUNT])
    assert answer.one("tool_call.result")["ok"]
    spans = receiver.spans
    assert sorted(span.name for span in spans) == ["POST /v1/streams", "chat tiny", "chat tiny", "execute_tool count"]
    server = receiver.of_kind(SERVER)
    run = next(span for span in spans if span.name == "execute_tool count")
    assert {span.trace_id for span in spans} == {server.trace_id}
    assert run.parent_id == server.span_id
    assert run.attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "count",
        "gen_ai.tool.call.id": "c0",
    }
    assert service.headers[0]["traceparent"].split("-")[1:3] == [server.trace_id, run.span_id]
