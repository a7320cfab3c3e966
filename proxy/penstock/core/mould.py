"""What stands around the text of a chunk: the same bytes token after token, so that they need not be read each time.

A mould is taken from a chunk that was read as JSON. A chunk fits where only a string and two counts differ from it: put
in the place of others of their kind, they leave its structure as it was. Whatever does not fit is read as JSON.
"""

import re
from typing import Any

import orjson

from penstock.core.events import Ext

_TEXT = re.compile(rb'"delta":\s*\{\s*"(content|reasoning|reasoning_content)":\s*"')
_COUNT = re.compile(rb'"(total_tokens|completion_tokens)":\s*(\d+)')
_ZERO = ord("0")
_MOST_DIGITS = 15
_FIELDS = frozenset({"index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"})
_FIELDS_BESIDE = frozenset({"id", "object", "created", "model", "choices", "usage"})


class Mould:
    """The bytes before the text, behind it, between the counts and behind those."""

    __slots__ = ("_before", "_behind", "_between", "_end", "_most", "_start", "_total_first", "choice", "field")

    def __init__(
        self, choice: int, field: str, before: bytes, behind: bytes, between: bytes, end: bytes, *, total_first: bool
    ) -> None:
        self.choice = choice
        self.field = field
        self._before = before
        self._start = len(before)
        self._behind = behind
        self._between = between
        self._end = end
        self._most = len(between) + len(end) + _MOST_DIGITS
        self._total_first = total_first

    def read(self, data: bytes) -> tuple[str, int] | None:
        """The text and the completion tokens so far, 0 where the engine does not count; None if it does not fit."""
        if not data.startswith(self._before):
            return None
        # The quote that ends the text is not escaped: of those that follow it here, none could stand in a string.
        cut = data.find(self._behind, self._start)
        if cut < 0:
            return None
        tokens = self._tokens(data[cut + len(self._behind) :])
        if tokens is None:
            return None
        try:
            return orjson.loads(data[self._start - 1 : cut + 1]), tokens
        except orjson.JSONDecodeError:
            return None

    def _tokens(self, rest: bytes) -> int | None:
        if not self._between:
            return None if rest else 0
        if not rest.endswith(self._end):
            return None
        first, _, second = rest[: -len(self._end)].partition(self._between)
        if not (first.isdigit() and second.isdigit()) or len(rest) > self._most:
            return None
        if first[0] == _ZERO or second[0] == _ZERO:
            return None
        return int(second if self._total_first else first)


def mould_of(data: bytes, chunk: Ext) -> Mould | None:
    """The mould of a chunk that is nothing but a piece of text, maybe with counts."""
    choice = _only_choice(chunk)
    places = list(_TEXT.finditer(data)) if choice is not None else []
    if choice is None or len(places) != 1:
        return None
    field, start = places[0][1].decode(), places[0].end()
    text, tokens = choice["delta"].get(field), (chunk.get("usage") or {}).get("completion_tokens", 0)
    end_of_text = _end_of_string(data, start)
    counts = list(_COUNT.finditer(data, end_of_text))
    if not chunk.get("usage"):
        parts, total_first = (data[end_of_text:], b"", b""), False
    elif len(counts) == 2:
        first, second = counts
        parts = (data[end_of_text : first.start(2)], data[first.end(2) : second.start(2)], data[second.end(2) :])
        total_first = first[1] == b"total_tokens"
    else:
        return None
    mould = Mould(choice.get("index", 0), field, data[:start], *parts, total_first=total_first)
    return mould if mould.read(data) == (text, tokens) else None


def _only_choice(chunk: Ext) -> dict[str, Any] | None:
    """The choice of a chunk that has one, with a delta of one field and nothing else that was said."""
    choices = chunk.get("choices")
    if not (chunk.keys() <= _FIELDS_BESIDE and isinstance(choices, list) and len(choices) == 1):
        return None
    choice = choices[0]
    said = [name for name, value in choice.items() if name not in ("index", "delta") and value is not None]
    is_plain = choice.keys() <= _FIELDS and not said and len(choice.get("delta") or ()) == 1
    return choice if is_plain else None


def _end_of_string(data: bytes, start: int) -> int:
    """Where the quote stands that ends the string that began before `start`."""
    position = start
    while data[position : position + 1] not in (b'"', b""):
        position += 2 if data[position : position + 1] == b"\\" else 1
    return position
