"""The connection to the plugin inside one vLLM: its tokenizer, and one WebSocket for all streams.

`docs/reference/frames.md` is the contract. While there is no connection `is_ready` is False and the caller reads
plain chunks; it is looked for again in the background, so a vLLM that gets the plugin later is found.
"""

import asyncio
import logging
from collections.abc import Mapping
from itertools import count
from typing import Any, Protocol

import aiohttp
import orjson
from yarl import URL

from penstock.core.detokenize import Vocabulary
from penstock.core.errors import EngineError
from penstock.core.families import Family
from penstock.core.frames import VERSION, End, EngineFailed, FrameError, Lost, Record, read_message

_log = logging.getLogger("penstock")

# A step of a full batch is some 10 kB; the plugin's outbox is 4 MiB, so nothing honest is larger.
_MOST_MESSAGE_BYTES = 16 * 2**20
_PING_SECONDS = 20.0
# A broken connection is looked for soon; an engine without the plugin less and less often, up to the last.
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LAST = (End, EngineFailed, Lost)


class Listener(Protocol):
    """Who opened a stream. Called from the connection's own task, so neither may wait."""

    def records(self, records: list[Record]) -> None:
        """What one engine step brought, in order."""

    def refused(self, status: int, body: bytes) -> None:
        """vLLM's own refusal, before the first token. Nothing follows."""

    def broke(self, problem: EngineError) -> None:
        """The connection is gone. Nothing follows."""


