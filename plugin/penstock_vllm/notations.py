"""Regular expressions and grammars as users write them for vLLM, read into the rules of `language`.

Three engines read each notation in their own way. Where they differ, what is read here is the widest: a language that
is too large only makes a stop rarer. What is not certain raises `UnclearError`. Pure.
"""

import re
from collections.abc import Callable, Mapping
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
    inverted,
    merged,
    text,
)
from penstock_vllm.white_space import RANGES as WHITE_SPACE

_MOST_CHARACTERS: Final = 100_000

_ASCII_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_FOREIGN: Ranges = inverted(merged([(0, 0x7F), *WHITE_SPACE]))
_CLASSES: Final[dict[str, Ranges]] = {
    "d": merged([*_DIGITS, *_FOREIGN]),
    "w": merged([*_WORD, *_FOREIGN]),
    "s": WHITE_SPACE,
    "D": inverted(_DIGITS),
    "W": inverted(_WORD),
    "S": inverted(_ASCII_SPACE),
}
# What all engines agree on: the complement of this is the widest.
_NARROW: Final[dict[str, Ranges]] = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _ASCII_SPACE,
    "D": inverted(merged([*_DIGITS, (0x80, LAST)])),
    "W": inverted(merged([*_WORD, (0x80, LAST)])),
    "S": inverted(merged([*_ASCII_SPACE, (0x80, LAST)])),
}
_CONTROLS: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_HEXADECIMAL: Final = re.compile(
    r"x\{([0-9a-fA-F]{1,6})\}|u\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})"
)
_COUNT: Final = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LARK_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EMPTY: Final = Row(())


def regular_expression(pattern: str) -> Grammar:
    scanner = _Scanner(pattern)
    node = _alternatives(scanner, _regex_atom)
    scanner.must_be_at_end()
    return Grammar({"root": node}, "root")


def grammar(source: str) -> Grammar:
    """EBNF as xgrammar and llama.cpp write it, or Lark's."""
    return Grammar(_ebnf(source), "root") if "::=" in source else Grammar(_lark(source), "start")


class _Scanner:
    def __init__(self, source: str) -> None:
        if len(source) > _MOST_CHARACTERS:
            raise UnclearError(f"longer than {_MOST_CHARACTERS} characters")
        self.source = source
        self.place = 0
        self.depth = 0

    @property
    def next(self) -> str:
        """The next character, or nothing."""
        return self.source[self.place : self.place + 1]

    def take(self) -> str:
        letter = self.next
        if not letter:
            raise self.unclear("an end")
        self.place += 1
        return letter

    def takes(self, sign: str) -> bool:
        found = self.source.startswith(sign, self.place)
        if found:
            self.place += len(sign)
        return found

    def matches(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.source, self.place)
        if found:
            self.place = found.end()
        return found

    def must_be_at_end(self) -> None:
        if self.next:
            raise self.unclear(repr(self.next))

    def unclear(self, what: str) -> UnclearError:
        return UnclearError(f"{what} at {self.place}")


_Atom = Callable[[_Scanner], Node | None]
"""Reads one atom; None where none begins."""


def _alternatives(scanner: _Scanner, atom: _Atom) -> Node:
    scanner.depth += 1
    if scanner.depth > 100:
        raise scanner.unclear("a deep nesting")
    parts = [_row(scanner, atom)]
    while scanner.takes("|"):
        parts.append(_row(scanner, atom))
    scanner.depth -= 1
    return parts[0] if len(parts) == 1 else OneOf(tuple(parts))


def _row(scanner: _Scanner, atom: _Atom) -> Node:
    parts = []
    while (part := atom(scanner)) is not None:
        parts.append(_repeated(scanner, part))
    return Row(tuple(parts))


