"""What the plugin must know of the engine's tokenizer: which id is a marker, and which bytes an id adds."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Final

# The letters that stand for the bytes of a byte-level vocabulary that are not printable, in order (GPT-2's table).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_LETTERS: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHERS)
}

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# The end of a prompt that settles, but for rare ones, how the next token is written; decoding it costs some 20 us.
_PROMPT_END = 64


class TokenizerVocabulary:
    """The vocabulary of a `tokenizers.Tokenizer`: the one that vLLM decodes with."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added_texts: dict[int, bytes] = {number: token.content.encode() for number, token in added.items()}
        self._added_ids: dict[str, int] = {token.content: number for number, token in added.items()}
        self.special = frozenset(number for number, token in added.items() if token.special)

    def added_id(self, text: str) -> int | None:
        return self._added_ids.get(text)

    def is_added(self, token_id: int) -> bool:
        return token_id in self._added_texts

    def piece(self, token_id: int) -> bytes:
        added = self._added_texts.get(token_id)
        if added is not None:
            return added
        token: str | None = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._spelled(token_id, token)

    def prompt_end(self, prompt: Sequence[int], *, skips_special: bool) -> Sequence[int]:
        """The last 64 ids, or the whole prompt where those do not settle how the first generated token is written."""
        end = prompt[-_PROMPT_END:]
        return end if len(end) == len(prompt) or self._settles(end, skips_special=skips_special) else prompt

    def _settles(self, end: Sequence[int], *, skips_special: bool) -> bool:
        """Whether `end` holds a token that is text by itself (not skipped, no part of a run of bytes) and is whole.

        A decoder strips the space in front of the first text that it sees, and makes text of a run of byte tokens
        only as a whole. Behind a prompt that ends within a character vLLM says all of it again with the first token.
        """
        skipped = self.special if skips_special else ()
        texts = (self._tokenizer.id_to_token(number) for number in end if number not in skipped)
        if not any(text is not None and not _BYTE_TOKEN.fullmatch(text) for text in texts):
            return False
        decoded: str = self._tokenizer.decode(list(end), skip_special_tokens=skips_special)
        return not decoded.endswith("\ufffd")

    def _spelled(self, token_id: int, token: str) -> bytes:
        if self._has_space_sign:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
        if self._is_byte_level:
            return bytes(BYTE_LETTERS[letter] for letter in token if letter in BYTE_LETTERS)
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()

    @cached_property
    def _has_space_sign(self) -> bool:
        # A byte-level vocabulary spells this sign as three letters, so only SentencePiece's kind has it as it is.
        return self._tokenizer.token_to_id(_SPACE) is not None

    @cached_property
    def _is_byte_level(self) -> bool:
        space = next(letter for letter, byte in BYTE_LETTERS.items() if byte == 0x20)
        return self._tokenizer.token_to_id(space) is not None


class TokenizerText:
    """`tokenizer.json` as the engine's own tokenizer writes it, and the digest of exactly that text."""

    def __init__(self, tokenizer: Any, bos: int | None) -> None:
        text: str = tokenizer.to_str()
        self.digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        # Kept as it is sent: writing it anew would hold the server's loop up, and vLLM may set truncation on its own.
        self.answer = json.dumps({"digest": self.digest, "tokenizer_json": text, "bos_token_id": bos}).encode()


def fast_tokenizer(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` inside the engine's tokenizer, or None where vLLM decodes by other means.

    vLLM's own fast detokeniser reads the same attribute, so this is the very object that it decodes with.
    """
    inner = getattr(tokenizer, "_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    return inner if hasattr(inner, "to_str") and hasattr(inner, "get_added_tokens_decoder") else None


def end_ids(tokenizer: Any, model_config: Any) -> list[int]:
    """The model's own end tokens."""
    generation = model_config.try_get_generation_config() or {}
    named = generation.get("eos_token_id")
    more: Iterable[int] = named if isinstance(named, list) else [] if named is None else [named]
    own = tokenizer.eos_token_id
    return sorted({*([] if own is None else [own]), *more})
