"""Rules compiled together, and what they say about a piece of text: what matches, and what still may.

The automata find candidates in microseconds whatever the number of rules (`docs/explanation/moderation.md` has the
figures); exact spans and checksums cost Python's time on the rare hit alone. Nothing here keeps state: the same
text gets the same answer, so that any cut of a stream is judged like the whole.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from penstock.core.patterns import Pattern, Reading

Action = Literal["redact", "halt", "flag"]
RuleChannel = Literal["answer", "reasoning", "tools"]


class Automaton(Protocol):
    """A compiled database of expressions, as hyperscan makes it in block mode."""

    def scan(
        self, data: bytes, match_event_handler: Callable[[int, int, int, int, Any], None], *, context: Any
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Empty `models` and `keys` mean all; both are shell patterns."""

    id: str
    action: Action
    category: str
    pattern: Pattern
    placeholder: str
    channels: frozenset[RuleChannel]
    check: Callable[[str], bool] | None = None
    models: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """A match from `start` to `end`, characters of the text that was scanned."""

    start: int
    end: int
    rule: Rule


@dataclass(slots=True)
class Scan:
    """What the rules say about a text. `held` and `kept` are lengths of ends of it.

    The last `held` characters may yet become part of a match that is cut out, the last `kept` of any match, if more
    text follows. Where a rule halts, the text counts as ending with the halting match, and nothing from `stop` on may
    go out.
    """

    spans: list[Span] = field(default_factory=list)
    held: int = 0
    kept: int = 0
    halt: Span | None = None
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Rulebook:
    """All rules of a deployment. `forward` and `backward` report a rule by its place in `rules`."""

    rules: tuple[Rule, ...]
    forward: Automaton
    backward: Automaton
    digest: str

    def choose(self, model: str, key: str) -> "Policy | None":
        """The rules for one stream, or None if there are none."""
        places = [n for n, rule in enumerate(self.rules) if _applies(rule.models, model) and _applies(rule.keys, key)]
        return Policy(self, frozenset(places)) if places else None


def _applies(patterns: tuple[str, ...], name: str) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


class Policy:
    """The rules that apply to one stream."""

    def __init__(self, book: Rulebook, places: frozenset[int]) -> None:
        self._book = book
        self._places = places
        self._scanners: dict[RuleChannel, Scanner | None] = {}
        self.digest = book.digest

    def scanner(self, channel: RuleChannel) -> "Scanner | None":
        """What scans this channel, or None if no rule is for it."""
        if channel not in self._scanners:
            places = frozenset(n for n in self._places if channel in self._book.rules[n].channels)
            self._scanners[channel] = Scanner(self._book, places) if places else None
        return self._scanners[channel]


# The binding takes a context that is false for none at all and crashes on callbacks that are not plain functions.
_TRUTHY = -1


def _note_rule(place: int, _start: int, _end: int, _flags: int, found: list[int]) -> None:
    found.append(place)


def _note_end(place: int, _start: int, end: int, _flags: int, found: list[int]) -> None:
    found.append(place)
    found.append(end)