def _repeated(scanner: _Scanner, node: Node) -> Node:
    while True:
        if scanner.takes("*"):
            node = Repeat(node, 0, None)
        elif scanner.takes("+"):
            node = Repeat(node, 1, None)
        elif scanner.takes("?"):
            node = Repeat(node, 0, 1)
        elif scanner.next == "{":
            node = _counted(scanner, node)
        else:
            return node


def _counted(scanner: _Scanner, node: Node) -> Node:
    found = scanner.matches(_COUNT)
    if found is None:
        raise scanner.unclear("a brace")
    least = int(found[1])
    most = least if found[2] is None else int(found[3]) if found[3] else None
    if most is not None and most < least:
        raise scanner.unclear("a count")
    return Repeat(node, least, most)


def _escaped(scanner: _Scanner, classes: Mapping[str, Ranges] = _CLASSES) -> Ranges:
    """What follows a backslash, in a class or outside of one."""
    if found := scanner.matches(_HEXADECIMAL):
        point = int(next(filter(None, found.groups())), 16)
        if point > LAST:
            raise scanner.unclear("a character")
        return ((point, point),)
    letter = scanner.take()
    if letter in classes:
        return classes[letter]
    letter = _CONTROLS.get(letter, letter)
    if letter.isalnum():
        raise scanner.unclear(f"\\{letter}")
    return ((ord(letter), ord(letter)),)


def _class(scanner: _Scanner, *, strict: bool) -> Chars:
    """Behind `[`. `strict`: what some engines take for a set within a set is not read."""
    negated = scanner.takes("^")
    classes = _NARROW if negated else _CLASSES
    ranges: list[tuple[int, int]] = []
    while not ranges or scanner.next != "]":
        if strict and (
            scanner.next in ("[", "]") or scanner.source[scanner.place : scanner.place + 2] in ("&&", "--", "~~", "||")
        ):
            raise scanner.unclear("a set within a set")
        ranges += _class_item(scanner, classes)
    scanner.take()
    return Chars(inverted(merged(ranges)) if negated else merged(ranges))


def _class_item(scanner: _Scanner, classes: Mapping[str, Ranges]) -> Ranges:
    low = _class_letter(scanner, classes)
    if scanner.next != "-" or scanner.source[scanner.place + 1 : scanner.place + 2] in ("]", ""):
        return low
    scanner.take()
    high = _class_letter(scanner, classes)
    if len(low) != 1 or low[0][0] != low[0][1] or len(high) != 1 or high[0][0] < low[0][0]:
        raise scanner.unclear("a range")
    return ((low[0][0], high[0][1]),)


def _class_letter(scanner: _Scanner, classes: Mapping[str, Ranges]) -> Ranges:
    letter = scanner.take()
    return _escaped(scanner, classes) if letter == "\\" else ((ord(letter), ord(letter)),)


# --- Regular expressions --------------------------------------------------------------------------------


def _regex_atom(scanner: _Scanner) -> Node | None:
    if scanner.next in ("", "|", ")"):
        return None
    letter = scanner.take()
    if letter == "(":
        return _regex_group(scanner)
    if letter == "[":
        return _class(scanner, strict=True)
    if letter == ".":
        return Chars(((0, LAST),))
    if letter == "\\":
        return Chars(_escaped(scanner))
    if letter in "^$":
        return _EMPTY
    if letter in "*+?{":
        raise scanner.unclear("a count of nothing")
    return text(letter)


def _regex_group(scanner: _Scanner) -> Node:
    if scanner.takes("?") and not scanner.takes(":") and scanner.matches(re.compile(r"P?<[A-Za-z_]\w*>")) is None:
        raise scanner.unclear("a group of its own kind")
    node = _alternatives(scanner, _regex_atom)
    if not scanner.takes(")"):
        raise scanner.unclear("an open group")
    return node


# --- EBNF -----------------------------------------------------------------------------------------------

