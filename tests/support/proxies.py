"""Real nginx, HAProxy and Envoy in front of Penstock, from the files in `examples/proxies`, and clients of them."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

import aiohttp
import h2.config
import h2.connection
import h2.events

from support.documents import ROOT
from support.http_client import Json

Kind = Literal["nginx", "haproxy", "envoy"]
Version = Literal["HTTP/1.1", "HTTP/2"]
KINDS: tuple[Kind, ...] = ("nginx", "haproxy", "envoy")
VERSIONS: tuple[Version, ...] = ("HTTP/1.1", "HTTP/2")
FILES: dict[Kind, Path] = {
    "nginx": ROOT / "examples" / "proxies" / "nginx.conf",
    "haproxy": ROOT / "examples" / "proxies" / "haproxy.cfg",
    "envoy": ROOT / "examples" / "proxies" / "envoy.yaml",
}
_PATIENCE_SECONDS = 20.0
# The client's windows: larger than any answer of a test, so that flow control does not hide what a proxy holds back.
_WINDOW = 2**20


@dataclass(frozen=True)
class Proxy:
    """A proxy that listens on `port`, with this certificate."""

    kind: Kind
    port: int
    certificate: Path

    def trusted(self, protocol: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.set_alpn_protocols([protocol])
        return context


@asynccontextmanager
async def proxy(kind: Kind, penstock_url: str, folder: Path, idle: str = "120s") -> AsyncIterator[Proxy]:
    """The proxy of the documented file, with `idle` in the place of its time-out of 120 s."""
    port = free_port()
    certificate = await asyncio.to_thread(_certificate, folder)
    text = await asyncio.to_thread(FILES[kind].read_text)
    config = folder / FILES[kind].name
    config.write_text(_adapted(text, kind, port, urlsplit(penstock_url).port or 80, folder, idle))
    process = await asyncio.create_subprocess_exec(
        *_command(kind, config, folder), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = asyncio.create_task(process.communicate())
    try:
        await _until_open(port, said)
        yield Proxy(kind, port, certificate)
    finally:
        if process.returncode is None:
            process.kill()
        await said


def _adapted(text: str, kind: Kind, port: int, penstock_port: int, folder: Path, idle: str) -> str:
    """The documented file with addresses of this run; every one of these must be there."""
    changes = {
        "nginx": [("listen 443", f"listen 127.0.0.1:{port}"), ("127.0.0.1:8080", f"127.0.0.1:{penstock_port}")],
        "haproxy": [("bind :443", f"bind 127.0.0.1:{port}"), ("127.0.0.1:8080", f"127.0.0.1:{penstock_port}")],
        "envoy": [
            ("address: 0.0.0.0, port_value: 443", f"address: 127.0.0.1, port_value: {port}"),
            ("address: 127.0.0.1, port_value: 8080", f"address: 127.0.0.1, port_value: {penstock_port}"),
        ],
    }[kind]
    for old, new in [*changes, (f"/etc/{kind}/", f"{folder}/"), ("120s", idle)]:
        assert old in text, f"{FILES[kind].name} has no {old!r} any more"
        text = text.replace(old, new)
    return text


def _command(kind: Kind, config: Path, folder: Path) -> list[str]:
    match kind:
        case "nginx":
            # Its own folder for what it writes; nothing here is about the traffic.
            return ["/usr/sbin/nginx", "-p", str(folder), "-c", str(config), "-e", "stderr", "-g",
                    f"daemon off; master_process off; pid {folder}/nginx.pid;"]  # fmt: skip
        case "haproxy":
            return ["/usr/sbin/haproxy", "-db", "-f", str(config)]
        case "envoy":
            envoy = str(Path(sys.executable).with_name("envoy"))
            return [envoy, "-c", str(config), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]


def _certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1, in the two forms that the proxies want."""
    certificate, key = folder / "penstock.crt", folder / "penstock.key"
    openssl = shutil.which("openssl")
    assert openssl is not None, "openssl is missing: apt-get install openssl"
    # fmt: off
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )
    # fmt: on
    (folder / "penstock.pem").write_text(certificate.read_text() + key.read_text())
    return certificate


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _until_open(port: int, said: asyncio.Task[tuple[bytes, bytes]]) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            assert not said.done(), said.result()[0].decode()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            await writer.wait_closed()
            return


