"""The HTTP below an MCP session: only to addresses where tools may stand, and only so much of an answer.

The package looks names up by itself, so each request is sent to an address that was judged here, under the name that
the certificate is for.
"""

import socket
from collections.abc import AsyncIterator, Mapping

import httpx2

from penstock.shell.reach import GuardedResolver, Networks

# As the package has them: a server may hold its stream of events open for long. A call has the binding's own limit.
_TIMEOUT = httpx2.Timeout(30, read=300)
# JSON writes a byte in six at most (`\u0000`). Around a result stand the message's frame and the server's own notes
# (progress, log lines), which come in the same answer: 1 MiB is ample, and little to hold for a call.
_MOST_PER_BYTE, _MOST_AROUND = 6, 1 << 20


def guarded_client(headers: Mapping[str, str], allowed: Networks, result_bytes: int) -> httpx2.AsyncClient:
    """For results of `result_bytes`: the answer to a message of ours breaks off at a bound that those fit into.

    Follows no redirect; the package follows those within the server's own origin. Uses no proxy, and no compression:
    the bound would count what little is sent, not what becomes of it.
    """
    transport = _GuardedTransport(allowed, result_bytes * _MOST_PER_BYTE + _MOST_AROUND)
    return httpx2.AsyncClient(headers={**headers, "Accept-Encoding": "identity"}, timeout=_TIMEOUT, transport=transport)


class _GuardedTransport(httpx2.AsyncBaseTransport):
    def __init__(self, allowed: Networks, most: int) -> None:
        self._resolver = GuardedResolver(allowed)
        self._inner = httpx2.AsyncHTTPTransport()
        self._most = most

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.host
        found = await self._resolver.resolve(host, request.url.port or 0, socket.AF_UNSPEC)
        sent = httpx2.Request(
            request.method,
            request.url.copy_with(host=found[0]["host"]),
            headers=request.headers,  # with the name, as it was asked for
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        answer = await self._inner.handle_async_request(sent)
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            await answer.aclose()
            raise httpx2.ReadError(f"the MCP server answered in {encoding!a}, and was asked for identity")
        if request.method == "POST" and isinstance(answer.stream, httpx2.AsyncByteStream):
            answer.stream = _Bounded(answer.stream, self._most)
        return answer

    async def aclose(self) -> None:
        await self._inner.aclose()
        await self._resolver.close()


class _Bounded(httpx2.AsyncByteStream):
    """A body that breaks off past its bound. The stream of a session, which is a GET, is as long as the session."""

    def __init__(self, inner: httpx2.AsyncByteStream, most: int) -> None:
        self._inner = inner
        self._most = most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._most
        async for piece in self._inner:
            left -= len(piece)
            if left < 0:
                raise httpx2.ReadError(f"the MCP server answered more than {self._most} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
