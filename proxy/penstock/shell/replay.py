"""A mock vLLM: an HTTP server that answers chat requests with recorded exchanges, and misbehaves when asked.

`load_recordings` reads them, `make_app` builds the server, `serving` runs it inside a program or a test, and
`run_replay` is the command. What is sent and when is decided in `penstock.core.recording`.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, assert_never

import orjson
from aiohttp import web

from penstock.core.recording import (
    Action,
    EndAnswer,
    Ending,
    Fault,
    Recording,
    RecordingError,
    ReplayError,
    SendBytes,
    SendHeaders,
    check_speed,
    error_body,
    parse_fault,
    parse_recording,
    pick_recording,
    plan_replay,
)

REQUEST_BYTES: Final = 32 * 1024 * 1024

# How long a stop waits for streams in flight, twice over, before it cuts them; a stalled one never ends.
_SHUTDOWN_SECONDS: Final = 0.1

# l_onoff=1, l_linger=0: closing the socket then sends RST instead of FIN.
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


# --- Reading recordings -----------------------------------------------------------------------------


def load_recordings(paths: Sequence[Path | str] = ()) -> list[Recording]:
    """Read `*.jsonl` from files and directories, by default those that come with Penstock.

    The order is that of `paths`, and inside a directory that of the file names. Raises `RecordingError`,
    which names file, line and problem: nothing found, a broken file, the same name twice."""
    recordings: dict[str, tuple[Recording, str]] = {}
    for file, shown in _recording_files(paths):
        recording = parse_recording(_read(file, shown), shown)
        if recording.name in recordings:
            earlier = recordings[recording.name][1]
            raise RecordingError(f"{shown}: the name {recording.name} is taken by {earlier}; names must differ")
        recordings[recording.name] = (recording, shown)
    return [recording for recording, _ in recordings.values()]


def _recording_files(paths: Sequence[Path | str]) -> Iterator[tuple[Traversable, str]]:
    if not paths:
        yield from _inside(resources.files("penstock") / "recordings", "penstock/recordings")
    for path in map(Path, paths):
        if path.is_dir():
            yield from _inside(path, str(path))
        else:
            yield path, str(path)


def _inside(directory: Traversable, shown: str) -> Iterable[tuple[Traversable, str]]:
    entries = directory.iterdir() if directory.is_dir() else iter(())
    files = sorted((entry for entry in entries if entry.name.endswith(".jsonl")), key=lambda file: file.name)
    if not files:
        raise RecordingError(f"{shown}: no recording here; recordings are files called NAME.jsonl")
    return [(file, f"{shown}/{file.name}") for file in files]


def _read(file: Traversable, shown: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RecordingError(f"{shown}: cannot be read: {error.strerror}") from error


# --- The server ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What a request asks of the replay itself, in its `vllm_xargs`."""

    recording_name: object
    fault: Fault | None
    speed: float


class ReplayEngine:
    """The handlers of the mock and its counts, as `GET /metrics` shows them."""

    def __init__(self, recordings: Sequence[Recording], fault: Fault | None, speed: float) -> None:
        if not recordings:
            raise RecordingError("there is no recording to replay")
        self._recordings = recordings
        self._fault = fault
        self._speed = check_speed(speed)
        self._models = list(dict.fromkeys(recording.model for recording in recordings))
        self._started = int(time.time())
        self.running: Counter[str] = Counter()
        self.requests = 0
        self.aborted = 0

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer with the recording that the request asks for, in the time and with the fault it asks for."""
        arrived = asyncio.get_running_loop().time()
        self.requests += 1
        try:
            asked = _parse_body(await request.read())
            wishes = _read_wishes(asked, self._fault, self._speed)
            recording = pick_recording(self._recordings, asked, wishes.recording_name)
            actions = plan_replay(recording, wishes.fault, wishes.speed)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"The request's body is larger than {REQUEST_BYTES} bytes.")
        except ReplayError as error:
            return _refusal(error.status, str(error))
        self.running[recording.model] += 1
        try:
            return await _perform(request, actions, arrived)
        except asyncio.CancelledError:  # how aiohttp tells that the peer has left
            self.aborted += 1
            raise
        except ConnectionError:  # a write noticed it first
            self.aborted += 1
            return web.Response(status=499)  # goes nowhere: the connection is gone
        finally:
            self.running[recording.model] -= 1

    async def models(self, _: web.Request) -> web.Response:
        """The models that the recordings were made with."""
        cards = [
            {"id": model, "object": "model", "created": self._started, "owned_by": "vllm", "root": model}
            for model in self._models
            if model
        ]
        return _json({"object": "list", "data": cards})

    async def health(self, _: web.Request) -> web.Response:
        """Alive; an empty 200, as vLLM's."""
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        """The version of the engine that the first recording was made with."""
        engine = self._recordings[0].engine
        number = re.search(r"\d+(\.\w+)+", engine)
        return _json({"version": number.group() if number else engine})

    async def metrics(self, _: web.Request) -> web.Response:
        """Requests running as vLLM counts them, and how many came and how many were aborted."""
        running = {f'{{model_name="{_label(model)}"}}': self.running[model] for model in self._models}
        families = [
            _family("vllm:num_requests_running", "gauge", "Requests being answered.", running),
            _family("vllm:num_requests_waiting", "gauge", "Always 0.", dict.fromkeys(running, 0)),
            _family("penstock_replay_requests_total", "counter", "Chat requests received.", {"": self.requests}),
            _family(
                "penstock_replay_aborted_total",
                "counter",
                "Answers that the client left.",
                {"": self.aborted},
            ),
        ]
        return web.Response(text="".join(families), headers={"Content-Type": "text/plain; version=0.0.4"})


