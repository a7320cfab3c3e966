"""Citations in the answer: held until whole, anchored where they stood, and everything else left alone."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.citations import CitationPattern
from penstock.core.signals import Annotated
from support import chunks
from support.playbook import STARTED, Outcome, Step, ask, play
from support.strategies import pieces_of, thorough

NUMBERS = CitationPattern("[", "]", r"(?P<source>\d{1,3})(?:,\s*\d{1,3})*")
LENTICULAR = CitationPattern("【", "】", r"[^【】]+")
TAGS = CitationPattern("<cite", "</cite>", r'(?: id="(?P<id>\w+)")?>(?P<title>[^<]*)', keeps=True)
ALL = (NUMBERS, LENTICULAR, TAGS)


def said(pieces: list[str], patterns: Any = ALL, **request: Any) -> Outcome:
    return play(ask(**request), chunks.answer_of(pieces), citations=patterns)


def notes(outcome: Outcome) -> list[tuple[Any, Any]]:
    return [(event["data"], event["anchor"]) for event in outcome.all_of("annotation")]


def anchor(offset: int, length: int = 0, block: int = 0) -> dict[str, int]:
    return {"choice": 0, "block": block, "offset": offset, "length": length}


TEXT = 'é[1] and 【a†b】, [12, 3] <cite id="x">T</cite> [link](u) [] [1234] 5'
SHOWN = 'é and ,  <cite id="x">T</cite> [link](u) [] [1234] 5'
FOUND = [
    ({"marker": "[1]", "text": "1", "source": "1"}, anchor(1)),
    ({"marker": "【a†b】", "text": "a†b"}, anchor(6)),
    ({"marker": "[12, 3]", "text": "12, 3", "source": "12"}, anchor(8)),
    ({"marker": '<cite id="x">T</cite>', "text": ' id="x">T', "id": "x", "title": "T"}, anchor(9, 21)),
]


def cuts() -> list[list[str]]:
    two = [[TEXT[:at], TEXT[at:]] for at in range(1, len(TEXT))]
    edges = [[0, *range(size, len(TEXT), size), len(TEXT)] for size in (1, 2, 3, 7)]
    return [[TEXT], *two, *([TEXT[start:end] for start, end in pairwise(edge)] for edge in edges)]


@pytest.mark.parametrize("pieces", cuts(), ids=range(len(cuts())))
def test_citations_however_they_are_cut(pieces: list[str]) -> None:
    outcome = said(pieces)
    assert outcome.blocks() == [f"text: {SHOWN}"]
    assert notes(outcome) == FOUND


def test_a_citation_comes_in_its_order_with_the_text() -> None:
    outcome = said(["a[1]", "b"])
    assert [event.get("text", event["type"]) for event in outcome.events[3:6]] == ["a", "annotation", "b"]


def test_what_can_be_no_marker_any_more_goes_out_at_once() -> None:
    step = play(ask(), [chunks.role(), chunks.content("a [li")], citations=ALL)
    assert step.blocks() == ["text: a [li"]
    assert play(ask(), [chunks.role(), chunks.content("a [1")], citations=ALL).blocks() == ["text: a "]


def test_a_marker_longer_than_its_bound_is_text() -> None:
    pattern = CitationPattern("【", "】", ".*", longest=8)
    for text, count in (("【123456】", 1), ("【1234567】", 0)):
        for pieces in ([text], list(text)):
            assert len(notes(said(pieces, [pattern]))) == count


def test_a_citation_may_be_the_first_thing() -> None:
    outcome = said(["[1]Hi"])
    assert (outcome.blocks(), notes(outcome)[0][1]) == (["text: Hi"], anchor(0))


def test_reasoning_is_not_searched_and_the_request_may_say_no() -> None:
    assert said(["<think>[1]</think>", "x"]).blocks() == ["reasoning: [1]", "text: x"]
    quiet = said(["[1]x"], penstock={"annotations": {"citations": False}})
    assert (quiet.blocks(), notes(quiet)) == (["text: [1]x"], [])


def test_an_unfinished_marker_is_text_at_the_end_and_before_a_call() -> None:
    assert said(["a[1"]).blocks() == ["text: a[1"]
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert said(["a[1", call], tools=["f"]).blocks() == ["text: a[1", "tool_call: f({})"]


@thorough(300)
@given(st.data(), st.text(st.sampled_from('[]【】<>/cite12,a ="id'), max_size=30))
def test_nothing_is_lost_and_no_cut_matters(data: st.DataObject, text: str) -> None:
    whole, cut = said([text]), said(data.draw(pieces_of(text)))
    assert (whole.contents(), notes(whole)) == (cut.contents(), notes(cut))
    assert whole.usage()["bytes"] == cut.usage()["bytes"]


# --- What backends add ----------------------------------------------------------------------------

NOTE = Annotated("status", {"text": "searching"}, None, STARTED)


def test_a_note_has_its_place_and_number() -> None:
    steps: list[Step] = [chunks.role(), chunks.content("a"), NOTE, *chunks.answer_of(["b"])[1:]]
    outcome = play(ask(), steps)
    assert [event["type"] for event in outcome.events[3:6]] == ["delta.text", "annotation", "delta.text"]
    note = outcome.one("annotation")
    assert (note["kind"], note["data"], "choice" in note) == ("status", {"text": "searching"}, False)


def test_a_note_that_comes_before_the_first_word_waits_for_it() -> None:
    outcome = play(ask(), [NOTE, *chunks.answer_of(["b"])])
    assert [event["type"] for event in outcome.events[:3]] == ["stream.start", "annotation", "delta.role"]
    assert outcome.events[-1]["events"] == len(outcome.events)


def test_a_note_to_a_stream_that_fails_before_its_first_word() -> None:
    outcome = play(ask(), [NOTE, chunks.error()])
    assert outcome.events == []


def test_a_note_is_left_out_where_the_dialect_has_no_word_for_it() -> None:
    request = ask(stream=True)
    with_note = play(request, [chunks.role(), NOTE, *chunks.answer_of(["b"])[1:]], dialect="chat")
    assert with_note.data == play(request, chunks.answer_of(["b"]), dialect="chat").data
