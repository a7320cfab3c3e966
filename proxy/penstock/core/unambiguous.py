"""Whether a repetition can match the same text in more than one way, which is what makes backtracking explode.

A repetition is read as an automaton whose states are the places of the expression (Glushkov). Two different
paths over the same text show in the automaton of pairs: it leaves the diagonal and can still get to the end.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

Ranges = list[tuple[int, int]]
# A repetition within a repetition is written out up to here; longer ones count as endless, which errs towards refusal.
_MOST_COPIES = 12
_MOST_PLACES = 160
# Neighbours that match the same letters may divide them in this many ways, at most.
_MOST_DIVISIONS = 100_000


def explosive_part(nodes: Sequence[Any], ignore_case: bool) -> str | None:
    """The first part that could cost exponential time, in words; None if there is none.

    A node is ("set", ranges), ("any of", sequences) or ("repeat", low, high, sequence, its own text).
    """
    for node in nodes:
        if node[0] == "any of":
            for branch in node[1]:
                if (found := explosive_part(branch, ignore_case)) is not None:
                    return found
        elif node[0] == "repeat":
            _, _, high, inner, text = node
            if (found := explosive_part(inner, ignore_case)) is not None:
                return found
            if high > 1 and not _is_one_set(inner) and _is_ambiguous(inner, ignore_case):
                return f"the repetition {text} can match the same text in more than one way"
    return _crowded(nodes, ignore_case)


def _is_one_set(nodes: Sequence[Any]) -> bool:
    return len(nodes) == 1 and nodes[0][0] == "set"


def _crowded(nodes: Sequence[Any], ignore_case: bool) -> str | None:
    """Repetitions of the same letters side by side: three of {0,500} divide a run of letters in 20 million ways."""
    ways, before = 1, _Places(ignore_case)
    for node in nodes:
        is_run = node[0] == "repeat" and _is_one_set(node[3]) and node[2] > node[1]
        if is_run:
            letters = before.add(node[3][0][1])
            touches = any(before.overlap(letters, other) for other in range(letters))
            ways = ways * (node[2] - node[1] + 1) if touches else node[2] - node[1] + 1
            if ways > _MOST_DIVISIONS:
                return f"{node[4]} and the repetitions before it divide the same letters in too many ways"
        elif not (node[0] == "repeat" and node[1] == 0):
            ways, before = 1, _Places(ignore_case)
    return None


class _Places:
    """Places of an expression by number, each with the letters that it matches."""

    def __init__(self, ignore_case: bool) -> None:
        self._ignore_case = ignore_case
        self._letters: list[Ranges] = []
        self._known: dict[tuple[int, int], bool] = {}

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, ranges: Ranges) -> int:
        both = list(ranges)
        if self._ignore_case:
            for low, high in ranges:
                both += _other_case(low, high, ord("a"), ord("z"), -32) + _other_case(low, high, 65, 90, 32)
        self._letters.append(both)
        return len(self._letters) - 1

    def overlap(self, one: int, other: int) -> bool:
        key = (one, other) if one < other else (other, one)
        if key not in self._known:
            pairs = ((a, b) for a in self._letters[one] for b in self._letters[other])
            self._known[key] = any(a[0] <= b[1] and b[0] <= a[1] for a, b in pairs)
        return self._known[key]


def _other_case(low: int, high: int, first: int, last: int, shift: int) -> Ranges:
    start, end = max(low, first), min(high, last)
    return [(start + shift, end + shift)] if start <= end else []


class _Part:
    """A part of an automaton: where it can begin and end, whether it can be empty."""

    __slots__ = ("empty", "first", "last")

    def __init__(self, first: Counter[int], last: Counter[int], empty: bool) -> None:
        self.first = first
        self.last = last
        self.empty = empty


def _is_ambiguous(nodes: Sequence[Any], ignore_case: bool) -> bool:
    """Whether `nodes`, any number of times, can match some text in two ways."""
    places = _Places(ignore_case)
    follow: dict[int, Counter[int]] = {}
    part = _sequence(nodes, places, follow)
    _connect(part.last, part.first, follow)
    if part.empty or any(count > 1 for count in part.first.values()):
        return True
    if any(count > 1 for following in follow.values() for count in following.values()):
        return True
    return _two_paths(part, places, follow)


def _two_paths(part: _Part, places: _Places, follow: dict[int, Counter[int]]) -> bool:
    """Forward from the start over pairs of places; a pair off the diagonal that can reach two ends tells."""
    edges: dict[tuple[int, int], set[tuple[int, int]]] = {}
    starts = {(p, q) for p in part.first for q in part.first if p <= q and places.overlap(p, q)}
    todo = list(starts)
    seen = set(starts)
    while todo:
        pair = todo.pop()
        for new in _steps(pair, places, follow):
            edges.setdefault(new, set()).add(pair)
            if new not in seen:
                seen.add(new)
                todo.append(new)
    ending = [(p, q) for p, q in seen if p in part.last and q in part.last]
    reaching = set(ending)
    while ending:
        for before in edges.get(ending.pop(), ()):
            if before not in reaching:
                reaching.add(before)
                ending.append(before)
    return any(p != q for p, q in reaching)


def _steps(pair: tuple[int, int], places: _Places, follow: dict[int, Counter[int]]) -> Iterator[tuple[int, int]]:
    for p in follow.get(pair[0], ()):
        for q in follow.get(pair[1], ()):
            if places.overlap(p, q):
                yield (p, q) if p <= q else (q, p)


def _connect(last: Counter[int], first: Counter[int], follow: dict[int, Counter[int]]) -> None:
    for place, ways in last.items():
        following = follow.setdefault(place, Counter())
        for after, more in first.items():
            following[after] += ways * more


def _sequence(nodes: Sequence[Any], places: _Places, follow: dict[int, Counter[int]]) -> _Part:
    whole = _Part(Counter(), Counter(), True)
    for node in nodes:
        part = _one(node, places, follow)
        _connect(whole.last, part.first, follow)
        whole.first = whole.first + part.first if whole.empty else whole.first
        whole.last = whole.last + part.last if part.empty else part.last
        whole.empty = whole.empty and part.empty
    return whole


def _one(node: Any, places: _Places, follow: dict[int, Counter[int]]) -> _Part:
    if node[0] == "set":
        place = places.add(node[1])
        return _Part(Counter({place: 1}), Counter({place: 1}), False)
    if node[0] == "any of":
        parts = [_sequence(branch, places, follow) for branch in node[1]]
        first, last = Counter[int](), Counter[int]()
        for part in parts:
            first, last = first + part.first, last + part.last
        return _Part(first, last, any(part.empty for part in parts))
    _, low, high, inner, _ = node
    if high <= _MOST_COPIES and len(places) < _MOST_PLACES:
        return _written_out(low, high, inner, places, follow)
    part = _sequence(inner, places, follow)
    _connect(part.last, part.first, follow)
    return _Part(part.first, part.last, part.empty or low == 0)


def _written_out(low: int, high: int, inner: Any, places: _Places, follow: dict[int, Counter[int]]) -> _Part:
    """`x{2,4}` as `xx(x(x)?)?`: nested, so that leaving out one copy leaves out all behind it."""
    rest: _Part | None = None
    for number in range(high, 0, -1):
        part = _sequence(inner, places, follow)
        if rest is not None:
            _connect(part.last, rest.first, follow)
            last = rest.last + part.last if rest.empty else rest.last
            first = part.first + rest.first if part.empty else part.first
            part = _Part(first, last, part.empty and rest.empty)
        rest = _Part(part.first, part.last, part.empty or number > low)
    return rest or _Part(Counter(), Counter(), True)
