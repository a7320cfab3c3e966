"""The tagger's meaning, written down as simply as it can be: over all ids at once, by positions in their text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

CHANNELS = {"answer": 0, "reasoning": 1, "tool": 2, "markup": 3}
MARKER = 3


@dataclass(frozen=True)
class FakeVocabulary:
    """Ids are positions in `pieces`; `added` are those that are met by their id."""

    pieces: Sequence[bytes]
    added: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[int] = frozenset()

    def added_id(self, text: str) -> int | None:
        return self.added.get(text)

    def piece(self, token_id: int) -> bytes:
        return self.pieces[token_id] if token_id < len(self.pieces) else b""

    def prompt_end(self, prompt: Sequence[int], *, skips_special: bool) -> Sequence[int]:
        return prompt[-64:]


def tags(family: Mapping[str, Any], vocabulary: FakeVocabulary, ids: Sequence[int]) -> list[int]:
    """The channel of each id. No piece may be empty."""
    ends = list(accumulate(len(vocabulary.piece(number)) for number in ids))
    text = b"".join(map(vocabulary.piece, ids))
    found: list[int | None] = [None] * len(ids)
    states = family["states"]
    state, position, header_start = states[family["start"]], 0, 0
    while True:
        start, end, target = _next_marker(state, vocabulary, ids, ends, text, position)
        waits = state.get("otherwise")
        other = re.search(rb"\S", text[position:start])
        if waits is not None and other is not None:
            _tag(found, ends, position + other.start(), CHANNELS[state["channel"]])
            state, position = states[waits], position + other.start()
            header_start = position
            continue
        _tag(found, ends, start, CHANNELS[state["channel"]])
        if target is None:
            return [CHANNELS[state["channel"]] if tag is None else tag for tag in found]
        _tag(found, ends, end, MARKER, parts_too=True)
        header = text[header_start:start].decode(errors="replace")
        for pattern, other_target in state.get("headers", ()) if state["channel"] == "markup" else ():
            if re.search(pattern, header):
                target = other_target
                break
        state, position, header_start = states[target], end, end


def _next_marker(
    state: Mapping[str, Any],
    vocabulary: FakeVocabulary,
    ids: Sequence[int],
    ends: Sequence[int],
    text: bytes,
    position: int,
) -> tuple[int, int, str | None]:
    """Start, end and target of the first marker from `position` on; the end of the text twice where there is none."""
    by_id = {vocabulary.added[marker]: target for marker, target in state["on"].items() if marker in vocabulary.added}
    spelled = {marker.encode(): target for marker, target in state["on"].items() if marker not in vocabulary.added}
    until, end, target = len(text), len(text), None
    for number, after in zip(ids, ends, strict=True):
        before = after - len(vocabulary.piece(number))
        if number in by_id and before >= position:
            until, end, target = before, after, by_id[number]
            break
    match = re.search(b"|".join(map(re.escape, spelled)), text[position:until]) if spelled else None
    if match is not None:
        return position + match.start(), position + match.end(), spelled[match.group()]
    return until, end, target


def _tag(found: list[int | None], ends: Sequence[int], until: int, tag: int, *, parts_too: bool = False) -> None:
    """Tags what is not tagged yet and ends by `until`; `parts_too`: or begins before it."""
    start = 0
    for place, end in enumerate(ends):
        if found[place] is None and (end <= until or (parts_too and start < until)):
            found[place] = tag
        start = end
