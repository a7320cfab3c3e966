"""A write that fails does not say that Redis is gone, and no stream is billed twice where a replica only slept.

Each replica has its own link to a real Redis. A stalled connection is what a process sees that was frozen in the
middle of a write: its time is over, and what became of the write is unknown.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientPayloadError, web
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import TimeoutError as RedisTimeout

from penstock.core.dialects import Form
from penstock.core.signals import Signal
from penstock.core.verifier import parse_log, verify
from penstock.shell.stores.log import DeferredLog, StreamInfo
from penstock.shell.stores.memory import MemoryStore
from penstock.shell.stores.redis.carried import RedisLog
from penstock.shell.stores.redis.link import stopped
from penstock.shell.streams import LiveStream
from support import chunks
from support.http_client import FOLDED, SSE, Json, chat
from support.links import Link, socket_link
from support.redis_server import RedisServer, redis_server
from support.replicas import STREAMS, Replicas, Word, begun, frames, replicas, resumed
from support.sockets import until
from support.upstreams import engine_app, saying

LINGER: Json = {"penstock": {"on_disconnect": "linger"}}


class World:
    """Two replicas, their links to Redis, and the bills of both."""

    def __init__(self, both: Replicas, redis: RedisServer, links: list[Link], bills: Path) -> None:
        self.both, self.redis, self.links = both, redis, links
        self._bills = bills

    def bills(self) -> list[Json]:
        if not self._bills.exists():
            return []
        return [json.loads(line) for line in self._bills.read_text().splitlines()]

    async def billed(self, stream_id: str) -> Json:
        """The one bill of a stream."""
        await until(lambda: any(bill["stream_id"] == stream_id for bill in self.bills()))
        [bill] = [bill for bill in self.bills() if bill["stream_id"] == stream_id]
        return bill


@asynccontextmanager
async def world(engine: web.Application, folder: Path, **flags: Any) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(folder))
        paths = [folder / f"link-{number}.sock" for number in range(2)]
        links = [await stack.enter_async_context(socket_link(folder / "redis.sock", path)) for path in paths]
        bills = folder / "bills.jsonl"
        settings = {"usage__file": {"path": str(bills)}, "timing__closing_seconds": 5, **flags}
        both = await stack.enter_async_context(replicas(engine, [f"unix://{path}" for path in paths], **settings))
        yield World(both, redis, links, bills)


def warnings(log: list[Any]) -> list[str]:
    return [event["code"] for event in log if event["type"] == "warning"]


@pytest.mark.parametrize("arrives", [True, False], ids=["the answer was lost", "the write was lost"])
async def test_a_write_of_unknown_fate_is_asked_after(tmp_path: Path, arrives: bool) -> None:
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat()) as (response, seen):
        all_.links[0].stall(asks=not arrives, answers=arrives)
        word.may_go_on.set()
        data = bytes(seen) + await response.read()
        log = parse_log(data)
        assert (verify(log), log[-1]["status"], warnings(log)) == ([], "completed", [])
        there = await resumed(all_.both.callers[1], response.headers["X-Stream-Id"])
        assert frames(there.body) == frames(data)
        bill = await all_.billed(response.headers["X-Stream-Id"])
        assert (bill["ending"], bill["estimated"]) == ("completed", False)


async def test_a_cursor_is_not_ahead_of_the_replica_that_waits_for_redis_to_confirm_it(tmp_path: Path) -> None:
    """Redis has the event and another replica has sent it, while its author does not know yet that it arrived."""
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat()) as (response, seen):
        stream_id, had = response.headers["X-Stream-Id"], frames(bytes(seen))
        there = all_.both.callers[1]
        async with there.session.get(f"{there.url}{STREAMS}/{stream_id}/events?after={len(had)}") as following:
            all_.links[0].stall(answers=True)
            word.say(" more")
            new = bytearray()
            while not new.endswith(b"\n\n") or b" more" not in new:
                new += await following.content.readany()
        here = asyncio.create_task(resumed(all_.both.callers[0], stream_id, len(had) + len(frames(bytes(new)))))
        word.may_go_on.set()
        assert (await here).status == 200


async def test_who_slept_in_the_middle_of_a_write_learns_that_its_stream_was_ended(tmp_path: Path) -> None:
    """The write is under way, the lease runs out, an heir ends the stream, and only then the write's time is over."""
    word = Word()
    async with world(word.app, tmp_path, store__timeout_seconds=3) as all_:
        async with begun(all_.both.callers[0], chat(**LINGER)) as (response, seen):
            stream_id, had = response.headers["X-Stream-Id"], frames(bytes(seen))
            await stopped([all_.both.store(0).tasks["beat"]])
            all_.links[0].stall(asks=True)
            word.may_go_on.set()
            rest = await resumed(all_.both.callers[1], stream_id, len(had))
            with pytest.raises(ClientPayloadError):
                await response.content.read()
        log = parse_log(b"".join(had + frames(rest.body)))
        assert (verify(log), log[-1]["status"]) == ([], "failed")
        await until(lambda: all_.both.sidecars[0].server.open_streams == 0)
        bill = await all_.billed(stream_id)
        assert (bill["ending"], bill["estimated"]) == ("replica_lost", True)
        again = await resumed(all_.both.callers[0], stream_id, len(had))
        assert frames(again.body) == frames(rest.body)


