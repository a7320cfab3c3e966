"""A caller of Penstock over HTTP, and what it got: every event log it reads is held against the guarantees."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import aiohttp
import jsonschema

from penstock.core.verifier import parse_log, verify

Json = dict[str, Any]
Event = dict[str, Any]

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
FOLDED = "application/json"
HI = [{"role": "user", "content": "hi"}]

# No test waits longer for one answer; whoever expects silence sets a smaller time.
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """One whole HTTP answer. What reads `events` may rely on a log that keeps every guarantee."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Json:
        """The error object of a refusal, in either shape."""
        error: Json = self.json["error"]
        return error

    @cached_property
    def events(self) -> list[Event]:
        """The event log, SSE or NDJSON, verified."""
        return kept_promises(parse_log(self.body))

    @cached_property
    def chunks(self) -> list[Json]:
        """The data of an OpenAI stream's frames, `[DONE]` left out."""
        frames = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(frame) for frame in frames if frame != "[DONE]"]

    def of(self, *types: str) -> list[Event]:
        return [event for event in self.events if event["type"] in types]

    def one(self, kind: str) -> Event:
        [event] = self.of(kind)
        return event

    def text(self, choice: int = 0) -> str:
        return self._joined("delta.text", choice)

    def reasoning(self, choice: int = 0) -> str:
        return self._joined("delta.reasoning", choice)

    def arguments(self, choice: int = 0) -> str:
        return self._joined("tool_call.arguments_chunk", choice)

    def finish(self, choice: int = 0) -> Event:
        [finish] = [event for event in self.of("finish") if event["choice"] == choice]
        return finish

    @property
    def usage(self) -> Event:
        """The final usage."""
        [usage] = [event for event in self.of("usage") if event["final"]]
        return usage

    @property
    def end(self) -> Event:
        return self.one("stream.end")

    def _joined(self, kind: str, choice: int) -> str:
        return "".join(event["text"] for event in self.of(kind) if event["choice"] == choice)


def kept_promises(events: list[Event]) -> list[Event]:
    """`events` themselves, if the whole log keeps the guarantees and each of them fits the published schema."""
    assert verify(events) == []
    for event in events:
        _schema().validate(event)
    return events


@cache
def _schema() -> jsonschema.Draft202012Validator:
    text = importlib.resources.files("penstock.core").joinpath("schema-1.0.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


class Caller:
    """One client of the server at `url`; `headers` go with every request."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def stream(self, accept: str = SSE, *, headers: Mapping[str, str] | None = None, **request: Any) -> Answer:
        """`POST /v1/streams`, read to its end. `request` are fields of the body; model and messages are filled in."""
        return await self.post("/v1/streams", chat(**request), {"Accept": accept, **(headers or {})})

    async def chat(self, *, headers: Mapping[str, str] | None = None, **request: Any) -> Answer:
        """`POST /v1/chat/completions`, read to its end."""
        return await self.post("/v1/chat/completions", chat(**request), headers)

    async def post(self, path: str, body: Json | bytes, headers: Mapping[str, str] | None = None) -> Answer:
        async with self.opened(path, body, headers) as response:
            return await whole(response)

    @asynccontextmanager
    async def opened(
        self, path: str, body: Json | bytes, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer as soon as its head is there; leaving the block before its end closes the connection."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        async with self.session.post(self.url + path, data=data, headers=sent) as response:
            yield response

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        async with self.session.get(self.url + path, headers=headers) as response:
            return await whole(response)

    async def delete(self, stream_id: str, headers: Mapping[str, str] | None = None) -> Answer:
        async with self.session.delete(f"{self.url}/v1/streams/{stream_id}", headers=headers) as response:
            return await whole(response)


def chat(**request: Any) -> Json:
    """A chat request for the tiny model, greedy unless it says otherwise."""
    return {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 512, **request}


async def whole(response: aiohttp.ClientResponse) -> Answer:
    return Answer(response.status, response.headers.copy(), await response.read())


@asynccontextmanager
async def calling(url: str, **headers: str) -> AsyncIterator[Caller]:
    """A caller whose connections, as many as it wants, are closed at the end. Nothing is decompressed on its way."""
    timeout, connector = aiohttp.ClientTimeout(total=PATIENCE_SECONDS), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, auto_decompress=False, headers=headers
    ) as session:
        yield Caller(url, session)
