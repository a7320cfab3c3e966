"""What an exchange holds does not grow with what it hears."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.commands import Ending
from penstock.core.exchange import Exchange
from penstock.core.families import Family
from penstock.core.signals import EngineSpoke
from support import chunks
from support.playbook import FAMILY_NAMES, STARTED, ask, open_exchange, play
from support.strategies import families, fragments, policies, thorough

LINE_BYTES = 8192
# White space before a block, a header, the head and the tail of a call, and one marker or character of each.
MOST_HELD = LINE_BYTES + 256 + 512 + 2 * 2048 + 256  # 13 KB; a flood is 20
_HOLDERS = ("_reader", "_journey", "_told", "_unsaid")
_ASIDE = frozenset({"_family", "_markers", "_limit", "_offered"})
_OF_A_CALL = "pieces"  # a call's arguments must be told whole at its end; the cap on bytes bounds them


def held_by(exchange: Exchange) -> int:
    """Characters and bytes that the steps keep, whatever they call them."""
    return sum(_size(getattr(exchange, name), set()) for name in _HOLDERS)


def _size(thing: Any, seen: set[int]) -> int:
    if isinstance(thing, str | bytes):
        return len(thing)
    if thing is None or isinstance(thing, int | float | Family) or callable(thing) or id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return sum(_size(value, seen) for value in thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return sum(_size(value, seen) for value in thing)
    return sum(_size(value, seen) for name, value in _attributes(thing) if name not in _ASIDE and name != _OF_A_CALL)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(thing, "__dict__", {}).items()
    for kind in type(thing).__mro__:
        for name in getattr(kind, "__slots__", ()):
            yield name, getattr(thing, name, None)


def most_held(exchange: Exchange, reads: Iterable[bytes]) -> int:
    """The most that it keeps at any time of what it hears, beside what it was given at its start."""
    given = most = held_by(exchange)
    for data in reads:
        exchange.receive(EngineSpoke(data, STARTED))
        most = max(most, held_by(exchange))
    return most - given


FLOODS = {
    "spaces": " ",
    "lines": "\n",
    "half a marker": "<tool_cal",
    "angles": "<",
    "half an end": "</thin",
    "joiners": "\u200d",
    "flags": "🇩",
    "a call that never ends": '<tool_call>{"name": "f", "arguments": {"a": "x',
    "the end of a call": '<tool_call>{"name": "f", "arguments": {}     ',
    "a header that never ends": "<|channel|>analysis",
    "half a header": "<|chan",
    "half a stop string": "STO",
    "brackets": "[",
}


def _long(flood: str) -> str:
    """As much as fits into one line, escaped; forty of them are far more than may be held."""
    return (flood * 1000)[: LINE_BYTES // 16]


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
@pytest.mark.parametrize("policy", ["separate", "hide", "inline"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_flood(family: str, policy: Any, flood: str) -> None:
    for prefix in ("", "<think>", "Hi "):
        request = ask(tools=["f"], penstock={"stop": ["STOP"]})
        exchange = open_exchange(request, family=family, reasoning=policy, line_bytes=LINE_BYTES)
        reads = [chunks.content(prefix), *repeat(chunks.content(_long(flood)), 40)]  # more than may be held
        assert most_held(exchange, reads) <= MOST_HELD
        assert not exchange.is_over


# A call whose keys come in another order is kept until its end mark: here no call begins but those of the floods.
starts = st.lists(fragments.filter(lambda text: "tool_call>" not in text and "§!" not in text), max_size=4)


@thorough(300)
@given(starts, st.sampled_from(list(FLOODS.values())), families, policies)
def test_any_text_for_ever(start: list[str], flood: str, family: str, policy: Any) -> None:
    exchange = open_exchange(ask(tools=["f"]), family=family, reasoning=policy, line_bytes=LINE_BYTES)
    reads = map(chunks.content, [*start, *repeat(_long(flood), 40)])
    assert most_held(exchange, reads) <= MOST_HELD


@pytest.mark.parametrize(
    ("family", "begin"),
    [
        ("qwen3", "<tool_call>"),
        ("qwen3-coder", "<tool_call><function="),
        ("qwen3-coder", "<tool_call><function=f>"),
        ("qwen3", "<tool_call>no object"),
        ("mistral", "[TOOL_CALLS]<think>"),
    ],
)
def test_white_space_in_a_call(family: str, begin: str) -> None:
    exchange = open_exchange(ask(tools=["f"]), family=family, line_bytes=LINE_BYTES)
    reads = [chunks.content(begin), *repeat(chunks.content(_long(" ")), 40)]
    assert most_held(exchange, reads) <= MOST_HELD


@pytest.mark.parametrize(
    "flood",
    [
        b"data: " + b"x" * 999,
        b":" * 999,
        b": comment\n",
        b"event: e\n",
        b"\r",
        b"\n",
        b"data: x\n",
        b"unknown\n",
        b"id: 5\n",
    ],
)
def test_a_flood_of_lines(flood: bytes) -> None:
    exchange = open_exchange(line_bytes=LINE_BYTES)
    assert most_held(exchange, repeat(flood, 2000)) <= LINE_BYTES + len(flood) + 10


def test_a_flood_of_unknown_fields() -> None:
    exchange = open_exchange(line_bytes=LINE_BYTES)
    reads = (chunks.frame({"choices": [{"index": 0, "delta": {}, f"a{n}": "x"}], f"b{n}": "x"}) for n in range(5000))
    assert most_held(exchange, reads) < 1000


def test_a_flood_of_nameless_calls() -> None:
    exchange = open_exchange(ask(tools=["f"]), line_bytes=LINE_BYTES)
    assert most_held(exchange, (chunks.tool(n % 7) for n in range(5000))) < 1000


def test_a_flood_of_things_after_the_finish() -> None:
    exchange = open_exchange(line_bytes=LINE_BYTES)
    reads = [chunks.finish(), *repeat(chunks.content("x" * 100), 500)]
    assert most_held(exchange, reads) < 1000


def test_a_call_in_another_order_is_held_to_the_cap_on_bytes() -> None:
    flood = [chunks.content('<tool_call>{"arguments": {"a": "'), *repeat(chunks.content("x" * 100), 1000)]
    outcome = play(ask(tools=["f"]), flood, stream_bytes=20_000)
    assert outcome.record.ending is Ending.CAP_REACHED
    assert outcome.record.usage.sizes["generated"] < 21_000
