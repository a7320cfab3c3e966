"""A stand-in for a vLLM with the plugin, in the test's own loop: the test says what comes on the WebSocket, and when.

    async with fake_plugin() as plugin, sidecar(plugin.url, {"plugin": "auto"}) as running: ...
        [stream] = await plugin.opened(1)
        await plugin.send(stream.begin(), *stream.says("Hi"), *stream.ends())

It writes frames straight from the page of the contract and knows nothing of the plugin's own writer. Its chat
route answers `PLAIN_ANSWER` in vLLM's chunks, so that a test sees which way a request went.
"""

import asyncio
import json
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from penstock.core.detokenize import Vocabulary
from penstock.core.frames import CAUSES, VERSION, Begin, End, EngineFailed, Finish, Lost, Record, Tag, Tokens
from support import chunks
from support.chunks import Json
from support.sockets import until
from support.tokenizers_made import MadeTokenizer, made
from support.upstreams import answering, engine_app, saying, silence

PLAIN_ANSWER = "in vLLM's own chunks"
PROMPT_TOKENS, CACHED_TOKENS = 9, 4
# A tokenizer is read in the test's loop no less than in the sidecar's: once, before any test runs.
_TOKENIZER = made("qwen")
_DIGEST = Vocabulary(_TOKENIZER.json).digest


# --- The writer ---------------------------------------------------------------------------------------


def write(records: Sequence[Record]) -> bytes:
    """One binary message."""
    return bytes([VERSION]) + b"".join(map(_write_record, records))


def _write_record(record: Record) -> bytes:
    match record:
        case Begin(stream, prompt_tokens, cached_tokens, prompt_end, state):
            name = state.encode()
            head = struct.pack("<BIIII", 1, stream, prompt_tokens, cached_tokens, len(prompt_end))
            return head + struct.pack(f"<{len(prompt_end)}I", *prompt_end) + bytes([len(name)]) + name
        case Tokens(stream, choice, tag, ids):
            return struct.pack("<BIBB", 2, stream, choice, tag) + _write_ids(ids)
        case Finish(stream, choice, cause, reason, stop):
            spoken = reason.encode("ascii")
            head = struct.pack("<BIBBB", 3, stream, choice, CAUSES.index(cause), len(spoken))
            return head + spoken + _write_stop(stop)
        case End(stream):
            return struct.pack("<BI", 4, stream)
        case EngineFailed(stream, status, body):
            return struct.pack("<BIHI", 5, stream, status, len(body)) + body
        case Lost(stream, why):
            return struct.pack("<BIB", 6, stream, why)


def _write_ids(ids: tuple[int, ...]) -> bytes:
    return struct.pack(f"<H{len(ids)}I", len(ids), *ids)


def _write_stop(stop: int | str | None) -> bytes:
    if stop is None:
        return b"\0"
    if isinstance(stop, int):
        return struct.pack("<BI", 1, stop)
    return struct.pack("<BH", 2, len(stop.encode())) + stop.encode()


# --- What was asked of it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedStream:
    """One `open`, and what may be said of it."""

    number: int
    request: Json
    headers: Json
    family: Json
    connection: int = -1
    """Which of the WebSockets it was opened on, in the order in which they came."""

    def begin(self) -> Begin:
        return Begin(self.number, PROMPT_TOKENS, CACHED_TOKENS, ())

    def says(self, text: str, choice: int = 0) -> list[Record]:
        """`text` as one run of tokens."""
        return [Tokens(self.number, choice, Tag.ANSWER, tuple(_TOKENIZER.encode(text)))]

    def ends(self, choices: int = 1) -> list[Record]:
        return [*(Finish(self.number, choice, "eos", "stop", None) for choice in range(choices)), End(self.number)]

    def whole(self, text: str) -> list[Record]:
        """An answer from its beginning to its end."""
        return [self.begin(), *self.says(text), *self.ends()]


Answer = Callable[[web.Request], Any]


