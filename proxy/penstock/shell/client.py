"""The connection to one caller: one answer, streamed or whole."""

import asyncio
from collections.abc import Mapping

from aiohttp import ClientConnectionResetError, web
from aiohttp.http import StreamWriter

from penstock.core.pacing import SlowClient

# `no-transform` and X-Accel-Buffering keep proxies from compressing or holding back a stream.
_STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """The caller closed its connection; nothing more can be told to it."""


class ClientConnection:
    """Writes one answer. A streamed one never waits for its reader: whoever writes looks at `unsent`.

    `marks` are those of what the reader has not taken, in this process; the kernel's own buffer comes on top.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str], marks: SlowClient) -> None:
        self._request = request
        self._headers = dict(headers)
        self._marks = marks
        self._response: web.StreamResponse | None = None
        self._writer: StreamWriter | None = None
        self._head_is_out = False

    @property
    def response(self) -> web.StreamResponse | None:
        """What the handler returns once the answer is over."""
        return self._response

    @property
    def unsent(self) -> int:
        """Bytes that wait in this process until the kernel takes them; none where the caller is gone."""
        transport = self._request.transport
        return 0 if transport is None else transport.get_write_buffer_size()

    async def open(self, content_type: str, preamble: bytes) -> None:
        """Sends the head of a streamed answer and its first bytes, which must be few: these are waited for."""
        response = web.StreamResponse(headers={**_STREAM_HEADERS, **self._headers, "Content-Type": content_type})
        self._response = response
        try:
            writer = await response.prepare(self._request)
            # aiohttp holds the head back until the first write of its own, so that write goes through it.
            await response.write(preamble)
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error
        self._set_marks(self._marks.high_bytes, self._marks.low_bytes)
        self._writer = writer if isinstance(writer, StreamWriter) else None

    def send(self, data: bytes) -> bool:
        """Hands `data` to the socket; False where more than the high mark waits there now.

        Costs a fifth of aiohttp's own write: no coroutine is made, and the chunk is one write to the transport.
        """
        transport, writer = self._request.transport, self._writer
        if transport is None or transport.is_closing() or writer is None:
            raise ClientGone
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if writer.chunked else data)
        return transport.get_write_buffer_size() <= self._marks.high_bytes

    async def room(self) -> None:
        """Until no more than the low mark waits."""
        try:
            if self._writer is not None:
                await self._writer.drain()
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error

    async def respond(self, status: int, body: bytes, content_type: str, headers: Mapping[str, str]) -> None:
        """Sends one whole answer."""
        merged = {**self._headers, **headers, "Content-Type": content_type}
        self._response = web.Response(status=status, body=body, headers=merged)
        try:
            writer = await self._response.prepare(self._request)
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error
        self._writer = writer if isinstance(writer, StreamWriter) else None
        await self.finish()

    async def finish(self) -> None:
        """Ends the answer, and waits until the kernel has all of it.

        What aiohttp leaves in its buffer when it closes an idle connection would stay there for as long as the
        caller does not read, and nobody would look after it.
        """
        if self._response is None:
            return
        try:
            self._set_marks(0, 0)
            await self._response.write_eof()
            if self._writer is not None:
                await self._writer.drain()  # an answer to HTTP/1.0 has no last chunk that aiohttp would wait for
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error
        self._set_marks(None, None)

    def _set_marks(self, high: int | None, low: int | None) -> None:
        if self._request.transport is not None:
            self._request.transport.set_write_buffer_limits(high, low)

    async def hang_up(self, seconds: float) -> None:
        """Ends the answer and the connection; what the kernel has not taken within `seconds` is lost."""
        try:
            async with asyncio.timeout(seconds):
                await self.finish()
        except TimeoutError:
            self.abort()
        except ClientGone:
            return
        if self._request.transport is not None:
            self._request.transport.close()

    def abort(self) -> None:
        """Drops the connection with what it still holds."""
        if self._request.transport is not None:
            self._request.transport.abort()
