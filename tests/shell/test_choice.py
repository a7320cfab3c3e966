"""The choice of an engine, and what is remembered of each: pure functions, with time as a number."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.shell.cluster import Checks, Circuit, Option, choose

WISHES = [f"conversation {number}".encode() for number in range(10_000)]


def engines(count: int, streams: int = 0) -> list[Option]:
    return [Option(f"http://10.0.0.{number}:8000", streams) for number in range(count)]


def placed(options: list[Option]) -> dict[bytes, str]:
    """Where each wish goes while nobody is overloaded."""
    return {wish: chosen.key for wish in WISHES if (chosen := choose(options, wish)) is not None}


# --- Without affinity ---------------------------------------------------------------------------------


def test_nobody_to_choose() -> None:
    assert choose([], None) is None
    assert choose([], b"wish") is None


def test_the_least_loaded_is_chosen() -> None:
    options = [Option("a", 3), Option("b", 1), Option("c", 2)]
    assert choose(options, None) == options[1]


def test_load_is_by_weight() -> None:
    big, small = Option("big", 6, weight=4.0), Option("small", 2, weight=1.0)
    assert choose([big, small], None) == big


def test_equal_loads_are_spread() -> None:
    options = engines(4)
    counts = Counter(chosen.key for _ in range(2000) if (chosen := choose(options, None)) is not None)
    assert min(counts.values()) > 350


# --- Zones --------------------------------------------------------------------------------------------


def test_the_own_zone_comes_first_however_loaded() -> None:
    near, far = Option("near", 90), Option("far", 0, is_near=False)
    assert choose([near, far], None) == near
    assert choose([near, far], b"wish") == near


def test_a_zone_where_requests_wait_is_left() -> None:
    near, far = Option("near", 9, has_queue=True), Option("far", 0, is_near=False)
    assert choose([near, far], None) == far
    assert choose([near, Option("near too", 90), far], None) == near, "one of the zone has no queue: it is not left"


def test_a_zone_without_engines_is_served_by_others() -> None:
    far = Option("far", 0, is_near=False)
    assert choose([far], None) == far


# --- Affinity -----------------------------------------------------------------------------------------


def test_a_wish_goes_where_it_went() -> None:
    assert placed(engines(5)) == placed(list(reversed(engines(5))))


def test_wishes_are_spread_evenly() -> None:
    counts = Counter(placed(engines(5)).values())
    assert len(counts) == 5
    assert all(abs(count - 2000) < 200 for count in counts.values()), counts


@pytest.mark.parametrize("count", [2, 3, 5, 10, 50])
def test_an_engine_that_goes_moves_its_own_share_only(count: int) -> None:
    before, after = placed(engines(count)), placed(engines(count)[:-1])
    gone = engines(count)[-1].key
    moved = [wish for wish in WISHES if before[wish] != after[wish]]
    assert all(before[wish] == gone for wish in moved)
    assert len(moved) / len(WISHES) == pytest.approx(1 / count, rel=0.2)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 50])
def test_an_engine_that_comes_takes_its_own_share_only(count: int) -> None:
    before, after = placed(engines(count)), placed([*engines(count), Option("http://new:8000", 0)])
    moved = [wish for wish in WISHES if before[wish] != after[wish]]
    assert {after[wish] for wish in moved} == {"http://new:8000"}
    assert len(moved) / len(WISHES) == pytest.approx(1 / (count + 1), rel=0.2)


def test_an_engine_with_few_streams_is_never_too_busy() -> None:
    options = engines(3)
    first = choose(options, b"wish")
    assert first is not None
    busy = [Option(option.key, 7 if option.key == first.key else 0) for option in options]
    chosen = choose(busy, b"wish", free=8)
    assert chosen is not None
    assert chosen.key == first.key
    full = [Option(option.key, 8 if option.key == first.key else 0) for option in options]
    chosen = choose(full, b"wish", free=8)
    assert chosen is not None
    assert chosen.key != first.key


@given(
    wishes=st.lists(st.sampled_from(WISHES[:3]), min_size=1, max_size=200),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=6),
    bound=st.sampled_from([1.0, 1.25, 2.0]),
)
def test_no_engine_gets_more_than_the_bound(wishes: list[bytes], weights: list[float], bound: float) -> None:
    """One hot prefix fills its engine to the bound and spills to the next in its own order."""
    streams = [0] * len(weights)
    for count, wish in enumerate(wishes):
        options = [Option(str(n), streams[n], weight) for n, weight in enumerate(weights)]
        chosen = choose(options, wish, bound=bound, free=1)
        assert chosen is not None
        streams[int(chosen.key)] += 1
        most = bound * (count + 1) / sum(weights) + 1
        assert streams[int(chosen.key)] <= (most + 1) * weights[int(chosen.key)] + 1
    assert sum(streams) == len(wishes)


# --- Passive health -------------------------------------------------------------------------------------


def test_a_circuit_opens_after_failures_in_a_row() -> None:
    circuit = Circuit(limit=3, pause=5, longest=60)
    circuit.failed(0)
    circuit.failed(0)
    circuit.worked(0)
    circuit.failed(0)
    circuit.failed(0)
    assert circuit.admits(0)
    circuit.failed(1)
    assert not circuit.admits(1)
    assert not circuit.admits(5.9)
    assert circuit.admits(6)


def opened(pause: float = 5) -> Circuit:
    circuit = Circuit(limit=1, pause=pause, longest=60)
    circuit.failed(0)
    return circuit


def test_one_trial_at_a_time() -> None:
    circuit = opened()
    circuit.begin()
    assert not circuit.admits(100)
    circuit.worked(100)
    assert circuit.is_closed
    assert circuit.admits(100)


def test_a_trial_that_told_nothing_leaves_room_for_another() -> None:
    circuit = opened()
    circuit.begin()
    circuit.leave()
    assert circuit.admits(5)


def test_failures_of_earlier_requests_do_not_lengthen_the_pause() -> None:
    circuit = opened()
    circuit.failed(1)
    circuit.failed(2)
    assert circuit.admits(5)


def test_a_flapping_engine_is_asked_less_and_less() -> None:
    """It answers every trial and fails the next request."""
    circuit, now, asked = Circuit(limit=1, pause=5, longest=60), 0.0, []
    circuit.failed(now)
    for _ in range(6):
        while not circuit.admits(now):
            now += 0.5
        asked.append(now)
        circuit.begin()
        circuit.worked(now)
        circuit.failed(now)
    assert asked == [5, 15, 35, 75, 135, 195]


def test_an_engine_that_worked_as_long_as_it_paused_is_forgiven() -> None:
    circuit = opened()
    circuit.begin()
    circuit.worked(5)
    circuit.failed(9)
    assert not circuit.admits(18), "too soon: the pause doubled to 10"
    assert circuit.admits(19)
    circuit.begin()
    circuit.worked(19)
    circuit.failed(29)
    assert circuit.admits(34)


# --- Active health --------------------------------------------------------------------------------------


def test_it_takes_answers_in_a_row_to_change_the_mind() -> None:
    checks = Checks(unhealthy_after=2, healthy_after=3)
    told = [False, True, False, False, True, True, False, True, True, True]
    minds = []
    for passed in told:
        checks.told(passed)
        minds.append(checks.is_healthy)
    assert minds == [True, True, True, False, False, False, False, False, False, True]
    assert checks.is_sure
