"""The plugin's frames, read: every vector of the contract, whatever a writer may say, and whatever nobody should."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.core.frames import (
    CAUSES,
    VERSION,
    Begin,
    End,
    EngineFailed,
    Finish,
    FrameError,
    Lost,
    Record,
    Tag,
    Tokens,
    read_message,
)
from support.fake_plugin import write
from support.strategies import thorough

Json = dict[str, Any]

VECTORS = Path(__file__).parents[1] / "vectors" / "frames"
WELL_FORMED = sorted(VECTORS.glob("*.json"))
MALFORMED = sorted((VECTORS / "malformed").glob("*.json"))


def load(path: Path) -> tuple[Json, bytes]:
    vector: Json = json.loads(path.read_text("utf-8"))
    return vector, bytes.fromhex(vector["bytes"])


def as_vector(record: Record) -> Json:
    """A record as the vectors spell it."""
    match record:
        case Begin(stream, prompt_tokens, cached_tokens, prompt_end, state):
            counts = {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens}
            return {"kind": "begin", "stream": stream, **counts, "prompt_end": list(prompt_end), "state": state}
        case Tokens(stream, choice, tag, ids):
            return {"kind": "tokens", "stream": stream, "choice": choice, "channel": tag.name.lower(), "ids": list(ids)}
        case Finish(stream, choice, cause, reason, stop):
            end = {"cause": cause, "reason": reason, "stop": stop}
            return {"kind": "finish", "stream": stream, "choice": choice, **end}
        case End(stream):
            return {"kind": "end", "stream": stream}
        case EngineFailed(stream, status, body):
            return {"kind": "error", "stream": stream, "status": status, "body": body.decode()}
        case Lost(stream, why):
            return {"kind": "lost", "stream": stream, "why": why}


# --- Whatever a writer may say ------------------------------------------------------------------------

u8, u16, u32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
ascii_texts = st.text(st.characters(codec="ascii"), max_size=255)
utf8_texts = st.text(st.characters(codec="utf-8"), max_size=40)
names = utf8_texts.filter(lambda text: len(text.encode()) < 256)
some_ids = st.lists(u32, max_size=70).map(tuple)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(Begin, u32, u32, u32, some_ids, names),
    st.builds(Tokens, u32, u8, st.sampled_from(Tag), some_ids.filter(len)),
    st.builds(Finish, u32, u8, st.sampled_from(CAUSES), ascii_texts, st.none() | u32 | utf8_texts),
    st.builds(End, u32),
    st.builds(EngineFailed, u32, u16, st.binary(max_size=300)),
    st.builds(Lost, u32, u8),
)
messages = st.lists(records, max_size=8)


# --- Tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WELL_FORMED, ids=lambda path: path.stem)
def test_a_vector_is_read_as_it_says(path: Path) -> None:
    vector, data = load(path)
    found = read_message(data)
    assert [as_vector(record) for record in found] == vector["records"]
    assert write(found) == data


def test_the_vectors_show_every_kind_channel_and_cause() -> None:
    shown = [record for path in WELL_FORMED for record in load(path)[0]["records"]]
    assert {record["kind"] for record in shown} == {"begin", "tokens", "finish", "end", "error", "lost"}
    assert {record["channel"] for record in shown if "channel" in record} == {tag.name.lower() for tag in Tag}
    assert {record["cause"] for record in shown if "cause" in record} == set(CAUSES)


@pytest.mark.parametrize("path", MALFORMED, ids=lambda path: path.stem)
def test_what_the_contract_does_not_say_is_refused(path: Path) -> None:
    with pytest.raises(FrameError):
        read_message(load(path)[1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "version missing"),
        (b"\x07\x04\x01\0\0\0", "version 07"),
        (b"\x01\x63\x01\0\0\0", "record kind 99 at byte 1"),
        (b"\x01\x04\x01\0\0\0\x02\x01\0\0\0\0\0\0\0", "no tokens at byte 6"),
        (b"\x01\x03\x01\0\0\0\0\0\0\x09", "stop kind 9"),
        (b"\x01\x04\x01\0", "after byte 1"),
    ],
)
def test_the_reason_says_what_and_where(data: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        read_message(data)


@thorough(300)
@given(messages)
def test_what_is_written_is_read(said: list[Record]) -> None:
    assert read_message(write(said)) == said


@thorough(300)
@given(messages.filter(len), st.data())
def test_a_message_that_was_cut_is_refused_or_ends_with_a_whole_record(said: list[Record], data: st.DataObject) -> None:
    """A cut between two records cannot be seen; WebSocket messages are never cut."""
    whole = write(said)
    ends = {len(write(said[:count])): count for count in range(len(said) + 1)}
    cut = data.draw(st.integers(0, len(whole) - 1))
    if cut in ends:
        assert read_message(whole[:cut]) == said[: ends[cut]]
    else:
        with pytest.raises(FrameError):
            read_message(whole[:cut])


@pytest.mark.parametrize("path", WELL_FORMED, ids=lambda path: path.stem)
def test_every_cut_of_a_vector(path: Path) -> None:
    data = load(path)[1]
    ends = {len(write(read_message(data)[:count])) for count in range(len(read_message(data)) + 1)}
    for cut in set(range(len(data))) - ends:
        with pytest.raises(FrameError):
            read_message(data[:cut])


@thorough(1000)
@given(st.binary(max_size=120))
@example(b"\x01\x05\x01\0\0\0\xf4\x01\xff\xff\xff\xff")
@example(b"\x01\x01\x01\0\0\0" + b"\0" * 8 + b"\xff\xff\xff\xff")
def test_bytes_that_nobody_should_send_are_read_or_refused(data: bytes) -> None:
    read_or_refused(data)
    read_or_refused(bytes([VERSION]) + data)


@thorough(300)
@given(messages.filter(len), st.data())
def test_one_wrong_byte_is_read_or_refused(said: list[Record], data: st.DataObject) -> None:
    spoiled = bytearray(write(said))
    spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(u8)
    read_or_refused(bytes(spoiled))


def read_or_refused(data: bytes) -> None:
    """Nothing but `FrameError` is ever raised, and what is read says exactly these bytes."""
    try:
        found = read_message(data)
    except FrameError:
        return
    assert write(found) == data
