"""What a moderation rule may look like, and the expressions that find it in a stream.

A rule's regular expression is parsed once and written out three times: for the automaton that tells that the rule
matches, for the one that tells which end of the text may still become a match, and for Python's `re`, which finds
the exact spans on the rare hit. Rules see folded text (`folding.py`), so their own letters are folded too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from penstock.core.folding import fold
from penstock.core.unambiguous import explosive_part

# Python's own parser of expressions; it has no public name and no type stubs.
_parser: Any = import_module("re._parser")
_codes: Any = import_module("re._constants")

_WORD = "0-9A-Za-z_"
_CATEGORIES: Final = {
    _codes.CATEGORY_DIGIT: "0-9",
    _codes.CATEGORY_NOT_DIGIT: r"\x00-\x2f\x3a-" + chr(0x10FFFF),
    _codes.CATEGORY_SPACE: r"\x09-\x0d\x20",
    _codes.CATEGORY_NOT_SPACE: r"\x00-\x08\x0e-\x1f\x21-" + chr(0x10FFFF),
    _codes.CATEGORY_WORD: _WORD,
    _codes.CATEGORY_NOT_WORD: r"\x00-\x2f\x3a-\x40\x5b-\x5e\x60\x7b-" + chr(0x10FFFF),
}
_ALLOWED_FLAGS: Final = re.IGNORECASE.value | re.DOTALL.value | re.UNICODE.value | re.VERBOSE.value | re.ASCII.value
# The edges of a match for Python's `re`; that of ASCII as the automaton's `\b`, which knows no other letters.
_BEFORE: Final = {"": "", "ascii": f"(?<![{_WORD}])", "sign": f"(?<![{_WORD}])", "unicode": r"(?<!\w)"}
_AFTER: Final = {"": "", "ascii": f"(?![{_WORD}])", "sign": f"(?![{_WORD}])", "unicode": r"(?!\w)"}
# A repetition longer than this gets an expression of its own where the beginnings of a match are looked for.
_LONG: Final = 16
# One space of a literal: a line break or a doubled space must not let it through.
_LITERAL_SPACE: Final = "[ \\t-\\r]{1,3}"
# What has another fold stands below this, but for tags, which fold away.
_LAST_FOLDED: Final = 0x2FFFF


class PatternError(ValueError):
    """A rule that is refused; the text says why and what to write instead."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A rule for Python's `re`. Where `after` is given, what follows a match decides whether it is one."""

    expression: re.Pattern[str]
    after: re.Pattern[str] | None


