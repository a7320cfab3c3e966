"""CPU microseconds per token of the sidecar alone: from the plugin's frames to its clients, without an engine.

A stand-in for the plugin sends one message a step to all streams; Penstock is a process of its own, and only it is
counted. Seconds instead of the minutes of `front_end.py`, which has the figures that count.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.cpu_per_token import CHAT, STREAMS, free_port, print_line, process_cpu_seconds, running  # noqa: E402

from penstock.core.frames import Record, Tag, Tokens  # noqa: E402
from support.fake_plugin import FakePlugin, OpenedStream, fake_plugin, write  # noqa: E402
from support.sockets import until  # noqa: E402

TEXT = "First we look at the question, then we check the facts, and finally we write the answer in plain words. "
WARM_STEPS = 40


class Reader(asyncio.Protocol):
    """One client; counts what it gets."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.size += len(data)


def request_bytes(route: str) -> bytes:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "tools": [tool]}
    data = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\naccept: text/event-stream\r\n"
    return head.encode() + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


def penstock(stack: ExitStack, plugin: FakePlugin) -> tuple[int, int]:
    """Its port and its process."""
    settings = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "penstock.yaml"
    settings.write_text(json.dumps({"upstreams": [{"url": plugin.url, "plugin": "auto", "parses_tools": False}]}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PENSTOCK_"))}
    port = free_port()
    command: list[str | Path] = [sys.executable, "-m", "penstock", "serve", "--port", str(port), "--config", settings]
    return port, stack.enter_context(running(command, port, environment)).pid


def step_of(streams: list[OpenedStream], ids: list[int], number: int) -> bytes:
    records: list[Record] = [
        Tokens(stream.number, 0, Tag.ANSWER, (ids[(number + stream.number) % len(ids)],)) for stream in streams
    ]
    return write(records)


async def measure(route: str, count: int, pause_ms: float, steps: int) -> None:
    loop = asyncio.get_running_loop()
    async with fake_plugin() as plugin:
        with ExitStack() as stack:
            port, pid = await asyncio.to_thread(penstock, stack, plugin)
            await until(lambda: plugin.connected > 0)
            request = request_bytes(route)
            readers = [
                (await loop.create_connection(lambda: Reader(request), "127.0.0.1", port))[1] for _ in range(count)
            ]
            streams = list(await plugin.opened(count))
            await plugin.send(*(stream.begin() for stream in streams))
            messages = [step_of(streams, plugin.tokenizer.encode(TEXT), number) for number in range(WARM_STEPS + steps)]
            await pace(plugin, messages[:WARM_STEPS], pause_ms)
            size, before = sum(reader.size for reader in readers), process_cpu_seconds(pid)
            await pace(plugin, messages[WARM_STEPS:], pause_ms)
            spent, tokens = process_cpu_seconds(pid) - before, steps * count
            print_line(
                route=route,
                streams=count,
                pause_ms=pause_ms,
                microseconds_per_token=round(spent / tokens * 1e6, 1),
                client_bytes_per_token=round((sum(reader.size for reader in readers) - size) / tokens, 1),
                load_average=os.getloadavg()[0],
            )


async def pace(plugin: FakePlugin, messages: list[bytes], pause_ms: float) -> None:
    """One message a step, and time for the last one to arrive."""
    start = time.monotonic()
    for number, message in enumerate(messages, start=1):
        await plugin.send_raw(message)
        await asyncio.sleep(max(0.0, start + number * pause_ms / 1000 - time.monotonic()))
    await asyncio.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64], help="default: 16 64")
    parser.add_argument("--pause-ms", type=float, default=30.0, help="between steps (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        for count in arguments.streams:
            for route in (CHAT, STREAMS):
                asyncio.run(measure(route, count, arguments.pause_ms, arguments.steps))


if __name__ == "__main__":
    main()