_EBNF_BLANK: Final = re.compile(r"(?:\s|#[^\n]*)*")
_EBNF_HEAD: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)(?:\s|#[^\n]*)*::=")


def _ebnf(source: str) -> dict[str, Node]:
    scanner = _Scanner(source)
    rules: dict[str, Node] = {}
    while scanner.matches(_EBNF_BLANK) and scanner.next:
        head = scanner.matches(_EBNF_HEAD)
        if head is None or head[1] in rules:
            raise scanner.unclear("a rule")
        rules[head[1]] = _alternatives(scanner, _ebnf_atom)
    return rules


def _ebnf_atom(scanner: _Scanner) -> Node | None:
    scanner.matches(_EBNF_BLANK)
    if scanner.next in ("", "|", ")") or _EBNF_HEAD.match(scanner.source, scanner.place):
        return None
    if found := scanner.matches(_NAME):
        node: Node = Rule(found[0])
    elif scanner.takes('"'):
        node = _quoted(scanner, '"')
    elif scanner.takes("["):
        node = _class(scanner, strict=False)
    elif scanner.takes("("):
        node = _group(scanner, _ebnf_atom, ")")
    else:
        raise scanner.unclear(repr(scanner.next))
    scanner.matches(_EBNF_BLANK)
    return node


def _quoted(scanner: _Scanner, end: str) -> Node:
    parts = []
    while (letter := scanner.take()) != end:
        parts.append(Chars(_escaped(scanner) if letter == "\\" else ((ord(letter), ord(letter)),)))
    return Row(tuple(parts))


def _group(scanner: _Scanner, atom: _Atom, end: str) -> Node:
    node = _alternatives(scanner, atom)
    if not scanner.takes(end):
        raise scanner.unclear("an open group")
    return node


# --- Lark -----------------------------------------------------------------------------------------------

_LARK_BLANK: Final = re.compile(r"(?:\s|//[^\n]*)*")
_LARK_HEAD: Final = re.compile(r"[?!]?([A-Za-z_][A-Za-z0-9_]*)[ \t]*:")
_LARK_REGEX: Final = re.compile(r"/((?:[^/\\\n]|\\.)+)/([a-z]*)")
_LARK_TIMES: Final = re.compile(r"[ \t]*~\s*(\d+)(?:\s*\.\.\s*(\d+))?")


def _lark(source: str) -> dict[str, Node]:
    scanner = _Scanner(source)
    rules: dict[str, Node] = {}
    while scanner.matches(_LARK_BLANK) and scanner.next:
        head = scanner.matches(_LARK_HEAD)
        if head is None or head[1] in rules:
            raise scanner.unclear("a rule")
        rules[head[1]] = _alternatives(scanner, _lark_atom)
    return rules


def _lark_atom(scanner: _Scanner) -> Node | None:
    scanner.matches(_LARK_BLANK)
    if scanner.next in ("", "|", ")", "]") or _LARK_HEAD.match(scanner.source, scanner.place):
        return None
    if found := scanner.matches(_LARK_REGEX):
        if found[2]:
            raise scanner.unclear("a flag")
        inner = _Scanner(found[1])
        node = _alternatives(inner, _regex_atom)
        inner.must_be_at_end()
    elif found := scanner.matches(_LARK_NAME):
        node = Rule(found[0])
    elif scanner.takes('"'):
        node = _lark_string(scanner)
    elif scanner.takes("("):
        node = _group(scanner, _lark_atom, ")")
    elif scanner.takes("["):
        node = Repeat(_group(scanner, _lark_atom, "]"), 0, 1)
    else:
        raise scanner.unclear(repr(scanner.next))
    if times := scanner.matches(_LARK_TIMES):
        node = Repeat(node, int(times[1]), int(times[2] or times[1]))
    return node


def _lark_string(scanner: _Scanner) -> Node:
    node = _quoted(scanner, '"')
    if scanner.matches(re.compile(r"i(?![A-Za-z0-9_])")) or scanner.matches(re.compile(r"\s*\.\.")):
        raise scanner.unclear("a string of its own kind")
    return node