@dataclass(frozen=True, slots=True)
class Pattern:
    """One rule, ready to be compiled. Widths in folded characters.

    `forward` and `backward` are for the automaton: the first match the rule anywhere, the second, anchored at the
    start of the reversed text, every non-empty beginning of it that may still become a match or a longer one. Of the
    `readings` any may match: the words of a rule end in different ways.
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]
    readings: tuple[Reading, ...]
    least: int
    most: int
    ignore_case: bool


def regex_pattern(regex: str, *, ignore_case: bool, most_chars: int) -> Pattern:
    """Raises `PatternError` for what cannot be found in a stream with a bounded hold, or in linear time."""
    try:
        tree = _parser.parse(regex)
    except (re.error, OverflowError) as error:
        raise PatternError(f"is no regular expression: {error}") from None
    except RecursionError:
        raise PatternError("is nested too deeply") from None
    flags = tree.state.flags
    if flags & ~_ALLOWED_FLAGS:
        raise PatternError("sets a flag that rules cannot have; only (?i), (?s) and (?x) at the start are possible")
    any_case = ignore_case or bool(flags & re.IGNORECASE)
    return _pattern(_Tree(list(tree), dotall=bool(flags & re.DOTALL), any_case=any_case), any_case, most_chars)


def words_pattern(words: Iterable[str], *, ignore_case: bool, whole_word: bool, most_chars: int) -> Pattern:
    """Any of these literals. With `whole_word` no letter, digit or underscore may touch it."""
    folded = sorted({fold(word).strip() for word in words}, key=lambda word: (-len(word), word))
    if not folded or not all(folded):
        raise PatternError("has a literal that is empty or made of invisible characters alone")
    parts = [_literal(word, whole_word=whole_word, most_chars=most_chars, ignore_case=ignore_case) for word in folded]
    by_end: dict[re.Pattern[str] | None, list[str]] = {}
    for part in parts:
        for reading in part.readings:
            by_end.setdefault(reading.after, []).append(reading.expression.pattern)
    flags = re.IGNORECASE if ignore_case else 0
    return Pattern(
        forward=tuple(expression for part in parts for expression in part.forward),
        backward=tuple(expression for part in parts for expression in part.backward),
        readings=tuple(Reading(re.compile("|".join(told), flags), after) for after, told in by_end.items()),
        least=min(part.least for part in parts),
        most=max(part.most for part in parts),
        ignore_case=ignore_case,
    )


def _literal(word: str, *, whole_word: bool, ignore_case: bool, most_chars: int) -> Pattern:
    escaped = _LITERAL_SPACE.join(re.escape(part) for part in word.split())
    tree = _Tree(list(_parser.parse(escaped)), dotall=False, any_case=ignore_case)
    if whole_word:
        tree.lead, tree.trail = _edge(word[0]), _edge(word[-1])
    return _pattern(tree, ignore_case, most_chars)


def _edge(letter: str) -> str:
    """Which kind of edge a word has there: ASCII, a sign, another script with capitals, or one without spaces."""
    if letter.isascii():
        return "ascii" if letter.isalnum() or letter == "_" else "sign"
    return "unicode" if letter.lower() != letter.upper() else ""


class _Tree:
    """A parsed expression without the word edges at its two ends, which are `lead` and `trail`."""

    def __init__(self, nodes: list[Any], *, dotall: bool, any_case: bool) -> None:
        self.lead = self.trail = ""
        if nodes and nodes[0] == (_codes.AT, _codes.AT_BOUNDARY):
            self.lead, nodes = "ascii", nodes[1:]
        if nodes and nodes[-1] == (_codes.AT, _codes.AT_BOUNDARY):
            self.trail, nodes = "ascii", nodes[:-1]
        self.writer = _Writer(dotall=dotall, any_case=any_case)
        self.nodes = self.writer.folded(nodes)


def _pattern(tree: _Tree, ignore_case: bool, most_chars: int) -> Pattern:
    writer = tree.writer
    least, most = writer.width(tree.nodes)
    if least == 0:
        raise PatternError("matches the empty text; make one part of it necessary")
    if most > most_chars:
        told = "without bound" if most >= _codes.MAXREPEAT else f"up to {most} characters"
        raise PatternError(
            f"matches {told}, and nothing of a match may be sent before its end is seen: at most {most_chars} "
            "characters are held (moderation.hold_chars); write {1,200} instead of + or *, or a smaller bound"
        )
    sets = [writer.sets(node) for node in tree.nodes]
    if (culprit := explosive_part(sets, ignore_case)) is not None:
        raise PatternError(
            f"would cost exponential time: {culprit}; "
            "let each repetition begin or end with something that its other parts cannot match"
        )
    if not (
        _stands_by_words(tree.lead, tree.nodes, 0, writer) and _stands_by_words(tree.trail, tree.nodes, -1, writer)
    ):
        raise PatternError(
            r"has \b beside what may be no ASCII letter, digit or underscore, where it says little; leave it out there "
            "or take `words`, which end where the letters of their script end"
        )
    body = writer.all_of(tree.nodes, reverse=False)
    before, after = _BEFORE[tree.lead], _AFTER[tree.trail]
    # The automaton's \b is ASCII alone, and asks for a word behind a sign; there it tells too much, and `re` decides.
    lead, trail = (r"\b" if edge == "ascii" else "" for edge in (tree.lead, tree.trail))
    flags = re.IGNORECASE if ignore_case else 0
    beginnings = writer.all_beginnings(tree.nodes, whole=bool(tree.trail))
    return Pattern(
        forward=(f"{lead}(?:{body}){trail}",),
        backward=tuple(f"^(?:{beginning}){lead}" for beginning in beginnings),
        readings=(Reading(re.compile(f"{before}(?:{body}){after}", flags), re.compile(after) if after else None),),
        least=least,
        most=most,
        ignore_case=ignore_case,
    )


def _stands_by_words(edge: str, nodes: Sequence[Any], end: int, writer: "_Writer") -> bool:
    r"""Whether `\b` at this end (0 or -1) has a word within the match, so that it asks for none outside."""
    return edge != "ascii" or all(_is_word(low, high) for low, high in writer.at_end(nodes, end))


def _is_word(low: int, high: int) -> bool:
    return all(chr(code).isalnum() or chr(code) == "_" for code in range(low, high + 1)) if high < 128 else False


class _Writer:
    """Writes parsed expressions in the words that both Python and the automaton understand alike.

    The automaton knows fewer pairs of capitals and small letters; with `any_case` those beyond ASCII are spelled out.
    """

    def __init__(self, *, dotall: bool, any_case: bool) -> None:
        self._any_case = any_case
        self._any = f"[\\x00-{chr(0x10FFFF)}]" if dotall else "[^\\x0a]"
        self._dotall = dotall

    def folded(self, nodes: Sequence[Any]) -> list[Any]:
        """The nodes with each letter as folded text has it; raises for what a stream cannot know."""
        return [new for node in nodes for new in self._fold(node)]

    def _fold(self, node: Any) -> list[Any]:
        op, value = node
        if op is _codes.LITERAL:
            return [self._letter(letter) for letter in fold(chr(value))]
        if op is _codes.IN:
            return [self._fold_set(value, is_repeated=False)]
        if op is _codes.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise PatternError("switches a flag within a group; write (?i) at the start, or [Aa]")
            return [(_codes.BRANCH, (None, [self.folded(inner)]))]
        if op is _codes.BRANCH:
            return [(op, (None, [self.folded(branch) for branch in value[1]]))]
        if op in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            low, high, inner = value
            is_set = len(inner) == 1 and inner[0][0] is _codes.IN
            folded = [self._fold_set(inner[0][1], is_repeated=high > 1)] if is_set else self.folded(inner)
            return [(_codes.MAX_REPEAT, (low, high, folded))]
        if op in (_codes.ANY, _codes.NOT_LITERAL):
            return [node]
        raise PatternError(_refusals().get(op, f"uses {op}, which rules cannot have"))

    def _letter(self, letter: str) -> Any:
        looks = sorted(look for look in self._looks(letter) if len(look) == 1)
        if letter.isascii() or len(looks) < 2:
            return (_codes.LITERAL, ord(letter))
        return (_codes.IN, [(_codes.LITERAL, ord(look)) for look in looks])

    def _looks(self, letter: str) -> set[str]:
        """What the letter is in folded text, in each of its cases where those do not matter."""
        cases = (letter, letter.lower(), letter.upper(), letter.title(), letter.swapcase(), letter.casefold())
        return {fold(one) for one in (cases if self._any_case else cases[:1])}

    def _fold_set(self, members: Sequence[Any], *, is_repeated: bool) -> Any:
        """Also what its members look like in folded text; one that becomes two letters stands beside the set.

        Where the set is repeated, two letters that are in it need no place of their own.
        """
        folds = {look for code in _codes_of(members) for look in self._looks(chr(code)) if look != chr(code)}
        singles = [(_codes.LITERAL, ord(letters)) for letters in sorted(folds) if len(letters) == 1]
        one = (_codes.IN, [*members, *(single for single in singles if single not in members)])
        if (_codes.NEGATE, None) in members:
            return one
        ranges = self._ranges(one)
        more = [
            [(_codes.LITERAL, ord(letter)) for letter in letters]
            for letters in sorted(folds)
            if len(letters) > 1 and not (is_repeated and all(_is_in(letter, ranges) for letter in letters))
        ]
        return (_codes.BRANCH, (None, [[one], *more])) if more else one

    def width(self, nodes: Sequence[Any]) -> tuple[int, int]:
        least = most = 0
        for op, value in nodes:
            low, high = 1, 1
            if op is _codes.BRANCH:
                widths = [self.width(branch) for branch in value[1]]
                low, high = min(w[0] for w in widths), max(w[1] for w in widths)
            elif op is _codes.MAX_REPEAT:
                inner = self.width(value[2])
                low, high = inner[0] * value[0], inner[1] * value[1]
            least, most = least + low, min(most + high, int(_codes.MAXREPEAT))
        return least, most

    def sets(self, node: Any) -> Any:
        """The node for the search for ambiguity: ("set", ranges), ("any of", sequences) or ("repeat", …)."""
        op, value = node
        if op is _codes.BRANCH:
            return ("any of", [[self.sets(inner) for inner in branch] for branch in value[1]])
        if op is _codes.MAX_REPEAT:
            return ("repeat", value[0], value[1], [self.sets(inner) for inner in value[2]], self.one(node))
        return ("set", self._ranges(node))

    def at_end(self, nodes: Sequence[Any], end: int) -> list[tuple[int, int]]:
        """The letters with which a match of the nodes may begin (`end` 0) or end (-1)."""
        found: list[tuple[int, int]] = []
        for node in nodes if end == 0 else reversed(nodes):
            op, value = node
            if op is _codes.BRANCH:
                found += [pair for branch in value[1] for pair in self.at_end(branch, end)]
            elif op is _codes.MAX_REPEAT:
                found += self.at_end(value[2], end)
            else:
                found += self._ranges(node)
            if self.width([node])[0] > 0:
                break
        return found

    def _ranges(self, node: Any) -> list[tuple[int, int]]:
        op, value = node
        if op is _codes.LITERAL:
            return [(value, value)]
        if op is _codes.ANY:
            return [(0, 0x10FFFF)] if self._dotall else [(0, 9), (11, 0x10FFFF)]
        if op is _codes.NOT_LITERAL:
            return _complement([(value, value)])
        ranges, negate = [], False
        for kind, what in value:
            if kind is _codes.NEGATE:
                negate = True
            elif kind is _codes.LITERAL:
                ranges.append((what, what))
            elif kind is _codes.RANGE:
                ranges.append(what)
            else:
                ranges += _category_ranges(what)
        return _complement(ranges) if negate else ranges

    # -- written out -------------------------------------------------------------------------------

    def one(self, node: Any, *, reverse: bool = False) -> str:
        op, value = node
        if op is _codes.LITERAL:
            return _escaped(value)
        if op is _codes.NOT_LITERAL:
            return f"[^{_escaped(value)}]"
        if op is _codes.ANY:
            return self._any
        if op is _codes.IN:
            return "[" + "".join(map(_member, value)) + "]"
        if op is _codes.BRANCH:
            return "(?:" + "|".join(self.all_of(branch, reverse=reverse) for branch in value[1]) + ")"
        return _repeated(self.all_of(value[2], reverse=reverse), value[0], value[1])

    def all_of(self, nodes: Sequence[Any], *, reverse: bool) -> str:
        pieces = [self.one(node, reverse=reverse) for node in nodes]
        return "".join(reversed(pieces) if reverse else pieces)

    def all_beginnings(self, nodes: Sequence[Any], *, whole: bool) -> list[str]:
        """As `beginnings`, in pieces: one for each long repetition and for what stands between them.

        In one expression, with all long repetitions nested in it, the automaton of a JWT rule takes 3.5 s and 550 kB.
        """
        parts: list[list[Any]] = [[]]
        for node in nodes:
            is_long = node[0] is _codes.MAX_REPEAT and node[1][1] > _LONG
            if is_long or (parts[-1] and parts[-1][-1][0] is _codes.MAX_REPEAT and parts[-1][-1][1][1] > _LONG):
                parts.append([])
            parts[-1].append(node)
        out: list[str] = []
        before: list[Any] = []
        for number, part in enumerate(parts):
            if not part:
                continue
            is_last = number == len(parts) - 1
            if beginning := self.beginnings(part, whole=whole or not is_last):
                out.append(f"(?:{beginning}){self.all_of(before, reverse=True)}")
            before += part
        return out

    def beginnings(self, nodes: Sequence[Any], *, whole: bool) -> str:
        """Every non-empty proper beginning of a match, reversed; with `whole` the match itself too. "" for none.

        Of `node` and what follows these are: a beginning within `node`; all of `node`, with or without a beginning
        of what follows; and, where `node` may be left out, a beginning of what follows alone.
        """
        rest = self._within(nodes[-1])
        if whole:
            rest = _any_of([rest, self._filled(nodes[-1])])
        for node in reversed(nodes[:-1]):
            ways = [self._within(node), f"(?:{rest})?{self._filled(node)}" if rest else self._filled(node)]
            rest = _any_of([*ways, rest if self.width([node])[0] == 0 else ""])
        return rest

    def _filled(self, node: Any) -> str:
        """A match of `node` that is not empty, reversed."""
        op, value = node
        if op is _codes.MAX_REPEAT and value[0] == 0:
            return _repeated(self.all_of(value[2], reverse=True), 1, value[1])
        return self.one(node, reverse=True)

    def _within(self, node: Any) -> str:
        """The non-empty proper beginnings of one node, reversed."""
        op, value = node
        if op is _codes.BRANCH:
            return _any_of(self.beginnings(branch, whole=False) for branch in value[1] if branch)
        if op is not _codes.MAX_REPEAT:
            return ""
        _, high, inner = value
        part = self.beginnings(inner, whole=False)
        copies = _repeated(self.all_of(inner, reverse=True), 1, high - 1) if high > 1 else ""
        return _any_of([part, f"(?:{part})?{copies}" if part and copies else copies])


def _refusals() -> dict[Any, str]:
    around = "looks around (?=…) (?<=…); the text around is not there yet when a stream is cut: match it instead"
    return {
        _codes.ASSERT: around,
        _codes.ASSERT_NOT: around,
        _codes.AT: "has ^, $, \\A, \\Z, \\B or an inner \\b; a stream has no lines: \\b is possible at its two ends",
        _codes.GROUPREF: "refers back to a group; what it would match is not known beforehand: spell it out",
        _codes.GROUPREF_EXISTS: "refers back to a group; what it would match is not known beforehand: spell it out",
        _codes.ATOMIC_GROUP: "has an atomic group (?>…); write (?:…)",
        _codes.POSSESSIVE_REPEAT: "has a possessive repetition; leave the second + out",
    }


def _escaped(code: int) -> str:
    letter = chr(code)
    return letter if code > 127 or letter.isalnum() else f"\\x{code:02x}"


def _member(member: Any) -> str:
    op, value = member
    if op is _codes.NEGATE:
        return "^"
    if op is _codes.LITERAL:
        return _escaped(value)
    if op is _codes.RANGE:
        return f"{_escaped(value[0])}-{_escaped(value[1])}"
    return _CATEGORIES[value]


def _codes_of(members: Sequence[Any]) -> Iterator[int]:
    """The letters beyond ASCII that a set names."""
    for op, value in members:
        if op is _codes.RANGE:
            yield from range(max(value[0], 128), min(value[1], _LAST_FOLDED) + 1)
        elif op is _codes.LITERAL and value > 127:
            yield value


def _is_in(letter: str, ranges: list[tuple[int, int]]) -> bool:
    return any(low <= ord(letter) <= high for low, high in ranges)


def _category_ranges(category: Any) -> list[tuple[int, int]]:
    (_, members), *_ = _parser.parse(f"[{_CATEGORIES[category]}]x")
    return [value if op is _codes.RANGE else (value, value) for op, value in members]


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            out.append((at, low - 1))
        at = max(at, high + 1)
    return [*out, (at, 0x10FFFF)] if at <= 0x10FFFF else out


def _repeated(expression: str, low: int, high: int) -> str:
    if (low, high) == (1, 1):
        return expression
    return f"(?:{expression}){{{low},{high}}}"


def _any_of(ways: Iterable[str]) -> str:
    told = [way for way in dict.fromkeys(ways) if way]
    return told[0] if len(told) == 1 else f"(?:{'|'.join(told)})" if told else ""
