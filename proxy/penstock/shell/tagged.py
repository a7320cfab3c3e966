"""The connections to the plugin inside one vLLM: its tokenizer, and a WebSocket to each of its API server processes.

`docs/reference/frames.md` is the contract. While there is no connection `vocabulary` is None and the caller reads
plain chunks; it is looked for again in the background, so a vLLM that gets the plugin later is found.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
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
# Which process takes a connection is not ours to say: so often a round tries for each that there is.
_TRIES_A_PROCESS = 8
# More than any machine has API server processes for one engine.
_MOST_PROCESSES = 256
# What may go wrong while a connection is made.
_UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)


class Listener(Protocol):
    """Who opened a stream. Called from the connection's own task, so neither may wait."""

    def records(self, records: list[Record], now: float) -> None:
        """What one engine step brought, or several that waited, in order. `now` is the loop's time."""

    def refused(self, status: int, body: bytes) -> None:
        """vLLM's own refusal, before the first token. Nothing follows."""

    def broke(self, problem: EngineError) -> None:
        """The connection is gone. Nothing follows."""


class PluginConnection:
    """Keeps the connections up while `run` runs, and deals the streams out over them."""

    def __init__(self, session: aiohttp.ClientSession, base: URL, headers: Mapping[str, str], label: str) -> None:
        self._session = session
        self._base = base.joinpath("v1/penstock")
        self._headers = dict(headers)
        self._label = label
        self._sockets: list[_Socket] = []
        self._seeking: asyncio.Task[None] | None = None
        self._is_missing = asyncio.Event()
        self._vocabulary: Vocabulary | None = None
        self._models: tuple[str, ...] = ()
        self.fingerprint: str | None = None
        """The engine's `system_fingerprint`, where it has one."""
        self._numbers = count(1)
        self._failures = 0
        self._distrusted: object = None
        self._settled = asyncio.Event()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The engine's tokenizer while there is a connection, else None: then plain chunks are what there is."""
        return self._vocabulary if self._sockets else None

    @property
    def loads(self) -> dict[str, int]:
        """The open streams on each API server process that is connected."""
        return {socket.instance: socket.streams for socket in self._sockets}

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
            except (*_UNREACHABLE, _NoPluginError) as error:
                outcome = str(error) or type(error).__name__
            except Exception:
                _log.exception("engine %s: internal error in the connection to the plugin", self._label)
                outcome = "internal error"
            finally:
                self._settled.set()
            if outcome != told:
                _log.info("engine %s: reading plain chunks (%s)", self._label, outcome)
                told = outcome
            await asyncio.sleep(_pause(self._failures))
            self._failures += 1

    def open(self, body: bytes, headers: Mapping[str, str], family: Family, listener: Listener) -> int:
        """Opens a request at the least loaded process and returns its number.

        Raises `EngineError` where the last connection has just gone. What the other side would close the connection
        for, and with it all other streams, is not sent.
        """
        if not self._sockets:
            raise EngineError("engine_gone", f"the connection to the plugin in {self._label} has gone")
        if len(body) > _MOST_REQUEST_BYTES:
            problem = f"the request is larger than {_MOST_REQUEST_BYTES} bytes, the most that the engine's plugin takes"
            raise EngineError("request_too_large", problem, status=413, retryable=False)
        number = next(self._numbers)
        readable = {name: value for name, value in headers.items() if value.isascii()}
        head = {"op": "open", "stream": number, "headers": readable, "family": _described(family)}
        message = orjson.dumps({**head, "request": orjson.Fragment(body)})
        min(self._sockets, key=_streams).open(number, message, listener)
        return number

    def abort(self, number: int) -> None:
        """Stops a stream in the engine; its listener hears nothing more."""
        for socket in self._sockets:
            socket.abort(number)

    async def _connect_and_listen(self) -> None:
        """Until the last connection has gone."""
        capabilities = _checked(await self._get("capabilities"), self._distrusted)
        if self._vocabulary is None or self._vocabulary.digest != capabilities.digest:
            self._vocabulary = await asyncio.to_thread(_vocabulary, await self._get("tokenizer"), capabilities.digest)
        self._models = capabilities.models
        self.fingerprint = capabilities.fingerprint
        first = await self._connect(capabilities)
        self._failures = 0
        try:
            async with asyncio.TaskGroup() as group:
                self._hold(first, capabilities, group)
                if capabilities.processes > 1:
                    self._seeking = group.create_task(self._seek(capabilities, group))
                self._settled.set()
                _log.info("engine %s: reading tagged tokens from plugin %s", self._label, capabilities.plugin)
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            for socket in tuple(self._sockets):
                await self._drop(socket)

    def _hold(self, socket: "_Socket", capabilities: "_Capabilities", group: asyncio.TaskGroup) -> None:
        self._sockets.append(socket)
        group.create_task(self._listen(socket, capabilities))

    async def _listen(self, socket: "_Socket", capabilities: "_Capabilities") -> None:
        """Until this connection ends. One that breaks the contract takes the others along: they are of one version."""
        try:
            await socket.listen()
        except FrameError as error:
            self._distrusted = capabilities.versions
            _log.warning("engine %s: plugin %s broke the contract: %s", self._label, capabilities.plugin, error)
            raise _NoPluginError(_distrust(capabilities.plugin)) from None
        finally:
            await self._drop(socket)

    async def _drop(self, socket: "_Socket") -> None:
        self._sockets.remove(socket)
        self._is_missing.set()
        if not self._sockets and self._seeking is not None:
            self._seeking.cancel()
        socket.break_off()
        await socket.close()

    async def _seek(self, capabilities: "_Capabilities", group: asyncio.TaskGroup) -> None:
        """Until there is a connection to each process, and again when one is lost."""
        told = misses = 0
        while True:
            self._is_missing.clear()
            with suppress(*_UNREACHABLE, _NoPluginError):
                await self._connect_to_more(capabilities, group)
            found, wanted = len(self._sockets), capabilities.processes
            if found != told:
                _log.info("engine %s: connected to %d of %d API server processes", self._label, found, wanted)
                told = found
            if found < wanted:
                misses += 1
            else:
                misses = 0
                await self._is_missing.wait()
            await asyncio.sleep(_pause(misses))

    async def _connect_to_more(self, capabilities: "_Capabilities", group: asyncio.TaskGroup) -> None:
        """One round of tries. vLLM gives a connection to the process with the fewest, or to whichever is first: so what
        came twice is held until the round is over."""
        twice: list[_Socket] = []
        try:
            for _ in range(_TRIES_A_PROCESS * capabilities.processes):
                if len(self._sockets) >= capabilities.processes:
                    break
                socket = await self._connect(capabilities)
                if socket.instance in self.loads:
                    twice.append(socket)
                else:
                    self._hold(socket, capabilities, group)
        finally:
            await asyncio.gather(*(socket.close() for socket in twice))

    async def _connect(self, capabilities: "_Capabilities") -> "_Socket":
        asks = {"frames": VERSION} if capabilities.processes == 1 else {"frames": VERSION, "hello": 1}
        async with asyncio.timeout(_ANSWER_SECONDS):
            socket = await self._session.ws_connect(
                self._base.joinpath("streams").with_query(asks),
                headers=self._headers,
                heartbeat=_PING_SECONDS,
                max_msg_size=_MOST_MESSAGE_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=_GOODBYE_SECONDS),
            )
            if capabilities.processes == 1:
                return _Socket(socket, "", self._label)
            try:
                return _Socket(socket, _instance(await socket.receive()), self._label)
            except BaseException:
                await socket.close()
                raise

    async def _get(self, name: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with self._session.get(self._base.joinpath(name), headers=self._headers, timeout=timeout) as answer:
            if answer.status != 200:
                raise _NoPluginError(f"no plugin: GET {answer.url.path} answered {answer.status}")
            return await answer.read()


class _Socket:
    """One WebSocket and the streams that were opened on it. `instance` names the process that took it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, instance: str, label: str) -> None:
        self._socket = socket
        self.instance = instance
        self._label = label
        self._listeners: dict[int, Listener] = {}
        # What was read and is handed out before the next read, by stream: at most what one read of the socket brings.
        self._waiting: dict[int, list[Record]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def streams(self) -> int:
        return len(self._listeners)

    def open(self, number: int, message: bytes, listener: Listener) -> None:
        self._listeners[number] = listener
        self._send(message)

    def abort(self, number: int) -> None:
        """Stops a stream that was opened here."""
        if self._listeners.pop(number, None) is not None:
            self._send(orjson.dumps({"op": "abort", "stream": number}))

    async def listen(self) -> None:
        """Until the connection ends. Raises `FrameError` at what is not of the contract."""
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self._gather(read_message(message.data))
            elif message.type is aiohttp.WSMsgType.TEXT:
                self._refuse(message.data)
            elif isinstance(message.data, aiohttp.WebSocketError):
                raise FrameError(str(message.data))

    def break_off(self) -> None:
        """Hands out what has come, and tells the rest that there is no more."""
        self._hand_out()
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.broke(EngineError("engine_gone", f"the connection to the plugin in {self._label} broke"))

    async def close(self) -> None:
        await self._socket.close()

    def _send(self, message: bytes) -> None:
        """In a task of its own, so that nobody who leaves can cut it short; the tasks start in their order."""
        task = asyncio.create_task(self._send_quietly(message.decode()))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_quietly(self, message: str) -> None:
        try:
            await self._socket.send_str(message)
        except (ConnectionError, aiohttp.ClientError):
            return  # a lost connection tells and aborts all its streams by itself

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


def _streams(socket: _Socket) -> int:
    return socket.streams


def _pause(failures: int) -> float:
    return RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]


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
    processes: int


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
            return _Capabilities(told["plugin"], versions, digest, models, fingerprint, _processes(told))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"the plugin's capabilities are not of the contract ({type(error).__name__}: {error})"
    raise _NoPluginError(reason)


def _processes(told: Mapping[str, Any]) -> int:
    """How many API server processes the engine has; a plugin that does not say has one as far as we are concerned."""
    processes = told.get("processes", 1)
    if type(processes) is not int or not 1 <= processes <= _MOST_PROCESSES:
        raise ValueError(f"processes is {processes!r}")
    return processes


def _instance(greeting: aiohttp.WSMessage) -> str:
    """The process that took a connection, by its first message."""
    try:
        told = orjson.loads(greeting.data) if greeting.type is aiohttp.WSMsgType.TEXT else {}
        if told["op"] == "hello":
            return str(told["instance"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    raise _NoPluginError("the plugin does not say which API server process it is in")


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