class Scanner:
    """The rules of one channel of one stream."""

    __slots__ = ("_all", "_backward", "_forward", "_holding", "_places", "_rules")

    def __init__(self, book: Rulebook, places: frozenset[int]) -> None:
        self._rules = book.rules
        self._forward = book.forward
        self._backward = book.backward
        self._places = places
        self._all = len(places) == len(book.rules)
        self._holding = frozenset(n for n in places if book.rules[n].action != "flag")

    def scan(self, text: str, *, first: int, whole: bool) -> Scan | None:
        """What the rules say about folded text; None if they have nothing against all of it.

        A match may begin at `first` (1 where the first character is only the context of what follows). `whole`
        says that the text ends here, so that nothing can grow any more.
        """
        data = text.encode("utf-8", "replace")
        found = [_TRUTHY]
        self._forward.scan(data, _note_rule, context=found)
        kept = held = 0
        reversed_data = data[::-1] if len(data) == len(text) else text[::-1].encode("utf-8", "replace")
        ends = [_TRUTHY]
        self._backward.scan(reversed_data, _note_end, context=ends)
        if len(ends) > 1:
            kept, held = self._ends(text, data, ends, first)
        hits = {place for place in found[1:] if self._all or place in self._places} if len(found) > 1 else None
        if not (kept or hits):
            return None
        scan = Scan(held=held, kept=kept)
        if hits:
            self._judge(scan, text, sorted(hits), first, whole)
        return scan

    def _ends(self, text: str, data: bytes, ends: list[int], first: int) -> tuple[int, int]:
        """The longest end that any rule waits for, and the longest that must be held; in characters."""
        most = len(text) - first
        kept = held = 0
        narrow = len(data) == len(text)
        for n in range(1, len(ends), 2):
            place, length = ends[n], ends[n + 1]
            if not self._all and place not in self._places:
                continue
            if not narrow:
                length = len(data[len(data) - length :].decode())
            if kept < length <= most:
                kept = length
            if held < length <= most and place in self._holding:
                held = length
        return kept, held

    def _judge(self, scan: Scan, text: str, hits: list[int], first: int, whole: bool) -> None:
        halts = [halt for n in hits if self._rules[n].action == "halt" for halt in self._halts(n, text, first, whole)]
        if halts:
            _, _, scan.halt = min(halts, key=lambda one: one[:2])
            size, text, whole = len(text), text[: scan.halt.end], False
            reversed_data = text[::-1].encode("utf-8", "replace")
            ends = [_TRUTHY]
            self._backward.scan(reversed_data, _note_end, context=ends)
            kept, held = self._ends(text, text.encode("utf-8", "replace"), ends, first)
            scan.stop = min(scan.halt.start, len(text) - held)
            scan.kept = size - len(text) + kept
        for place in hits:
            rule = self._rules[place]
            if rule.action != "halt":
                scan.spans += _spans(rule, text, first, whole)
        scan.spans.sort(key=lambda span: (span.start, -span.end))

    def _halts(self, place: int, text: str, first: int, whole: bool) -> Iterator[tuple[int, int, Span]]:
        """For each start the shortest match, behind where the rule knew of it: who knows first is told."""
        rule = self._rules[place]
        for reading in rule.pattern.readings:
            for start, longest in _starts(reading, text, first):
                for end in range(start + rule.pattern.least, longest + 1):
                    if _is_match(rule, reading, text, start, end, whole):
                        knew = end if reading.after is None else end + 1
                        yield knew, start, Span(start, end, rule)
                        break


def _starts(reading: Reading, text: str, first: int) -> Iterator[tuple[int, int]]:
    """Every place where a match begins, and where the one that `re` prefers there ends."""
    found = reading.expression.search(text, first)
    while found is not None:
        yield found.span()
        found = reading.expression.search(text, found.start() + 1)


def _spans(rule: Rule, text: str, first: int, whole: bool) -> Iterable[Span]:
    for reading in rule.pattern.readings:
        for start, end in _starts(reading, text, first):
            if rule.check is None:
                if whole or end < len(text) or reading.after is None:
                    yield Span(start, end, rule)
                continue
            # A shorter number than the longest may be the one whose checksum is right.
            for shorter in range(end, start + rule.pattern.least - 1, -1):
                if _is_match(rule, reading, text, start, shorter, whole):
                    yield Span(start, shorter, rule)
                    break


def _is_match(rule: Rule, reading: Reading, text: str, start: int, end: int, whole: bool) -> bool:
    if reading.after is not None:
        if end == len(text) and not whole:
            return False
        # `fullmatch` takes the text to end at its end; the next letter may say that the word goes on.
        if reading.after.match(text, end) is None:
            return False
    found = reading.expression.fullmatch(text, start, end)
    return found is not None and (rule.check is None or rule.check(text[start:end]))
