"""Traces by OpenTelemetry's GenAI conventions: one server span and one client span a stream.

The conventions are in development, so every name stands in this file. Configured by the standard `OTEL_*`
variables alone; without an exporter named there nothing is recorded, and the caller's context still travels
on to the engine.
"""

import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from penstock import __version__
from penstock.core.commands import Ending, RecordUsage
from penstock.core.errors import Problem
from penstock.core.events import Intervention
from penstock.core.request import StreamRequest
from penstock.core.wishes import ToolRun

# They warn of every malformed piece of a caller's headers, up to 180 lines a request.
for _name in ("baggage.propagation", "trace.propagation.tracecontext", "trace.span"):
    logging.getLogger(f"opentelemetry.{_name}").setLevel(logging.ERROR)

CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; nobody is there to see it but the trace."""
_NOT_ERRORS = (Ending.COMPLETED, Ending.CANCELLED, Ending.CLIENT_GONE)


class Telemetry:
    """Makes the spans. `close` sends what is still queued; call it once, when the last stream is over."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = trace.get_tracer("penstock", __version__, tracer_provider=provider)

    @classmethod
    def from_environment(cls) -> "Telemetry":
        """As `OTEL_TRACES_EXPORTER`, `OTEL_EXPORTER_OTLP_*` and `OTEL_SDK_DISABLED` say; by default off."""
        exporter = _exporter(os.environ)
        if exporter is None:
            return cls(None)
        provider = TracerProvider(resource=_resource(os.environ))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, headers: Mapping[str, str], route: str, stream_id: str, method: str = "POST") -> "StreamTrace":
        """Opens the server span, child of the caller's span if `headers` name one."""
        # W3C allows ASCII only, and the propagators trip over bytes that are no UTF-8.
        carrier = {name.lower(): value for name, value in headers.items() if value.isascii()}
        context = propagate.extract(carrier)
        attributes: dict[str, AttributeValue] = {
            "http.request.method": method,
            "http.route": route,
            "penstock.stream.id": stream_id,
        }
        span = self._tracer.start_span(f"{method} {route}", context, SpanKind.SERVER, attributes)
        return StreamTrace(self._tracer, span, context, route)

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


