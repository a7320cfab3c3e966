"""Token ids -> text, byte for byte as vLLM's own detokeniser writes it (`vllm/v1/engine/detokenizer.py`).

One `Vocabulary` per tokenizer, one `Detokenizer` per choice. What a tokenizer's decoder cannot say yet, because a
character is not whole, stays inside its stream; what never becomes whole is never said.
"""

import hashlib

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# tokenizers says so when a decoder's output is not monotonic (vllm-project/vllm#17448); vLLM starts afresh then.
_INVALID_PREFIX = "Invalid prefix encountered"


class Vocabulary:
    """A tokenizer as the engine has it. `digest` is `sha256:<hex>` of the text of its `tokenizer.json`."""

    def __init__(self, tokenizer_json: str) -> None:
        self.digest = "sha256:" + hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        added = self.tokenizer.get_added_tokens_decoder()
        self.added = {number: token.content for number, token in added.items()}
        self.special = {number: token.content for number, token in added.items() if token.special}

    def count(self, text: str) -> int:
        """How many tokens a text is by itself. Takes about 0.2 µs a character: long ones belong in a thread."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


class Detokenizer:
    """One choice. `prompt_end` are the last ids before the first generated one: a decoder may join across them."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_end: tuple[int, ...],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=list(prompt_end), skip_special_tokens=skip_special_tokens)
        spaced = skip_special_tokens or spaces_between_special_tokens
        self._unspaced = {} if spaced else vocabulary.added
        self._last_was_added = False

    def feed(self, ids: tuple[int, ...]) -> str:
        """The text that these ids complete."""
        if len(ids) == 1 and not self._unspaced:
            return self._step(ids[0])
        return "".join(map(self._spell, ids))

    def _spell(self, token_id: int) -> str:
        text = self._step(token_id)
        if self._unspaced:
            added = self._unspaced.get(token_id)
            if added is not None and self._last_was_added:
                text = added
            self._last_was_added = added is not None
        return text

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except (OverflowError, TypeError):
            return ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._tokenizer, token_id) or ""