class PluginConnection:
    """Keeps the connection up while `run` runs."""

    def __init__(self, session: aiohttp.ClientSession, base: URL, headers: Mapping[str, str], label: str) -> None:
        self._session = session
        self._base = base.joinpath("v1/penstock")
        self._headers = dict(headers)
        self._label = label
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._vocabulary: Vocabulary | None = None
        self._models: tuple[str, ...] = ()
        self._listeners: dict[int, Listener] = {}
        self._numbers = count(1)
        self._sending: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The engine's tokenizer while there is a connection, else None: then plain chunks are what there is."""
        return self._vocabulary if self._socket is not None else None

    def model_name(self, asked: str) -> str:
        """How vLLM names the model in its answers: the first of its served names, or the adapter that was asked."""
        return self._models[0] if asked in self._models else asked

    async def settled(self) -> None:
        """Until the plugin was found or seen to be missing for the first time."""
        await self._settled.wait()

    async def run(self) -> None:
        """Looks for the plugin until it is cancelled."""
        told, failures = "", 0
        while True:
            try:
                await self._connect_and_listen()
                failures = 0
                outcome = "the plugin closed the connection"
            except (aiohttp.ClientError, TimeoutError, OSError, FrameError, _NoPluginError) as error:
                outcome = str(error) or type(error).__name__
            finally:
                self._socket = None
                self._break_off()
                self._settled.set()
            if outcome != told:
                _log.info("engine %s: reading plain chunks (%s)", self._label, outcome)
                told = outcome
            await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
            failures += 1

    async def open(self, body: bytes, headers: Mapping[str, str], family: Family, listener: Listener) -> int:
        """Opens a request and returns its number. Raises `EngineError` where the connection has just gone."""
        socket = self._socket
        if socket is None:
            raise EngineError("engine_gone", f"the connection to the plugin in {self._label} has gone")
        number = next(self._numbers)
        self._listeners[number] = listener
        head = {"op": "open", "stream": number, "headers": dict(headers), "family": _described(family)}
        message = orjson.dumps({**head, "request": orjson.Fragment(body)})
        try:
            await socket.send_str(message.decode())
        except (ConnectionError, aiohttp.ClientError) as error:
            self._listeners.pop(number, None)
            raise EngineError("engine_gone", f"the connection to the plugin in {self._label} broke") from error
        return number

    def abort(self, number: int) -> None:
        """Stops a stream in the engine; its listener hears nothing more."""
        if self._listeners.pop(number, None) is None or self._socket is None:
            return
        message = orjson.dumps({"op": "abort", "stream": number}).decode()
        task = asyncio.create_task(self._send_quietly(self._socket, message))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_quietly(self, socket: aiohttp.ClientWebSocketResponse, message: str) -> None:
        try:
            await socket.send_str(message)
        except (ConnectionError, aiohttp.ClientError):
            return  # a lost connection aborts all its streams by itself

    async def _connect_and_listen(self) -> None:
        capabilities = await self._get("capabilities")
        if reason := _unusable(capabilities):
            raise _NoPluginError(reason)
        if self._vocabulary is None or self._vocabulary.digest != capabilities["tokenizer"]["digest"]:
            tokenizer = await self._get("tokenizer")
            self._vocabulary = await asyncio.to_thread(Vocabulary, tokenizer["tokenizer_json"])
            if self._vocabulary.digest != capabilities["tokenizer"]["digest"]:
                raise _NoPluginError("the tokenizer does not have the digest that the plugin names")
        self._models = tuple(capabilities.get("models", ()))
        url = self._base.joinpath("streams").with_query(frames=VERSION)
        async with self._session.ws_connect(
            url, headers=self._headers, heartbeat=_PING_SECONDS, max_msg_size=_MOST_MESSAGE_BYTES
        ) as socket:
            self._socket = socket
            self._settled.set()
            _log.info("engine %s: reading tagged tokens from plugin %s", self._label, capabilities["plugin"])
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    self._hand_out(read_message(message.data))
                elif message.type is aiohttp.WSMsgType.TEXT:
                    self._refuse(orjson.loads(message.data))

    async def _get(self, name: str) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=30)
        async with self._session.get(self._base.joinpath(name), headers=self._headers, timeout=timeout) as answer:
            if answer.status != 200:
                raise _NoPluginError(f"no plugin: GET {answer.url.path} answered {answer.status}")
            loaded = orjson.loads(await answer.read())
            if not isinstance(loaded, dict):
                raise _NoPluginError(f"GET {answer.url.path} answered no JSON object")
            return loaded

    def _hand_out(self, records: list[Record]) -> None:
        """One walk through a step: the records of each stream together, to whoever opened it."""
        by_stream: dict[int, list[Record]] = {}
        for record in records:
            by_stream.setdefault(record.stream, []).append(record)
        for number, own in by_stream.items():
            listener = self._listeners.get(number)
            if listener is None:
                continue  # aborted while this step was on its way
            if isinstance(own[-1], _LAST):
                del self._listeners[number]
            listener.records(own)

    def _refuse(self, message: dict[str, Any]) -> None:
        listener = self._listeners.pop(message.get("stream", 0), None)
        if message.get("op") == "refused" and listener is not None:
            listener.refused(int(message["status"]), orjson.dumps(message["body"]))

    def _break_off(self) -> None:
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.broke(EngineError("engine_gone", f"the connection to the plugin in {self._label} broke"))


class _NoPluginError(Exception):
    """This engine offers nothing that this sidecar can use; the text says why."""


def _unusable(capabilities: Mapping[str, Any]) -> str | None:
    if VERSION not in capabilities.get("frames", ()):
        return f"the plugin speaks frames {capabilities.get('frames')}, this sidecar version {VERSION}"
    if not capabilities.get("hooks", {}).get("output_tap"):
        why = capabilities.get("problems", {}).get("output_tap", "no reason given")
        return f"the plugin's output tap is off: {why}"
    if not capabilities.get("tokenizer", {}).get("fast"):
        return "the engine's tokenizer has no fast form"
    return None


def _described(family: Family) -> dict[str, Any]:
    states = {
        name: {"channel": state.channel, "on": dict(state.on), "headers": [list(pair) for pair in state.headers]}
        for name, state in family.states.items()
    }
    return {"start": family.start, "states": states}
