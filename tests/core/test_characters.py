"""Whole characters, whatever an engine cuts: bytes of UTF-8, halves of UTF-16, joiners and flags."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.characters import WholeCharacters, decode_leniently
from support.strategies import CLUSTERS

ZWJ = "\u200d"
WOMAN, LAPTOP = "👩", "💻"
D, E = "🇩", "🇪"

texts = st.lists(
    st.one_of(st.sampled_from([*CLUSTERS, D, E, ZWJ, "💀"]), st.text(st.characters(codec="utf-8"), max_size=4)),
    max_size=9,
).map("".join)


def feed_all(pieces: list[str]) -> tuple[list[str], str, int]:
    """What each piece gave, what the end gave, and how many halves were dropped."""
    whole = WholeCharacters()
    given_out = [whole.feed(piece) for piece in pieces]
    return given_out, whole.flush(), whole.dropped


def utf8(*pieces: bytes) -> list[str]:
    return [decode_leniently(piece) for piece in pieces]


def ends_in_half_a_flag(text: str) -> bool:
    letters = len(text) - len(text.rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))
    return letters % 2 == 1


def assert_law(pieces: list[str], text: str) -> None:
    """Nothing is lost or replaced, and no piece ends where the visible character is provably unfinished.

    One joiner is held, so a joiner may end a piece where joiners follow each other, which joins nothing.
    """
    given_out, held, dropped = feed_all(pieces)
    assert "".join(given_out) + held == text
    assert dropped == 0
    given_out = [piece for piece in given_out if piece]
    for piece, following in pairwise([*given_out, held]):
        assert not any("\ud800" <= character <= "\udfff" for character in piece)
        is_unfinished = piece.endswith(ZWJ) or ends_in_half_a_flag(piece)
        assert not is_unfinished or following.startswith(ZWJ)


# --- The law --------------------------------------------------------------------------------------


@given(st.data(), texts)
def test_any_cut_of_utf_8_gives_the_text(data: st.DataObject, text: str) -> None:
    raw = text.encode()
    edges = data.draw(st.lists(st.integers(0, len(raw)), max_size=8).map(sorted))
    assert_law(utf8(*(raw[start:end] for start, end in pairwise([0, *edges, len(raw)]))), text)
    assert_law(utf8(*(bytes([byte]) for byte in raw)), text)


@given(st.data(), texts)
def test_any_cut_between_the_halves_of_utf_16_gives_the_text(data: st.DataObject, text: str) -> None:
    raw = text.encode("utf-16-le")
    edges = data.draw(st.lists(st.integers(0, len(raw) // 2), max_size=8).map(sorted))
    halves = [raw[2 * start : 2 * end] for start, end in pairwise([0, *edges, len(raw) // 2])]
    assert_law([half.decode("utf-16-le", "surrogatepass") for half in halves], text)
    every = [raw[n : n + 2] for n in range(0, len(raw), 2)]
    assert_law([half.decode("utf-16-le", "surrogatepass") for half in every], text)


# --- What is held, and for how long ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "given_out", "held"),
    [
        pytest.param(["Hi", "", "é", "漢"], ["Hi", "", "é", "漢"], "", id="whole characters wait for nothing"),
        pytest.param(["\ud83d", "\ude00"], ["", "😀"], "", id="halves of an escape"),
        pytest.param(["a\ud83d", "\ude00b"], ["a", "😀b"], "", id="halves among text"),
        pytest.param(["\ud83d", "\udc80"], ["", "💀"], "", id="a low half that looks like an undecoded byte"),
        pytest.param(["\ud83d\ude00"], ["😀"], "", id="both halves in one piece"),
        pytest.param(utf8(b"\xc3", b"\xa9"), ["", "é"], "", id="bytes of two"),
        pytest.param(utf8(b"\xe6", b"\xbc", b"\xa2"), ["", "", "漢"], "", id="bytes of three"),
        pytest.param(utf8(b"a\xf0\x9f", b"\x98", b"\x80b"), ["a", "", "😀b"], "", id="bytes of four"),
        pytest.param(utf8(b"\xc3\xa9\xe6\xbc"), ["é"], "", id="an unfinished end after a whole character"),
        pytest.param([WOMAN, ZWJ, LAPTOP], [WOMAN, "", ZWJ + LAPTOP], "", id="a joiner goes with what it joins"),
        pytest.param([WOMAN + ZWJ], [WOMAN], ZWJ, id="a joiner at the end of the field"),
        pytest.param([WOMAN + ZWJ + "\ud83d", "\udcbb"], [WOMAN, ZWJ + LAPTOP], "", id="a joiner and a half"),
        pytest.param(["a" + ZWJ + ZWJ], ["a" + ZWJ], ZWJ, id="of joiners in a row one is held"),
        pytest.param([D, E], ["", D + E], "", id="a flag in two"),
        pytest.param([D + E + D, E], [D + E, D + E], "", id="the second flag in two"),
        pytest.param([D + "\ud83c", "\uddea"], ["", D + E], "", id="one letter and half a letter"),
        pytest.param([D, "a"], ["", D + "a"], "", id="a letter that is no flag"),
        pytest.param(["a" + D], ["a"], D, id="a letter at the end of the field"),
        pytest.param(["a" + ZWJ + D, E], ["a", ZWJ + D + E], "", id="a joiner before half a flag"),
    ],
)
def test_what_each_piece_gives(pieces: list[str], given_out: list[str], held: str) -> None:
    assert feed_all(pieces)[:2] == (given_out, held)


@pytest.mark.parametrize(
    ("pieces", "text", "dropped"),
    [
        pytest.param(["a\ud83d"], "a", 1, id="a high half at the end"),
        pytest.param(["a\ud83d", "b"], "ab", 1, id="a high half before text"),
        pytest.param(["a\ude00b"], "ab", 1, id="a low half alone"),
        pytest.param(["\ud83d\ud83d", "\ude00"], "😀", 1, id="two high halves"),
        pytest.param(["\ud83d" + ZWJ], ZWJ, 1, id="a half before a joiner"),
        pytest.param(utf8(b"a\xff\xfeb"), "ab", 2, id="bytes of no character"),
        pytest.param(utf8(b"a\xf0\x9f"), "a", 2, id="bytes that are never completed"),
        pytest.param(utf8(b"\xf0\x9f", b"a"), "a", 2, id="bytes interrupted by text"),
        pytest.param(utf8(b"\x80\x80\x80\x80"), "", 4, id="continuations without a lead"),
        pytest.param([*utf8(b"\xc3"), "\ud83d"], "", 2, id="a byte and a half"),
        pytest.param(utf8(b"\xed\xa0\x80"), "", 3, id="a surrogate spelled in UTF-8"),
        pytest.param(["\ufffd"], "\ufffd", 0, id="the model's own U+FFFD is text"),
    ],
)
def test_what_never_becomes_a_character_is_dropped_and_counted(pieces: list[str], text: str, dropped: int) -> None:
    given_out, held, counted = feed_all(pieces)
    assert ("".join(given_out) + held, counted) == (text, dropped)


def test_after_the_end_of_a_field_it_begins_anew() -> None:
    whole = WholeCharacters()
    assert (whole.feed("a\ud83d"), whole.flush(), whole.flush()) == ("a", "", "")
    assert whole.feed("\ude00b") == "b"
    assert whole.dropped == 2


def test_no_more_is_held_than_one_character_and_a_joiner() -> None:
    whole = WholeCharacters()
    given_out = sum(len(whole.feed(ZWJ)) for _ in range(1000))
    assert given_out == 999
