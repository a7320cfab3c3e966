"""Which bytes an id adds to the text, for each kind of vocabulary that models come with."""

import hashlib
import json

import pytest

from penstock_vllm.vocabulary import TokenizerText, TokenizerVocabulary, fast_tokenizer
from support.tokenizers_made import SHAPES, made

SPELLING_SHAPES = ["qwen", "plain_delimiters", "tiktoken", "llama", "mistral", "gemma"]
TEXT = "Hello, the weather in Paris: 你好 🙂 é\n<think>"


@pytest.mark.parametrize("shape", SPELLING_SHAPES)
def test_the_pieces_of_a_text_are_its_bytes(shape: str) -> None:
    vocabulary = TokenizerVocabulary(made(shape).tokenizer)
    text = b"".join(map(vocabulary.piece, made(shape).encode(TEXT)))
    # Llama 2 and Mistral put a space in front of a text.
    assert text.removeprefix(b" ") == TEXT.encode()


@pytest.mark.parametrize("shape", [shape for shape in SPELLING_SHAPES if made(shape).bytes])
def test_each_byte_has_its_id(shape: str) -> None:
    vocabulary = TokenizerVocabulary(made(shape).tokenizer)
    assert [vocabulary.piece(number) for number in made(shape).bytes] == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("shape", SHAPES)
def test_added_tokens_are_known_by_their_text(shape: str) -> None:
    vocabulary = TokenizerVocabulary(made(shape).tokenizer)
    for text, number in made(shape).added.items():
        assert vocabulary.added_id(text) == number
        assert vocabulary.piece(number) == text.encode()
    assert vocabulary.special == set(made(shape).special.values())
    assert vocabulary.added_id("weather") is None


@pytest.mark.parametrize("shape", SHAPES)
def test_an_id_that_does_not_exist_has_no_text(shape: str) -> None:
    assert TokenizerVocabulary(made(shape).tokenizer).piece(10**6) == b""


def test_a_word_is_what_the_decoder_says_where_no_byte_can_be_told() -> None:
    words = TokenizerVocabulary(made("word_ends").tokenizer)
    assert b"the" in {words.piece(number) for number in made("word_ends").encode("the weather")}


def test_the_digest_is_of_exactly_the_text_that_is_sent() -> None:
    tokenizer = made("qwen").tokenizer
    sent = json.loads(TokenizerText(tokenizer, bos=7).answer)
    assert sent["tokenizer_json"] == tokenizer.to_str()
    assert sent["digest"] == "sha256:" + hashlib.sha256(sent["tokenizer_json"].encode()).hexdigest()
    assert sent["bos_token_id"] == 7


class Wrapped:
    """A tokenizer as `transformers` wraps one."""

    def __init__(self, inner: object, *, is_fast: bool = True) -> None:
        self._tokenizer = inner
        self.is_fast = is_fast


def test_only_a_fast_tokenizer_is_offered() -> None:
    tokenizer = made("qwen").tokenizer
    assert fast_tokenizer(Wrapped(tokenizer)) is tokenizer
    assert fast_tokenizer(Wrapped(tokenizer, is_fast=False)) is None
    assert fast_tokenizer(Wrapped(object())) is None
    assert fast_tokenizer(None) is None


# --- How much of a prompt the sidecar must see ---------------------------------------------------------

TURN = "The weather in Paris. " * 40 + "assistant\n"


def test_the_last_64_ids_of_a_prompt_are_enough_as_a_rule() -> None:
    for shape in SHAPES:
        ids = made(shape).encode(TURN)
        assert TokenizerVocabulary(made(shape).tokenizer).prompt_end(ids, skips_special=True) == ids[-64:]


def test_a_prompt_whose_end_does_not_settle_how_the_next_token_is_written_is_told_whole() -> None:
    qwen, mistral, gemma = made("qwen"), made("mistral"), made("gemma")
    broken = [*qwen.encode(TURN), qwen.bytes[0xF0]]
    images = mistral.encode(TURN) + [mistral.added["[IMG]"]] * 99
    run = gemma.encode(TURN) + [gemma.bytes[byte] for byte in ("é" * 50).encode()]
    for shape, ids in (("qwen", broken), ("mistral", images), ("gemma", run)):
        assert TokenizerVocabulary(made(shape).tokenizer).prompt_end(ids, skips_special=True) == ids
    shown = TokenizerVocabulary(mistral.tokenizer).prompt_end(images, skips_special=False)
    assert shown == images[-64:]