# --- Clients ------------------------------------------------------------------------------------------


class Answer(Protocol):
    """A streamed answer; `read` gives what came since the last time, empty at its end, as soon as there is some."""

    status: int
    headers: dict[str, str]

    async def read(self) -> bytes: ...


@asynccontextmanager
async def posted(through: Proxy, version: Version, path: str, body: Json | bytes) -> AsyncIterator[Answer]:
    """`POST` through the proxy. Leaving early closes the connection, or with HTTP/2 resets the stream."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if version == "HTTP/2":
        async with _posted_by_http2(through, path, data) as answer:
            yield answer
        return
    async with (
        aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(_PATIENCE_SECONDS)) as session,
        session.post(
            f"https://127.0.0.1:{through.port}{path}",
            data=io.BytesIO(data),
            ssl=through.trusted("http/1.1"),
            headers={"Accept-Encoding": "gzip, br"},
        ) as response,
    ):
        yield _Http1Answer(response)
        if response.connection is not None and response.connection.transport is not None:
            # As a process that ends. asyncio's own `close` waits for the proxy's TLS goodbye before it closes.
            response.connection.transport.abort()


class _Http1Answer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def read(self) -> bytes:
        return await self._response.content.readany()


@asynccontextmanager
async def _posted_by_http2(through: Proxy, path: str, data: bytes) -> AsyncIterator[Answer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", through.port, ssl=through.trusted("h2"))
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            answer = _Http2Answer(reader, writer)
            await answer.ask(path, data)
            yield answer
            await answer.leave()
            # The connection stays open for a moment, as a browser's does: the reset alone must do.
            await asyncio.sleep(0.5)
    finally:
        writer.transport.abort()


class _Http2Answer:
    """One stream on one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._reader, self._writer = reader, writer
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._stream = 0
        self._data = b""
        self._is_over = False

    async def ask(self, path: str, data: bytes) -> None:
        self._h2.initiate_connection()
        self._stream = self._h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "https"), (":authority", "127.0.0.1"), (":path", path)]
        self._h2.send_headers(self._stream, [*headers, ("accept-encoding", "gzip, br")])
        self._h2.increment_flow_control_window(_WINDOW)
        while data:
            room = min(self._h2.local_flow_control_window(self._stream), self._h2.max_outbound_frame_size, len(data))
            if room:
                self._h2.send_data(self._stream, data[:room])
                data = data[room:]
            else:
                await self._hear()
        self._h2.end_stream(self._stream)
        self._writer.write(self._h2.data_to_send())
        while not self.status:
            assert not self._is_over, "closed without an answer"
            await self._hear()

    async def read(self) -> bytes:
        while not self._data and not self._is_over:
            await self._hear()
        data, self._data = self._data, b""
        return data

    async def leave(self) -> None:
        if not self._is_over:
            self._h2.reset_stream(self._stream)
            self._writer.write(self._h2.data_to_send())

    async def _hear(self) -> None:
        """One read of the connection."""
        self._writer.write(self._h2.data_to_send())
        received = await self._reader.read(65536)
        self._is_over |= not received
        for event in self._h2.receive_data(received) if received else []:
            match event:
                case h2.events.ResponseReceived():
                    self.headers = {str(name): str(value) for name, value in event.headers}
                    self.status = int(self.headers[":status"])
                case h2.events.DataReceived():
                    self._data += event.data
                    self._h2.acknowledge_received_data(event.flow_controlled_length, self._stream)
                case h2.events.StreamReset():
                    raise ConnectionResetError("the proxy reset the stream")
                case h2.events.StreamEnded():
                    self._is_over = True
        self._writer.write(self._h2.data_to_send())
