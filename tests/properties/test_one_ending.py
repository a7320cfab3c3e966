"""Whatever happens, in whatever order: nothing is raised, and every stream has one ending, complete and verified.

`play` checks that: one `Close`, last; one bill; a log with its first and its last event, in which `verify` finds
nothing wrong.
"""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.commands import Close
from penstock.core.signals import EngineAnswered, EngineClosed
from support import chunks
from support.playbook import STARTED, DialectName, Step, ask, open_exchange, play, tell
from support.strategies import (
    chunks_of_choice,
    families,
    garbage,
    policies,
    signals,
    streams,
    thorough,
    wrong_values,
)

STREAMED: list[DialectName] = ["ndjson", "sse", "folded", "chat"]
streamed = st.sampled_from(STREAMED)  # the engine is asked to stream
dialects = st.sampled_from([*STREAMED, "chat_whole"])
requests = st.builds(
    lambda n, stop, usage: ask(
        n=n,
        tools=["f", "g"],
        stream_options={"include_usage": True, "continuous_usage_stats": usage},
        penstock={"stop": ["STOP", "a"][:stop]} if stop else {},
    ),
    st.integers(1, 3),
    st.integers(0, 2),
    st.booleans(),
)
finishes = st.builds(chunks.finish, st.sampled_from(["stop", "length", "abort", "x"]), st.integers(0, 2))
steps = st.lists(
    st.one_of(st.integers(0, 2).flatmap(chunks_of_choice), garbage, finishes, signals(), st.just(chunks.DONE)),
    max_size=12,
)


@thorough(2000)
@given(steps, requests, streamed, families, policies)
def test_any_order_of_anything(said: list[Step], request: Any, dialect: Any, family: str, policy: Any) -> None:
    setting = {"dialect": dialect, "family": family, "reasoning": policy, "line_bytes": 2000, "stream_bytes": 20_000}
    outcome = play(request, [*_in_order(said), EngineClosed(None, STARTED + 10_000)], **setting)
    assert outcome.exchange.is_over
    assert outcome.exchange.receive(EngineClosed(None, STARTED + 10_001)) == []


@thorough(1000)
@given(st.data(), streams(3), st.lists(garbage, min_size=1, max_size=3), streamed)
def test_a_good_stream_with_something_bad_in_it(
    data: st.DataObject, frames: list[bytes], bad: list[bytes], dialect: Any
) -> None:
    for frame in bad:
        frames.insert(data.draw(st.integers(0, len(frames))), frame)
    request = ask(n=3, tools=["f", "g"])
    play(request, [*frames, EngineClosed(None, STARTED + 1)], dialect=dialect, line_bytes=2000)


wholes = st.recursive(
    st.one_of(
        wrong_values,
        st.fixed_dictionaries(
            {
                "choices": st.lists(
                    st.fixed_dictionaries({"index": st.integers(-1, 1) | wrong_values, "message": wrong_values})
                )
            }
        ),
        st.builds(
            lambda message, **more: json.loads(chunks.whole(message, **more)),
            st.dictionaries(
                st.sampled_from(
                    ["content", "reasoning", "reasoning_content", "refusal", "tool_calls", "role", "audio"]
                ),
                wrong_values | st.text(max_size=5),
            ),
            finish_reason=st.just("stop") | wrong_values,
            usage=wrong_values,
        ),
    ),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@thorough(1000)
@given(st.one_of(st.binary(max_size=40), wholes.map(lambda body: json.dumps(body).encode())), dialects, policies)
def test_any_whole_answer(body: bytes, dialect: Any, policy: Any) -> None:
    outcome = play(ask(tools=["f"]), [EngineAnswered(body, STARTED + 1)], dialect=dialect, reasoning=policy)
    assert outcome.exchange.is_over


@thorough(300)
@given(signals())
def test_every_signal_to_a_stream_that_has_heard_nothing(signal: Any) -> None:
    exchange = open_exchange()
    commands = exchange.start() + tell(exchange, signal)
    assert sum(isinstance(command, Close) for command in commands) == int(exchange.is_over)


def _in_order(said: list[Step]) -> list[Step]:
    """Signals with their times in order: a monotonic clock does not go back."""
    times = iter(sorted(step.now for step in said if not isinstance(step, bytes)))
    for step in said:
        if not isinstance(step, bytes):
            step.now = next(times)
    return said
