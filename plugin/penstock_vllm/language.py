"""What may still follow a text in a language: the question behind a stop that must never cut a value.

A grammar is a set of rules over characters. `Machine` makes a small automaton of each rule (a regular expression is
one rule); `Reading` walks a text through them all at once, as Earley's parser does, and answers exactly. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from penstock_vllm.white_space import RANGES as WHITE_SPACE

Ranges = tuple[tuple[int, int], ...]
"""Code points, first and last, in order and without overlaps."""

LAST: Final = 0x10FFFF
MOST_STATES: Final = 20_000
MOST_STEPS: Final = 10_000
"""At a time, four to twelve a character: as long, some 10 ms, may an engine step have to wait."""
MOST_CHARACTERS: Final = 100_000
"""Of one text: each keeps a little memory."""
MOST_WAITING: Final = 100_000
"""Items kept of one text, some 250 bytes each, in all that waits for the end of a rule: two or three a character where
rules call each other. The engine core holds them as long as the request runs."""


class UnclearError(Exception):
    """The language cannot be read here, or not within bounds. Nothing may be concluded from that."""


# --- Grammars -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chars:
    """One character."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Row:
    """One after the other."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class OneOf:
    """Any of them."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` times, up to `most`; without end where that is None."""

    part: "Node"
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Rule:
    """Another rule, by its name."""

    name: str


Node = Chars | Row | OneOf | Repeat | Rule


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules by their names, and the one that a whole text is of."""

    rules: Mapping[str, Node]
    root: str


def text(letters: str) -> Node:
    return Row(tuple(Chars(((ord(letter), ord(letter)),)) for letter in letters))


def merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return tuple(out)


def inverted(ranges: Ranges) -> Ranges:
    out, following = [], 0
    for first, last in ranges:
        if first > following:
            out.append((following, first - 1))
        following = last + 1
    if following <= LAST:
        out.append((following, LAST))
    return tuple(out)


def size(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)


def overlap(ranges: Ranges, others: Ranges) -> int:
    """How many characters are in both."""
    return sum(max(0, min(a[1], b[1]) - max(a[0], b[0]) + 1) for a in ranges for b in others)


def is_white(ranges: Ranges) -> bool:
    return overlap(ranges, WHITE_SPACE) == size(ranges)


# --- Machines -----------------------------------------------------------------------------------------


class Machine:
    """The automata of all rules. A state's steps need a character; its jumps, nothing; its calls, a whole rule."""

    def __init__(self, grammar: Grammar) -> None:
        """Raises `UnclearError` for a rule that is not there, and beyond `MOST_STATES`."""
        self.steps: list[list[tuple[Ranges, int]]] = []
        self.jumps: list[list[int]] = []
        self.calls: list[list[tuple[int, int]]] = []
        self.rule_of: list[int] = []
        rules, root = grammar.rules, grammar.root
        if root not in rules:
            raise UnclearError(f"no rule {root}")
        self._number = {name: number for number, name in enumerate([root, *(name for name in rules if name != root)])}
        self.starts: list[int] = []
        self.ends: list[int] = []
        for number, name in enumerate(self._number):
            self.starts.append(self._state(number))
            self.ends.append(self._build(rules[name], self.starts[-1], number))
        self.leads_to_text = self._those_that_lead_to_text()

    def _state(self, rule: int) -> int:
        if len(self.steps) >= MOST_STATES:
            raise UnclearError(f"more than {MOST_STATES} states")
        self.steps.append([])
        self.jumps.append([])
        self.calls.append([])
        self.rule_of.append(rule)
        return len(self.steps) - 1

    def _build(self, node: Node, entry: int, rule: int) -> int:
        """The state behind `node`, entered at `entry`. Only fresh states are ever jumped back to."""
        match node:
            case Chars():
                following = self._state(rule)
                self.steps[entry].append((node.ranges, following))
                return following
            case Rule():
                if node.name not in self._number:
                    raise UnclearError(f"no rule {node.name}")
                following = self._state(rule)
                self.calls[entry].append((self._number[node.name], following))
                return following
            case Row():
                for part in node.parts:
                    entry = self._build(part, entry, rule)
                return entry
            case OneOf():
                following = self._state(rule)
                for part in node.parts:
                    own = self._state(rule)
                    self.jumps[entry].append(own)
                    self.jumps[self._build(part, own, rule)].append(following)
                return following
            case Repeat():
                return self._build_repeat(node, entry, rule)

    def _build_repeat(self, node: Repeat, entry: int, rule: int) -> int:
        for _ in range(node.least):
            entry = self._build(node.part, entry, rule)
        if node.most is None:
            loop = self._state(rule)
            self.jumps[entry].append(loop)
            self.jumps[self._build(node.part, loop, rule)].append(loop)
            return loop
        following = self._state(rule)
        for _ in range(node.most - node.least):
            self.jumps[entry].append(following)
            own = self._state(rule)
            self.jumps[entry].append(own)
            entry = self._build(node.part, own, rule)
        self.jumps[entry].append(following)
        return following

    def _those_that_lead_to_text(self) -> list[bool]:
        """Whether from a state, within its rule and what it calls, anything but white space can come."""
        leads = [any(not is_white(ranges) for ranges, _ in steps) for steps in self.steps]
        changed = True
        while changed:
            changed = False
            for state in range(len(leads) - 1, -1, -1):
                if not leads[state] and (
                    any(leads[target] for target in self.jumps[state])
                    or any(leads[target] for _, target in self.steps[state])
                    or any(leads[target] or leads[self.starts[rule]] for rule, target in self.calls[state])
                ):
                    leads[state] = changed = True
        return leads


