"""Tokenizers of the shapes that models come with, made on the spot: each in milliseconds, always the same.

    made("qwen").encode("<think>Hi") -> token ids
    made("qwen").json                -> what its `tokenizer.json` would hold

No file is downloaded: what matters to a detokeniser is how a shape decodes (bytes, spaces, added tokens), and that
does not depend on the text that it learned from.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from support.engine import byte_letters

CORPUS: Final = (
    "The user says hi. A short greeting is enough, and the weather in Paris would be nice to have.",
    "Hello! How can I help you today? I can look up the weather, the time and 3.14159 other things.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": [1, 2, 3]}}',
    "def main(arguments: list[str]) -> int:\n    for number in range(10):\n        print(number)\n    return 0\n",
    "I don't know, they've said it's \"fine\"; we'll see what (if anything) comes of it by 2024-12-31.",
    "Übermäßig schöne Grüße aus München! Où est la bibliothèque, s'il vous plaît? ¿Qué tal, señor?",
    "你好，世界！今天天气怎么样？ 東京の天気を教えてください。 안녕하세요 세계.",
    "Привет, мир! Как дела? مرحبا بالعالم، كيف حالك؟ สวัสดีชาวโลก नमस्ते दुनिया",
    "Emoji 🙂 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ and combining e\u0301 n\u0303, wide ＡＢＣ, signs ∑∫√, arrows → ⇒.",
    "   indented\n\n\n\ttabs\tand  double  spaces\r\n    and trailing   \n",
    "<tool_call>\n{}\n</tool_call> <think> hm </think> [THINK] assistant analysis commentary final",
)

# What stands in a vocabulary beside the learned tokens, and whether a decoder may skip it.
_QWEN: Final = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
}
_HARMONY: Final = dict.fromkeys(
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"), True
)
_MISTRAL: Final = dict.fromkeys(
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_END]", "[THINK]", "[/THINK]"), True
)
_SENTENCE_PIECE: Final = {"<unk>": True, "<s>": True, "</s>": True}
_T5: Final = {"<pad>": True, "</s>": True, "<unk>": True, "<extra_id_0>": False, "<extra_id_1>": False}
_BERT: Final = {"[PAD]": True, "[UNK]": True, "[CLS]": True, "[SEP]": True, "[MASK]": True, "[think]": False}
_CLIP: Final = {"<|startoftext|>": True, "<|endoftext|>": True, "<think>": False}

_GPT2_SPLIT: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: Final = [f"<0x{byte:02X}>" for byte in range(256)]
_LEARNED: Final = 400


@dataclass(frozen=True)
class MadeTokenizer:
    """One tokenizer; `json` is the text of its `tokenizer.json`."""

    name: str
    json: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.json)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        return found

    @cached_property
    def added(self) -> dict[str, int]:
        """The added tokens, special or not, with their ids."""
        return {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def special(self) -> dict[str, int]:
        """Those that `skip_special_tokens` leaves out of the text."""
        decoder = self.tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in decoder.items() if token.special}

    @cached_property
    def bytes(self) -> list[int]:
        """The id that stands for each of the 256 bytes, in their order; empty where the shape has none."""
        letters = byte_letters()
        spelled = [letters[byte] for byte in range(256)] if self._is_byte_level else _BYTES
        return [self.vocabulary[text] for text in spelled if text in self.vocabulary]

    @property
    def _is_byte_level(self) -> bool:
        return bool(json.loads(self.json)["decoder"]["type"] == "ByteLevel")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as the tokenizer cuts it, with nothing put around them."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def bytewise(self, text: str) -> list[int]:
        """Ids of `text` with every byte a token of its own and added tokens whole; the shape must have `bytes`.

        A lone surrogate U+DC80 to U+DCFF stands for a byte that is no text, as in `os.fsdecode`.
        """
        ids: list[int] = []
        while text:
            marker = next((marker for marker in self.added if text.startswith(marker)), None)
            if marker is None:
                ids += [self.bytes[byte] for byte in text[0].encode(errors="surrogateescape")]
            else:
                ids.append(self.added[marker])
            text = text.removeprefix(marker or text[0])
        return ids


@cache
def made(name: str) -> MadeTokenizer:
    """The tokenizer of this shape, one of `SHAPES`."""
    return MadeTokenizer(name, _MAKERS[name]().to_str())


def _byte_level(split: str, added: Mapping[str, bool]) -> Tokenizer:
    """GPT-2's kind: text as bytes, bytes as printable letters; learned pieces may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + _LEARNED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with(tokenizer, added)


