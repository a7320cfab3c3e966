"""Whole characters out of whatever an engine calls a string.

vLLM holds a character's tokens back until it is whole, but engines and proxies exist that cut the JSON escape of
a character outside the BMP into two halves, or put the raw bytes of one character into two chunks. Both are
put together here. Nothing is ever replaced by U+FFFD: what never becomes a character is dropped and counted.
"""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_HIGH_HALF = re.compile("[\ud800-\udbff]")
_UNDECODED = re.compile("[\udc80-\udcff]+")
_UNDECODED_END = re.compile("[\udc80-\udcff]+\\Z")
_ZWJ = "\u200d"
_FLAG_LETTERS = ("\U0001f1e6", "\U0001f1ff")


def decode_leniently(data: bytes) -> str:
    """UTF-8, with bytes that are none of it kept as U+DC80..U+DCFF for `WholeCharacters` to put together."""
    return data.decode("utf-8", "surrogateescape")


class WholeCharacters:
    """One text field of one choice. Holds at most one unfinished character (and one joiner and flag half).

    A delta never ends after a zero-width joiner or between the two letters of a flag: there the visible
    character is provably unfinished. (Of joiners in a row, which join nothing, only the last is held.) A joiner
    or combining mark that follows a whole character cannot be foreseen without delaying every token by one, so
    it may start the next delta.
    """

    def __init__(self) -> None:
        self._held = ""
        self.dropped = 0

    def feed(self, text: str) -> str:
        if self._held:
            text, self._held = self._held + text, ""
        if not text:
            return ""
        if not text.isascii():
            if _SURROGATE.search(text):
                text = self._mend(text)
            text = self._hold_unfinished(text)
        return text

    def flush(self) -> str:
        """What was held; call it where the field ends. A half that can no longer be completed is dropped."""
        text, self._held = self._held, ""
        whole = _SURROGATE.sub("", text)
        self.dropped += len(text) - len(whole)
        return whole

    def _mend(self, text: str) -> str:
        """Joins surrogate halves, then undecoded bytes; holds an unfinished end; drops what fits nowhere."""
        if _HIGH_HALF.match(text[-1]):
            text, self._held = text[:-1], text[-1]
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        if not self._held and (run := _UNDECODED_END.search(text)):
            unfinished = _unfinished_suffix(_raw(run))
            text, self._held = text[: len(text) - unfinished], text[len(text) - unfinished :]
        text = _UNDECODED.sub(lambda run: decode_leniently(_raw(run)), text)
        whole = _SURROGATE.sub("", text)
        self.dropped += len(text) - len(whole)
        return whole

    def _hold_unfinished(self, text: str) -> str:
        end = len(text)
        if end and _FLAG_LETTERS[0] <= text[-1] <= _FLAG_LETTERS[1] and _odd_flag_letters(text):
            end -= 1
        if end and text[end - 1] == _ZWJ:
            end -= 1
        self._held = text[end:] + self._held
        return text[:end]


def _raw(run: re.Match[str]) -> bytes:
    return run.group().encode("utf-8", "surrogateescape")


def _odd_flag_letters(text: str) -> bool:
    count = 0
    for character in reversed(text):
        if not _FLAG_LETTERS[0] <= character <= _FLAG_LETTERS[1]:
            break
        count += 1
    return count % 2 == 1


def _unfinished_suffix(raw: bytes) -> int:
    """How many bytes at the end of `raw` may be the beginning of a character (0 to 3)."""
    for length in range(1, min(3, len(raw)) + 1):
        lead = raw[-length]
        if lead >= 0xC0:
            wanted = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return length if length < wanted else 0
    return 0
