"""Cursors, and the bytes of a log cut at events and respelled."""

from pathlib import Path

import pytest

from penstock.core.dialects import Form
from penstock.core.errors import CallerError
from penstock.core.resuming import read_after, read_cursor, read_idempotency_key, respell, split

GOLDEN = sorted((Path(__file__).parents[1] / "vectors" / "golden").glob("*.ndjson"))


@pytest.mark.parametrize(
    ("header", "after", "cursor"),
    [(None, None, 0), ("", "3", 3), ("st_1:7", None, 7), ("7", None, 7), ("st_1:7", "3", 7), (None, "0", 0)],
)
def test_a_cursor(header: str | None, after: str | None, cursor: int) -> None:
    assert read_cursor("st_1", header, after) == cursor


@pytest.mark.parametrize(
    ("header", "after"),
    [("st_2:7", None), ("st_1:", None), ("x", None), (None, ""), (None, "-1"), (None, "1.0"), (None, "9" * 16)],
)
def test_no_cursor(header: str | None, after: str | None) -> None:
    with pytest.raises(CallerError, match=r"Last-Event-ID|after") as caught:
        read_cursor("st_1", header, after)
    assert (caught.value.status, caught.value.code) == (400, "invalid_cursor")


@pytest.mark.parametrize(("body", "cursor"), [(b"", 0), (b" ", 0), (b"{}", 0), (b'{"after": 12}', 12)])
def test_a_cursor_in_a_body(body: bytes, cursor: int) -> None:
    assert read_after(body) == cursor


@pytest.mark.parametrize("body", [b"12", b"[]", b"{", b'{"after": -1}', b'{"after": 1.5}', b'{"after": true}', b"\xff"])
def test_no_cursor_in_a_body(body: bytes) -> None:
    with pytest.raises(CallerError):
        read_after(body)


def test_idempotency_keys() -> None:
    assert read_idempotency_key(None) is None
    assert read_idempotency_key(' "8e03978e-40d5" ') == "8e03978e-40d5"
    for wrong in ("", " ", '""', "k" * 256, "é", "a\tb"):
        with pytest.raises(CallerError, match="Idempotency-Key"):
            read_idempotency_key(wrong)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_both_spellings_hold_the_same_and_come_apart_at_events(path: Path) -> None:
    lines = path.read_bytes()
    events = respell(lines, Form.NDJSON, Form.SSE)
    assert respell(events, Form.SSE, Form.NDJSON) == lines
    assert respell(lines, Form.NDJSON, Form.NDJSON) is lines
    apart = split(events, Form.SSE)
    assert b"".join(apart) == events
    assert len(apart) == len(split(lines, Form.NDJSON)) == lines.count(b"\n")
