"""The HTTP below an MCP session: only to addresses where tools may stand.

The package looks names up by itself, so each request is sent to an address that was judged here, under the name that
the certificate is for.
"""

import socket
from collections.abc import Mapping

import httpx2

from penstock.shell.reach import GuardedResolver, Networks

# As the package has them: a server may hold its stream of events open for long. A call has the binding's own limit.
_TIMEOUT = httpx2.Timeout(30, read=300)


def guarded_client(headers: Mapping[str, str], allowed: Networks) -> httpx2.AsyncClient:
    """Follows no redirect; the package follows those within the server's own origin. Uses no proxy."""
    return httpx2.AsyncClient(headers=dict(headers), timeout=_TIMEOUT, transport=_GuardedTransport(allowed))


class _GuardedTransport(httpx2.AsyncBaseTransport):
    def __init__(self, allowed: Networks) -> None:
        self._resolver = GuardedResolver(allowed)
        self._inner = httpx2.AsyncHTTPTransport()

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
        return await self._inner.handle_async_request(sent)

    async def aclose(self) -> None:
        await self._inner.aclose()
        await self._resolver.close()
