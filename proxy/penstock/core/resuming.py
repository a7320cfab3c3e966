"""How a stream is taken up again: what a cursor says, and how logged bytes are cut at an event and respelled.

A log holds the very bytes that went to the client, one write an entry, so that a replay is byte-identical (G8). The
edge between two events of one entry is found in the bytes: JSON has no line break of its own.
"""

import re

import orjson

from penstock.core import sse
from penstock.core.dialects import Form
from penstock.core.errors import CallerError

_SEQ = re.compile(r"[0-9]{1,15}")
_MOST_KEY = 255


def read_cursor(stream_id: str, last_event_id: str | None, after: str | None) -> int:
    """The number of the last event that the caller has, 0 for none.

    `last_event_id` is what the header says, `<stream_id>:<seq>` or a bare number; it beats `after`, because an
    EventSource reconnects to the same URL. Raises `CallerError` (400) naming what is wrong.
    """
    if last_event_id:
        name, _, seq = last_event_id.rpartition(":")
        if name and name != stream_id:
            message = f"Last-Event-ID {last_event_id[:80]!a} is of another stream than {stream_id}"
            raise CallerError("invalid_cursor", message, param="Last-Event-ID")
        return _number(seq, "Last-Event-ID")
    return _number(after, "after") if after is not None else 0


def read_after(body: bytes) -> int:
    """The cursor in the body of a resume, `{"after": SEQ}`; an empty body or object is the start."""
    if not body.strip():
        return 0
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise CallerError("invalid_json", f"the request body is not JSON: {error}") from None
    if not isinstance(asked, dict) or asked.keys() - {"after"}:
        raise CallerError("invalid_cursor", 'the body of a resume must be like {"after": 12}', param="after")
    after = asked.get("after", 0)
    if type(after) is not int or not 0 <= after < 10**15:
        raise CallerError("invalid_cursor", f"after is {after!r}; it must be the seq of an event", param="after")
    return after


def read_idempotency_key(value: str | None) -> str | None:
    """The caller's `Idempotency-Key`, or None. Raises `CallerError` where it is no sensible key."""
    if value is None:
        return None
    key = value.strip().strip('"')
    if not key or len(key) > _MOST_KEY or not key.isascii() or not key.isprintable():
        message = f"Idempotency-Key must be 1 to {_MOST_KEY} printable ASCII characters, like a UUID"
        raise CallerError("invalid_request", message, param="Idempotency-Key")
    return key


def _number(text: str, name: str) -> int:
    if not _SEQ.fullmatch(text):
        message = f"{name} is {text[:80]!a}; it must be the id of the last event that was read, or its number"
        raise CallerError("invalid_cursor", message, param=name)
    return int(text)


def split(data: bytes, form: Form) -> list[bytes]:
    """The events of one entry, each as it went over the wire."""
    if form is Form.SSE:
        return [frame + b"\n\n" for frame in data.split(b"\n\n")[:-1]]
    return data.splitlines(keepends=True)


def respell(data: bytes, have: Form, want: Form) -> bytes:
    """Native events from one native spelling into the other; the JSON of each stays as it is, byte for byte."""
    if have is want:
        return data
    if want is Form.NDJSON:
        return b"".join(line[6:] + b"\n" for line in data.split(b"\n") if line.startswith(b"data: "))
    return b"".join(map(_frame, data.splitlines()))


def bodies(data: bytes, form: Form) -> list[bytes]:
    """The JSON of each event in `data`."""
    return respell(data, form, Form.NDJSON).splitlines()


def _frame(line: bytes) -> bytes:
    event = orjson.loads(line)
    event_id = f"{event['stream_id']}:{event['seq']}"
    return sse.encode(event["type"].encode(), event_id.encode(), line)
