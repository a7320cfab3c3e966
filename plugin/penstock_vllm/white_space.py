"""Which token ids are white space, by their bytes. Pure, and asked once per tokenizer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from penstock_vllm.vocabulary import BYTE_LETTERS, TokenizerVocabulary

# Unicode's White_Space. The engines' `\s` is this (guidance, outlines) or less (xgrammar).
RANGES: Final = (
    (0x09, 0x0D),
    (0x20, 0x20),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
)
CHARACTERS: Final = frozenset(chr(point) for first, last in RANGES for point in range(first, last + 1))

_BEGINNINGS: Final = frozenset(
    letter.encode()[:length] for letter in CHARACTERS for length in range(1, len(letter.encode()))
)
# Bytes that can be part of white space, and the letters that spell them in a vocabulary of either kind.
_BYTES: Final = frozenset(byte for letter in CHARACTERS for byte in letter.encode())
_CANDIDATE: Final = re.compile(
    "(?:<0x[0-9A-F]{2}>|["
    + re.escape("".join(letter for letter, byte in BYTE_LETTERS.items() if byte in _BYTES))
    + re.escape("".join(sorted(CHARACTERS)) + "\u2581")
    + "])+"
)


@dataclass(frozen=True, slots=True)
class WhiteSpaceTokens:
    """Ids of one vocabulary. A fragment is white space, or nothing, and then the beginning of a white-space character.

    A grammar that allows `\\s` allows the first bytes of its longer characters too, which are as well the first
    bytes of other characters: fragments alone are no sign of white space.
    """

    whole: tuple[int, ...]
    fragments: tuple[int, ...]


def white_space_tokens(vocabulary: TokenizerVocabulary, tokens: Mapping[str, int]) -> WhiteSpaceTokens:
    """`tokens` are the vocabulary's own spellings and their ids."""
    whole: list[int] = []
    fragments: list[int] = []
    for spelling, number in tokens.items():
        if _CANDIDATE.fullmatch(spelling) is None or vocabulary.is_added(number):
            continue
        kind = _kind(vocabulary.piece(number))
        if kind is not None:
            (fragments if kind else whole).append(number)
    return WhiteSpaceTokens(tuple(sorted(whole)), tuple(sorted(fragments)))


def _kind(text: bytes) -> bool | None:
    """False for white space, True for a fragment of it, None for anything else."""
    if not text:
        return None
    for cut in range(3):
        head, tail = text[: len(text) - cut], text[len(text) - cut :]
        if tail and tail not in _BEGINNINGS:
            continue
        try:
            letters = head.decode()
        except UnicodeDecodeError:
            continue
        if CHARACTERS.issuperset(letters):
            return bool(tail)
    return None
