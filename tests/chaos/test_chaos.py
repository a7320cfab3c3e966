"""Replicas and Redis die while many talk: real vLLM, Redis and nginx and two replicas, as processes of their own.

In each round one replica is killed (SIGKILL) and started again, the other is frozen for longer than its lease, and
Redis is killed and comes back empty. nginx and the engine live on. Each client reads one ending, events in order and
none twice, and a text that the script said; a stream that completed has all of it, no error and an exact bill, any
other names its error and has an estimated one. Told on the way that nobody knows its stream, a client asks anew.
With the profile `soak` there are more clients and rounds.
"""

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from penstock.core.verifier import parse_log, verify
from support.engine import Engine
from support.http_client import calling, chat
from support.proxies import free_port
from support.redis_server import RedisServer, redis_server
from support.scripts import Script
from support.sockets import until

pytestmark = pytest.mark.engine

STREAMS = "/v1/streams"
SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
CLIENTS, ROUNDS = (200, 6) if SOAK else (24, 1)
LEASE = 1.0
PATIENCE = 120.0
WORDS = "The quick brown fox jumps over the lazy dog. " * 12

NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 2048; }}
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
    settings: dict[str, Any]
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def records(self) -> Path:
        return self.folder / f"{self.name}.usage.jsonl"

    async def start(self) -> None:
        config = self.folder / f"{self.name}.json"  # JSON is YAML
        listen = {"host": "127.0.0.1", "port": self.port}
        usage = {"file": {"path": str(self.records)}}
        config.write_text(json.dumps({**self.settings, "listen": listen, "usage": usage}))
        command = [sys.executable, "-m", "penstock", "serve", "--config", str(config)]
        log = (self.folder / f"{self.name}.log").open("ab")
        self.process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        log.close()
        await until(self._answers, 30)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def _answers(self) -> bool:
        try:
            async with calling(self.url) as caller:
                return (await caller.get("/healthz")).status == 200
        except (aiohttp.ClientError, OSError):
            return False


@dataclass
class Fleet:
    url: str
    replicas: list[Replica]
    redis: RedisServer


@asynccontextmanager
async def fleet(engine: Engine, folder: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(folder))
        settings = {
            "upstreams": [{"url": engine.url, "name": "engine"}],
            "store": {"url": redis.url, "lease_seconds": LEASE, "timeout_seconds": 0.5, "linger_seconds": 20},
            "timing": {"drain_seconds": 1},
        }
        replicas = [Replica(folder, name, free_port(), settings) for name in ("one", "two")]
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.kill)
        port = free_port()
        servers = " ".join(f"server 127.0.0.1:{r.port} max_fails=0;" for r in replicas)
        config = folder / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, servers=servers, port=port))
        nginx = await asyncio.create_subprocess_exec("/usr/sbin/nginx", "-p", str(folder), "-c", str(config))
        stack.push_async_callback(nginx.wait)
        stack.callback(nginx.terminate)
        yield Fleet(f"http://127.0.0.1:{port}", replicas, redis)


@dataclass
class Told:
    """What one client was told, over all of its connections."""

    events: list[bytes] = field(default_factory=list)
    stream_id: str | None = None
    connections: int = 0
    unknown: int = 0  # answers that said that the stream is not known, which is a loss that is reported
    attempts: int = 0

    @property
    def log(self) -> list[Any]:
        return parse_log(b"".join(self.events))


async def talk(session: aiohttp.ClientSession, url: str, body: Any, key: str) -> Told:
    """Asks, and comes back until the end of the stream was read. A stream that nobody knows is asked for anew."""
    told = Told()
    attempt = 0
    while not told.events or b"event: stream.end" not in told.events[-1]:
        try:
            if told.stream_id is None:
                told.attempts += 1
                headers = {"Idempotency-Key": f"{key}-{attempt}"}
                async with session.post(url + STREAMS, json=body, headers=headers) as response:
                    await _listen(response, told)
            else:
                headers = {"Last-Event-ID": f"{told.stream_id}:{len(told.events)}"}
                async with session.get(f"{url}{STREAMS}/{told.stream_id}/events", headers=headers) as response:
                    await _listen(response, told)
        except (aiohttp.ClientError, ConnectionError):
            pass
        if told.unknown >= 40:
            told, attempt = Told(attempts=told.attempts), attempt + 1
        await asyncio.sleep(0.1)
    return told


