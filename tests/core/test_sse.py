"""The event stream of the WHATWG text: vectors, each read at every cut, and what we write."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.sse import Frame, Parser, encode

VECTORS = Path(__file__).parent.parent / "vectors" / "sse"


def vectors() -> list[Any]:
    """Every case of every file: what was said and the frames that it is."""
    return [
        pytest.param(case["stream"].encode(), [_frame(frame) for frame in case["frames"]], id=case["name"])
        for path in sorted(VECTORS.glob("*.json"))
        for case in json.loads(path.read_text("utf-8"))["cases"]
    ]


def _frame(entry: dict[str, Any]) -> Frame:
    last_id = entry["id"]
    return Frame(entry["data"].encode(), entry["event"].encode(), None if last_id is None else last_id.encode())


def read(data: bytes, cuts: list[int], limit: int = 10_000) -> list[Frame]:
    parser = Parser(limit)
    edges = [0, *cuts, len(data)]
    return [frame for start, end in pairwise(edges) for frame in parser.feed(data[start:end])]


@pytest.mark.parametrize(("data", "frames"), vectors())
def test_a_vector_at_every_cut(data: bytes, frames: list[Frame]) -> None:
    assert read(data, []) == frames
    assert read(data, list(range(1, len(data)))) == frames
    for first in range(1, len(data)):
        assert read(data, [first]) == frames
        assert read(data, [first, first]) == frames, "an empty read is nothing"


def test_bytes_that_are_no_characters_are_passed_on() -> None:
    assert read(b"data:\xff\xfe \xe9\xf0\x9f\n\n", [8, 12]) == [Frame(b"\xff\xfe \xe9\xf0\x9f")]


pieces = st.sampled_from(
    [b"data", b":", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"event", b"id", b"a", b"data: x\n\n", b"\0"]
)


@given(st.lists(pieces, max_size=30).map(b"".join), st.data())
def test_any_bytes_at_any_cut(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    assert read(data, cuts) == read(data, [])


@pytest.mark.parametrize(
    "long",
    [
        b"data: " + b"x" * 100,
        b":" + b"x" * 100,
        b"x" * 101 + b"\n",
        b"data: 123456789\n" * 11 + b"\n",
        b"data:x\n" * 99,
    ],
)
@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_past_the_limit_nothing_more_is_read_and_nothing_before_is_lost(long: bytes, size: int) -> None:
    data = b"data: before\n\n" + long + b"\n\ndata: after\n\n"
    parser = Parser(limit=100)
    frames = [frame for start in range(0, len(data), size) for frame in parser.feed(data[start : start + size])]
    assert frames == [Frame(b"before")]
    assert parser.has_overflowed
    assert parser.feed(b"data: x\n\n") == []


def test_up_to_the_limit_all_is_read() -> None:
    line = b"data: " + b"x" * 94
    assert read(line + b"\n\n", [], limit=100) == [Frame(b"x" * 94)]
    assert read(line + b"\n\n", [50], limit=100) == [Frame(b"x" * 94)]


def test_what_is_written_is_read() -> None:
    data = encode(b"delta.text", b"st_1:7", b'{"text":"a"}')
    assert data == b'event: delta.text\nid: st_1:7\ndata: {"text":"a"}\n\n'
    assert Parser(1000).feed(data) == [Frame(b'{"text":"a"}', b"delta.text", b"st_1:7")]
