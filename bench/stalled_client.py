"""One client asks for 200 MB and reads nothing: what its proxy takes in, and how late the other clients' tokens get.

Penstock, and with `--peers DIRECTORY` LiteLLM and the Shepherd Model Gateway, each in a virtual environment there
(made if it is missing), one after the other in front of the same mock engine. `docs/explanation/cost.md` has the
figures of one run.
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

# The other scripts, wherever this one is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cpu_per_token import free_port, running
from bench.peers import START_SECONDS, peer_python, smg_command, version

STALL_BYTES = 200_000_000
PIECE = "x" * 4000
NEIGHBOURS = 8
RATE = 50.0
CALM_SECONDS = 4.0
STALL_SECONDS = 8.0
# The mock engine's two answers, told apart by what every proxy passes on.
FLOOD, PACED = 7, 100_000


# -- the mock engine -----------------------------------------------------------------------------------


def chunk(content: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "bench"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


class MockEngine:
    """Answers with 200 MB as fast as they are taken, or with the time, 50 times a second."""

    def __init__(self) -> None:
        self.taken = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if asked.get("max_tokens") == FLOOD:
            await self._flood(response)
        else:
            await self._tell_the_time(response)
        await response.write(chunk("", "stop") + b"data: [DONE]\n\n")
        return response

    async def _flood(self, response: web.StreamResponse) -> None:
        self.taken = 0
        piece = chunk(PIECE)
        while self.taken < STALL_BYTES:
            await response.write(piece)
            self.taken += len(piece)

    async def _tell_the_time(self, response: web.StreamResponse) -> None:
        started = time.monotonic()
        for number in range(int((CALM_SECONDS + STALL_SECONDS + 2) * RATE)):
            await asyncio.sleep(max(0.0, started + number / RATE - time.monotonic()))
            await response.write(chunk(f"t{time.monotonic():.6f};"))

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response({"taken": self.taken})

    def serve(self, port: int) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/stats", self.stats)
        for path in ("/health", "/v1/health", "/health_generate"):
            app.router.add_get(path, self.health)
        for path in ("/v1/models", "/get_model_info", "/model_info", "/get_server_info", "/server_info"):
            app.router.add_get(path, self.models)
        web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def models(self, _: web.Request) -> web.Response:
        model = {"id": "bench", "object": "model", "created": 1700000000, "owned_by": "vllm", "max_model_len": 200000}
        return web.json_response({"object": "list", "data": [model], "model_path": "bench", "is_generation": True})


# -- who stands in front of it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    name: str
    pid: int
    port: int
    route: str = "/v1/chat/completions"


@contextmanager
def penstock(engine: str) -> Iterator[list[Contender]]:
    port = free_port()
    limits = {"PENSTOCK_LIMITS__STREAM_BYTES": "1000000000", "PENSTOCK_LIMITS__STREAM_SECONDS": "600"}
    command: list[str | Path] = [sys.executable, "-m", "penstock", "serve", "--port", str(port), "--upstream", engine]
    with running(command, port, {**os.environ, **limits}) as process:
        yield [
            Contender("Penstock, chat completions", process.pid, port),
            Contender("Penstock, /v1/streams", process.pid, port, "/v1/streams"),
        ]


@contextmanager
def litellm(engine: str, python: Path) -> Iterator[list[Contender]]:
    port = free_port()
    params = {"model": "openai/bench", "api_base": f"{engine}/v1", "api_key": "none"}
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yaml"
        config.write_text(json.dumps({"model_list": [{"model_name": "bench", "litellm_params": params}]}))
        command: list[str | Path] = [python.parent / "litellm", "--config", config, "--host", "127.0.0.1"]
        keyless = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
        with running([*command, "--port", str(port), "--num_workers", "1"], port, keyless, START_SECONDS) as process:
            yield [Contender(f"LiteLLM {version(python, 'litellm')}", process.pid, port)]


@contextmanager
def smg(engine: str, python: Path) -> Iterator[list[Contender]]:
    port = free_port()
    command = smg_command(python, engine, port, free_port())
    with running(command, port, dict(os.environ), START_SECONDS) as process:
        yield [Contender(f"smg {version(python, 'smg')}", process.pid, port)]


def resident_bytes(pid: int) -> int:
    """Of a process and all below it."""
    total = 0
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        total += int(fields[1]) * os.sysconf("SC_PAGESIZE")
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(resident_bytes(int(child)) for child in children.read_text().split())
    return total


# -- the clients ---------------------------------------------------------------------------------------


def request_bytes(route: str, max_tokens: int) -> bytes:
    messages = [{"role": "user", "content": "How is a turbine fed?"}]
    body = json.dumps({"model": "bench", "messages": messages, "stream": True, "max_tokens": max_tokens}).encode()
    head = f"POST {route} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\naccept: text/event-stream\r\n"
    return head.encode() + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Neighbour:
    """A client that reads at once and notes how late each time stamp of the engine is."""

    lateness: list[tuple[float, float]] = field(default_factory=list)  # when, by how much; seconds
    said: bytes = b""

    async def read(self, contender: Contender) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
        writer.write(request_bytes(contender.route, PACED))
        held = b""
        while data := await reader.read(65536):
            now = time.monotonic()
            self.said = self.said or data[:200]
            *stamps, held = (held + data).split(b";")
            for stamp in stamps:
                told = stamp.rpartition(b'"t')[2]
                with suppress(ValueError):
                    self.lateness.append((now, now - float(told)))
        writer.close()


@contextmanager
def stalled(contender: Contender) -> Iterator[None]:
    """A client that asks and then reads nothing; its kernel keeps little."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", contender.port))
        client.sendall(request_bytes(contender.route, FLOOD))
        yield


