"""What the model wrote is delivered or accounted for, to the byte, also when the stream breaks off anywhere.

`play` checks the sum for every stream. Here its left side is also known from outside, and every ending is tried.
"""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.signals import ClientLeft, EngineClosed
from support import chunks
from support.playbook import STARTED, Json, Step, ask, play
from support.strategies import families, model_texts, pieces_of, policies, signals, streams, thorough

TOOLS = ["f", "g", "get_weather"]
stops = st.lists(st.sampled_from(["STOP", "TO", "é", "\n\n", "</"]), max_size=2)


def request(stop: list[str], choices: int) -> Json:
    options: Json = {"penstock": {"stop": stop}} if stop else {}
    return ask(n=choices, tools=TOOLS, **options)


@thorough(1000)
@given(st.data(), model_texts, families, policies)
def test_the_bytes_of_a_whole_answer(data: st.DataObject, text: str, family: str, policy: Any) -> None:
    pieces = data.draw(pieces_of(text))
    outcome = play(ask(tools=TOOLS), chunks.answer_of(pieces), family=family, reasoning=policy)
    sizes = outcome.record.usage.sizes
    assert sizes["generated"] == len(text.encode())
    if policy == "separate":
        assert sizes["added"] == sizes["hidden"] == 0
    assert sizes["added"] % len("<think></think>") == 0, "what was opened was closed"
    if policy != "hide":
        assert sizes["hidden"] == 0
    assert sizes["stop"] == sizes["moderation"] == 0


@thorough(1000)
@given(st.data(), streams(), families, policies, stops, signals())
def test_a_stream_that_breaks_off(
    data: st.DataObject, frames: list[bytes], family: str, policy: Any, stop: list[str], signal: Any
) -> None:
    end = data.draw(st.integers(0, len(frames) - 1))
    steps: list[Step] = [*frames[:end], signal, *frames[end:], EngineClosed(None, STARTED + 1000)]
    assert play(request(stop, 2), steps, family=family, reasoning=policy).exchange.is_over


@thorough(700)
@given(st.data(), model_texts, families, policies)
def test_what_a_client_that_left_did_not_get(data: st.DataObject, text: str, family: str, policy: Any) -> None:
    pieces = data.draw(pieces_of(text))
    steps: list[Step] = [*map(chunks.content, pieces), ClientLeft(STARTED + 1)]
    record = play(ask(tools=TOOLS), steps, family=family, reasoning=policy).record
    assert record.usage.sizes["generated"] + _held_characters(text) >= len(text.encode())
    assert record.unsent_bytes <= len(text.encode())


def _held_characters(text: str) -> int:
    """A joiner or half a flag at the very end was never taken for written."""
    return 4 if text.endswith(("\u200d", "🇩", "🇯")) else 0
