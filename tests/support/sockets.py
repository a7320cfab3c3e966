"""Clients below HTTP: one that does not read, one that counts, and waiting for a condition."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEADLINE_SECONDS = 15.0


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = DEADLINE_SECONDS) -> None:
    """Returns once `condition` is true; raises TimeoutError if that takes longer than `seconds`."""
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.01)


async def settled(value: Callable[[], int], seconds: float = 0.3, deadline: float = DEADLINE_SECONDS) -> int:
    """`value()` once it has not changed for `seconds`."""
    clock = asyncio.get_running_loop()
    async with asyncio.timeout(deadline):
        last, since = value(), clock.time()
        while clock.time() - since < seconds:
            await asyncio.sleep(0.01)
            if (now := value()) != last:
                last, since = now, clock.time()
        return last


@asynccontextmanager
async def raw_request(
    url: str, line: bytes, *headers: bytes, body: bytes = b"", receive_bytes: int = 65536
) -> AsyncIterator[RawClient]:
    """A request byte by byte, whose answer nobody reads yet; the kernel keeps about `receive_bytes` of it."""
    place = urlsplit(url)
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (place.hostname, place.port))
    sized = [b"Content-Length: %d" % len(body)] if body else []
    await loop.sock_sendall(sock, b"\r\n".join([line, b"Host: x", *headers, *sized, b"", b""]) + body)
    try:
        yield RawClient(sock)
    finally:
        sock.close()


@asynccontextmanager
async def unread(url: str, path: str, body: dict[str, Any]) -> AsyncIterator[RawClient]:
    """A chat request whose answer nobody reads yet, and of which the kernel keeps little."""
    line = f"POST {path} HTTP/1.1".encode()
    async with raw_request(url, line, body=json.dumps(body).encode(), receive_bytes=4096) as client:
        yield client


class RawClient:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def read_all(self) -> bytes:
        """Everything until the other side closes, be it by a reset."""
        pieces: list[bytes] = []
        while data := await self._read():
            pieces.append(data)
        return b"".join(pieces)

    async def read_until(self, end: bytes) -> bytes:
        """Everything until what was read ends with `end`."""
        received = bytearray()
        while not received.endswith(end):
            data = await self._read()
            assert data, f"closed after {received[-200:]!r}"
            received += data
        return bytes(received)

    async def read_head(self) -> bytes:
        """The answer's headers; what comes behind them stays unread, but for a part of the first kB."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += await self._read(1024)
        return received.partition(b"\r\n\r\n")[0]

    async def read_some(self, most: int) -> bytes:
        """What comes next, up to `most` bytes; nothing where the other side has closed."""
        return await self._read(most)

    async def _read(self, most: int = 65536) -> bytes:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await asyncio.get_running_loop().sock_recv(self._sock, most)
        except ConnectionResetError:
            return b""


def open_sockets() -> int:
    """How many sockets this process has open."""
    return sum(_is_socket(link) for link in Path("/proc/self/fd").iterdir())


def _is_socket(link: Path) -> bool:
    try:
        return str(link.readlink()).startswith("socket:")
    except FileNotFoundError:  # closed since it was listed
        return False


def connections(*, local_port: int | None = None, peer_port: int | None = None) -> list[socket.socket]:
    """Duplicates of this process's TCP connections with that port on that end; the caller closes them."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        if not _is_socket(link):
            continue
        connection = socket.socket(fileno=os.dup(int(link.name)))
        if _has_ports(connection, local_port, peer_port):
            found.append(connection)
        else:
            connection.close()
    return found


def _has_ports(connection: socket.socket, local_port: int | None, peer_port: int | None) -> bool:
    if connection.family != socket.AF_INET or connection.type != socket.SOCK_STREAM:
        return False
    try:
        peer = connection.getpeername()
    except OSError:  # listening, or gone
        return False
    return local_port in (None, connection.getsockname()[1]) and peer_port in (None, peer[1])