@dataclass(frozen=True)
class Outcome:
    taken: int
    growth: int
    calm: list[float]
    stalled: list[float]


async def measure(contender: Contender, engine_port: int) -> Outcome:
    neighbours = [Neighbour() for _ in range(NEIGHBOURS)]
    reading = [asyncio.create_task(neighbour.read(contender)) for neighbour in neighbours]
    await asyncio.sleep(CALM_SECONDS)
    if not all(neighbour.lateness for neighbour in neighbours):
        raise SystemExit(f"{contender.name} serves no stream: {neighbours[0].said!r}")
    before = most = resident_bytes(contender.pid)
    began = time.monotonic()
    with stalled(contender):
        while time.monotonic() < began + STALL_SECONDS:
            await asyncio.sleep(0.1)
            most = max(most, resident_bytes(contender.pid))
        taken = await taken_by(engine_port)
    for task in reading:
        task.cancel()
    late = list(itertools.chain.from_iterable(neighbour.lateness for neighbour in neighbours))
    # The first second is that of the connections, on both sides.
    calm = [by for when, by in late if began - CALM_SECONDS + 1 < when < began]
    return Outcome(taken, most - before, calm, [by for when, by in late if when >= began])


async def taken_by(engine_port: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", engine_port)
    writer.write(b"GET /stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    told: dict[str, Any] = json.loads(answer.rpartition(b"\r\n\r\n")[2])
    return int(told["taken"])


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def row(name: str, outcome: Outcome) -> str:
    late = [
        f"{statistics.median(v) * 1000:.1f} / {percentile(v, 0.99) * 1000:.1f}" for v in (outcome.calm, outcome.stalled)
    ]
    return f"| {name} | {outcome.taken / 1e6:.1f} | {outcome.growth / 1e6:+.1f} | {late[0]} | {late[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="directory of the peers' virtual environments; without it no peers")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        MockEngine().serve(asked.serve)
        return
    port = free_port()
    engine = f"http://127.0.0.1:{port}"
    print(
        "| in front of the engine | taken in, MB | growth, MB | late before, p50 / p99 ms | late while it stalls, ms |"
    )
    print("|---|---|---|---|---|")
    with running([sys.executable, Path(__file__), "--serve", str(port)], port):
        fronts = [penstock(engine)]
        if asked.peers is not None:
            fronts += [
                litellm(engine, peer_python(asked.peers, "litellm")),
                smg(engine, peer_python(asked.peers, "smg")),
            ]
        for front in fronts:
            with front as contenders:
                for contender in contenders:
                    print(row(contender.name, asyncio.run(measure(contender, port))), flush=True)


if __name__ == "__main__":
    main()