# --- Reading ------------------------------------------------------------------------------------------

_Item = tuple[int, int]
"""A state, and the place in the text where its rule began."""


class Reading:
    """One text, as far as it has come. Every question is about what has been read of it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._unread = ""
        self._callers: list[dict[int, list[_Item]]] = []
        """Of each place: who waits there for a rule that began there."""
        self._waiting = 0
        self._items: set[_Item] = set()
        self._close([(machine.starts[0], 0)])

    def feed(self, letters: str) -> None:
        """Raises `UnclearError` beyond `MOST_CHARACTERS`."""
        self._unread += letters
        if len(self._callers) + len(self._unread) > MOST_CHARACTERS:
            raise UnclearError(f"more than {MOST_CHARACTERS} characters")

    def catch_up(self) -> bool:
        """Reads what has been fed, about `MOST_STEPS` at a time: whether that was all of it.

        Raises `UnclearError` where a single character needs more than those, and beyond `MOST_WAITING`.
        """
        steps, left = self._machine.steps, MOST_STEPS
        for number, letter in enumerate(self._unread):
            if left <= 0:
                self._unread = self._unread[number:]
                return False
            point = ord(letter)
            following = [
                (target, origin)
                for state, origin in self._items
                for ranges, target in steps[state]
                if any(first <= point <= last for first, last in ranges)
            ]
            left -= self._close(following)
        self._unread = ""
        return True

    def _close(self, items: list[_Item]) -> int:
        """Everything that can be reached from `items` without a character, and in how many steps."""
        machine, place = self._machine, len(self._callers)
        here: dict[int, list[_Item]] = {}
        self._callers.append(here)
        found: set[_Item] = set()
        nothing: set[int] = set()
        steps = 1
        while items:
            item = items.pop()
            steps += 1
            if item in found:
                continue
            found.add(item)
            state, origin = item
            items += [(target, origin) for target in machine.jumps[state]]
            for rule, target in machine.calls[state]:
                here.setdefault(rule, []).append((target, origin))
                self._waiting += 1
                items.append((machine.starts[rule], place))
                if rule in nothing:
                    items.append((target, origin))
            rule = machine.rule_of[state]
            if state == machine.ends[rule]:
                items += self._callers[origin].get(rule, ())
                if origin == place:
                    nothing.add(rule)
            if steps + len(items) > MOST_STEPS:
                raise UnclearError(f"more than {MOST_STEPS} steps")
            if self._waiting > MOST_WAITING:
                raise UnclearError(f"more than {MOST_WAITING} items wait")
        self._items = found
        return steps

    @property
    def is_whole(self) -> bool:
        """Whether the text is one of the language."""
        return (self._machine.ends[0], 0) in self._items

    @property
    def can_only_add_white_space(self) -> bool:
        """Whether nothing but white space can follow in any reading of the text."""
        machine = self._machine
        todo, seen = list(self._items), set(self._items)
        while todo:
            state, origin = todo.pop()
            if machine.leads_to_text[state]:
                return False
            for caller in self._callers[origin].get(machine.rule_of[state], ()):
                if caller not in seen:
                    seen.add(caller)
                    todo.append(caller)
        return True
