"""A link between two processes that can stall, in either direction, and break: a relay of bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

_Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Link:
    """Each connection goes through two gates, one for what is asked and one for what is answered."""

    def __init__(self, connect: _Connect) -> None:
        self._connect = connect
        self._open: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.asks = self.answers = True
        """Whether connections that are made from now on let through what is asked, and what is answered."""

    def leads_to(self, connect: _Connect) -> None:
        """Connections that are made from now on go there."""
        self._connect = connect

    def stall(self, *, asks: bool = False, answers: bool = False) -> None:
        """Connections that are open now hold back what is named, to their end; later ones are as they were."""
        for pair in self._open:
            pair.stall(asks=asks, answers=answers)

    def cut(self) -> None:
        """Nothing passes any more, on connections that are open and on new ones, which seem to be made."""
        self.asks = self.answers = False
        self.stall(asks=True, answers=True)

    def mend(self) -> None:
        """New connections pass; the stalled ones break."""
        self.asks = self.answers = True
        for pair in list(self._open):
            pair.close()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            far_reader, far_writer = await self._connect()
        except OSError:
            writer.close()
            self._tasks.discard(task)
            return
        pair = _Pair((reader, writer), (far_reader, far_writer))
        pair.stall(asks=not self.asks, answers=not self.answers)
        self._open.add(pair)
        try:
            await pair.run()
        finally:
            self._open.discard(pair)
            self._tasks.discard(task)

    async def close(self) -> None:
        for pair in list(self._open):
            pair.close()
        await asyncio.gather(*self._tasks)


class _Pair:
    def __init__(
        self,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._near, self._far = near, far
        self._asks, self._answers = asyncio.Event(), asyncio.Event()
        self._asks.set()
        self._answers.set()

    def stall(self, *, asks: bool, answers: bool) -> None:
        if asks:
            self._asks.clear()
        if answers:
            self._answers.clear()

    async def run(self) -> None:
        ways = [
            asyncio.create_task(_pour(self._near[0], self._far[1], self._asks)),
            asyncio.create_task(_pour(self._far[0], self._near[1], self._answers)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        self.close()
        await asyncio.gather(*ways)

    def close(self) -> None:
        """Breaks both connections; what was held back is lost."""
        for _, writer in (self._near, self._far):
            writer.transport.abort()
        self._asks.set()
        self._answers.set()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            await gate.wait()
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def socket_link(target: Path, path: Path) -> AsyncIterator[Link]:
    """From the socket `path` to the socket `target`."""
    link = Link(lambda: asyncio.open_unix_connection(str(target)))
    server = await asyncio.start_unix_server(link.carry, str(path))
    try:
        yield link
    finally:
        server.close()
        await link.close()


@asynccontextmanager
async def port_link(target: int, port: int) -> AsyncIterator[Link]:
    """From a port of this machine to another."""
    link = Link(lambda: asyncio.open_connection("127.0.0.1", target))
    server = await asyncio.start_server(link.carry, "127.0.0.1", port)
    try:
        yield link
    finally:
        server.close()
        await link.close()