async def _listen(response: aiohttp.ClientResponse, told: Told) -> None:
    if response.status != 200:
        told.unknown += response.status in (404, 409, 410)
        return
    told.connections += 1
    told.stream_id = response.headers["X-Stream-Id"]
    replayed = response.request_info.method == "POST"
    if replayed:
        told.events.clear()
    rest = b""
    try:
        async for data in response.content.iter_any():
            *whole, rest = (rest + data).split(b"\n\n")
            told.events += [frame + b"\n\n" for frame in whole if not frame.startswith(b":")]
    finally:
        response.close()


async def havoc(fleet: Fleet, dice: random.Random) -> None:
    one, two = dice.sample(fleet.replicas, 2)
    await asyncio.sleep(1.0)
    await one.kill()
    await asyncio.sleep(2.0)
    await one.start()
    await asyncio.sleep(0.5)
    two.signal(signal.SIGSTOP)
    await asyncio.sleep(2.5 * LEASE)
    two.signal(signal.SIGCONT)
    await asyncio.sleep(1.0)
    await fleet.redis.kill()
    await asyncio.sleep(1.0)
    await fleet.redis.start()
    await asyncio.sleep(1.0)


async def test_every_stream_ends_once_whatever_dies(engine: Engine, tmp_path: Path) -> None:
    dice = random.Random(11)
    timeout, connector = aiohttp.ClientTimeout(total=PATIENCE), aiohttp.TCPConnector(limit=0, force_close=True)
    async with (
        fleet(engine, tmp_path) as running,
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
    ):
        body = chat(**Script(engine)(WORDS, pause_ms=20), max_tokens=2000)
        talks: list[asyncio.Task[Told]] = []
        for round_ in range(ROUNDS):
            breaking = asyncio.create_task(havoc(running, dice))
            for number in range(CLIENTS):
                talks.append(asyncio.create_task(talk(session, running.url, body, f"{round_}-{number}")))
                await asyncio.sleep(6 / CLIENTS)
            await breaking
        async with asyncio.timeout(PATIENCE):
            everything = await asyncio.gather(*talks)
        quiet = await talk(session, running.url, body, "quiet")
        assert quiet.log[-1]["status"] == "completed"
        await asyncio.sleep(2 * LEASE)
    endings = Counter(judge(told) for told in everything)
    assert endings["completed"] > 0
    assert endings.keys() <= {"completed", "replica_lost", "engine_gone", "store_lost"}, endings
    bills(tmp_path, everything, endings)


def judge(told: Told) -> str:
    """Checks what one client was told and says how it ended."""
    log = told.log
    assert verify(log) == []
    assert [event["type"] for event in log].count("stream.end") == 1
    [usage] = [event for event in log if event["type"] == "usage" and event["final"]]
    text = "".join(event["text"] for event in log if event["type"] == "delta.text")
    errors = [event["code"] for event in log if event["type"] == "error"]
    if log[-1]["status"] == "completed":
        assert errors == []
        assert text == WORDS
        assert usage["estimated"] is False
        return "completed"
    assert WORDS.startswith(text)
    assert usage["estimated"] is True
    [error] = errors
    return str(error)


def bills(folder: Path, everything: list[Told], endings: Counter[str]) -> None:
    """No stream is billed twice, and each that a client saw completed is billed."""
    records = [json.loads(line) for path in folder.glob("*.usage.jsonl") for line in path.read_text().splitlines()]
    billed = Counter(record["stream_id"] for record in records)
    assert [stream for stream, times in billed.items() if times > 1] == []
    completed = [told.stream_id for told in everything if told.log[-1]["status"] == "completed"]
    # A replica that is killed may take records with it that it had not written yet, of streams that it had ended.
    assert sum(stream not in billed for stream in completed) <= 2 * ROUNDS
    assert endings.total() == len(everything)
