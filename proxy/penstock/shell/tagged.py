"""The connection to the plugin inside one vLLM: its tokenizer, and one WebSocket for all streams.

`docs/reference/frames.md` is the contract. While there is no connection `vocabulary` is None and the caller reads
plain chunks; it is looked for again in the background, so a vLLM that gets the plugin later is found.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
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
# vLLM's server closes a WebSocket over a message of more than 16 MiB (uvicorn's ws_max_size).
_MOST_REQUEST_BYTES = 15 * 2**20
_PING_SECONDS = 20.0
_ANSWER_SECONDS = 30.0
# How long a closing connection may take to say goodbye; its streams were told before.
_GOODBYE_SECONDS = 1.0
# A broken connection is looked for soon; an engine without the plugin less and less often, up to the last.
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LAST = (End, EngineFailed, Lost)


class Listener(Protocol):
    """Who opened a stream. Called from the connection's own task, so neither may wait."""

    def records(self, records: list[Record], now: float) -> None:
        """What one engine step brought, or several that waited, in order. `now` is the loop's time."""

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
        self.fingerprint: str | None = None
        """The engine's `system_fingerprint`, where it has one."""
        self._listeners: dict[int, Listener] = {}
        # What was read and is handed out before the next read, by stream: at most what one read of the socket brings.
        self._waiting: dict[int, list[Record]] = {}
        self._numbers = count(1)
        self._failures = 0
        self._distrusted: object = None
        self._sending: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The engine's tokenizer while there is a connection, else None: then plain chunks are what there is."""
        return self._vocabulary if self._socket is not None else None

    def model_name(self, asked: str) -> str:
        """How vLLM names the model in its answers: the first of its served names, or the adapter that was asked."""
        return self._models[0] if asked in self._models else asked

    def serves(self, model: str) -> bool:
        return model in self._models

    async def settled(self) -> None:
        """Until the plugin was found or seen to be missing for the first time."""
        await self._settled.wait()

    async def run(self) -> None:
        """Looks for the plugin until it is cancelled."""
        told = ""
        while True:
            try:
                await self._connect_and_listen()
                outcome = "the plugin closed the connection"
            except (aiohttp.ClientError, TimeoutError, OSError, _NoPluginError) as error:
                outcome = str(error) or type(error).__name__
            except Exception:
                _log.exception("engine %s: internal error in the connection to the plugin", self._label)
                outcome = "internal error"
            finally:
                self._settled.set()
            if outcome != told:
                _log.info("engine %s: reading plain chunks (%s)", self._label, outcome)
                told = outcome
            await asyncio.sleep(RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS) - 1)])
            self._failures += 1

    def open(self, body: bytes, headers: Mapping[str, str], family: Family, listener: Listener) -> int:
        """Opens a request and returns its number. Raises `EngineError` where the connection has just gone.

        What the other side would close the connection for, and with it all other streams, is not sent.
        """
        if self._socket is None:
            raise EngineError("engine_gone", f"the connection to the plugin in {self._label} has gone")
        if len(body) > _MOST_REQUEST_BYTES:
            message = f"the request is larger than {_MOST_REQUEST_BYTES} bytes, the most that the engine's plugin takes"
            raise EngineError("request_too_large", message, status=413, retryable=False)
        number = next(self._numbers)
        self._listeners[number] = listener
        readable = {name: value for name, value in headers.items() if value.isascii()}
        head = {"op": "open", "stream": number, "headers": readable, "family": _described(family)}
        self._send(self._socket, orjson.dumps({**head, "request": orjson.Fragment(body)}))
        return number

    def abort(self, number: int) -> None:
        """Stops a stream in the engine; its listener hears nothing more."""
        if self._listeners.pop(number, None) is not None and self._socket is not None:
            self._send(self._socket, orjson.dumps({"op": "abort", "stream": number}))

    def _send(self, socket: aiohttp.ClientWebSocketResponse, message: bytes) -> None:
        """In a task of its own, so that nobody who leaves can cut it short; the tasks start in their order."""
        task = asyncio.create_task(self._send_quietly(socket, message.decode()))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_quietly(self, socket: aiohttp.ClientWebSocketResponse, message: str) -> None:
        try:
            await socket.send_str(message)
        except (ConnectionError, aiohttp.ClientError):
            return  # a lost connection tells and aborts all its streams by itself

    async def _connect_and_listen(self) -> None:
        capabilities = _checked(await self._get("capabilities"), self._distrusted)
        if self._vocabulary is None or self._vocabulary.digest != capabilities.digest:
            self._vocabulary = await asyncio.to_thread(_vocabulary, await self._get("tokenizer"), capabilities.digest)
        self._models = capabilities.models
        self.fingerprint = capabilities.fingerprint
        socket = await self._connect()
        self._socket = socket
        self._failures = 0
        self._settled.set()
        _log.info("engine %s: reading tagged tokens from plugin %s", self._label, capabilities.plugin)
        try:
            await self._listen(socket)
        except FrameError as error:
            self._distrusted = capabilities.versions
            _log.warning("engine %s: plugin %s broke the contract: %s", self._label, capabilities.plugin, error)
            raise _NoPluginError(_distrust(capabilities.plugin)) from None
        finally:
            self._socket = None
            self._hand_out()
            self._break_off()
            await socket.close()

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        async with asyncio.timeout(_ANSWER_SECONDS):
            return await self._session.ws_connect(
                self._base.joinpath("streams").with_query(frames=VERSION),
                headers=self._headers,
                heartbeat=_PING_SECONDS,
                max_msg_size=_MOST_MESSAGE_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=_GOODBYE_SECONDS),
            )

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Until the connection ends. Raises `FrameError` at what is not of the contract."""
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self._gather(read_message(message.data))
            elif message.type is aiohttp.WSMsgType.TEXT:
                self._refuse(message.data)
            elif isinstance(message.data, aiohttp.WebSocketError):
                raise FrameError(str(message.data))

    async def _get(self, name: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with self._session.get(self._base.joinpath(name), headers=self._headers, timeout=timeout) as answer:
            if answer.status != 200:
                raise _NoPluginError(f"no plugin: GET {answer.url.path} answered {answer.status}")
            return await answer.read()

    def _gather(self, records: list[Record]) -> None:
        """Puts the records of each stream together.

        Messages that have come already are read without a turn of the loop, so a sidecar that is behind walks once
        through all steps that wait, and writes once: it catches up. One that keeps up has one step at a time.
        """
        waiting = self._waiting
        if not waiting:
            asyncio.get_running_loop().call_soon(self._hand_out)
        for record in records:
            # Not joined to the run before, though it may be one: how its tokens are counted would depend on our haste.
            own = waiting.get(record.stream)
            if own is None:
                waiting[record.stream] = [record]
            else:
                own.append(record)

    def _hand_out(self) -> None:
        """To whoever opened each stream."""
        waiting, self._waiting = self._waiting, {}
        now = asyncio.get_running_loop().time()
        for number, own in waiting.items():
            listener = self._listeners.get(number)
            if listener is None:
                continue  # aborted while this step was on its way
            if isinstance(own[-1], _LAST):
                del self._listeners[number]
            listener.records(own, now)

    def _refuse(self, message: str) -> None:
        try:
            refusal = orjson.loads(message)
            number, status, body = int(refusal["stream"]), int(refusal["status"]), orjson.dumps(refusal["body"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise FrameError(f"a text message that is no refusal ({error}): {message[:80]!r}") from None
        listener = self._listeners.pop(number, None)
        if listener is not None:
            listener.refused(status, body)

    def _break_off(self) -> None:
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.broke(EngineError("engine_gone", f"the connection to the plugin in {self._label} broke"))


class _NoPluginError(Exception):
    """This engine offers nothing that this sidecar can use; the text says why."""


@dataclass(frozen=True, slots=True)
class _Capabilities:
    """What this sidecar needs to know of a plugin that it can use."""

    plugin: str
    versions: object
    digest: str
    models: tuple[str, ...]
    fingerprint: str | None


def _checked(answer: bytes, distrusted: object) -> _Capabilities:
    """Raises `_NoPluginError` where the plugin is of no use, or is the one that broke the contract before."""
    try:
        told = orjson.loads(answer)
        versions = (told["plugin"], told.get("vllm"))
        fingerprint = told.get("system_fingerprint")
        reason = _unusable(told)
        if versions == distrusted:
            reason = _distrust(told["plugin"])
        if reason is None:
            digest, models = told["tokenizer"]["digest"], tuple(told["models"])
            return _Capabilities(told["plugin"], versions, digest, models, fingerprint)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = f"the plugin's capabilities are not of the contract ({type(error).__name__}: {error})"
    raise _NoPluginError(reason)


def _distrust(plugin: str) -> str:
    return f"plugin {plugin} broke the contract and is not used any more"


def _unusable(told: Mapping[str, Any]) -> str | None:
    if VERSION not in told["frames"]:
        return f"the plugin speaks frames {told['frames']}, this sidecar version {VERSION}"
    if not told["hooks"].get("output_tap"):
        return f"the plugin's output tap is off: {told.get('problems', {}).get('output_tap', 'no reason given')}"
    return None if told["tokenizer"]["fast"] else "the engine's tokenizer has no fast form"


def _vocabulary(answer: bytes, digest: str) -> Vocabulary:
    """A tokenizer takes a second to load: call this in a thread."""
    try:
        vocabulary = Vocabulary(orjson.loads(answer)["tokenizer_json"])
    except Exception as error:  # the library raises just that for a text that is no tokenizer
        raise _NoPluginError(f"the plugin's tokenizer cannot be read: {error}") from None
    if vocabulary.digest != digest:
        raise _NoPluginError("the tokenizer does not have the digest that the plugin names")
    return vocabulary


def _described(family: Family) -> dict[str, Any]:
    states = {
        name: {
            "channel": state.channel,
            "on": dict(state.on),
            "otherwise": state.otherwise,
            "headers": [list(pair) for pair in state.headers],
        }
        for name, state in family.states.items()
    }
    return {"start": family.start, "states": states}
