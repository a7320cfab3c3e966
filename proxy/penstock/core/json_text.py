"""Where values stand in JSON text, also in text that comes in pieces."""

import json
import re

_BETWEEN = re.compile(r"[ \t\r\n,:]*")


class ObjectEnd:
    """Finds where a JSON object ends. Each character is looked at once; `depth` brackets are open already."""

    _OUTSIDE = re.compile(r'["{}\[\]]')
    _INSIDE = re.compile(r'["\\]')

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The position right after the object's last brace, or None while it is open."""
        position = 0
        if self._escaped and text:
            self._escaped, position = False, 1
        while found := (self._INSIDE if self._in_string else self._OUTSIDE).search(text, position):
            position = found.end()
            match found.group():
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._escaped = position == len(text)
                    position += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth == 0:
                        return position
        return None


def value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where each value of the (valid) JSON object `text` stands."""
    decoder, spans = json.JSONDecoder(strict=False), {}
    position = _skip(text, text.index("{") + 1)
    while text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        start = _skip(text, position)
        _, end = decoder.raw_decode(text, start)
        spans[key] = (start, end)
        position = _skip(text, end)
    return spans


def _skip(text: str, position: int) -> int:
    """The next position that is neither space nor a separator of JSON."""
    found = _BETWEEN.match(text, position)
    return found.end() if found else position
