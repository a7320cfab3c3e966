"""Thousands of open streams in one process: what each costs in memory, and how late their tokens get.

All of them are opened through Penstock in front of a mock engine in this process, which says a word to each and then
one more every `--pause` seconds. Memory is that of Penstock's process, measured when all are open and have heard
their first word. `docs/explanation/cost.md` has the figures of one run.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

# The other scripts and the tests' helpers, wherever this one is started from.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.cpu_per_token import free_port, running  # noqa: E402
from bench.stalled_client import chunk, percentile, request_bytes, resident_bytes  # noqa: E402

from support.sockets import until  # noqa: E402

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OPEN_AT_ONCE = 100
STAMP = re.compile(rb"t(\d+\.\d{6});")
LONGEST_STAMP = 24
ROUTES = ["/v1/chat/completions", "/v1/streams"]


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class EngineSide(asyncio.Protocol):
    """One connection of the mock engine: it answers health checks, and keeps a stream open."""

    open: set["EngineSide"] = set()  # noqa: RUF012  (one mock engine a process)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or (b"POST" in head and not body):
            return
        self._received = b""
        if head.startswith(b"POST"):
            self.transport.write(HEAD + framed(chunk("Hello")))
            self.open.add(self)
        else:
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    def connection_lost(self, _exc: Exception | None) -> None:
        self.open.discard(self)


@dataclass
class Clients:
    """All clients: how many have heard a word, and how late each time stamp was."""

    heard: int = 0
    failed: bytes = b""
    lateness: list[float] = field(default_factory=list)


class ClientSide(asyncio.Protocol):
    def __init__(self, clients: Clients, request: bytes) -> None:
        self._clients = clients
        self._request = request
        self._has_heard = False
        self._rest = b""  # the beginning of a time stamp, perhaps

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._has_heard and b"Hello" in data:
            self._has_heard = True
            self._clients.heard += 1
        elif data.startswith(b"HTTP/1.1") and not data.startswith(b"HTTP/1.1 200"):
            self._clients.failed = data
        # Several may come in one event, where Penstock was behind, and one in two reads.
        said = self._rest + data
        end = 0
        for stamp in STAMP.finditer(said):
            self._clients.lateness.append(now - float(stamp[1]))
            end = stamp.end()
        self._rest = said[end:][-LONGEST_STAMP:]


async def measure(route: str, port: int, pid: int, count: int, pause: float) -> str:
    clients, loop = Clients(), asyncio.get_running_loop()
    before = resident_bytes(pid)
    request = request_bytes(route, 16)
    transports: list[asyncio.Transport] = []
    for number in range(count):
        transport, _ = await loop.create_connection(lambda: ClientSide(clients, request), "127.0.0.1", port)
        transports.append(transport)
        while number - clients.heard > OPEN_AT_ONCE:
            await asyncio.sleep(0.005)
            if clients.failed:
                raise SystemExit(f"refused: {clients.failed.decode(errors='replace')}")
    try:
        await until(lambda: clients.heard == count, 60)
    except TimeoutError:
        raise SystemExit(f"{clients.heard} of {count} streams have begun within 60 s") from None
    grown = resident_bytes(pid) - before
    for _ in range(3):
        began = time.monotonic()
        for number, engine in enumerate(list(EngineSide.open)):
            await asyncio.sleep(max(0.0, began + pause * number / count - time.monotonic()))
            engine.transport.write(framed(chunk(f"t{time.monotonic():.6f};")))
    try:
        await until(lambda: len(clients.lateness) == 3 * count, 30)
    except TimeoutError:
        raise SystemExit(f"{len(clients.lateness)} of {3 * count} words came within 30 s") from None
    for transport in transports:
        transport.abort()
    await until(lambda: not EngineSide.open, 60)
    late = [statistics.median(clients.lateness) * 1000, percentile(clients.lateness, 0.99) * 1000]
    return f"| {route} | {count} | {grown / 1e6:.0f} | {grown / count / 1000:.1f} | {late[0]:.1f} / {late[1]:.1f} |"


async def run(count: int, pause: float) -> None:
    loop = asyncio.get_running_loop()
    engine = await loop.create_server(EngineSide, "127.0.0.1", 0, backlog=1024)
    address = f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}"
    print("| route | open streams | memory, MB | a stream, kB | late, p50 / p99 ms |\n|---|---|---|---|---|")
    for route in ROUTES:
        port = free_port()
        limits = {"PENSTOCK_LIMITS__STREAMS": str(count), "PENSTOCK_UPSTREAMS": json.dumps([{"url": address}])}
        command = [sys.executable, "-m", "penstock", "serve", "--port", str(port)]
        # Started and looked at in threads: the mock engine of this process has to answer meanwhile.
        front = running(command, port, {**os.environ, **limits})
        process = await asyncio.to_thread(front.__enter__)
        try:
            print(await measure(route, port, process.pid, count, pause), flush=True)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5000, help="how many are open at once (default 5000)")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two words of one stream (default 5)")
    asked = parser.parse_args()
    # Both ends of every connection but Penstock's own are in this process.
    needed = 2 * asked.streams + 1000
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < needed:
        raise SystemExit(f"{needed} open files are needed and {most} allowed; raise `ulimit -Hn`, or ask for fewer")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(run(asked.streams, asked.pause))


if __name__ == "__main__":
    main()
