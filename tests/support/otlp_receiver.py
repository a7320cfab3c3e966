"""An OTLP receiver over HTTP that remembers the spans and the log records it gets."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from penstock.shell.replay import serving

SERVER, CLIENT = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT
OK, ERROR = 0, 2  # a span that is no error leaves its status unset


@dataclass(frozen=True)
class Received:
    """A span as the receiver got it; ids in hex, `resource` are the attributes of who sent it.

    `events` are its events by name, each with its attributes.
    """

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    status: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    events: Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class ReceivedLog:
    event_name: str
    trace_id: str
    span_id: str
    nanoseconds: int
    attributes: Mapping[str, Any]


class Receiver:
    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Received] = []
        self.logs: list[ReceivedLog] = []

    def of_kind(self, kind: int) -> Received:
        """The one span of this kind."""
        [span] = [span for span in self.spans if span.kind == kind]
        return span

    async def take(self, request: web.Request) -> web.Response:
        self.remember(ExportTraceServiceRequest.FromString(await request.read()))
        body = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=body, content_type="application/x-protobuf")

    async def take_logs(self, request: web.Request) -> web.Response:
        exported = ExportLogsServiceRequest.FromString(await request.read())
        for resource in exported.resource_logs:
            for scope in resource.scope_logs:
                self.logs += map(_received_log, scope.log_records)
        body = ExportLogsServiceResponse().SerializeToString()
        return web.Response(body=body, content_type="application/x-protobuf")

    def remember(self, exported: ExportTraceServiceRequest) -> None:
        for resource in exported.resource_spans:
            sender = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_received(span, sender) for span in scope.spans]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """The receiver while it listens."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    app.router.add_post("/v1/logs", receiver.take_logs)
    async with serving(app) as url:
        receiver.url = url
        yield receiver


def _received(span: Any, resource: Mapping[str, Any]) -> Received:
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    events = [(event.name, _attributes(event.attributes)) for event in span.events]
    return Received(span.name, span.kind, *ids, span.status.code, _attributes(span.attributes), resource, events)


def _received_log(log: Any) -> ReceivedLog:
    ids = (log.trace_id.hex(), log.span_id.hex())
    return ReceivedLog(log.event_name, *ids, log.time_unix_nano, _attributes(log.attributes))


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
