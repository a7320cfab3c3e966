"""A set of words looked for in text that comes in pieces: found at once, held no longer than needed."""

import re
from collections.abc import Iterable


class Markers:
    """No word may be complete within another before its end: which one is found would depend on how text is cut."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        for word in self.words:
            longer = [other for other in self.words if word in other[:-1]]
            if not word or longer:
                raise ValueError(f"{word!r} is empty or stands within another of the same set: {longer}")
        self.pattern = re.compile("|".join(map(re.escape, self.words)) or r"(?!)")
        letters = sorted({word[0] for word in self.words})
        self._first = re.compile("[" + "".join(map(re.escape, letters)) + "]" if letters else r"(?!)")
        self._beginnings = frozenset(word[:end] for word in self.words for end in range(len(word)))
        self._longest = max(map(len, self.words), default=1) - 1

    def are_excluded_by(self, text: str) -> bool:
        """True if `text` neither contains nor begins a marker: the quick way out per token (0.2 us)."""
        return self._first.search(text) is None

    def may_begin(self, text: str) -> bool:
        """Whether `text`, possibly empty, is a proper beginning of a marker."""
        return text in self._beginnings

    def unfinished(self, text: str) -> int:
        """Length of the longest end of `text` that may still become a marker: the least that must be held."""
        for length in range(min(len(text), self._longest), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
