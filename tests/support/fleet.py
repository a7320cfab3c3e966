"""What is deployed: replicas of Penstock as processes, nginx before them, a Redis between them; links that stall."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from support.http_client import Json
from support.links import Link, port_link, socket_link
from support.proxies import free_port
from support.redis_server import RedisServer, redis_server
from support.sockets import until

_START_SECONDS = 60.0
_NGINX = """
worker_processes 1; daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream replicas {{ {servers} }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 60s; proxy_connect_timeout 2s; proxy_next_upstream error timeout;
    }}
  }}
}}
"""


@dataclass
class Replica:
    """`penstock serve` as a process that can be killed, frozen and started again."""

    folder: Path
    name: str
    port: int
    settings: Json
    redis_link: Link
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        config = self.folder / f"{self.name}.json"  # JSON is YAML
        config.write_text(json.dumps(self.settings))
        command = [sys.executable, "-m", "penstock", "serve", "--config", str(config)]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        await until(self._answers, _START_SECONDS)

    async def kill(self) -> None:
        self.signal(9)
        assert self.process is not None
        await self.process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)

    async def _answers(self) -> bool:
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self.port}/healthz") as answer,
            ):
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False


@dataclass
class Fleet:
    """`url` is that of nginx."""

    url: str
    replicas: list[Replica]
    redis: RedisServer
    engine_link: Link
    folder: Path

    def bills(self) -> list[Json]:
        """The usage records of all replicas."""
        lines = [line for path in self.folder.glob("*.usage.jsonl") for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def went_on_alone(self) -> set[str]:
        """Streams of which a replica says that another one ended them while it was out of touch and went on."""
        logs = [path.read_text() for path in self.folder.glob("*.log")]
        return {found for log in logs for found in re.findall(r"stream (st_\w+) went on alone", log)}


@asynccontextmanager
async def fleet(engine_port: int, folder: Path, upstreams: dict[str, Json], settings: Json) -> AsyncIterator[Fleet]:
    """A replica for each of `upstreams`: more settings of how it asks the engine, by the replica's name."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(folder))
        link_port = free_port()
        engine_link = await stack.enter_async_context(port_link(engine_port, link_port))
        replicas: list[Replica] = []
        for name, upstream in upstreams.items():
            path = folder / f"{name}.sock"
            redis_link = await stack.enter_async_context(socket_link(folder / "redis.sock", path))
            port = free_port()
            own: dict[str, Any] = {
                **settings,
                "listen": {"host": "127.0.0.1", "port": port},
                "upstreams": [{"url": f"http://127.0.0.1:{link_port}", "name": "engine", **upstream}],
                "store": {**settings["store"], "url": f"unix://{path}"},
                "usage": {"file": {"path": str(folder / f"{name}.usage.jsonl")}},
            }
            replica = Replica(folder, name, port, own, redis_link)
            stack.push_async_callback(replica.kill)
            await replica.start()
            replicas.append(replica)
        url = await stack.enter_async_context(_nginx(folder, [replica.port for replica in replicas]))
        yield Fleet(url, replicas, redis, engine_link, folder)


@asynccontextmanager
async def _nginx(folder: Path, ports: list[int]) -> AsyncIterator[str]:
    port, config = free_port(), folder / "nginx.conf"
    servers = " ".join(f"server 127.0.0.1:{one} max_fails=0;" for one in ports)
    config.write_text(_NGINX.format(folder=folder, servers=servers, port=port))
    process = await asyncio.create_subprocess_exec("/usr/sbin/nginx", "-p", str(folder), "-c", str(config))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()
