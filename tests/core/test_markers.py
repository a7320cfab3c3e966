"""Words looked for in text that comes in pieces, against brute force."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from penstock.core.markers import Markers
from support.strategies import cut, cuts

# Few letters and a sign of regular expressions, so that words overlap often.
letters = st.text("ab]", min_size=1, max_size=4)
texts = st.text("ab]x", max_size=12)


@st.composite
def sets_of_markers(draw: st.DrawFn) -> Markers:
    words = draw(st.lists(letters, max_size=4, unique=True))
    assume(not any(word in other[:-1] for word in words for other in words))
    return Markers(words)


def longest_unfinished_end(words: tuple[str, ...], text: str) -> int:
    ends = [text[start:] for start in range(len(text))]
    return max((len(end) for end in ends for word in words if word.startswith(end) and word != end), default=0)


@given(sets_of_markers(), texts)
def test_unfinished_is_the_longest_end_that_may_still_become_a_marker(markers: Markers, text: str) -> None:
    assert markers.unfinished(text) == longest_unfinished_end(markers.words, text)


@given(sets_of_markers(), texts)
def test_may_begin_is_true_of_proper_beginnings_only(markers: Markers, text: str) -> None:
    assert markers.may_begin(text) == any(word.startswith(text) and word != text for word in markers.words)


@given(sets_of_markers(), texts)
def test_the_quick_way_out_is_taken_only_where_no_marker_is_or_begins(markers: Markers, text: str) -> None:
    if markers.are_excluded_by(text):
        assert not any(word in text for word in markers.words)
        assert markers.unfinished(text) == 0


@given(st.data(), sets_of_markers(), texts)
def test_what_is_found_does_not_depend_on_the_cut(data: st.DataObject, markers: Markers, text: str) -> None:
    pieces = cut(text, data.draw(cuts(len(text)))) if len(text) > 1 else [text]
    assert parts(markers, pieces) == parts(markers, [text])


def parts(markers: Markers, pieces: list[str]) -> list[str]:
    """The text between markers and the markers, by turns, as a step finds them that holds what it must."""
    found, held = [""], ""
    for piece in pieces:
        held += piece
        while match := markers.pattern.search(held):
            found[-1] += held[: match.start()]
            found += [match.group(), ""]
            held = held[match.end() :]
        free = len(held) - markers.unfinished(held)
        found[-1] += held[:free]
        held = held[free:]
    return [*found[:-1], found[-1] + held]


def test_without_words_nothing_is_found_or_held() -> None:
    markers = Markers(())
    assert markers.are_excluded_by("<think>")
    assert (markers.pattern.search("<think>"), markers.unfinished("<think>"), markers.may_begin("")) == (None, 0, False)


def test_a_marker_is_found_after_half_of_itself() -> None:
    markers = Markers(["</think>"])
    assert markers.unfinished("a </thin") == len("</thin")
    assert markers.unfinished("a </thin</") == len("</")
    assert markers.unfinished("a </think>") == 0, "it is whole, so it is found, not held"


@pytest.mark.parametrize("words", [["a", ""], ["<a>", "x<a>x"], ["ab", "abc"], ["b", "abc"]])
def test_words_that_would_depend_on_the_cut_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="is empty or stands within another"):
        Markers(words)


def test_a_word_may_end_another() -> None:
    found = Markers(["b", "ab"]).pattern.search("ab")
    assert found is not None
    assert found.group() == "ab"
