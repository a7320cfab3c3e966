"""A cheap stand-in for vLLM: writes chunks that were encoded beforehand, one write a token as vLLM does.

    upstream.py PORT CHUNKS

`CHUNKS` is a JSON file: `head`, `tokens` and `tail` are the stream's SSE events in order, of which only `tokens`
are paced. A request's `max_tokens` cuts the tokens; its `penstock_bench` object says how they come. The streams of
one `turn` begin once `streams` of them are open: `rate` tokens a second each (0: as fast as they are taken), dealt
out over `phases` evenly spaced ticks a period. One phase is an engine whose whole batch steps at once.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_MODELS = b'{"object":"list","data":[{"id":"bench","object":"model","owned_by":"vllm","max_model_len":200000}]}'
_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
# What a proxy may ask of an engine before it sends it anything.
_KNOWN = {b"get /health": _OK % (0, b""), b"get /v1/models": _OK % (len(_MODELS), _MODELS)}
_UNKNOWN = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


def framed(event: str) -> bytes:
    """An event as one HTTP chunk."""
    data = event.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


class Chunks:
    def __init__(self, path: Path) -> None:
        said: dict[str, list[str]] = json.loads(path.read_text())
        self.head = _HEAD + b"".join(map(framed, said["head"]))
        self.tokens = list(map(framed, said["tokens"]))
        self.tail = b"".join(map(framed, said["tail"])) + b"0\r\n\r\n"


class Metronome:
    """Steps the streams of one load once all are there: each phase once a period, or without any pause."""

    def __init__(self, rate: float, phases: int, streams: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval = 1 / (rate * phases) if rate else 0.0
        self._phases: list[list[Stream]] = [[] for _ in range(phases)]
        self._missing = streams
        self._turn = 0
        self._due = 0.0

    def add(self, stream: "Stream") -> None:
        min(self._phases, key=len).append(stream)
        self._missing -= 1
        if not self._missing:
            self._due = self._loop.time()
            self._loop.call_soon(self._step)

    def remove(self, stream: "Stream") -> None:
        for phase in self._phases:
            if stream in phase:
                phase.remove(stream)

    def _step(self) -> None:
        for stream in list(self._phases[self._turn]):
            stream.step()
        self._turn = (self._turn + 1) % len(self._phases)
        if not any(self._phases):
            return
        if not self._interval:
            self._loop.call_soon(self._step)
            return
        self._due = max(self._due + self._interval, self._loop.time() - 1)
        self._loop.call_at(self._due, self._step)


class Stream:
    """One answer on its way."""

    def __init__(self, transport: asyncio.Transport, chunks: Chunks, tokens: int, metronome: Metronome) -> None:
        self._transport = transport
        self._chunks = chunks
        self._tokens = tokens
        self._next = 0
        self._metronome = metronome
        self.is_held = False
        transport.write(chunks.head)
        metronome.add(self)

    def step(self) -> None:
        if self.is_held:
            return
        if self._next < self._tokens:
            self._transport.write(self._chunks.tokens[self._next])
            self._next += 1
        else:
            self._transport.write(self._chunks.tail)
            self.stop()

    def stop(self) -> None:
        self._metronome.remove(self)


class Connection(asyncio.Protocol):
    """Reads requests one after another and answers each with a stream."""

    def __init__(self, chunks: Chunks, metronomes: dict[str, Metronome]) -> None:
        self._chunks = chunks
        self._metronomes = metronomes
        self._received = b""
        self._stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        lengths = [int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")]
        if not end or len(body) < sum(lengths):
            return
        self._received = b""
        if lengths:
            self._answer(json.loads(body))
        else:
            self._transport.write(_KNOWN.get(lines[0].rpartition(b" ")[0], _UNKNOWN))

    def _answer(self, request: dict[str, Any]) -> None:
        load = request["penstock_bench"]
        metronome = self._metronomes.get(load["turn"])
        if metronome is None:
            metronome = self._metronomes[load["turn"]] = Metronome(load["rate"], load["phases"], load["streams"])
        self._stream = Stream(self._transport, self._chunks, request["max_tokens"], metronome)

    def pause_writing(self) -> None:
        if self._stream is not None:
            self._stream.is_held = True

    def resume_writing(self) -> None:
        if self._stream is not None:
            self._stream.is_held = False

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._stream is not None:
            self._stream.stop()


async def serve(port: int, chunks: Chunks) -> None:
    metronomes: dict[str, Metronome] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(chunks, metronomes), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Chunks(Path(sys.argv[2]))))