async def test_an_heir_that_does_not_hear_that_it_has_ended_a_stream_bills_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat(**LINGER)) as (response, _):
        heir = all_.both.store(1)._heirs
        end_as_heir, deaf = heir._end_as_heir, [True, True]

        async def end(**said: Any) -> Any:
            answer = await end_as_heir(**said)
            if deaf:
                deaf.pop()
                raise RedisTimeout("the answer was lost")
            return answer

        monkeypatch.setattr(heir, "_end_as_heir", end)
        await all_.both.kill(0)
        bill = await all_.billed(response.headers["X-Stream-Id"])
        assert (bill["ending"], bill["estimated"], deaf) == ("replica_lost", True, [])


@pytest.mark.parametrize("kept", [300, 0.5], ids=["while it is kept", "when it is forgotten"])
async def test_a_replica_that_slept_for_long_says_nothing_more(tmp_path: Path, kept: float) -> None:
    word = Word()
    async with world(word.app, tmp_path, store__retention_seconds=kept) as all_:
        async with begun(all_.both.callers[0], chat(**LINGER)) as (response, _):
            stream_id = response.headers["X-Stream-Id"]
            await stopped([all_.both.store(0).tasks["beat"]])
            assert (await all_.billed(stream_id))["ending"] == "replica_lost"
            if kept < 1:
                await until(lambda: _forgotten(all_, stream_id))
            word.may_go_on.set()
            with pytest.raises(ClientPayloadError):
                await response.content.read()
        await until(lambda: all_.both.sidecars[0].server.open_streams == 0)
        await all_.billed(stream_id)


async def _forgotten(all_: World, stream_id: str) -> bool:
    return (await all_.both.callers[1].get(f"{STREAMS}/{stream_id}")).status == 404


async def test_a_reader_at_a_replica_that_lost_the_stream_is_cut_off_too(tmp_path: Path) -> None:
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat(**LINGER)) as (response, seen):
        stream_id, had = response.headers["X-Stream-Id"], frames(bytes(seen))
        second = asyncio.create_task(resumed(all_.both.callers[0], stream_id, 0))
        await stopped([all_.both.store(0).tasks["beat"]])
        await resumed(all_.both.callers[1], stream_id, len(had))
        word.may_go_on.set()
        with pytest.raises(ClientPayloadError):
            await second


async def test_behind_a_partition_a_stream_is_told_and_not_billed_again(tmp_path: Path) -> None:
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat(**LINGER)) as (response, seen):
        stream_id, had = response.headers["X-Stream-Id"], frames(bytes(seen))
        all_.links[0].cut()
        rest = await resumed(all_.both.callers[1], stream_id, len(had))
        assert parse_log(b"".join(had + frames(rest.body)))[-1]["status"] == "failed"
        word.say("More")
        while b"resume_lost" not in seen:
            seen += await response.content.readany()
        word.may_go_on.set()
        log = parse_log(bytes(seen) + await response.read())
        assert (verify(log), log[-1]["status"], warnings(log)) == ([], "completed", ["resume_lost"])
        assert (await all_.billed(stream_id))["ending"] == "replica_lost"
        all_.links[0].mend()
        await until(lambda: _shares(all_))
        assert (await all_.billed(stream_id))["ending"] == "replica_lost"


async def _shares(all_: World) -> bool:
    """Whether the first replica writes to Redis again, and has asked it about everything before."""
    answer = await all_.both.callers[0].stream()
    return not warnings(answer.events) and not all_.both.store(0).is_behind