class StreamTrace:
    """The two spans of one stream. `finish` ends both."""

    def __init__(self, tracer: trace.Tracer, server: Span, context: Context, route: str) -> None:
        self.route = route
        self._tracer = tracer
        self._server = server
        self._context = context  # the caller's, with its baggage
        self._client: Span | None = None

    @property
    def trace_id(self) -> str | None:
        context = self._server.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else None

    @property
    def span_id(self) -> str | None:
        context = self._server.get_span_context()
        return trace.format_span_id(context.span_id) if context.is_valid else None

    def call_engine(self, request: StreamRequest, address: str, port: int | None) -> MutableMapping[str, str]:
        """Opens the client span and returns the headers that carry the context on to the engine."""
        attributes: dict[str, AttributeValue | None] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": request.model,
            "gen_ai.request.choice.count": request.choices if request.choices > 1 else None,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "server.address": address,
            "server.port": port,
        }
        known = {name: value for name, value in attributes.items() if value is not None}
        parent = trace.set_span_in_context(self._server, self._context)
        if self._client is not None:  # an engine that failed before its first token, or a turn before this one
            self._client.end()
        self._client = self._tracer.start_span(f"chat {request.model}", parent, SpanKind.CLIENT, known)
        headers: dict[str, str] = {}
        propagate.inject(headers, trace.set_span_in_context(self._client, self._context))
        return headers

    def give_up_engine(self, problem: Problem) -> None:
        """It failed before its first token; whether another one is called or none is left, its span says so."""
        if self._client is not None:
            self._fail(self._client, problem.code)

    def pass_on(self) -> Mapping[str, str]:
        """The headers that carry the context on, of a request that is handed to an engine as it is."""
        headers: dict[str, str] = {}
        propagate.inject(headers, trace.set_span_in_context(self._server, self._context))
        return headers

    @contextmanager
    def run_tool(self, run: ToolRun) -> Iterator[Mapping[str, str]]:
        """The span of one call that is run here, and the headers that carry the context on to the tool."""
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": run.name,
            "gen_ai.tool.call.id": run.call_id,
        }
        parent = trace.set_span_in_context(self._server, self._context)
        span = self._tracer.start_span(f"execute_tool {run.name}", parent, SpanKind.INTERNAL, attributes)
        headers: dict[str, str] = {}
        propagate.inject(headers, trace.set_span_in_context(span, self._context))
        try:
            yield headers
        finally:
            span.end()

    def finish(self, record: RecordUsage) -> None:
        if self._client is not None:
            self._client.set_attributes(_answer_attributes(record))
            self._settle(self._client, record)
        self._server.set_attribute("penstock.ending", record.ending.value)
        self._settle(self._server, record)

    def moderated(self, done: Intervention) -> None:
        """An event of the server span; the audit's entry names the span."""
        told: dict[str, AttributeValue] = {
            "penstock.rule": done.rule,
            "penstock.action": done.action,
            "penstock.category": done.category,
            "penstock.choice": done.choice,
        }
        self._server.add_event("penstock.moderation", told)

    def fetch(self, stream_id: str) -> None:
        """Ends the server span of a request that is answered from the log of another one."""
        self._server.set_attributes({"gen_ai.operation.name": "fetch_response", "penstock.replay.of": stream_id})
        self._server.end()

    def refuse(self, code: str, status: int) -> None:
        """Ends the server span of a request that never became a stream. The caller's faults are no errors of ours."""
        self._server.set_attributes({"error.type": code, "http.response.status_code": status})
        if status >= 500:
            self._server.set_status(Status(StatusCode.ERROR, code))
        self._server.end()

    @staticmethod
    def _settle(span: Span, record: RecordUsage) -> None:
        if record.ending not in _NOT_ERRORS:
            StreamTrace._fail(span, record.error_code or record.ending.value)
        span.end()

    @staticmethod
    def _fail(span: Span, code: str) -> None:
        span.set_attribute("error.type", code)
        span.set_status(Status(StatusCode.ERROR, code))


def context_of(trace_id: str | None, span_id: str | None) -> Context | None:
    """Where a log record belongs that is written after its spans have ended."""
    if trace_id is None or span_id is None:
        return None
    sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    ids = trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=sampled)
    return trace.set_span_in_context(trace.NonRecordingSpan(ids))


def logger_provider(environment: Mapping[str, str]) -> LoggerProvider:
    """For records that the settings asked for; where they go is said by `OTEL_EXPORTER_OTLP_*`."""
    provider = LoggerProvider(resource=_resource(environment))
    general = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if environment.get("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", general) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcExporter

        provider.add_log_record_processor(BatchLogRecordProcessor(GrpcExporter()))
    else:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpExporter

        provider.add_log_record_processor(BatchLogRecordProcessor(HttpExporter()))
    return provider


def _resource(environment: Mapping[str, str]) -> Resource:
    return Resource.create(
        {SERVICE_NAME: environment.get("OTEL_SERVICE_NAME", "penstock"), SERVICE_VERSION: __version__}
    )


def _answer_attributes(record: RecordUsage) -> dict[str, AttributeValue]:
    usage = record.usage
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.response.id": record.engine_id,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.response.time_to_first_chunk": record.ttft_seconds,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        "penstock.usage.estimated": usage.estimated,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _exporter(environment: Mapping[str, str]) -> SpanExporter | None:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    has_endpoint = any(
        environment.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    )
    match environment.get("OTEL_TRACES_EXPORTER") or ("otlp" if has_endpoint else "none"):
        case "console":
            return ConsoleSpanExporter()
        case "otlp":
            return _otlp_exporter(environment)
        case _:
            return None


def _otlp_exporter(environment: Mapping[str, str]) -> SpanExporter:
    general = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", general) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()
