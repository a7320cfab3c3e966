"""A store that stops in the middle of something, or hears what it does not expect, at a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from penstock.core.dialects import Form
from penstock.settings import StoreSettings
from penstock.shell.stores.log import NoteFate, StreamInfo
from penstock.shell.stores.redis import mirrors
from penstock.shell.stores.redis.carried import RedisLog
from penstock.shell.stores.redis.link import stopped
from penstock.shell.stores.redis.mirrors import Mirror
from penstock.shell.stores.redis.store import RedisStore
from support.redis_server import RedisServer, redis_server
from support.sockets import until


class Heard:
    """What a store said to its sidecar."""

    def __init__(self) -> None:
        self.words: list[tuple[str, str]] = []
        self.lost: list[str] = []

    def word(self, word: str, stream_id: str, _seconds: float) -> None:
        self.words.append((word, stream_id))

    def note(self, _stream_id: str, _principal: str, _note: bytes) -> NoteFate:
        return "no_such_stream"


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
async def client(redis: RedisServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis.url) as client:
        yield client


def started(redis: RedisServer, **settings: Any) -> tuple[RedisStore, Heard]:
    store, heard = RedisStore(StoreSettings.model_validate({"url": redis.url, **settings}), 60, 5), Heard()
    store.start(heard.word, heard.note, lambda info, _record: heard.lost.append(info.stream_id))
    return store, heard


@asynccontextmanager
async def running(redis: RedisServer, **settings: Any) -> AsyncIterator[tuple[RedisStore, Heard]]:
    store, heard = started(redis, **settings)
    try:
        yield store, heard
    finally:
        await store.close()


async def created(store: RedisStore, stream_id: str) -> RedisLog:
    log = await store.create(StreamInfo(stream_id, "somebody", Form.SSE, "NativeSse", "text/event-stream", 0), None)
    assert isinstance(log, RedisLog)
    return log


async def begun(store: RedisStore, stream_id: str) -> RedisLog:
    """A stream that is carried there, and has said one event."""
    log = await created(store, stream_id)
    log.open()
    say(log, 1)
    await log.settled()
    return log


def say(log: RedisLog, number: int) -> None:
    log.append_later(b"id: %d\ndata: {}\n\n" % number, number, send=False)


# --- It stops ---------------------------------------------------------------------------------------------


async def closed_in_the_middle_of_the_last_write(store: RedisStore, log: RedisLog, redis: RedisServer) -> None:
    redis.pause()
    log.end()
    await until(lambda: log._draft is None)
    closing = asyncio.create_task(store.close())
    await until(store.tasks["write"].done)
    redis.go_on()
    await closing


async def test_a_stream_is_billed_whose_last_write_is_under_way_when_the_store_closes(
    redis: RedisServer, client: Redis
) -> None:
    store, _ = started(redis)
    log, decisions = await begun(store, "st_1"), list[bool]()
    log.when_decided(decisions.append)
    await closed_in_the_middle_of_the_last_write(store, log, redis)
    assert decisions == [False]
    entries: Any = await client.xrange("penstock:st_1:log")
    assert [b"e" in fields for _, fields in entries] == [False, False, True]
    assert 0 < await client.ttl("penstock:st_1:log") <= store._link.seconds_kept(True)


async def test_a_stream_is_billed_whatever_hinders_the_store_in_closing(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = started(redis)
    log, decisions = await begun(store, "st_1"), list[bool]()
    log.when_decided(decisions.append)

    async def fails() -> None:
        raise IndexError("the log is gone")

    monkeypatch.setattr(store._carried, "catch_redis_up", fails)
    await closed_in_the_middle_of_the_last_write(store, log, redis)
    assert decisions == [False]


@pytest.mark.parametrize(("found", "bills"), [("it is the heir", 1), ("another is", 0), ("Redis is away", 1)])
async def test_an_heir_that_stops_before_it_hears_that_it_is_one_bills_the_stream(
    redis: RedisServer, client: Redis, found: str, bills: int
) -> None:
    dead, _ = started(redis, lease_seconds=0.5)
    await created(dead, "st_1")
    await stopped(dead.tasks.values())
    await dead._link.close()
    heir, heard = started(redis, lease_seconds=0.5)
    end_as_heir, has_ended = heir._heirs._end_as_heir, asyncio.Event()

    async def unheard(**said: Any) -> None:
        assert await end_as_heir(**said) == 1
        has_ended.set()
        await asyncio.get_running_loop().create_future()

    heir._heirs._end_as_heir = unheard  # type: ignore[assignment]
    await until(has_ended.is_set)
    if found == "another is":
        await client.set("penstock:st_1:heir", "another")
    if found == "Redis is away":
        await redis.kill()
    await heir.close()
    assert heard.lost == ["st_1"] * bills


# --- It hears what it does not expect ---------------------------------------------------------------------


async def test_a_store_that_cannot_listen_does_not_try_without_pause(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis answers a ping, and not this: for example since it takes no further connections."""
    monkeypatch.setattr(mirrors, "RETRY_SECONDS", 0.2)
    async with running(redis) as (store, _):
        tries = list[float]()

        async def refuses(*_: Any, **__: Any) -> None:
            tries.append(asyncio.get_running_loop().time())
            raise RedisConnectionError("max number of clients reached")

        monkeypatch.setattr(store._link.ear, "xread", refuses)
        await until(lambda: len(tries) >= 4)
        assert min(tries[2] - tries[1], tries[3] - tries[2]) > 0.19


