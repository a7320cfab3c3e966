"""The ledgers: the one in memory and the one in Redis do the same, to the token; nothing is counted twice."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.shell.ledgers import LEASE_SECONDS, Entry, Ledger, MemoryLedger, RedisLedger, connected
from support.redis_server import RedisServer

NOON = 1_800_000_000.0
_callers = (f"caller-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    asyncio.run(server.start())
    yield server
    asyncio.run(server.kill())


@asynccontextmanager
async def redis_ledger(redis: RedisServer, clock: Callable[[], float] | None = None) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger(connected(redis.url, 5), clock)
    try:
        yield ledger
    finally:
        await ledger.close()


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def entry(caller: str, stream: str = "st_1", reserved: int = 10, **limits: Any) -> Entry:
    return Entry(caller, stream, reserved, period="2027-01", period_ends=int(NOON) + 1000, **limits)


# --- Both the same ------------------------------------------------------------------------------------

Step = tuple[str, int, int, float]
steps = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "settle"]),
        st.integers(0, 5),  # which stream
        st.integers(0, 300),  # tokens
        st.sampled_from([0.0, 0.0, 0.25, 1.0, 7.0]),  # seconds before it
    ),
    max_size=30,
)
limits = st.fixed_dictionaries(
    {
        "requests": st.sampled_from([0, 1, 3, 60]),
        "tokens": st.sampled_from([0, 100, 1000]),
        "streams": st.sampled_from([0, 1, 3]),
        "quota": st.sampled_from([-1, 0, 500]),
    }
)


@given(steps=steps, caps=limits, changed=limits)
def test_memory_and_redis_say_the_same(
    redis: RedisServer, steps: list[Step], caps: dict[str, int], changed: dict[str, int]
) -> None:
    """Also when the limits of a key change in between."""
    asyncio.run(_compare(redis, steps, caps, changed))


async def _compare(redis: RedisServer, steps: list[Step], caps: dict[str, int], changed: dict[str, int]) -> None:
    clock, caller = Clock(), next(_callers)
    open_streams: dict[str, Entry] = {}
    async with redis_ledger(redis, clock) as shared:
        memory = MemoryLedger(clock)
        for number, (what, which, tokens, seconds) in enumerate(steps):
            clock.now += seconds
            caps = changed if number == len(steps) // 2 else caps
            stream = f"st_{which}"
            if what == "admit" and stream not in open_streams:
                asked = entry(caller, stream, tokens, **caps)
                one, other = await memory.admit(asked), await shared.admit(asked)
                assert one.refused == other.refused
                assert one.quota_used == other.quota_used or asked.quota < 0
                assert one.retry_seconds == pytest.approx(other.retry_seconds, abs=1e-4)
                assert one.requests_left == pytest.approx(other.requests_left, abs=1e-4) or not asked.requests
                assert one.tokens_left == pytest.approx(other.tokens_left, abs=1e-4) or not asked.tokens
                if not one.refused:
                    open_streams[stream] = asked
            elif what == "settle" and stream in open_streams:
                settled = open_streams.pop(stream)
                await memory.settle(settled, tokens)
                await shared.settle(settled, tokens)


# --- Each -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "redis"])
async def ledger(request: pytest.FixtureRequest, redis: RedisServer) -> AsyncIterator[tuple[Ledger, Clock]]:
    clock = Clock()
    if request.param == "memory":
        yield MemoryLedger(clock), clock
        return
    async with redis_ledger(redis, clock) as shared:
        yield shared, clock


async def test_a_bucket_holds_a_minute_and_fills_evenly(ledger: tuple[Ledger, Clock]) -> None:
    book, clock = ledger
    asked = entry(next(_callers), "st_x", requests=6)
    assert [(await book.admit(replace(asked, stream_id=f"st_{n}"))).refused for n in range(7)] == [""] * 6 + [
        "requests"
    ]
    refused = await book.admit(asked)
    assert refused.retry_seconds == pytest.approx(10)
    clock.now += 9.9
    assert (await book.admit(asked)).refused == "requests"
    clock.now += 0.2
    assert (await book.admit(asked)).refused == ""
    clock.now += 3600
    assert (await book.admit(replace(asked, stream_id="st_y"))).requests_left == pytest.approx(5)


async def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_owed(ledger: tuple[Ledger, Clock]) -> None:
    book, _ = ledger
    asked = entry(next(_callers), "st_a", 900, tokens=1000)
    assert (await book.admit(asked)).tokens_left == pytest.approx(100)
    await book.settle(asked, 100)
    other = replace(asked, stream_id="st_b")
    assert (await book.admit(other)).tokens_left == pytest.approx(0)
    await book.settle(other, 2900)
    refused = await book.admit(replace(asked, stream_id="st_c", reserved=1))
    assert refused.refused == "tokens"
    assert refused.retry_seconds == pytest.approx(2001 * 60 / 1000)


async def test_a_request_larger_than_the_bucket_passes_when_it_is_full_and_is_paid_off(
    ledger: tuple[Ledger, Clock],
) -> None:
    book, clock = ledger
    asked = entry(next(_callers), reserved=3000, tokens=1000)
    assert (await book.admit(asked)).refused == ""
    clock.now += 119
    assert (await book.admit(replace(asked, stream_id="st_2", reserved=1))).refused == "tokens"
    clock.now += 2
    assert (await book.admit(replace(asked, stream_id="st_2", reserved=1))).refused == ""


async def test_a_quota_never_goes_over_by_reservations_and_starts_anew_with_its_period(
    ledger: tuple[Ledger, Clock],
) -> None:
    book, _ = ledger
    asked = entry(next(_callers), "st_a", 60, quota=100)
    assert (await book.admit(asked)).quota_used == 60
    refused = await book.admit(replace(asked, stream_id="st_b"))
    assert (refused.refused, refused.quota_used) == ("quota", 60)
    await book.settle(asked, 40)
    await book.settle(asked, 40)  # a second time changes nothing
    assert (await book.admit(replace(asked, stream_id="st_b"))).quota_used == 100
    assert (await book.admit(replace(asked, stream_id="st_c", period="2027-02"))).quota_used == 60


async def test_as_many_streams_at_once_and_no_more(ledger: tuple[Ledger, Clock]) -> None:
    book, _ = ledger
    asked = entry(next(_callers), "st_a", streams=2)
    assert (await book.admit(asked)).refused == ""
    assert (await book.admit(replace(asked, stream_id="st_b"))).refused == ""
    assert (await book.admit(replace(asked, stream_id="st_c"))).refused == "streams"
    await book.settle(asked, 0)
    assert (await book.admit(replace(asked, stream_id="st_c"))).refused == ""


# --- Redis alone ----------------------------------------------------------------------------------------


async def test_the_stream_of_a_replica_that_died_is_forgotten_and_that_of_one_that_lives_is_not(
    redis: RedisServer,
) -> None:
    caller = next(_callers)
    dead, alive = entry(caller, "st_dead", streams=2), entry(caller, "st_alive", streams=2)
    clock = Clock()
    async with redis_ledger(redis, clock) as one, redis_ledger(redis) as real:
        assert [(await one.admit(e)).refused for e in (dead, alive)] == ["", ""]
        clock.now += LEASE_SECONDS - 1
        assert (await one.admit(entry(caller, "st_new", streams=2))).refused == "streams"
        await real.renew([alive])  # by Redis's own clock, which is far from the test's: check what it wrote
        client = connected(redis.url, 5)
        score = await client.zscore(f"penstock:{{{caller}}}:open", "st_alive")
        seconds, _ = await client.time()
        assert score - seconds == pytest.approx(LEASE_SECONDS, abs=2)
        assert await client.zscore(f"penstock:{{{caller}}}:open", "st_dead") == NOON + LEASE_SECONDS
        await real.renew([entry(caller, "st_never", streams=2)])
        assert await client.zscore(f"penstock:{{{caller}}}:open", "st_never") is None
        await client.aclose()
        clock.now += 2
        assert (await one.admit(entry(caller, "st_new", streams=2))).refused == ""


async def test_a_settlement_that_comes_after_the_lease_still_counts_once(redis: RedisServer) -> None:
    caller, clock = next(_callers), Clock()
    async with redis_ledger(redis, clock) as book:
        asked = entry(caller, "st_a", 100, quota=1000)
        await book.admit(asked)
        clock.now += 3600
        await book.settle(asked, 30)
        await book.settle(asked, 30)
        assert (await book.admit(entry(caller, "st_b", 0, quota=1000))).quota_used == 30


async def test_a_charge_counts_once_and_settles_what_was_admitted_unheard(redis: RedisServer) -> None:
    caller = next(_callers)
    async with redis_ledger(redis) as book:
        unknown = entry(caller, "st_a", 100, quota=1000)
        await book.charge(unknown, 70)
        await book.charge(unknown, 70)
        admitted = entry(caller, "st_b", 100, quota=1000)
        await book.admit(admitted)
        await book.charge(admitted, 20)
        assert (await book.admit(entry(caller, "st_c", 0, quota=1000))).quota_used == 90


async def test_everything_in_redis_goes_away_by_itself(redis: RedisServer) -> None:
    caller = "{evil}:caller/\n"
    async with redis_ledger(redis) as book:
        await book.admit(entry(caller, requests=5, tokens=100, streams=1, quota=100))
        client = connected(redis.url, 5)
        keys = [key async for key in client.scan_iter("penstock:{%7Bevil%7D*")]
        assert len(keys) == 3
        assert all([await client.ttl(key) > 0 for key in keys])
        await client.aclose()


async def test_fifty_at_once_over_two_replicas_are_counted_exactly(redis: RedisServer) -> None:
    caller = next(_callers)
    async with redis_ledger(redis) as one, redis_ledger(redis) as other:
        asked = [entry(caller, f"st_{n}", 10, streams=20, quota=130) for n in range(50)]
        verdicts = await asyncio.gather(*((one, other)[n % 2].admit(e) for n, e in enumerate(asked)))
        admitted = [e for e, verdict in zip(asked, verdicts, strict=True) if not verdict.refused]
        assert len(admitted) == 13
        await asyncio.gather(*((one, other)[n % 2].settle(e, 7) for n, e in enumerate(admitted)))
        assert (await one.admit(entry(caller, "st_x", 0, streams=20, quota=130))).quota_used == 13 * 7


async def test_a_request_that_is_asked_for_twice_is_counted_once(ledger: tuple[Ledger, Clock]) -> None:
    """As by a client that lost the answer with its connection."""
    book, _ = ledger
    asked = entry(next(_callers), "st_x", 40, requests=1, tokens=50, streams=1, quota=50)
    assert [(await book.admit(asked)).refused for _ in range(2)] == ["", ""]
    await book.settle(asked, 10)
    other = entry(asked.caller, "st_y", 40, quota=50)
    assert (await book.admit(other)).quota_used == 50


async def test_two_deployments_may_share_one_redis(redis: RedisServer) -> None:
    caller = next(_callers)
    client = connected(redis.url, 5)
    one, other = RedisLedger(client), RedisLedger(client, prefix="blue")
    assert (await one.admit(entry(caller, "st_a", 40, quota=50))).quota_used == 40
    assert (await other.admit(entry(caller, "st_b", 40, quota=50))).quota_used == 40
    await client.aclose()
