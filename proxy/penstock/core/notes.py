"""What a backend adds to a live stream, read from the body of its request."""

import re
from typing import Any

import orjson

from penstock.core.errors import CallerError
from penstock.core.signals import Annotated

_KIND = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_FIELDS = ("anchor", "data", "kind")
_ANCHOR = ("block", "choice", "length", "offset")
# A span of text that is taken back must be told exactly.
_SPAN = ("block", "offset", "length")
_MOST_DEPTH = 32


def read_note(body: bytes, now: float) -> Annotated:
    """The note in `body`. Raises `CallerError` naming the field, what was wrong and what to do."""
    try:
        note = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise CallerError("invalid_json", f"the annotation is not JSON: {error}") from None
    if not isinstance(note, dict):
        raise CallerError("invalid_json", "the annotation must be a JSON object with kind and data")
    if unknown := sorted(note.keys() - set(_FIELDS)):
        raise _wrong(unknown[0], f"is no field of an annotation; the fields are {', '.join(_FIELDS)}")
    kind, data = note.get("kind"), note.get("data", {})
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise _wrong("kind", "must be a word of small letters, such as citation, evidence, status, text, retraction")
    if not isinstance(data, dict) or _depth(data) > _MOST_DEPTH:
        raise _wrong("data", f"must be an object, nested at most {_MOST_DEPTH} deep")
    if kind == "text" and not isinstance(data.get("text"), str):
        raise _wrong("data.text", "must be the text, a string")
    return Annotated(kind, data, _anchor(note.get("anchor"), kind), now)


def _anchor(anchor: Any, kind: str) -> dict[str, int] | None:
    if anchor is None and kind != "retraction":
        return None
    if not isinstance(anchor, dict):
        raise _wrong("anchor", f"must be an object with any of {', '.join(_ANCHOR)}")
    for name, value in anchor.items():
        if name not in _ANCHOR or not _is_count(value):
            raise _wrong(f"anchor.{name}", f"must be one of {', '.join(_ANCHOR)}, a whole number from 0")
    if kind == "retraction" and (missing := [name for name in _SPAN if name not in anchor]):
        raise _wrong(f"anchor.{missing[0]}", "is missing; a retraction names block, offset and length")
    return anchor


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= _MOST_DEPTH:
        depth += 1
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
    return depth


def _wrong(name: str, what: str) -> CallerError:
    return CallerError("invalid_request", f"{name} {what}", param=name)