async def test_what_went_on_without_redis_is_there_when_redis_is_back(tmp_path: Path) -> None:
    """One stream ends while Redis is away, one goes on afterwards; both are whole at the other replica, and billed."""
    short, long = Word(), Word()
    turns = [short, long]

    async def answer(request: web.Request) -> web.StreamResponse:
        return await turns.pop(0).answer(request)

    app, _ = engine_app(answer)
    async with world(app, tmp_path) as all_:
        here, there = all_.both.callers
        async with begun(here, chat()) as (first, first_had), begun(here, chat()) as (second, second_had):
            await all_.redis.kill()
            short.may_go_on.set()
            over = bytes(first_had) + await first.read()
            long.say("More")
            while b"resume_lost" not in second_had:
                second_had += await second.content.readany()
            assert all_.bills() == []
            await all_.redis.start()
            await until(lambda: not all_.both.store(0).is_behind)
            long.may_go_on.set()
            rest = bytes(second_had) + await second.read()
        for response, data in ((first, over), (second, rest)):
            log = parse_log(data)
            assert (verify(log), log[-1]["status"], warnings(log)) == ([], "completed", ["resume_lost"])
            stream_id = response.headers["X-Stream-Id"]
            assert frames((await resumed(there, stream_id)).body) == frames(data)
            bill = await all_.billed(stream_id)
            assert (bill["ending"], bill["estimated"]) == ("completed", False)


