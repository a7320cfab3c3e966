"""Limits over HTTP: what a caller is told, two replicas that count as one, and what happens when Redis is gone."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.access_settings import Plan
from penstock.core.errors import CallerError, Overloaded
from penstock.shell.auth import hash_key
from penstock.shell.callers import Caller as Principal
from penstock.shell.ledgers import Entry, RedisLedger, Verdict, connected
from penstock.shell.rate_limits import RateLimits, spell_seconds
from penstock.shell.replay import serving
from support import chunks
from support.http_client import Answer, Caller, calling, chat
from support.redis_server import RedisServer, redis_server
from support.sidecar import sidecar
from support.sockets import until
from support.upstreams import Seen, engine_app, in_front_of, opened, saying, silence

KEY = "alices-key-0123456789"
ALICE = {"Authorization": f"Bearer {KEY}"}
# What the engine says of every answer: the prompt's tokens and the answer's.
PROMPT, ANSWER = 10, 20


def key(words: str) -> dict[str, Any]:
    return {"auth__keys": {"alice": f"{hash_key(KEY)} {words}"}}


def answer() -> tuple[web.Application, Seen]:
    words = [chunks.content("Hello", tokens=ANSWER)]
    return engine_app(
        saying(chunks.role(), *words, chunks.finish("stop"), chunks.final_usage(ANSWER, PROMPT), chunks.DONE)
    )


# --- What is told ---------------------------------------------------------------------------------------


async def test_every_answer_tells_what_is_left_in_openais_words() -> None:
    app, _ = answer()
    async with in_front_of(app, **key("requests_per_minute=3 tokens_per_minute=6000")) as setup:
        told = [(await setup.caller.chat(headers=ALICE, max_tokens=100, stream=True)).headers for _ in range(2)]
        assert [headers["x-ratelimit-limit-requests"] for headers in told] == ["3", "3"]
        assert [headers["x-ratelimit-remaining-requests"] for headers in told] == ["2", "1"]
        assert told[0]["x-ratelimit-reset-requests"] == "20s"
        assert told[0]["x-ratelimit-limit-tokens"] == "6000"
        assert told[0]["x-ratelimit-remaining-tokens"] == "5900"
        assert told[0]["x-ratelimit-reset-tokens"] == "1s"
        folded = await setup.caller.stream("application/json", headers=ALICE)
        assert folded.headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_limit_is_a_429_that_says_when_to_come_back() -> None:
    app, seen = answer()
    async with in_front_of(app, **key("requests_per_minute=2")) as setup:
        assert [(await setup.caller.stream(headers=ALICE)).status for _ in range(2)] == [200, 200]
        native = await setup.caller.stream(headers=ALICE)
        openai = await setup.caller.chat(headers=ALICE, stream=True)
        for refused in (native, openai):
            assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
            assert 10 <= int(refused.headers["Retry-After"]) <= 30
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert "alice may send 2 requests a minute; wait " in refused.error["message"]
        assert native.error["retryable"] is True
        assert seen.requests == 2


async def test_tokens_are_reserved_and_settled() -> None:
    """Fifty are reserved and thirty used: what was not used is there again at once."""
    app, seen = answer()
    async with in_front_of(app, **key("tokens_per_minute=60")) as setup:
        first = await setup.caller.stream(headers=ALICE, max_tokens=50)
        assert first.headers["x-ratelimit-remaining-tokens"] == "10"
        # Needs a full bucket, which is half a minute away, and costs nothing when it is refused.
        refused = await setup.caller.stream(headers=ALICE, max_tokens=60)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert "may use 60 tokens a minute and this request needs about 60; wait" in refused.error["message"]
        assert 30 <= int(refused.headers["x-ratelimit-remaining-tokens"]) < 60
        assert seen.requests == 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("words", ["tokens_per_minute=100000", "requests_per_minute=9", "quota_tokens=100000"])
async def test_no_number_in_a_request_breaks_the_count(shared: bool, words: str, tmp_path: Path) -> None:
    """Numbers that are no float any more, or leave nothing of what is added to them."""
    app, _ = answer()
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(tmp_path)) if shared else None
        store: dict[str, Any] = {"store__url": redis.url} if redis else {}
        setup = await stack.enter_async_context(in_front_of(app, **key(words), **store))
        for max_tokens, n in ((1e308, 100), (1e300, 1), (-1e300, 1)):
            assert (await setup.caller.stream(headers=ALICE, max_tokens=max_tokens, n=n)).status in (200, 429)

        async def is_settled() -> bool:
            told = await setup.caller.stream(headers=ALICE, max_tokens=60)
            return told.status == 200

        await until(is_settled)


async def test_a_quota_that_is_used_up_says_what_is_left() -> None:
    app, seen = answer()
    async with in_front_of(app, limits__reserve_tokens=70, **key("quota_tokens=100 quota_period=day")) as setup:
        assert (await setup.caller.stream(headers=ALICE, max_tokens=None)).status == 200
        await until(lambda: seen.open == 0)
        await asyncio.sleep(0.05)
        refused = await setup.caller.stream(headers=ALICE, max_tokens=71)
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert (
            "alice has 70 of 100 tokens left for this day and this request needs about 71" in refused.error["message"]
        )
        assert 0 < int(refused.headers["Retry-After"]) <= 86400
        assert refused.error["retryable"] is False
        assert (await setup.caller.stream(headers=ALICE, max_tokens=70)).status == 200


@pytest.mark.parametrize(("bill", "used"), [("generated", PROMPT + ANSWER), ("delivered", PROMPT)])
async def test_what_is_billed_is_a_setting(bill: str, used: int) -> None:
    """Hidden reasoning is generated and never delivered."""
    thoughts = [chunks.reasoning("Well", tokens=ANSWER)]
    app, _ = engine_app(
        saying(chunks.role(), *thoughts, chunks.finish("stop"), chunks.final_usage(ANSWER, PROMPT), chunks.DONE)
    )
    words = key("quota_tokens=1000")
    async with in_front_of(app, reasoning="hide", usage__bill=bill, limits__reserve_tokens=0, **words) as setup:
        assert (await setup.caller.stream(headers=ALICE, max_tokens=None)).status == 200
        await asyncio.sleep(0.05)
        refused = await setup.caller.stream(headers=ALICE, max_tokens=1000)
        assert f"alice has {1000 - used} of 1000 tokens left" in refused.error["message"]


async def test_streams_that_are_open_count_and_one_that_ended_does_not() -> None:
    async def one_word(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello", tokens=1))
        await silence()
        return response

    app, _ = engine_app(one_word)
    async with in_front_of(app, **key("streams=1")) as setup:
        async with setup.caller.opened("/v1/streams", chat(), ALICE):
            refused = await setup.caller.stream(headers=ALICE)
            assert (refused.status, refused.error["code"]) == (429, "too_many_streams_of_key")

        async def is_free() -> bool:
            async with setup.caller.opened("/v1/streams", chat(), ALICE) as response:
                return response.status == 200

        await until(is_free)


async def test_what_never_became_a_stream_gives_its_reservation_back() -> None:
    async with in_front_of(replay_nothing(), limits__reserve_tokens=0, **key("quota_tokens=100 streams=1")) as setup:
        for _ in range(3):
            refused = await setup.caller.stream(headers=ALICE, max_tokens=100)
            assert refused.status == 400
            await asyncio.sleep(0.05)


def replay_nothing() -> web.Application:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "No."}}, status=400)

    return engine_app(refuse)[0]


@pytest.mark.parametrize(
    ("seconds", "spelled"),
    [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"), (3661.5, "61m1.5s")],
)
def test_times_are_spelled_as_openai_spells_them(seconds: float, spelled: str) -> None:
    assert spell_seconds(seconds) == spelled


# --- Two replicas ---------------------------------------------------------------------------------------


@dataclass
class Replicas:
    one: Caller
    other: Caller
    redis: RedisServer
    engine: Seen

    async def each(self, count: int, **request: Any) -> list[Answer]:
        """So many requests at once, in turn to one and the other."""
        replicas = [(self.one, self.other)[n % 2] for n in range(count)]
        return await asyncio.gather(*(replica.stream(headers=ALICE, **request) for replica in replicas))

    async def used(self) -> int:
        client = connected(self.redis.url, 5)
        keys = [key async for key in client.scan_iter("penstock:{alice}:quota:*")]
        value = int(await client.get(keys[0])) if keys else 0
        await client.aclose()
        return value


@asynccontextmanager
async def replicas(folder: Path, words: str, app: web.Application, seen: Seen, **flags: Any) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(folder))
        engine_url = await stack.enter_async_context(serving(app))
        callers = []
        for _ in range(2):
            running = await stack.enter_async_context(sidecar(engine_url, store__url=redis.url, **key(words), **flags))
            callers.append(await stack.enter_async_context(calling(running.url)))
        yield Replicas(callers[0], callers[1], redis, seen)


async def test_requests_over_two_replicas_are_limited_exactly(tmp_path: Path) -> None:
    app, seen = answer()
    # One more is let in every twelve seconds: that many may pass while sixty are on their way.
    async with replicas(tmp_path, "requests_per_minute=5", app, seen) as both:
        answers = await both.each(60)
        assert sorted(answer.status for answer in answers) == [200] * 5 + [429] * 55
        assert seen.requests == 5


async def test_a_quota_over_two_replicas_is_exact_whatever_comes_at_once(tmp_path: Path) -> None:
    """Forty are reserved each, thirty billed: it never goes over, and in the end every bill is in it, once."""
    app, seen = answer()
    async with replicas(tmp_path, "quota_tokens=1000", app, seen) as both:
        billed = 0
        for _ in range(4):
            answers = await both.each(20, max_tokens=40)
            served = [answer for answer in answers if answer.status == 200]
            assert all(a.error["code"] == "insufficient_quota" for a in answers if a.status != 200)
            billed += len(served) * (PROMPT + ANSWER)
            assert billed <= 1000

            async def is_settled(total: int = billed) -> bool:
                return await both.used() == total

            await until(is_settled)
        assert billed == seen.requests * 30
        assert 1000 - billed < 40


async def test_streams_over_two_replicas_are_counted_together(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def held(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello", tokens=1))
        await release.wait()
        await response.write(chunks.finish("stop") + chunks.final_usage(1, 1) + chunks.DONE)
        return response

    app, seen = engine_app(held)
    async with replicas(tmp_path, "streams=4", app, seen) as both:
        asked = asyncio.create_task(both.each(10))
        await until(lambda: seen.open == 4)
        await asyncio.sleep(0.2)
        assert seen.open == 4
        release.set()
        assert sorted(answer.status for answer in await asked) == [200] * 4 + [429] * 6


# --- Redis is gone --------------------------------------------------------------------------------------


async def test_when_redis_is_gone_a_replica_counts_alone_and_nothing_is_lost(tmp_path: Path) -> None:
    app, seen = answer()
    words = "quota_tokens=200 requests_per_minute=50"
    async with replicas(tmp_path, words, app, seen) as both:
        assert (await both.one.stream(headers=ALICE, max_tokens=40)).status == 200

        async def first_is_settled() -> bool:
            return await both.used() == 30

        await until(first_is_settled)
        await both.redis.kill()
        # It goes on from the last count that it heard, which the reservation of 40 was in.
        alone = [await both.one.stream(headers=ALICE, max_tokens=40) for _ in range(6)]
        assert [answer.status for answer in alone] == [200] * 5 + [429]
        await both.redis.start()

        async def all_is_charged() -> bool:
            return await both.used() == 6 * 30

        await until(all_is_charged)
        await asyncio.sleep(1.1)  # the replica asks again after its pause
        refused = await both.other.stream(headers=ALICE, max_tokens=40)
        assert "alice has 20 of 200 tokens left" in refused.error["message"]


async def test_when_redis_is_gone_a_replica_may_be_told_to_refuse(tmp_path: Path) -> None:
    app, seen = answer()
    async with replicas(tmp_path, "requests_per_minute=50", app, seen, limits__without_store="refuse") as both:
        assert (await both.one.stream(headers=ALICE)).status == 200
        await both.redis.kill()
        for refused in await both.each(4):
            assert (refused.status, refused.error["code"]) == (503, "limits_unavailable")
            assert refused.headers["Retry-After"] == "1"
        assert seen.requests == 1
        await both.redis.start()

        async def is_back() -> bool:
            return (await both.one.stream(headers=ALICE)).status == 200

        await until(is_back)


async def test_who_has_no_limits_never_asks_redis(tmp_path: Path) -> None:
    app, _ = answer()
    async with replicas(tmp_path, "", app, Seen(), limits__without_store="refuse") as both:
        await both.redis.kill()
        assert (await both.one.stream(headers=ALICE)).status == 200


# --- Answers that are lost on the way -------------------------------------------------------------------


class Deaf:
    """A ledger that does what it is asked and whose answers never arrive."""

    def __init__(self, ledger: RedisLedger) -> None:
        self.ledger = ledger
        self.is_deaf = True

    async def admit(self, entry: Entry) -> Verdict:
        verdict = await self.ledger.admit(entry)
        if self.is_deaf:
            raise ConnectionError("the answer is lost")
        return verdict

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ledger, name)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    asyncio.run(server.start())
    yield server
    asyncio.run(server.kill())


@pytest.mark.parametrize(("without_store", "used"), [("local", 30), ("refuse", 0)])
async def test_what_was_counted_unheard_is_settled_all_the_same(
    redis: RedisServer, without_store: Any, used: int
) -> None:
    deaf = Deaf(RedisLedger(connected(redis.url, 5)))
    limits = RateLimits(deaf, without_store, reserve_tokens=0)
    principal = Principal(f"deaf-{without_store}", Plan(quota_tokens=1000, streams=5))
    keeping = asyncio.create_task(limits.keep_up())
    if without_store == "local":
        limits.settle(await limits.admit(principal, "st_a", 0, 100), 30)
    else:
        with pytest.raises(Overloaded):
            await limits.admit(principal, "st_a", 0, 100)
    deaf.is_deaf = False

    async def left() -> str:
        with pytest.raises(CallerError) as caught:
            await limits.admit(principal, "st_b", 0, 1001)
        return caught.value.message

    async def is_settled() -> bool:
        return f"has {1000 - used} of 1000 tokens left" in await left()

    await asyncio.sleep(1.1)
    await until(is_settled)
    limits.close()
    await keeping
    await deaf.close()