def make_app(
    recordings: Sequence[Recording], default_fault: Fault | None = None, speed: float = 1.0
) -> web.Application:
    """The mock as an application; `default_fault` and `speed` hold for requests that do not ask otherwise.

    Run it with `serving`: aborts are only seen with aiohttp's `handler_cancellation`. Raises `RecordingError`
    without recordings, `ReplayError` for an impossible speed."""
    engine = ReplayEngine(recordings, default_fault, speed)
    app = web.Application(client_max_size=REQUEST_BYTES)
    app.add_routes(
        [
            web.post("/v1/chat/completions", engine.chat_completions),
            web.get("/v1/models", engine.models),
            web.get("/health", engine.health),
            web.get("/version", engine.version),
            web.get("/metrics", engine.metrics),
        ]
    )
    return app


@asynccontextmanager
async def serving(app: web.Application, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve `app` while the block runs and yield its address, such as `http://127.0.0.1:40123`.

    Port 0 takes a free one. Streams still open at the end of the block are cut. Raises `OSError` where the
    address cannot be bound."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound_host, bound_port = runner.addresses[0][:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        yield f"http://{shown}:{bound_port}"
    finally:
        await runner.cleanup()


async def run_replay(
    paths: Sequence[Path | str],
    host: str,
    port: int,
    speed: float,
    fault_text: str | None,
    announce: Callable[[str, Sequence[Recording]], None],
) -> None:
    """Serve until cancelled; `announce` is told the address and the recordings once it listens.

    Raises, before it listens: `RecordingError` and `ReplayError` (both are `ValueError` with a sentence to
    show), and `OSError` where the address cannot be bound."""
    fault = parse_fault(fault_text) if fault_text is not None else None
    recordings = await asyncio.to_thread(load_recordings, paths)
    async with serving(make_app(recordings, fault, speed), host, port) as url:
        announce(url, recordings)
        await asyncio.get_running_loop().create_future()


# --- One request ----------------------------------------------------------------------------------------


def _parse_body(body: bytes) -> dict[str, Any]:
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ReplayError(f"The request's body is not valid JSON: {error}.") from error
    if not isinstance(asked, dict):
        raise ReplayError("The request's body must be a JSON object.")
    return asked


def _read_wishes(asked: Mapping[str, Any], default_fault: Fault | None, default_speed: float) -> _Wishes:
    extra = asked.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        raise ReplayError("vllm_xargs must be a JSON object.")
    return _Wishes(
        recording_name=extra.get("replay"),
        fault=parse_fault(extra["replay_fault"]) if "replay_fault" in extra else default_fault,
        speed=check_speed(extra["replay_speed"]) if "replay_speed" in extra else default_speed,
    )


async def _perform(request: web.Request, actions: Sequence[Action], arrived: float) -> web.StreamResponse:
    """Carry the actions out, each at its time after `arrived`, so that lateness does not add up."""
    response = web.StreamResponse()
    for action in actions:
        await _until(arrived + action.at)
        match action:
            case SendHeaders():
                response = _headed(request, action)
                await response.prepare(request)
            case SendBytes():
                await response.write(action.data)
            case EndAnswer():
                _end(request, response, action.ending)
            case _:
                assert_never(action)
    return response


async def _until(moment: float) -> None:
    loop = asyncio.get_running_loop()
    if moment == math.inf:
        await loop.create_future()
    # A wait of 0 still lets others run, so that at speed 0 a reader in the same loop sees each write.
    await asyncio.sleep(max(0.0, moment - loop.time()))


def _headed(request: web.Request, action: SendHeaders) -> web.StreamResponse:
    response = web.StreamResponse(status=action.status, headers={"Content-Type": action.content_type})
    response.content_length = action.content_length
    if "X-Request-Id" in request.headers:
        response.headers["X-Request-Id"] = request.headers["X-Request-Id"]
    return response


def _end(request: web.Request, response: web.StreamResponse, ending: Ending) -> None:
    if ending is Ending.COMPLETE:
        return
    response.force_close()
    if ending is Ending.RESET and request.transport is not None:
        peer: socket.socket = request.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        request.transport.abort()


def _refusal(status: int, message: str) -> web.Response:
    return web.Response(status=status, text=error_body(status, message), content_type="application/json")


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


def _family(name: str, kind: str, help_text: str, samples: Mapping[str, int]) -> str:
    """One metric in Prometheus' text format; `samples` maps the labels, braces included, to values."""
    lines = [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{labels} {value}" for labels, value in samples.items()]
    return "\n".join([*lines, ""])


def _label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
