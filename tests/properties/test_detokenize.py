"""Penstock's text is vLLM's own, step by step, for every sequence of token ids: both are asked and must agree.

Four thousand sequences in every run, a million in a soak; and some hundreds drawn by hypothesis, which shrinks
what it finds.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.detokenize import Detokenizer, Vocabulary
from penstock_vllm.vocabulary import TokenizerVocabulary
from support.strategies import CLUSTERS, model_texts, seeds, thorough
from support.tokenizers_made import CORPUS, SHAPES, MadeTokenizer, made
from support.vllm_detokenizer import Case, VllmDetokenizer, vllm_detokenizer

pytestmark = pytest.mark.engine

IN_A_SOAK, IN_EVERY_RUN = 1_000_000, 4_000
BATCH = 250
# What BEGIN carries of a prompt as a rule.
PROMPT_END = 64


class Oracle:
    """vLLM's detokeniser, and Penstock's over the tokenizers as vLLM writes them."""

    def __init__(self, vllm: VllmDetokenizer, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.vllm = vllm
        self.vocabularies = vocabularies
        self.plugins = {shape: TokenizerVocabulary(vocabulary.tokenizer) for shape, vocabulary in vocabularies.items()}

    def assert_same(self, cases: Sequence[Case]) -> None:
        for case, expected in zip(cases, self.vllm.texts(cases), strict=True):
            assert self.penstock_says(case, self.prompt_end(case)) == expected, case

    def penstock_says(self, case: Case, prompt_end: Sequence[int]) -> list[str]:
        detokenizer = Detokenizer(
            self.vocabularies[case.tokenizer],
            tuple(prompt_end),
            skip_special_tokens=case.skip_special_tokens,
            spaces_between_special_tokens=case.spaces_between_special_tokens,
        )
        *before, last = case.steps
        return [detokenizer.feed(tuple(ids)) for ids in (*before, last[: len(last) - case.stopped])]

    def prompt_end(self, case: Case) -> Sequence[int]:
        """What the plugin puts into BEGIN."""
        return self.plugins[case.tokenizer].prompt_end(case.prompt, skips_special=case.skip_special_tokens)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with vllm_detokenizer() as vllm:
        vocabularies = {}
        for shape in SHAPES:
            file: Path = tmp_path_factory.mktemp(shape) / "tokenizer.json"
            file.write_text(made(shape).json, "utf-8")
            vocabularies[shape] = Vocabulary(vllm.load(shape, file))
        yield Oracle(vllm, vocabularies)


# --- A great many sequences, from seeds ---------------------------------------------------------------


class Dice:
    """Draws sequences of one shape: what models say, and what only a broken one would."""

    def __init__(self, shape: str, seed: int) -> None:
        self._tokenizer = made(shape)
        self._random = random.Random(f"{shape} {seed}")
        tokenizer = self._tokenizer
        self._pools: list[Sequence[int]] = [
            range(len(tokenizer.vocabulary)),
            range(len(tokenizer.vocabulary) + 3),  # the last ones are no tokens
            list(tokenizer.added.values()),
            list(tokenizer.special.values()),
        ]
        self._pools += [tokenizer.bytes] * 2 if tokenizer.bytes else []

    def case(self) -> Case:
        chance = self._random
        return Case(
            self._tokenizer.name,
            self.prompt(),
            self.steps(self.ids(chance.randint(1, 40))),
            skip_special_tokens=chance.random() < 0.6,
            spaces_between_special_tokens=chance.random() < 0.6,
            stopped=chance.random() < 0.2,
        )

    def prompt(self) -> list[int]:
        length = self._random.choice([0, 1, 2, 10, 30, 63, 64, 65, 66, 70, 130, 300])
        if self._random.random() < 0.1:  # one kind of token at the end for long: only skipped ones, only bytes
            pool = self._random.choice(self._pools)
            return self.ids(length) + [self._random.choice(pool) for _ in range(self._random.randint(1, 140))]
        return self.ids(length)

    def ids(self, length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids += self.text() if self._random.random() < 0.4 else self.run()
        return ids[:length]

    def run(self) -> list[int]:
        pool = self._random.choice(self._pools)
        return [self._random.choice(pool) for _ in range(self._random.randint(1, 10))]

    def text(self) -> list[int]:
        chance, tokenizer = self._random, self._tokenizer
        text = chance.choice([chance.choice(CORPUS), "".join(chance.choices(CLUSTERS, k=3))])
        start = chance.randrange(len(text))
        text = text[start : start + chance.randint(1, 30)]
        if tokenizer.bytes and chance.random() < 0.5:
            return tokenizer.bytewise(text)
        return tokenizer.encode(text)

    def steps(self, ids: Sequence[int]) -> list[list[int]]:
        """One token a step, or several as with speculation."""
        sizes = self._random.choice([[1], [1, 1, 1, 2, 4], [3, 8]])
        steps: list[list[int]] = []
        rest = list(ids)
        while rest:
            size = self._random.choice(sizes)
            steps.append(rest[:size])
            rest = rest[size:]
        return steps


@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_is_vllms(oracle: Oracle, shape: str) -> None:
    for batch in seeds(*(-(-sequences // (BATCH * len(SHAPES))) for sequences in (IN_EVERY_RUN, IN_A_SOAK))):
        dice = Dice(shape, batch)
        oracle.assert_same([dice.case() for _ in range(BATCH)])


# --- Sequences that shrink ----------------------------------------------------------------------------


@cache
def some_ids(tokenizer: MadeTokenizer) -> st.SearchStrategy[list[int]]:
    size = len(tokenizer.vocabulary)
    runs = [
        st.lists(st.integers(0, size - 1), max_size=8),
        st.lists(st.sampled_from([size, size + 1, 2**31, 2**32 - 1]), max_size=2),
        st.lists(st.sampled_from(list(tokenizer.added.values())), max_size=5),
        model_texts.map(tokenizer.encode),
    ]
    if tokenizer.bytes:
        runs += [st.lists(st.sampled_from(tokenizer.bytes), max_size=8), model_texts.map(tokenizer.bytewise)]
    return st.lists(st.one_of(runs), max_size=8).map(lambda several: list(chain.from_iterable(several)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokenizer = made(draw(st.sampled_from(SHAPES)))
    ids, prompt = draw(some_ids(tokenizer).filter(len)), draw(some_ids(tokenizer))
    size = draw(st.sampled_from([1, 1, 2, 5]))
    return Case(
        tokenizer.name,
        draw(st.sampled_from([prompt, prompt * 9])),
        [ids[at : at + size] for at in range(0, len(ids), size)],
        skip_special_tokens=draw(st.booleans()),
        spaces_between_special_tokens=draw(st.booleans()),
        stopped=draw(st.booleans()),
    )


@thorough(400)
@given(case=cases())
def test_the_text_is_vllms_for_what_hypothesis_draws(oracle: Oracle, case: Case) -> None:
    oracle.assert_same([case])


# --- How much of the prompt is needed -----------------------------------------------------------------


def long_prompts() -> Iterator[tuple[str, Case]]:
    """Prompts whose last 64 ids do not settle how the next token is written."""
    qwen, mistral, gemma = made("qwen"), made("mistral"), made("gemma")
    text = "The weather in Paris. " * 8
    broken = qwen.bytewise(f"{text}\udcf0\udc9f")
    yield "ends within a character", Case("qwen", broken, [[number] for number in qwen.encode("Hi")])
    images = mistral.encode(text) + [mistral.added["[IMG]"]] * 99 + [mistral.added["[/INST]"]]
    yield "ends with skipped tokens", Case("mistral", images, [mistral.encode("The")])
    run = gemma.encode("Say:") + [gemma.bytes[byte] for byte in ("é" * 49 + "€").encode()]
    yield "ends with a long run of bytes", Case("gemma", run, [[number] for number in gemma.encode("Hi")])


LONG_PROMPTS = dict(long_prompts())


@pytest.mark.parametrize("name", LONG_PROMPTS)
def test_where_the_last_64_ids_of_a_prompt_do_not_settle_it_the_plugin_tells_all(oracle: Oracle, name: str) -> None:
    case = LONG_PROMPTS[name]
    [expected] = oracle.vllm.texts([case])
    assert oracle.prompt_end(case) == case.prompt
    assert oracle.penstock_says(case, case.prompt[-PROMPT_END:]) != expected
    assert oracle.penstock_says(case, case.prompt) == expected


@pytest.mark.parametrize("name", LONG_PROMPTS)
def test_any_text_at_the_end_of_such_a_prompt_settles_it(oracle: Oracle, name: str) -> None:
    case = LONG_PROMPTS[name]
    closed = replace(case, prompt=[*case.prompt, *made(case.tokenizer).encode("assistant\n")])
    [expected] = oracle.vllm.texts([closed])
    assert oracle.prompt_end(closed) == closed.prompt[-PROMPT_END:]
    assert oracle.penstock_says(closed, closed.prompt[-PROMPT_END:]) == expected
