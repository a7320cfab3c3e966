"""What the plugin writes is what the contract says, byte for byte, and what the sidecar reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.frames import Begin, End, EngineFailed, Finish, Lost, Record, Tag, Tokens, read_message
from penstock_vllm import frames
from penstock_vllm.frames import Cause, Channel

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "frames").glob("*.json"))

numbers = st.integers(0, 2**32 - 1)
streams = st.integers(1, 2**32 - 1)
choices = st.integers(0, 255)
ids = st.lists(numbers, max_size=70)
text = st.text(max_size=60)


def written(record: dict[str, Any]) -> bytes:
    stream = record["stream"]
    match record["kind"]:
        case "begin":
            counts = record["prompt_tokens"], record["cached_tokens"]
            return frames.begin(stream, *counts, record["prompt_end"], record["state"])
        case "tokens":
            return frames.tokens(stream, record["choice"], Channel[record["channel"].upper()], record["ids"])
        case "finish":
            cause = Cause[record["cause"].upper()]
            return frames.finish(stream, record["choice"], cause, record["reason"], record["stop"])
        case "end":
            return frames.end(stream)
        case "error":
            return frames.error(stream, record["status"], record["body"].encode())
        case "lost":
            return frames.lost(stream, record["why"])
        case kind:
            raise AssertionError(f"a vector with a record of unknown kind {kind}")


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_each_vector_is_written_as_it_stands(path: Path) -> None:
    vector = json.loads(path.read_text("utf-8"))
    assert frames.message(map(written, vector["records"])).hex() == vector["bytes"]


def test_every_kind_channel_and_cause_has_a_vector() -> None:
    records = [record for path in VECTORS for record in json.loads(path.read_text("utf-8"))["records"]]
    assert {record["kind"] for record in records} == {"begin", "tokens", "finish", "end", "error", "lost"}
    assert {record["channel"] for record in records if "channel" in record} == {c.name.lower() for c in Channel}
    assert {record["cause"] for record in records if "cause" in record} == {c.name.lower() for c in Cause}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, Record]:
    """What is written, and what must be read of it."""
    stream = draw(streams)
    match draw(st.sampled_from(["begin", "tokens", "finish", "end", "error", "lost"])):
        case "begin":
            prompt, cached, end, state = draw(numbers), draw(numbers), draw(ids), draw(text)
            return frames.begin(stream, prompt, cached, end, state), Begin(stream, prompt, cached, tuple(end), state)
        case "tokens":
            choice, tag, run = draw(choices), draw(st.sampled_from(Tag)), draw(ids.filter(bool))
            return frames.tokens(stream, choice, tag, run), Tokens(stream, choice, tag, tuple(run))
        case "finish":
            choice, cause, stop = draw(choices), draw(st.sampled_from(Cause)), draw(st.none() | numbers | text)
            reason = draw(st.text(st.characters(codec="ascii"), max_size=20))
            told = Finish(stream, choice, cause.name.lower(), reason, stop)
            return frames.finish(stream, choice, cause, reason, stop), told
        case "error":
            status, body = draw(st.integers(0, 65535)), draw(st.binary(max_size=80))
            return frames.error(stream, status, body), EngineFailed(stream, status, body)
        case "lost":
            return frames.lost(stream), Lost(stream, 1)
        case _:
            return frames.end(stream), End(stream)


@given(st.lists(pairs(), max_size=12))
def test_the_sidecar_reads_what_the_plugin_wrote(records: list[tuple[bytes, Record]]) -> None:
    message = frames.message(written for written, _ in records)
    assert read_message(message) == [told for _, told in records]
    assert [frames.stream_of(written) for written, _ in records] == [told.stream for _, told in records]


def test_a_burst_longer_than_a_record_becomes_two() -> None:
    run = list(range(65536))
    first, second = read_message(frames.message([frames.tokens(1, 0, Channel.ANSWER, run)]))
    assert isinstance(first, Tokens)
    assert isinstance(second, Tokens)
    assert (first.ids, second.ids) == (tuple(run[:65535]), (65535,))


def test_a_long_stop_string_is_cut_between_characters() -> None:
    [record] = read_message(frames.message([frames.finish(1, 0, Cause.STOP_STRING, "stop", "é" * 40_000)]))
    assert isinstance(record, Finish)
    assert record.stop == "é" * 32767
