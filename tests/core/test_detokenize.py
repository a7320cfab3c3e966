"""Token ids to text, by hand. That it is vLLM's own text is shown in `properties/test_detokenize.py`."""

import hashlib
from typing import Any

import pytest

from penstock.core import detokenize
from penstock.core.detokenize import Detokenizer, Vocabulary
from support.tokenizers_made import SHAPES, made


def detokenizer(shape: str, prompt_end: tuple[int, ...] = (), **flags: bool) -> Detokenizer:
    return Detokenizer(Vocabulary(made(shape).json), prompt_end, **flags)


def texts(decoder: Detokenizer, ids: list[int]) -> list[str]:
    """What each id completes."""
    return [decoder.feed((number,)) for number in ids]


def test_the_digest_is_that_of_the_text_of_tokenizer_json() -> None:
    text = made("qwen").json
    assert Vocabulary(text).digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_added_tokens_and_which_of_them_are_skipped() -> None:
    qwen = made("qwen")
    vocabulary = Vocabulary(qwen.json)
    assert vocabulary.added == {number: text for text, number in qwen.added.items()}
    assert set(vocabulary.special.values()) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_by_one_and_all_at_once_are_the_same_text(shape: str) -> None:
    ids = made(shape).encode("Hello! The weather in Paris, 你好 - don't.")
    assert "".join(texts(detokenizer(shape), ids)) == detokenizer(shape).feed(tuple(ids))


@pytest.mark.parametrize("shape", ["qwen", "llama"])
def test_a_character_is_said_once_it_is_whole(shape: str) -> None:
    ids = [made(shape).bytes[byte] for byte in "a👧b".encode()]
    assert texts(detokenizer(shape), ids) == ["a", "", "", "", "👧", "b"]


def test_a_character_that_never_becomes_whole_is_said_as_broken_by_the_next() -> None:
    ids = [made("qwen").bytes[byte] for byte in b"a\xf0\x9fb\xf0"]
    assert texts(detokenizer("qwen"), ids) == ["a", "", "", "\ufffdb", ""]


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_out_of_the_vocabulary_are_no_text(shape: str) -> None:
    tokenizer = made(shape)
    ids = tokenizer.encode("Hello")
    outside = [len(tokenizer.vocabulary), 2**32 - 1, 2**40]
    said = texts(detokenizer(shape), [outside[0], *ids, *outside])
    assert "".join(said) == "Hello"
    assert said[-3:] == ["", "", ""]


def test_text_that_changes_when_more_comes_starts_the_decoder_afresh() -> None:
    """With byte fallback a run of bytes is text only as a whole: `é` is taken back when a broken byte follows it."""
    llama = made("llama")
    ids = [llama.bytes[byte] for byte in "aé".encode() + b"\xff"]
    said = texts(detokenizer("llama"), ids + llama.encode("The"))
    assert said == ["a", "", "é", "", "Th", "e"]  # not " Th": a fresh decoder strips the space in front of its text


def test_an_unknown_failure_of_the_library_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, **_: Any) -> None:
            pass

        def step(self, *_: Any) -> str:
            raise RuntimeError("something else")

    monkeypatch.setattr(detokenize, "DecodeStream", Broken)
    with pytest.raises(RuntimeError, match="something else"):
        detokenizer("qwen").feed((1,))


def test_special_tokens_are_skipped_unless_they_are_wanted() -> None:
    qwen = made("qwen")
    ids = tuple(qwen.encode("<think>a<|im_end|>"))
    assert detokenizer("qwen").feed(ids) == "<think>a"
    assert detokenizer("qwen", skip_special_tokens=False).feed(ids) == "<think>a<|im_end|>"


def test_spaces_between_added_tokens() -> None:
    """WordPiece writes a space before every token; vLLM can leave it out between added ones, unless it skips some."""
    bert = made("word_piece")
    ids = (*bert.encode("hi"), bert.added["[MASK]"], bert.added["[SEP]"], bert.added["[think]"], *bert.encode("hi"))
    assert detokenizer("word_piece", skip_special_tokens=False).feed(ids) == "hi [MASK] [SEP] [think] hi"
    unspaced = detokenizer("word_piece", skip_special_tokens=False, spaces_between_special_tokens=False)
    assert unspaced.feed(ids) == "hi [MASK][SEP][think] hi"
    assert detokenizer("word_piece", spaces_between_special_tokens=False).feed(ids) == "hi [think] hi"


@pytest.mark.parametrize(("shape", "joined"), [("llama", " The"), ("qwen", "The"), ("word_piece", " The")])
def test_the_first_token_is_joined_to_the_prompt(shape: str, joined: str) -> None:
    ids = tuple(made(shape).encode("The"))
    assert detokenizer(shape).feed(ids) == "The"
    assert detokenizer(shape, tuple(made(shape).encode("is"))).feed(ids) == joined
