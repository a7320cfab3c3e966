"""White-space tokens by their bytes, in vocabularies of every shape."""

import pytest

from penstock_vllm.vocabulary import TokenizerVocabulary
from penstock_vllm.white_space import CHARACTERS, white_space_tokens
from support.tokenizers_made import made


@pytest.mark.parametrize("name", ["qwen", "tiktoken", "llama", "gemma", "unigram"])
def test_every_token_is_told_by_its_bytes(name: str) -> None:
    tokenizer = made(name)
    vocabulary = TokenizerVocabulary(tokenizer.tokenizer)
    tokens = tokenizer.tokenizer.get_vocab(with_added_tokens=False)
    found = white_space_tokens(vocabulary, tokens)
    for number in tokens.values():
        piece = b"" if vocabulary.is_added(number) else vocabulary.piece(number)
        assert (number in found.whole) == is_white_space(piece), piece
        assert (number in found.fragments) == may_become_white_space(piece), piece


def is_white_space(piece: bytes) -> bool:
    return bool(piece) and CHARACTERS.issuperset(piece.decode(errors="replace"))


def may_become_white_space(piece: bytes) -> bool:
    """Whether some white-space characters begin with it and none ends there. Slow and plain."""
    letters = [letter.encode() for letter in CHARACTERS]
    rests = {piece}
    while True:
        longer = rests | {rest[len(one) :] for rest in rests for one in letters if rest.startswith(one)}
        if longer == rests:
            break
        rests = longer
    return b"" not in rests and any(one.startswith(rest) for rest in rests for one in letters)


def test_what_is_white_space() -> None:
    assert {" ", "\n", "\t", "\r", "\u00a0", "\u2028", "\u3000"} <= CHARACTERS
    assert not {"\u200b", "\ufeff", "\x1c", "a"} & CHARACTERS
