"""The plugin's frames, read: `docs/reference/frames.md`, byte by byte. The writer is in the plugin."""

import struct
from dataclasses import dataclass
from enum import IntEnum

VERSION = 1

_RECORD = struct.Struct("<BI")
_ONE_TOKEN = struct.Struct("<BIBBHI")
_BEGIN = struct.Struct("<III")
_TOKENS = struct.Struct("<BBH")
_FINISH = struct.Struct("<BBB")
_ERROR = struct.Struct("<HI")


class FrameError(ValueError):
    """A message that is not of this version of the contract; the connection cannot be trusted any more."""


class Tag(IntEnum):
    """The channel of a run of tokens."""

    ANSWER = 0
    REASONING = 1
    TOOL = 2
    MARKER = 3


CAUSES = ("unknown", "eos", "stop_token", "stop_string", "max_tokens", "grammar", "abort", "error", "repetition")


@dataclass(slots=True)
class Begin:
    stream: int
    prompt_tokens: int
    cached_tokens: int
    prompt_end: tuple[int, ...]
    state: str = ""


@dataclass(slots=True)
class Tokens:
    stream: int
    choice: int
    tag: Tag
    ids: tuple[int, ...]


@dataclass(slots=True)
class Finish:
    stream: int
    choice: int
    cause: str
    reason: str
    stop: int | str | None


@dataclass(slots=True)
class End:
    stream: int


@dataclass(slots=True)
class EngineFailed:
    stream: int
    status: int
    body: bytes


@dataclass(slots=True)
class Lost:
    stream: int
    why: int


Record = Begin | Tokens | Finish | End | EngineFailed | Lost

_TAGS = tuple(Tag)
_TOKENS_KIND = 2


def read_message(message: bytes) -> list[Record]:
    """The records of one binary message, in order. Raises `FrameError` on anything that the contract does not say."""
    if not message or message[0] != VERSION:
        raise FrameError(f"frame version {message[:1].hex() or 'missing'}; this reader knows {VERSION}")
    records: list[Record] = []
    position, size = 1, len(message)
    last_one_token = size - _ONE_TOKEN.size
    try:
        while position < size:
            if position <= last_one_token:  # a record of one token, nearly all there are: 0.5 us instead of 1.3
                kind, stream, choice, tag, count, token_id = _ONE_TOKEN.unpack_from(message, position)
                if kind == _TOKENS_KIND and count == 1:
                    records.append(Tokens(stream, choice, _TAGS[tag], (token_id,)))
                    position += _ONE_TOKEN.size
                    continue
            record, position = _read_record(message, position)
            records.append(record)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise FrameError(f"the message is cut or malformed after byte {position}: {error}") from None
    return records


def _read_record(message: bytes, position: int) -> tuple[Record, int]:
    kind, stream = _RECORD.unpack_from(message, position)
    position += _RECORD.size
    match kind:
        case 2:
            choice, tag, count = _TOKENS.unpack_from(message, position)
            if not count:
                raise FrameError(f"a run of no tokens at byte {position - _RECORD.size}")
            ids, position = _ids(message, position + _TOKENS.size, count)
            return Tokens(stream, choice, _TAGS[tag], ids), position
        case 1:
            prompt_tokens, cached_tokens, count = _BEGIN.unpack_from(message, position)
            ids, position = _ids(message, position + _BEGIN.size, count)
            state, position = _take(message, position + 1, message[position])
            return Begin(stream, prompt_tokens, cached_tokens, ids, state.decode()), position
        case 3:
            return _read_finish(message, stream, position)
        case 4:
            return End(stream), position
        case 5:
            status, length = _ERROR.unpack_from(message, position)
            body, position = _take(message, position + _ERROR.size, length)
            return EngineFailed(stream, status, body), position
        case 6:
            return Lost(stream, message[position]), position + 1
        case _:
            raise FrameError(f"record kind {kind} at byte {position - _RECORD.size} is not of version {VERSION}")


def _read_finish(message: bytes, stream: int, position: int) -> tuple[Finish, int]:
    choice, cause, length = _FINISH.unpack_from(message, position)
    reason, position = _take(message, position + _FINISH.size, length)
    kind = message[position]
    stop: int | str | None = None
    position += 1
    if kind == 1:
        (stop,) = struct.unpack_from("<I", message, position)
        position += 4
    elif kind == 2:
        (length,) = struct.unpack_from("<H", message, position)
        text, position = _take(message, position + 2, length)
        stop = text.decode()
    elif kind:
        raise FrameError(f"stop kind {kind} is not of version {VERSION}")
    return Finish(stream, choice, CAUSES[cause], reason.decode("ascii"), stop), position


def _ids(message: bytes, position: int, count: int) -> tuple[tuple[int, ...], int]:
    return struct.unpack_from(f"<{count}I", message, position), position + 4 * count


def _take(message: bytes, position: int, length: int) -> tuple[bytes, int]:
    piece = message[position : position + length]
    if len(piece) != length:
        raise FrameError(f"the message ends inside a record, at byte {len(message)}")
    return piece, position + length
