"""Whether a mask of allowed tokens may be believed: told from a grammar alone, before a single token.

The logits processor sees, on the device, which tokens are allowed next, and nothing else. "The end or white space"
proves a value to be whole only in grammars where no text can come behind that white space. Here the grammar is made
one automaton and all of its states are looked at. Where that is not possible the answer is no. Pure.
"""

from itertools import pairwise
from typing import Final

from penstock_vllm.language import (
    LAST,
    Chars,
    Grammar,
    Node,
    OneOf,
    Ranges,
    Repeat,
    Row,
    Rule,
    UnclearError,
    is_white,
)
from penstock_vllm.white_space import CHARACTERS

_MOST_STATES: Final = 4000
_MOST_SETS: Final = 2000
_MOST_LETTERS: Final = 200


def mask_tells_the_end(grammar: Grammar, *, masks_are_whole: bool = True) -> bool:
    """Whether a value of `grammar` is whole wherever only the end and white space are allowed.

    `masks_are_whole`: all tokens that may follow are in the mask. Outlines leaves out those after which the value would
    not be whole, where it is whole before them (`a(1b)?` never goes on behind `a` but by a token `1b`).
    """
    try:
        return _Flat(grammar).mask_tells_the_end(masks_are_whole=masks_are_whole)
    except (UnclearError, RecursionError):
        return False


class _Flat:
    """The grammar without calls: each use of a rule is a copy. A rule within itself is one copy, whose end leads back
    to all of its uses, so that the language is too large (`is_exact` is False then)."""

    def __init__(self, grammar: Grammar) -> None:
        self._rules = grammar.rules
        self._shared: dict[str, tuple[int, int]] = {}
        self.is_exact = True
        self.steps: list[list[tuple[Ranges, int]]] = []
        self.jumps: list[list[int]] = []
        start = self._state()
        self.end = self._rule(grammar.root, start, {}, frozenset(), is_last=True)
        self.start = start

    def _state(self) -> int:
        if len(self.steps) >= _MOST_STATES:
            raise UnclearError("too many states")
        self.steps.append([])
        self.jumps.append([])
        return len(self.steps) - 1

    def _rule(self, name: str, entry: int, loops: dict[str, int], inside: frozenset[str], *, is_last: bool) -> int:
        """`loops`: the rules of which this is the last part, by their beginnings; `inside`: all that it is within."""
        if name not in self._rules:
            raise UnclearError(f"no rule {name}")
        if is_last and name in loops:
            self.jumps[entry].append(loops[name])
            return self._state()  # nobody gets here: what follows is what follows the rule
        if name in inside:
            return self._recursive(name, entry)
        start = self._state()
        self.jumps[entry].append(start)
        within = {**(loops if is_last else {}), name: start}
        return self._build(self._rules[name], start, within, inside | {name}, is_last=True)

    def _recursive(self, name: str, entry: int) -> int:
        self.is_exact = False
        if name not in self._shared:
            start, end = self._state(), self._state()
            self._shared[name] = start, end
            own_end = self._build(self._rules[name], start, {name: start}, frozenset(self._rules), is_last=True)
            self.jumps[own_end].append(end)
        start, end = self._shared[name]
        self.jumps[entry].append(start)
        following = self._state()
        self.jumps[end].append(following)
        return following

    def _build(self, node: Node, entry: int, loops: dict[str, int], inside: frozenset[str], *, is_last: bool) -> int:
        match node:
            case Chars():
                following = self._state()
                self.steps[entry].append((node.ranges, following))
                return following
            case Rule():
                return self._rule(node.name, entry, loops, inside, is_last=is_last)
            case Row():
                for place, part in enumerate(node.parts, 1):
                    entry = self._build(part, entry, loops, inside, is_last=is_last and place == len(node.parts))
                return entry
            case OneOf():
                following = self._state()
                for part in node.parts:
                    own = self._state()
                    self.jumps[entry].append(own)
                    self.jumps[self._build(part, own, loops, inside, is_last=is_last)].append(following)
                return following
            case Repeat():
                return self._repeat(node, entry, loops, inside, is_last=is_last and (node.least, node.most) == (0, 1))

    def _repeat(self, node: Repeat, entry: int, loops: dict[str, int], inside: frozenset[str], *, is_last: bool) -> int:
        for _ in range(node.least):
            entry = self._build(node.part, entry, loops, inside, is_last=False)
        following = self._state()
        if node.most is None:
            loop = self._state()
            self.jumps[entry].append(loop)
            self.jumps[loop].append(following)
            self.jumps[self._build(node.part, loop, loops, inside, is_last=False)].append(loop)
            return following
        for _ in range(node.most - node.least):
            own = self._state()
            self.jumps[entry] += [following, own]
            entry = self._build(node.part, own, loops, inside, is_last=is_last)
        self.jumps[entry].append(following)
        return following

    def mask_tells_the_end(self, *, masks_are_whole: bool) -> bool:
        leads = self._those_that_lead_to_text()
        letters = self._letters()
        start = self._closed({self.start})
        seen, todo = {start}, [start]
        while todo:
            states = todo.pop()
            shows = masks_are_whole and self._shows_text(states)
            if self.end in states and any(leads[state] for state in states) and not shows:
                return False
            for letter in letters:
                following = self._closed(
                    {
                        target
                        for state in states
                        for ranges, target in self.steps[state]
                        if any(first <= letter <= last for first, last in ranges)
                    }
                )
                if following and following not in seen:
                    if len(seen) >= _MOST_SETS:
                        raise UnclearError("too many sets")
                    seen.add(following)
                    todo.append(following)
        return True

    def _shows_text(self, states: frozenset[int]) -> bool:
        """Whether a token of text is allowed next for certain: an ASCII letter is a token of its own everywhere."""
        return self.is_exact and any(
            first < 0x80 and any(chr(point) not in CHARACTERS for point in range(first, min(last, 0x7F) + 1))
            for state in states
            for ranges, _ in self.steps[state]
            for first, last in ranges
        )

    def _closed(self, states: set[int]) -> frozenset[int]:
        todo = list(states)
        while todo:
            for target in self.jumps[todo.pop()]:
                if target not in states:
                    states.add(target)
                    todo.append(target)
        return frozenset(states)

    def _letters(self) -> list[int]:
        """One character for all that the grammar does not tell apart."""
        bounds = {0, LAST + 1}
        for steps in self.steps:
            for ranges, _ in steps:
                bounds.update(bound for first, last in ranges for bound in (first, last + 1))
        if len(bounds) > _MOST_LETTERS:
            raise UnclearError("too many letters")
        return [first for first, following in pairwise(sorted(bounds)) if first < following]

    def _those_that_lead_to_text(self) -> list[bool]:
        leads = [any(not is_white(ranges) for ranges, _ in steps) for steps in self.steps]
        changed = True
        while changed:
            changed = False
            for state in range(len(leads) - 1, -1, -1):
                if not leads[state] and (
                    any(leads[target] for target in self.jumps[state])
                    or any(leads[target] for _, target in self.steps[state])
                ):
                    leads[state] = changed = True
        return leads
