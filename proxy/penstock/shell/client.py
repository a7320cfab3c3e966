"""The connection to one caller: one answer, streamed or whole."""

from collections.abc import Mapping

from aiohttp import ClientConnectionResetError, web

# `no-transform` and X-Accel-Buffering keep proxies from compressing or holding back a stream.
_STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """The caller closed its connection; nothing more can be told to it."""


class ClientConnection:
    """Writes one answer. Every write may wait until the caller has taken what was sent; none copies twice."""

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request = request
        self._headers = dict(headers)
        self._response: web.StreamResponse | None = None

    @property
    def response(self) -> web.StreamResponse | None:
        """What the handler returns once the answer is over."""
        return self._response

    async def open(self, content_type: str) -> None:
        """Sends the head of a streamed answer."""
        self._response = web.StreamResponse(headers={**_STREAM_HEADERS, **self._headers, "Content-Type": content_type})
        try:
            await self._response.prepare(self._request)
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error

    async def send(self, data: bytes) -> None:
        if self._response is None:
            raise RuntimeError("the stream's head was not sent")
        try:
            await self._response.write(data)
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error

    async def respond(self, status: int, body: bytes, content_type: str, headers: Mapping[str, str]) -> None:
        """Sends one whole answer."""
        merged = {**self._headers, **headers, "Content-Type": content_type}
        self._response = web.Response(status=status, body=body, headers=merged)
        try:
            await self._response.prepare(self._request)
            await self._response.write_eof()
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error

    async def finish(self) -> None:
        if self._response is None:
            return
        try:
            await self._response.write_eof()
        except (ClientConnectionResetError, ConnectionError) as error:
            raise ClientGone from error

    def abort(self) -> None:
        """Drops the connection with what it still holds."""
        if self._request.transport is not None:
            self._request.transport.abort()
