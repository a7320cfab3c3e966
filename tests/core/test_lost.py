"""A log that breaks off anywhere is closed so that the whole keeps every guarantee, and its bill is an estimate."""

from pathlib import Path

import orjson
import pytest

from penstock.core.commands import Ending
from penstock.core.dialects import Form
from penstock.core.lost import close_lost, refusal_of
from penstock.core.resuming import respell
from penstock.core.verifier import parse_log, verify

GOLDEN = sorted((Path(__file__).parents[1] / "vectors" / "golden").glob("*.ndjson"))
STREAM_ID = "st_00112233445566778899aabbccddeeff"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_prefix_of_a_log_is_closed_well(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [orjson.loads(line) for line in lines]
    for cut in range(1, len(lines)):
        closing = close_lost(lines[:cut], Form.NDJSON, "NativeNdjson", STREAM_ID, cut, 10_000)
        log = parse_log(b"".join(lines[:cut]) + closing.data)
        assert verify(log) == []
        assert log[-1]["seq"] == closing.last
        [usage] = [event for event in log if event["type"] == "usage" and event["final"]]
        had_its_bill = any(event["type"] == "usage" and event["final"] for event in whole[:cut])
        assert usage["estimated"] or had_its_bill
        billed = closing.record.usage
        assert (billed.completion_tokens, billed.estimated) == (usage["completion_tokens"], usage["estimated"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_stream_that_had_said_all_is_billed_as_it_said(path: Path) -> None:
    """Its replica died before the mark behind its end was written, and with it the bill."""
    lines = path.read_bytes().splitlines(keepends=True)
    usage, end = (orjson.loads(line) for line in lines[-2:])
    closing = close_lost(lines, Form.NDJSON, "NativeNdjson", STREAM_ID, len(lines), 10_000)
    assert (closing.data, closing.last) == (b"", len(lines))
    record = closing.record
    assert (record.usage.completion_tokens, record.usage.estimated) == (usage["completion_tokens"], usage["estimated"])
    assert record.duration_seconds * 1000 == pytest.approx(end["duration_ms"])
    errors = [event["code"] for line in lines if (event := orjson.loads(line))["type"] == "error"]
    assert [record.error_code] == (errors or [None])
    assert record.ending in (Ending.COMPLETED, Ending.CANCELLED, Ending.REPLICA_LOST)
    assert (record.ending is Ending.REPLICA_LOST) == (end["status"] == "failed")


def test_a_log_of_events_is_closed_in_its_own_spelling() -> None:
    lines = GOLDEN[0].read_bytes().splitlines(keepends=True)[:4]
    by_lines = close_lost(lines, Form.NDJSON, "NativeNdjson", STREAM_ID, 4, 10_000)
    by_events = close_lost(lines, Form.SSE, "NativeSse", STREAM_ID, 4, 10_000)
    assert respell(by_events.data, Form.SSE, Form.NDJSON) == by_lines.data
    assert respell(by_lines.data, Form.NDJSON, Form.SSE) == by_events.data


def test_the_bill_is_the_last_count_and_a_token_for_each_delta_behind_it() -> None:
    counts = {
        "prompt_tokens": 7, "cached_tokens": 3, "completion_tokens": 20, "reasoning_tokens": 15, "answer_tokens": 5,
        "tool_tokens": 0, "delivered_tokens": 20, "wasted_tokens_after_cancel": 0,
    }  # fmt: skip
    place = {"choice": 0, "block": 0}
    said = [
        {"type": "stream.start", "schema": "1.0", "model": "m", "choices": 1},
        {"type": "delta.role", "choice": 0, "role": "assistant"},
        {"type": "text.start", **place},
        {"type": "delta.text", **place, "text": "twenty"},
        {"type": "usage", **counts, "estimated": True, "bytes": {"generated": 6, "delivered": 6}, "final": False},
        {"type": "delta.text", **place, "text": "é"},
        {"type": "delta.text", **place, "text": "!"},
    ]
    lines = [orjson.dumps({**event, "stream_id": STREAM_ID, "seq": n, "ts": n}) for n, event in enumerate(said, 1)]
    closing = close_lost(lines, Form.NDJSON, "NativeNdjson", STREAM_ID, 7, 10_000)
    usage = closing.record.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.answer_tokens) == (7, 22, 7)
    assert usage.sizes["delivered"] == 9
    assert (closing.record.model, closing.record.finish_reasons) == ("m", ["error"])


def test_a_stream_that_had_said_nothing_is_refused_in_its_own_words() -> None:
    for form in (Form.SSE, Form.FOREIGN, Form.WHOLE):
        closing = close_lost([], form, "NativeSse" if form is Form.SSE else "ChatStream", STREAM_ID, 0, 10_000)
        assert (closing.data, closing.last) == (b"", 0)
    assert orjson.loads(refusal_of("NativeFolded"))["error"]["retryable"] is True
    assert orjson.loads(refusal_of("ChatWhole"))["error"]["type"] == "server_error"