async def test_a_stream_whose_end_arrived_unheard_is_kept_no_longer_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last write has the end in it; neither the answer to that comes, nor one to the question after it."""
    word, may_answer, answered = Word(), asyncio.Event(), list[Any]()
    execute = Pipeline.execute

    async def once_and_late(self: Any, *args: Any, **options: Any) -> Any:
        answered.append(await execute(self, *args, **options))
        if len(answered) > 1:
            raise RedisTimeout("the answer was lost")
        await may_answer.wait()
        return answered[0]

    async with world(word.app, tmp_path) as all_:
        async with begun(all_.both.callers[0], chat()) as (response, _):
            stream_id = response.headers["X-Stream-Id"]
            await stopped([all_.both.store(n).tasks[name] for n in (0, 1) for name in ("beat", "listen", "inherit")])
            monkeypatch.setattr(Pipeline, "execute", once_and_late)
            word.may_go_on.set()
            log = await all_.both.store(0).find(stream_id)
            assert isinstance(log, RedisLog)
            await until(lambda: log._draft is not None and log._draft.is_last)
            may_answer.set()
            await response.read()
        assert all_.both.store(0).is_behind
        monkeypatch.setattr(Pipeline, "execute", execute)
        assert (await all_.billed(stream_id))["ending"] == "completed"
        async with Redis.from_url(f"unix://{tmp_path / 'redis.sock'}") as redis:
            kept = [await redis.ttl(f"penstock:{stream_id}:{part}") for part in ("meta", "log")]
            assert all(0 < seconds <= 300 for seconds in kept)
            assert await redis.keys("penstock:at:*:open") == []


async def test_a_redis_that_forgot_everything_is_told_again(tmp_path: Path) -> None:
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat()) as (response, seen):
        await all_.redis.kill()
        for path in (tmp_path / "appendonlydir").iterdir():
            path.unlink()
        await all_.redis.start()
        word.say("More")
        while b"resume_lost" not in seen:
            seen += await response.content.readany()
        await until(lambda: not all_.both.store(0).is_behind)
        word.may_go_on.set()
        data = bytes(seen) + await response.read()
        stream_id = response.headers["X-Stream-Id"]
        assert frames((await resumed(all_.both.callers[1], stream_id)).body) == frames(data)
        await all_.billed(stream_id)


async def test_a_replica_that_stops_while_redis_is_away_writes_its_bills(tmp_path: Path) -> None:
    word = Word()
    async with world(word.app, tmp_path) as all_, begun(all_.both.callers[0], chat()) as (response, seen):
        await all_.redis.kill()
        word.may_go_on.set()
        log = parse_log(bytes(seen) + await response.read())
        assert log[-1]["status"] == "completed"
        assert all_.bills() == []
    bill = await all_.billed(response.headers["X-Stream-Id"])
    assert (bill["ending"], bill["estimated"]) == ("completed", False)


@pytest.mark.parametrize("arrives", [True, False], ids=["the answer was lost", "the request was lost"])
async def test_a_key_whose_claim_has_an_unknown_fate_runs_one_attempt(tmp_path: Path, arrives: bool) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello", " you"])))
    headers = {"Accept": FOLDED, "Idempotency-Key": "k-1"}
    async with world(app, tmp_path) as all_:
        assert (await all_.both.callers[0].stream()).status == 200  # it has a connection that can stall
        all_.links[0].stall(asks=not arrives, answers=arrives)
        first, again = await asyncio.gather(*(c.post(STREAMS, chat(), headers) for c in all_.both.callers))
        assert (first.status, again.status, first.body) == (200, 200, again.body)
        assert seen.requests == 2


async def test_a_key_is_not_given_free_by_the_end_of_another_stream(tmp_path: Path) -> None:
    """The first attempt is lost before its first byte, the second one under the same key has begun meanwhile."""
    silent, word = asyncio.Event(), Word()
    turns: list[asyncio.Event | Word] = [silent, word]

    async def answer(request: web.Request) -> web.StreamResponse:
        turn = turns.pop(0)
        if isinstance(turn, Word):
            return await turn.answer(request)
        await turn.wait()
        return web.Response()

    app, seen = engine_app(answer)
    headers = {"Accept": FOLDED, "Idempotency-Key": "k-1"}
    async with world(app, tmp_path) as all_:
        first = asyncio.create_task(all_.both.callers[0].post(STREAMS, chat(), headers))
        await until(lambda: seen.open == 1)
        await all_.both.kill(0)
        waiting = await all_.both.callers[1].post(STREAMS, chat(), headers)
        assert (waiting.status, waiting.error["code"]) == (502, "replica_lost")
        second = asyncio.create_task(all_.both.callers[1].post(STREAMS, chat(), headers))
        await until(lambda: seen.requests == 2)
        word.may_go_on.set()
        assert (await second).status == 200
        again = await all_.both.callers[1].post(STREAMS, chat(), headers)
        assert (again.headers["Idempotency-Replayed"], seen.requests) == ("true", 2)
        first.cancel()


async def test_a_key_that_was_taken_while_redis_was_away_is_known_when_it_is_back(tmp_path: Path) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello", " you"])))
    headers = {"Accept": FOLDED, "Idempotency-Key": "k-1"}
    async with world(app, tmp_path) as all_:
        here = all_.both.callers[0]
        await all_.redis.kill()
        first = [await here.post(STREAMS, chat(), {**headers, "Idempotency-Key": key}) for key in ("k-1", "k-2")]
        await all_.redis.start()
        await until(lambda: _shares(all_))
        asked = seen.requests
        again = [await here.post(STREAMS, chat(), {**headers, "Idempotency-Key": key}) for key in ("k-1", "k-2")]
        assert [answer.body for answer in again] == [answer.body for answer in first]
        assert seen.requests == asked


async def test_a_caller_that_leaves_while_its_stream_begins_may_ask_again_elsewhere(tmp_path: Path) -> None:
    """Redis has begun the stream, and nobody carries it: whoever joined it is cut off, and then the key is free."""
    app, seen = engine_app(saying(*chunks.answer_of(["Hello", " you"])))
    headers = {"Accept": FOLDED, "Idempotency-Key": "k-1"}
    async with world(app, tmp_path, store__timeout_seconds=5) as all_:
        here, there = all_.both.callers
        assert (await here.stream()).status == 200  # it has a connection that can stall
        all_.links[0].stall(answers=True)
        leaving = asyncio.create_task(here.post(STREAMS, chat(), headers))
        await until(lambda: _is_claimed(tmp_path))
        leaving.cancel()

        async def answered() -> bool:
            try:
                return (await there.post(STREAMS, chat(), headers)).status == 200
            except ClientError:
                return False

        await until(answered)
        assert seen.requests == 2


async def _is_claimed(folder: Path) -> bool:
    redis: Redis = Redis.from_url(f"unix://{folder}/redis.sock")
    try:
        return bool(await redis.keys("penstock:key:*"))
    finally:
        await redis.aclose()


async def test_what_is_told_soon_has_the_time_at_which_it_is_told() -> None:
    """The engine speaks in between, and the time of a stream's events does not go back."""
    log = DeferredLog(StreamInfo("st_1", "anonymous", Form.SSE, "NativeSse", SSE, 0), MemoryStore(1000, 1))
    loop, told = asyncio.get_running_loop(), list[Signal]()

    class Carrier:
        spoke = 0.0
        is_over = False

        async def run(self) -> None:
            lost = loop.time()
            log.lost(False)
            while self.spoke <= lost:
                self.spoke = loop.time()
            await until(lambda: told != [])

        async def tell(self, signal: Signal) -> None:
            told.append(signal)

        def hear(self, signal: Signal) -> None: ...

        def leave(self) -> None: ...

    nobody: Any = None
    carrier = Carrier()
    await LiveStream("st_1", "anonymous", nobody, log, linger_seconds=0, cut_linger_seconds=0).carry(carrier)
    assert told[0].now >= carrier.spoke
