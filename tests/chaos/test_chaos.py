"""Everything around dies, sleeps and stalls while many talk: real vLLM, Redis and nginx, and two replicas as processes.

One fault comes after the other: a replica is killed, frozen for longer than its lease, frozen for a moment; Redis is
killed and comes back; the link to Redis loses what is under way; the link to the engine stalls; with the profile `soak`
the engine is killed too, all of it several times, and with hundreds of clients. One replica reads the engine's own
chunks, the other one the plugin's tagged tokens.

Clients come back until they have read an ending. Each reads one, events in order and none twice, and a text that the
script said. A stream that completed has all of it and an exact bill; any other one names its error and has an estimated
bill. A client that is told that nobody knows its stream any more asks anew.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from conftest import EngineHolder
from penstock.core.verifier import parse_log, verify
from support.engine import Engine
from support.fleet import Fleet, fleet
from support.http_client import Json, chat
from support.scripts import Script
from support.sockets import until

pytestmark = pytest.mark.engine

STREAMS, CHAT = "/v1/streams", "/v1/chat/completions"
SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
ROUNDS, A_SECOND = (3, 3.0) if SOAK else (1, 2.0)
LEASE = 1.5
WORDS = "The quick brown fox jumps over the lazy dog. " * 8
SETTINGS: Json = {
    "store": {"lease_seconds": LEASE, "timeout_seconds": 0.5, "linger_seconds": 20},
    "timing": {"drain_seconds": 1, "heartbeat_seconds": 1, "engine_silence_seconds": 2, "connect_seconds": 1},
}
# What a client may read that asked for nothing wrong: each says that something around the stream broke.
ERRORS = {
    "replica_lost",
    "engine_gone",
    "engine_stalled",
    "engine_incomplete",
    "engine_unreachable",
    "engine_abort",
    "engine_timeout",
}
GIVE_UP_AFTER = 20  # answers that say that the stream is not known
KILL_SHADOW_SECONDS = 3.0
PATIENCE = 120.0


@dataclass
class Talk:
    """One client. It comes back until it has read an ending."""

    url: str
    name: str
    body: Json = field(repr=False)
    route: str
    frames: list[bytes] = field(default_factory=list, repr=False)
    stream_id: str | None = None
    attempt: int = 0
    unknown: int = 0
    last_answer: str = ""
    ended_at: float = 0.0

    @property
    def is_over(self) -> bool:
        end = b"event: stream.end" if self.route == STREAMS else b"data: [DONE]"
        return bool(self.frames) and end in self.frames[-1]

    async def run(self, session: aiohttp.ClientSession) -> "Talk":
        while not self.is_over:
            # Its connection breaks, or is silent for longer than a heartbeat.
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                await self._ask(session)
            if self.unknown > GIVE_UP_AFTER:
                self.frames, self.stream_id, self.unknown, self.attempt = [], None, 0, self.attempt + 1
            if not self.is_over:
                await asyncio.sleep(0.3)
        self.ended_at = time.time()
        return self

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        if self.stream_id is not None and self.route == STREAMS:
            headers = {"Last-Event-ID": f"{self.stream_id}:{len(self.frames)}"}
            async with session.get(f"{self.url}{STREAMS}/{self.stream_id}/events", headers=headers) as answer:
                await self._listen(answer)
        else:
            headers = {"Idempotency-Key": f"{self.name}-{self.attempt}"}
            async with session.post(self.url + self.route, json=self.body, headers=headers) as answer:
                if answer.status == 200:
                    self.frames, self.stream_id = [], answer.headers["X-Stream-Id"]
                await self._listen(answer)

    async def _listen(self, answer: aiohttp.ClientResponse) -> None:
        self.last_answer = f"{answer.status} {await answer.text() if answer.status != 200 else ''}"
        if answer.status != 200:
            self.unknown += answer.status in (404, 409, 410)
            return
        rest = b""
        while data := await answer.content.readany():
            *whole, rest = (rest + data).split(b"\n\n")
            self.frames += [frame + b"\n\n" for frame in whole if not frame.startswith(b":")]

    def ending(self) -> str:
        """How it ended, after everything was checked that the client was told."""
        return self._events() if self.route == STREAMS else self._chunks()

    def _events(self) -> str:
        log: list[Any] = parse_log(b"".join(self.frames))
        assert verify(log) == [], self.stream_id
        assert [event["type"] for event in log].count("stream.end") == 1
        [usage] = [event for event in log if event["type"] == "usage" and event["final"]]
        text = "".join(event["text"] for event in log if event["type"] == "delta.text")
        errors = [event["code"] for event in log if event["type"] == "error"]
        return self._judged(text, errors, usage["estimated"], log[-1]["status"] == "completed")

    def _chunks(self) -> str:
        said = [json.loads(frame.removeprefix(b"data: ")) for frame in self.frames[:-1]]
        choices = [chunk["choices"][0] for chunk in said if chunk.get("choices")]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        errors = [chunk["error"]["code"] for chunk in said if "error" in chunk]
        finished = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        assert len(errors) + len(finished) == 1
        return self._judged(text, errors, bool(errors), finished == ["stop"])

    def _judged(self, text: str, errors: list[str], estimated: bool, completed: bool) -> str:
        if completed:
            assert (errors, text, estimated) == ([], WORDS, False)
            return "completed"
        [error] = errors
        assert error in ERRORS
        assert WORDS.startswith(text)
        assert estimated
        return error

    @property
    def was_warned(self) -> bool:
        return any(b"resume_lost" in frame for frame in self.frames)


class Havoc:
    """The faults, one after the other."""

    def __init__(self, running: Fleet, holder: EngineHolder, dice: random.Random) -> None:
        self._running, self._holder, self._dice = running, holder, dice
        self.kills: list[float] = []

    async def wreak(self) -> None:
        faults = [self.kill_replica, self.freeze, self.blink, self.kill_redis, self.lose_writes, self.stall_engine]
        faults += [self.kill_engine] if SOAK else []
        for _ in range(ROUNDS):
            self._dice.shuffle(faults)
            for fault in faults:
                await asyncio.sleep(0.5)
                await fault()

    async def kill_replica(self) -> None:
        replica = self._dice.choice(self._running.replicas)
        self.kills.append(time.time())
        await replica.kill()
        await asyncio.sleep(1.5 * LEASE)
        await replica.start()

    async def freeze(self) -> None:
        await self._sleep(2.5 * LEASE)

    async def blink(self) -> None:
        await self._sleep(0.25 * LEASE)

    async def _sleep(self, seconds: float) -> None:
        replica = self._dice.choice(self._running.replicas)
        replica.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        replica.signal(signal.SIGCONT)

    async def kill_redis(self) -> None:
        await self._running.redis.kill()
        await asyncio.sleep(1)
        await self._running.redis.start()

    async def lose_writes(self) -> None:
        for replica in self._running.replicas:
            replica.redis_link.stall(asks=self._dice.random() < 0.5, answers=True)
            await asyncio.sleep(0.5)

    async def stall_engine(self) -> None:
        self._running.engine_link.cut()
        await asyncio.sleep(3)
        self._running.engine_link.mend()

    async def kill_engine(self) -> None:
        engine = self._holder.running()
        engine.kill()
        await until(lambda: not engine.is_alive())
        engine = await asyncio.to_thread(self._holder.running)
        port = urlsplit(engine.url).port
        self._running.engine_link.leads_to(lambda: asyncio.open_connection("127.0.0.1", port))


async def test_every_stream_ends_once_whatever_dies(
    engine: Engine, engine_holder: EngineHolder, tmp_path: Path
) -> None:
    dice = random.Random(11)
    script = Script(engine)(WORDS, pause_ms=20)
    body, tokens = chat(**script, max_tokens=1000), len(engine.script(WORDS))
    port = urlsplit(engine.url).port or 0
    timeout, connector = aiohttp.ClientTimeout(sock_read=5), aiohttp.TCPConnector(limit=0, force_close=True)
    async with (
        fleet(port, tmp_path, {"one": {"plugin": "off"}, "two": {"plugin": "auto"}}, SETTINGS) as running,
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
    ):
        havoc = Havoc(running, engine_holder, dice)
        async with asyncio.TaskGroup() as group:
            begun: list[Talk] = []
            talks: list[asyncio.Task[Talk]] = []
            breaking = group.create_task(havoc.wreak())
            while not breaking.done():
                route = STREAMS if len(talks) % 3 else CHAT
                talk = Talk(running.url, f"client-{len(talks)}", {**body, "stream": True}, route)
                begun.append(talk)
                talks.append(group.create_task(talk.run(session)))
                await asyncio.sleep(1 / A_SECOND)
            _, hanging = await asyncio.wait(talks, timeout=PATIENCE)
            assert not hanging, [talk for talk in begun if not talk.is_over]
            told = [task.result() for task in talks]
        quiet = await Talk(running.url, "quiet", body, STREAMS).run(session)
        told.append(quiet)
        endings = Counter(talk.ending() for talk in told)
        print(dict(endings), "of", len(told), "clients, who asked", sum(1 + talk.attempt for talk in told), "times")
        assert quiet.ending() == "completed"
        assert endings["completed"] > len(told) / 4
        await settled(running, told, havoc, tokens)
        await same_everywhere(running, session, told)
        await until(lambda: asyncio.to_thread(lambda: engine_holder.running().running_requests() == 0))


async def settled(running: Fleet, told: list[Talk], havoc: Havoc, tokens: int) -> None:
    """Every stream whose ending was read has one bill that fits it, and none has two."""
    ended = {str(talk.stream_id): talk for talk in told}

    def missing() -> set[str]:
        return ended.keys() - {bill["stream_id"] for bill in running.bills()}

    def may_be_missing(talk: Talk) -> bool:
        """A replica that is killed takes records with it that it had not written yet."""
        return any(0 <= kill - talk.ended_at + KILL_SHADOW_SECONDS <= 2 * KILL_SHADOW_SECONDS for kill in havoc.kills)

    await until(lambda: all(may_be_missing(ended[stream_id]) for stream_id in missing()))
    bills, alone = running.bills(), running.went_on_alone()
    twice = {stream_id for stream_id, times in Counter(bill["stream_id"] for bill in bills).items() if times > 1}
    assert twice == set()
    for bill in bills:
        if (talk := ended.get(bill["stream_id"])) is None:
            continue
        # Whom Redis could not hear for longer than the lease goes on all the same, and leaves the bill to its heir.
        ending = "replica_lost" if talk.stream_id in alone else talk.ending()
        said = (bill["error"] or bill["ending"], bill["estimated"])
        assert said == (ending, ending != "completed"), (bill["time"], bill["stream_id"])
        if ending == "completed":
            assert bill["completion_tokens"] == tokens


async def same_everywhere(running: Fleet, session: aiohttp.ClientSession, told: list[Talk]) -> None:
    """What was pieced together from many connections is what the log has, at each replica, byte for byte."""
    alone = running.went_on_alone()
    for replica in running.replicas:
        for talk in told:
            if talk.route != STREAMS or talk.stream_id in alone:
                continue
            url = f"http://127.0.0.1:{replica.port}{STREAMS}/{talk.stream_id}/events"
            async with session.get(url, headers={"Accept": "text/event-stream"}) as answer:
                again = await answer.read()
            frames = [frame + b"\n\n" for frame in again.split(b"\n\n")[:-1] if not frame.startswith(b":")]
            # A stream that began without Redis stays with its replica.
            assert (answer.status, frames) == (200, talk.frames) or (answer.status == 404 and talk.was_warned)
