"""The frames of `docs/reference/frames.md`, version 1: the writer. The reader is in the sidecar.

A record is bytes, a message is the version and any number of records. Nothing here checks ranges beyond what
`struct` does by itself: a value that does not fit raises `struct.error`.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from struct import Struct, pack, unpack_from
from typing import Final

VERSION: Final = 1
MOST_CHOICES: Final = 256
LARGEST_STREAM: Final = 2**32 - 1
LOST_OUTBOX_FULL: Final = 1

_PREFIX = bytes([VERSION])
_MOST_IDS = 2**16 - 1
_MOST_STOP_BYTES = 2**16 - 1
MOST_STATE_BYTES: Final = 255

_BEGIN, _TOKENS, _FINISH, _END, _ERROR, _LOST = range(1, 7)

_ONE_TOKEN = Struct("<BIBBHI")
_FINISH_HEAD = Struct("<BIBBB")
_ERROR_HEAD = Struct("<BIHI")


class Channel(IntEnum):
    """Whose text a run of tokens is."""

    ANSWER = 0
    REASONING = 1
    TOOL = 2
    MARKER = 3


class Cause(IntEnum):
    """Why a choice ended."""

    UNKNOWN = 0
    EOS = 1
    STOP_TOKEN = 2
    STOP_STRING = 3
    MAX_TOKENS = 4
    GRAMMAR = 5
    ABORT = 6
    ERROR = 7
    REPETITION = 8


def message(records: Iterable[bytes]) -> bytes:
    return _PREFIX + b"".join(records)


def begin(stream: int, prompt_tokens: int, cached_tokens: int, prompt_end: Sequence[int], state: str) -> bytes:
    """`prompt_end` is as much of the prompt's end as matters; `state` the family's in which the model begins."""
    name, count = state.encode(), len(prompt_end)
    head = pack(f"<BIIII{count}I", _BEGIN, stream, prompt_tokens, cached_tokens, count, *prompt_end)
    return head + bytes([len(name)]) + name


def tokens(stream: int, choice: int, channel: int, ids: Sequence[int]) -> bytes:
    """One record; more ids than a record can count (65535) become several."""
    count = len(ids)
    if count == 1:
        return _ONE_TOKEN.pack(_TOKENS, stream, choice, channel, 1, ids[0])
    if count > _MOST_IDS:
        rest = tokens(stream, choice, channel, ids[_MOST_IDS:])
        return tokens(stream, choice, channel, ids[:_MOST_IDS]) + rest
    return pack(f"<BIBBH{count}I", _TOKENS, stream, choice, channel, count, *ids)


def finish(stream: int, choice: int, cause: int, reason: str, stop: int | str | None) -> bytes:
    """`stop` is the token id or the text that ended the choice; a text is cut to 65535 bytes of whole characters."""
    spelled = reason.encode("ascii", "replace")[:255]
    head = _FINISH_HEAD.pack(_FINISH, stream, choice, cause, len(spelled)) + spelled
    if stop is None:
        return head + b"\0"
    if isinstance(stop, int):
        return head + pack("<BI", 1, stop)
    text = stop.encode(errors="replace")
    if len(text) > _MOST_STOP_BYTES:
        text = text[:_MOST_STOP_BYTES].decode(errors="ignore").encode()
    return head + pack("<BH", 2, len(text)) + text


def end(stream: int) -> bytes:
    return pack("<BI", _END, stream)


def error(stream: int, status: int, body: bytes) -> bytes:
    """`body` is the engine's own error as JSON in UTF-8."""
    return _ERROR_HEAD.pack(_ERROR, stream, status, len(body)) + body


def lost(stream: int, why: int = LOST_OUTBOX_FULL) -> bytes:
    return pack("<BIB", _LOST, stream, why)


def stream_of(record: bytes) -> int:
    """The stream that a record, or several of one stream in a row, belong to."""
    stream: int = unpack_from("<I", record, 1)[0]
    return stream
