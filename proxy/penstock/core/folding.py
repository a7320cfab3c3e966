"""How moderation reads text: one spelling for what looks alike, with the way back to what was written.

Width and style variants (NFKD), marks over and strokes through letters, zero-width and other invisible characters,
digits of all scripts are folded away one character at a time, so that a fold of the whole is the fold of its pieces,
however a stream is cut. Letters of other scripts that merely look Latin are not.
"""

import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

# Canonical combining classes of marks that are written over, under or through a letter, which people stack to dodge a
# filter. Between them are the vowel and voicing signs of other scripts, which are part of the word.
_MARKS: Final = frozenset([1, *range(10, 37), *range(200, 241)])
# Invisible, though not all are of Unicode's class Cf: fillers, the grapheme joiner, variation selectors, tags.
_INVISIBLE: Final = frozenset(
    [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10)]
)
# What Unicode does not take apart: strokes, dashes, blanks that are no spaces.
_OWN: Final = dict(
    [*zip("ıİøØłŁđĐħĦŧŦɨƗƀɃɍɌ", "iIoOlLdDhHtTiIbBrR", strict=True)]
    + [("ß", "ss"), ("ẞ", "SS"), ("æ", "ae"), ("Æ", "AE"), ("œ", "oe"), ("Œ", "OE")]
    + [(dash, "-") for dash in "‐‑‒–−﹘"]
    + [("\u2800", " "), ("\x85", "\n"), ("\u2028", "\n"), ("\u2029", "\n")]
)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
# Letters in boxes and circles, each kind in the order of the alphabet.
_BOXED: Final = (0x1F130, 0x1F150, 0x1F170, 0x1F1E6)
_ESCAPE: Final = re.compile(
    r'\\(?:(["\\/bfnrt])|u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))'
)
_UNFINISHED_ESCAPE: Final = re.compile(
    r"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?)?)?\Z"
)
_SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_QUOTE: Final = re.compile(r'\\.|"', re.DOTALL)


class _Folds(dict[int, str]):
    """`str.translate` asks for each character once; the answer is kept."""

    def __missing__(self, code: int) -> str:
        folded = self[code] = _fold_one(chr(code))
        return folded


def _fold_one(letter: str) -> str:
    if letter in _OWN:
        return _OWN[letter]
    code = ord(letter)
    category = unicodedata.category(letter)
    if category == "Cf" or code in _INVISIBLE or 0xE0000 <= code < 0xE1000:
        return ""
    if category == "Cc":
        return letter if "\t" <= letter <= "\r" else ""
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    if category == "Zs":
        return " "
    for first in _BOXED:
        if 0 <= code - first < 26:
            return chr(ord("A") + code - first)
    bare = "".join(part for part in unicodedata.normalize("NFKD", letter) if not _is_mark(part))
    return unicodedata.normalize("NFC", "".join(_OWN.get(part, part) for part in bare))


def _is_mark(letter: str) -> bool:
    return unicodedata.combining(letter) in _MARKS or unicodedata.category(letter) == "Me"


_FOLDS: Final = _Folds()


def fold(text: str) -> str:
    """The text as rules see it. ASCII stays what it is, but for control characters, which nobody sees."""
    return text if is_plain(text) else text.translate(_FOLDS)


def is_plain(text: str) -> bool:
    """Whether the text is its own fold, as nearly all text is."""
    return text.isascii() and (text.isprintable() or _CONTROL.search(text) is None)


@dataclass(slots=True)
class View:
    """Text as rules see it, and where each of its characters was written.

    `starts[i]` and `ends[i]` are the characters of the original that made the i-th one here; None where the two
    run side by side. `read` is how much of the original is in it: an unfinished escape at the end is not.
    """

    text: str
    starts: list[int] | None
    ends: list[int] | None
    read: int

    def start(self, place: int) -> int:
        """Where the character at `place` begins in the original."""
        if self.starts is None:
            return place
        return self.starts[place] if place < len(self.starts) else self.read

    def last_before(self, place: int) -> tuple[int, int]:
        """Where the last visible character stands that begins before `place` of the original; empty if none does."""
        if self.starts is None or self.ends is None:
            return max(place - 1, 0), place
        found = bisect_left(self.starts, place) - 1
        return (self.starts[found], min(self.ends[found], place)) if found >= 0 else (0, 0)

    def end(self, place: int) -> int:
        """Where the character before `place` ends in the original."""
        return place if self.ends is None else self.ends[place - 1] if place else 0


def view_of(text: str, *, json: bool, whole: bool) -> View:
    """`json` reads escapes as what they stand for; `whole` says that no more text follows."""
    if json and "\\" in text:
        return _unescaped(text, whole)
    folded = fold(text)
    if folded is text or folded == text:
        return View(text, None, None, len(text))
    return _mapped([(letter, at, at + 1) for at, letter in enumerate(text)], len(text))


def _mapped(letters: list[tuple[str, int, int]], read: int) -> View:
    out: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for letter, start, end in letters:
        folded = _FOLDS[ord(letter)]
        out.append(folded)
        for _ in folded:
            starts.append(start)
            ends.append(end)
    return View("".join(out), starts, ends, read)


def _unescaped(text: str, whole: bool) -> View:
    letters: list[tuple[str, int, int]] = []
    at, stop = 0, len(text)
    unfinished = None if whole else _last_unfinished(text)
    if unfinished is not None:
        stop = unfinished
    while at < stop:
        found = _ESCAPE.match(text, at) if text[at] == "\\" else None
        if found is None:
            letters.append((text[at], at, at + 1))
            at += 1
        else:
            letters.append((_meaning(found), at, found.end()))
            at = found.end()
    return _mapped(letters, stop)


def _last_unfinished(text: str) -> int | None:
    """Where an escape begins that the text does not hold all of. Backslashes come in pairs before it."""
    at = text.find("\\")
    while at >= 0:
        if _UNFINISHED_ESCAPE.match(text, at):
            return at
        found = _ESCAPE.match(text, at)
        at = text.find("\\", found.end() if found else at + 1)
    return None


def _meaning(escape: re.Match[str]) -> str:
    short, high, low, code = escape.groups()
    if short:
        return _SHORT.get(short, short)
    if high:
        return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00)
    letter = chr(int(code, 16))
    return "\ufffd" if "\ud800" <= letter <= "\udfff" else letter


def ends_in_string(text: str, *, begins_in_string: bool) -> bool:
    """Whether JSON text that starts in or out of a string ends in one."""
    quotes = text.count('"') if "\\" not in text else _QUOTE.findall(text).count('"')
    return begins_in_string != (quotes % 2 == 1)
