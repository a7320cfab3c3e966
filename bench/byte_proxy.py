"""The least that a proxy on aiohttp can do: it passes bytes on as they come and looks at none of them.

byte_proxy.py PORT UPSTREAM
"""

import sys

import aiohttp
from aiohttp import web

UPSTREAM = web.AppKey("UPSTREAM", str)
SESSION = web.AppKey("SESSION", aiohttp.ClientSession)


async def forward(request: web.Request) -> web.StreamResponse:
    target = request.app[UPSTREAM] + request.path
    headers = {"Content-Type": "application/json"}
    async with request.app[SESSION].post(target, data=await request.read(), headers=headers) as answer:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
        await response.prepare(request)
        async for data in answer.content.iter_any():
            await response.write(data)
        await response.write_eof()
        return response


async def application(upstream: str) -> web.Application:
    app = web.Application()
    app[UPSTREAM] = upstream
    app[SESSION] = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )
    app.on_cleanup.append(lambda app: app[SESSION].close())
    app.router.add_post("/{path:.*}", forward)
    return app


if __name__ == "__main__":
    web.run_app(application(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
