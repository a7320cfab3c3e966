"""Whatever way the engine's bytes are cut, the client gets the same."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.commands import Respond
from penstock.core.recording import parse_recording
from support import chunks
from support.golden import RECORDINGS
from support.playbook import FAMILY_NAMES, Json, Outcome, ask, play
from support.strategies import cuts, families, garbage, policies, spelled, streams, thorough

TOOLS = ["f", "g", "get_weather"]
_CALL_ENDS = ("tool_call.ready", "tool_call.end")
REQUEST = ask(n=2, tools=TOOLS)


def summary(outcome: Outcome) -> dict[str, Any]:
    """What must not depend on the cut: everything but how neighbouring deltas are merged, and the clock."""
    return {
        "answer": outcome.only(Respond) if outcome.count(Respond) else None,
        "types": outcome.types(),
        "finishes": outcome.finishes(),
        "calls": [{**event, "seq": 0} for name in _CALL_ENDS for event in outcome.all_of(name)],
        "ext": [event["ext"] for event in outcome.events if "ext" in event],
        "token_ids": [n for event in outcome.events for n in event.get("token_ids", ())],
        "usage": outcome.record.usage,
        "ending": outcome.record.ending,
    }


def assert_cut_does_not_matter(data: bytes, cuts: Sequence[int], body: Json = REQUEST, **setting: Any) -> None:
    uncut = play(body, [data], **setting)
    parts = play(body, [data], cuts=cuts, **setting)
    assert parts.exchange.is_over == uncut.exchange.is_over
    assert parts.contents() == uncut.contents()
    if uncut.exchange.is_over:
        assert summary(parts) == summary(uncut)


@thorough(700)
@given(st.data(), streams(), families, policies)
def test_a_stream(data: st.DataObject, frames: list[bytes], family: str, policy: Any) -> None:
    body = data.draw(spelled(frames))
    assert_cut_does_not_matter(body, data.draw(cuts(len(body))), family=family, reasoning=policy)


@thorough(600)
@given(st.data(), st.lists(garbage, max_size=4), streams())
def test_a_stream_with_things_that_nobody_should_say(
    data: st.DataObject, bad: list[bytes], frames: list[bytes]
) -> None:
    for frame in bad:
        frames.insert(data.draw(st.integers(0, len(frames))), frame)
    body = data.draw(spelled(frames))
    assert_cut_does_not_matter(body, data.draw(cuts(len(body))), line_bytes=1500)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_single_position(family: str) -> None:
    said = [
        "<thi",
        "nk>é👩‍💻</think>\n\n",
        '<tool_call>{"name":"f","arguments":{"a":"\\u00e9"}}</tool_call>',
        "<|call|>",
    ]
    body = b"\xef\xbb\xbf" + b"".join(chunks.answer_of(said)).replace(b"\n", b"\r\n")
    for position in range(1, len(body)):
        assert_cut_does_not_matter(body, [position], family=family)
    assert_cut_does_not_matter(body, list(range(1, len(body))), family=family)


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_what_a_real_engine_said(path: Any) -> None:
    recording = parse_recording(path.read_bytes(), path.name)
    if recording.is_event_stream and recording.status == 200:
        for size in (1, 2, 3, 7, 64, 1000):
            edges = list(range(size, len(recording.body), size))
            assert_cut_does_not_matter(recording.body, edges, body={**recording.request, "tool_choice": "auto"})