@dataclass
class FakePlugin:
    """Change `capabilities` or the routes' answers before the sidecar asks; see `CAPABILITIES`."""

    url: str = ""
    tokenizer: MadeTokenizer = _TOKENIZER
    capabilities: Any = None
    tokenizer_answer: Any = None
    opens: list[OpenedStream] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    asked: list[tuple[str, Json]] = field(default_factory=list)
    """Path with query, and headers, of every request to a route of the plugin."""
    plain_requests: Callable[[], int] = lambda: 0
    instances: Iterator[str] = field(default_factory=lambda: repeat("fake"))
    """The processes that take one WebSocket after the other."""
    _sockets: list[web.WebSocketResponse] = field(default_factory=list)
    is_deaf: bool = False
    """Reads nothing from its WebSocket, not even a goodbye."""
    is_mute: bool = False
    """Does not even answer to who would open a WebSocket."""
    keeps_silent: bool = False
    """Takes plain requests and does not answer them."""

    def __post_init__(self) -> None:
        self.capabilities = {
            "plugin": "0.1.0",
            "frames": [VERSION],
            "vllm": "0.32.0",
            "system_fingerprint": "vllm-0.32.0-fake",
            "instance": "fake",
            "models": ["tiny", "tiny-too"],
            "max_model_len": 2048,
            "hooks": {"output_tap": True, "grammar_stop": True},
            "problems": {},
            "tokenizer": {"digest": _DIGEST, "fast": True},
        }
        self.tokenizer_answer = {"digest": _DIGEST, "tokenizer_json": self.tokenizer.json, "bos_token_id": None}

    @property
    def connections(self) -> int:
        """How many WebSockets are open."""
        return sum(not socket.closed for socket in self._sockets)

    @property
    def connected(self) -> int:
        """How many WebSockets were ever opened."""
        return len(self._sockets)

    async def opened(self, count: int) -> list[OpenedStream]:
        """All streams opened so far, once there are `count` of them."""
        await until(lambda: len(self.opens) >= count)
        return self.opens

    async def send(self, *records: Record, to: int = -1) -> None:
        """One message, on the connection that was opened last, or on another."""
        await self.send_raw(write(records), to)

    async def send_raw(self, data: bytes | str, to: int = -1) -> None:
        socket = self._sockets[to]
        await (socket.send_str(data) if isinstance(data, str) else socket.send_bytes(data))

    async def refuse(self, stream: OpenedStream, status: Any, body: Any) -> None:
        await self.send_raw(json.dumps({"op": "refused", "stream": stream.number, "status": status, "body": body}))

    def drop(self, connection: int | None = None) -> None:
        """Breaks one of the connections, or all, without a goodbye."""
        for socket in self._sockets if connection is None else [self._sockets[connection]]:
            if not socket.closed and (transport := _transport(socket)) is not None:
                transport.abort()

    # -- the routes --------------------------------------------------------------------------------

    async def answer_capabilities(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        return await _answer(self.capabilities)

    async def answer_tokenizer(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        return await _answer(self.tokenizer_answer)

    async def serve_streams(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if self.is_mute:
            await silence()
        socket = web.WebSocketResponse(autoclose=not self.is_deaf, max_msg_size=0)
        await socket.prepare(request)
        number, instance = len(self._sockets), next(self.instances)
        self._sockets.append(socket)
        if self.is_deaf:
            await silence()
        if request.query.get("hello") == "1":
            greeting = self.greeting(instance)
            await (socket.send_str(greeting) if isinstance(greeting, str) else socket.send_bytes(greeting))
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                self._obey(json.loads(message.data), number)
        return socket

    def greeting(self, instance: str) -> str | bytes:
        return json.dumps({"op": "hello", "instance": instance})

    def _obey(self, told: Json, connection: int) -> None:
        if told.pop("op") == "open":
            self.opens.append(OpenedStream(told.pop("stream"), **told, connection=connection))
        else:
            self.aborts.append(told["stream"])

    def _note(self, request: web.Request) -> None:
        self.asked.append((request.path_qs, dict(request.headers)))


def _transport(socket: web.WebSocketResponse) -> asyncio.Transport | None:
    request: Any = socket._req
    return request.transport if request is not None else None


async def _answer(what: Any) -> web.StreamResponse:
    """JSON; bytes as they are; a number as a status; None never."""
    match what:
        case None:
            await silence()
            raise AssertionError
        case int():
            return web.json_response({"error": {"message": "no", "code": what}}, status=what)
        case bytes():
            return web.Response(body=what, content_type="application/json")
        case _:
            return web.json_response(what)


async def _in_plain_chunks(request: web.Request, plugin: FakePlugin) -> web.StreamResponse:
    """vLLM's own chat route."""
    if plugin.keeps_silent:
        await silence()
    if (await request.json()).get("stream"):
        return await saying(*chunks.answer_of([PLAIN_ANSWER]))(request)
    return await answering(chunks.whole({"content": PLAIN_ANSWER}))(request)


@asynccontextmanager
async def fake_plugin(*, unix_socket: Path | None = None) -> AsyncIterator[FakePlugin]:
    """Listens on a free port, or on a Unix socket."""
    plugin = FakePlugin()
    app, seen = engine_app(lambda request: _in_plain_chunks(request, plugin))
    plugin.plain_requests = lambda: seen.requests
    app.add_routes(
        [
            web.get("/v1/penstock/capabilities", plugin.answer_capabilities),
            web.get("/v1/penstock/tokenizer", plugin.answer_tokenizer),
            web.get("/v1/penstock/streams", plugin.serve_streams),
        ]
    )
    # A handler of a connection that broke is cancelled; nobody waits for one that is deaf.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        if unix_socket is None:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            plugin.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        else:
            await web.UnixSite(runner, unix_socket).start()
            plugin.url = "http://vllm"
        yield plugin
    finally:
        plugin.drop()
        await runner.cleanup()


@contextmanager
def socket_path() -> Iterator[Path]:
    """Where a Unix socket may be made: short, as its address must be."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "vllm.sock"