def _byte_fallback(added: Mapping[str, bool], *, strips: bool) -> Tokenizer:
    """SentencePiece's BPE: spaces are `▁`, what was not learned is spelled in byte tokens `<0xE4>`.

    Llama 2 and Mistral put a space in front of a text and strip it when they decode, Gemma does not.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend("▁")] if strips else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    # Which characters are learned is settled here: the library would break ties at random.
    alphabet = [*string.ascii_letters, *string.digits, *string.punctuation, *"▁éüß你好"]
    trainer = trainers.BpeTrainer(
        vocab_size=_LEARNED, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    words = [*added, *_BYTES, *learned["vocab"]]
    tokenizer.model = models.BPE(
        vocab={word: number for number, word in enumerate(dict.fromkeys(words))},
        merges=[tuple(pair) for pair in learned["merges"]],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    strip = [decoders.Strip(content=" ", left=1, right=0)] if strips else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _with(tokenizer, added)


def _unigram() -> Tokenizer:
    """T5's kind: every piece has a score, a space is `▁` at the start of a word."""
    pieces = [*(f"▁{word}" for word in _common_words()), "▁", *_characters()]
    scored = [(text, 0.0) for text in _T5] + [(text, -10.0 / len(text)) for text in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=list(_T5).index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with(tokenizer, _T5)


def _word_piece() -> Tokenizer:
    """BERT's kind: the decoder puts a space before every token that does not go on, and tidies up punctuation."""
    pieces = [*_BERT, *_common_words(), *_characters(), *(f"##{character}" for character in _characters())]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with(tokenizer, _BERT)


def _word_ends() -> Tokenizer:
    """CLIP's kind: the end of a word is part of its last token, and a space only where another one follows."""
    merges: dict[tuple[str, str], None] = {}
    for word in _common_words():
        begun, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for piece in rest:
            merges[begun, piece] = None
            begun += piece
    pieces = [*_CLIP, *_characters(), *(f"{character}</w>" for character in _characters()), *map("".join, merges)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(numbers, list(merges), unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _with(tokenizer, _CLIP)


def _common_words() -> list[str]:
    """By their frequency, then by the alphabet: the library's own trainers break ties at random for these shapes."""
    counts = Counter(word for line in CORPUS for word in re.findall(r"\w+", line))
    return sorted(counts, key=lambda word: (-counts[word], word))


def _characters() -> list[str]:
    return sorted({character for line in CORPUS for character in line if not character.isspace()})


def _with(tokenizer: Tokenizer, added: Mapping[str, bool]) -> Tokenizer:
    tokens = [AddedToken(text, normalized=False, special=special) for text, special in added.items()]
    for token in tokens:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


_MAKERS: Final[Mapping[str, Callable[[], Tokenizer]]] = {
    "qwen": lambda: _byte_level(_GPT2_SPLIT, _QWEN),
    "plain_delimiters": lambda: _byte_level(_GPT2_SPLIT, {"<|endoftext|>": True}),
    "tiktoken": lambda: _byte_level(_CL100K_SPLIT, _HARMONY),
    "llama": lambda: _byte_fallback(_SENTENCE_PIECE, strips=True),
    "mistral": lambda: _byte_fallback(_MISTRAL, strips=True),
    "gemma": lambda: _byte_fallback({**_SENTENCE_PIECE, "<think>": False, "</think>": False}, strips=False),
    "unigram": _unigram,
    "word_piece": _word_piece,
    "word_ends": _word_ends,
}
SHAPES: Final = tuple(_MAKERS)
"""Byte-level BPE as Qwen has it, without the delimiters as added tokens, and with tiktoken's split; SentencePiece
with byte fallback as Llama 2, Mistral and Gemma have it; Unigram with `▁`; WordPiece; and BPE with word ends."""
