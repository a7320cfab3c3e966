"""Stop strings in the answer: where they cut, what is held, what is counted."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Channel, Event, Extra, Finished, Role, Text, ToolDelta, Warned, Withheld
from penstock.core.stop_strings import StopStrings
from support.strategies import pieces_of, thorough


def answer(text: str, **more: Any) -> Text:
    return Text(0, Channel.ANSWER, text, **more)


def feed(step: StopStrings, *items: Event) -> list[Event]:
    return [event for item in items for event in step.feed([item])] + step.flush()


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def test_without_strings_nothing_is_looked_at() -> None:
    items: list[Event] = [answer("x")]
    assert StopStrings((), include=False).feed(items) is items


def first_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the string that is complete first; of two that end together, the longer."""
    found = [(start + len(stop), start) for stop in stops for start in range(len(text)) if text.startswith(stop, start)]
    return (min(found)[1], min(found)[0]) if found else None


@thorough(1000)
@given(st.data(), st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_string_that_is_complete_first_stops(data: st.DataObject, text: str, stops: list[str]) -> None:
    include = data.draw(st.booleans())
    step = StopStrings(tuple(stops), include=include)
    events = feed(step, *(answer(piece) for piece in data.draw(pieces_of(text))))
    found = first_end(text, stops)
    assert texts(events) == (text if found is None else text[: found[1] if include else found[0]])
    assert step.has_stopped(0) is (found is not None)
    if found is not None:
        (finished,) = [event for event in events if isinstance(event, Finished)]
        assert finished.stop_reason == text[found[0] : found[1]]


@pytest.mark.parametrize(
    "between",
    [
        Text(0, Channel.REASONING, "x"),
        ToolDelta(0, 0, "c", "f", ""),
        Withheld(0, "marker", "<x>"),
        Finished(0, "stop"),
        Text(0, Channel.ANSWER, "<think>", added=True),
        Text(0, Channel.ANSWER, "N", inlined=True),
        Text(0, Channel.ANSWER, "N", refusal=True),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_ends_half_a_string(between: Event) -> None:
    step = StopStrings(("END",), include=False)
    events = feed(step, answer("E"), between, answer("ND"))
    assert events[:2] == [answer("E"), between]
    assert not step.has_stopped(0)


@pytest.mark.parametrize(
    "between", [Extra(0, {"x": 1}), Role(0, "assistant"), Warned("x", "y"), Text(1, Channel.ANSWER, "x")]
)
def test_what_does_not_end_half_a_string(between: Event) -> None:
    step = StopStrings(("END",), include=False)
    feed(step, between)
    step.feed([answer("E")])
    step.feed([between])
    step.feed([answer("ND")])
    assert step.has_stopped(0)


def test_tokens_logprobs_and_ids_stay_with_their_text() -> None:
    step = StopStrings(("END",), include=False)
    pieces = [answer("xE", tokens=1, logprobs=[1], token_ids=[1]), answer("N", tokens=1, logprobs=[2], token_ids=[2])]
    first, second = feed(step, *pieces, answer("x", tokens=1, token_ids=[3]))
    assert first == answer("x", tokens=1, logprobs=[1], token_ids=[1])
    assert second == answer("ENx", tokens=2, logprobs=[2], token_ids=[2, 3])


def test_what_was_held_before_a_string_that_stops_at_once_goes_with_the_finish() -> None:
    step = StopStrings(("END",), include=False)
    events = feed(step, answer("E", tokens=1, logprobs=[1]), answer("ND", tokens=2, logprobs=[2], token_ids=[2]))
    (finished,) = [event for event in events if isinstance(event, Finished)]
    assert (finished.tokens, finished.logprobs, finished.token_ids) == (3, [1, 2], [2])


def test_a_stopped_choice_says_no_more_but_is_counted() -> None:
    step = StopStrings(("END",), include=True)
    events = feed(
        step,
        answer("END and"),
        Text(0, Channel.REASONING, "more", tokens=2),
        ToolDelta(0, 0, "c", "f", "{}", tokens=1),
        Withheld(0, "marker", "<x>"),
        Text(0, Channel.ANSWER, "</think>", added=True),
        Finished(0, "length"),
    )
    assert texts(events) == "END"
    assert [(event.text, event.tokens) for event in events if isinstance(event, Withheld)] == [
        (" and", 0),
        ("more", 2),
        ("{}", 1),
        ("<x>", 0),
    ]
    assert sum(isinstance(event, Finished) for event in events) == 1