async def test_a_word_that_is_not_understood_hinders_no_other(redis: RedisServer, client: Redis) -> None:
    async with running(redis) as (store, heard):
        control = f"penstock:at:{store.replica}:control"
        async with client.pipeline(transaction=True) as pipe:
            pipe.xadd(control, {"word": "annotate"})
            pipe.xadd(control, {"word": "cancel", "id": "st_1", "seconds": 1})
            await pipe.execute()
        await until(lambda: heard.words == [("cancel", "st_1")])
        await client.xadd(control, {"word": "cancel", "id": "st_2", "seconds": 1})
        await until(lambda: heard.words == [("cancel", "st_1"), ("cancel", "st_2")])


async def test_readers_are_cut_off_at_an_entry_that_is_not_understood_and_others_are_not(
    redis: RedisServer, client: Redis
) -> None:
    async with running(redis) as (store, _), running(redis) as (other, _):
        logs = [await begun(store, "st_1"), await begun(store, "st_2")]
        broken, sound = [await other.find(log.info.stream_id) for log in logs]
        assert broken is not None
        assert sound is not None
        await client.xadd("penstock:st_1:log", {"d": "no number"}, id="2-0")
        await until(lambda: broken.earliest > broken.last + 1)
        say(logs[1], 2)
        await until(lambda: sound.last == 2)


async def test_a_stream_that_cannot_be_ended_hinders_no_other_of_its_replica(redis: RedisServer) -> None:
    dead, _ = started(redis, lease_seconds=0.5)
    for stream_id in ("st_1", "st_2"):
        await created(dead, stream_id)
    await stopped(dead.tasks.values())
    await dead._link.close()
    async with running(redis, lease_seconds=0.5) as (heir, heard):
        end_lost, refused = heir._heirs._end_lost, list[str]()

        async def ends_all_but_the_first(stream_id: str, replica: str) -> None:
            if stream_id in (refused or [stream_id]):
                refused.append(stream_id)
                raise ResponseError("WRONGTYPE")
            await end_lost(stream_id, replica)

        heir._heirs._end_lost = ends_all_but_the_first  # type: ignore[method-assign]
        await until(lambda: heard.lost != [])
        assert {*heard.lost, refused[0]} == {"st_1", "st_2"}


# --- It keeps what is needed ------------------------------------------------------------------------------


async def test_words_for_a_replica_that_has_left_go_with_time(redis: RedisServer, client: Redis) -> None:
    async with running(redis) as (store, _):
        left, _ = started(redis)
        log = await begun(left, "st_1")
        log.end()
        await log.settled()
        await left.close()
        await store.tell("st_1", "somebody", "cancel")
        assert await client.ttl(f"penstock:at:{left.replica}:control") > 0

        note: dict[Any, Any] = {
            "word": "annotate",
            "id": "st_1",
            "principal": "somebody",
            "note": "{}",
            "from": "gone",
            "number": 1,
        }
        await client.xadd(f"penstock:at:{store.replica}:control", note)

        async def answer_is_kept_for_a_while() -> bool:
            return bool(await client.ttl("penstock:at:gone:control") > 0)

        await until(answer_is_kept_for_a_while)


async def test_a_stream_that_nobody_read_for_long_is_not_forgotten_while_somebody_asks_for_it(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(redis) as (store, _), running(redis) as (other, _):
        log = await begun(store, "st_1")
        mirror = await other.find("st_1")
        assert isinstance(mirror, Mirror)
        mirror.idle_since -= 1000
        monkeypatch.setattr(mirrors, "catch_up", _forgetting(other, mirrors.catch_up))
        assert await other.find("st_1") is mirror
        say(log, 2)  # this may still be heard by who has listened since before
        await until(lambda: mirror.last == 2)
        say(log, 3)
        await until(lambda: mirror.last == 3)


def _forgetting(store: RedisStore, catch_up: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The store looks for what nobody reads in the middle of it."""

    async def forgets(*args: Any) -> None:
        store._mirrors._forget()
        await catch_up(*args)

    return forgets
