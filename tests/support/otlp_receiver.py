"""An OTLP receiver over HTTP that remembers the spans it gets."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
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
    """A span as the receiver got it; ids in hex, `resource` are the attributes of who sent it."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    status: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]


class Receiver:
    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Received] = []

    def of_kind(self, kind: int) -> Received:
        """The one span of this kind."""
        [span] = [span for span in self.spans if span.kind == kind]
        return span

    async def take(self, request: web.Request) -> web.Response:
        self.remember(ExportTraceServiceRequest.FromString(await request.read()))
        body = ExportTraceServiceResponse().SerializeToString()
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
    async with serving(app) as url:
        receiver.url = url
        yield receiver


def _received(span: Any, resource: Mapping[str, Any]) -> Received:
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return Received(span.name, span.kind, *ids, span.status.code, _attributes(span.attributes), resource)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
