"""The plugin's channels hold what vLLM's own reasoning and tool parsers find, for random answers in any tokens.

vLLM's parsers read the whole text at its end; the tagger gets ids, a step at a time, and never sees text. Six shapes of
tokenizers: markers that are tokens of their own, and markers that are spelled. Two thousand answers in every run, a
million in a soak. That the tags do not depend on the cuts, for any family, is shown in `plugin/test_channels.py`.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from penstock_vllm.channels import Run, Table
from penstock_vllm.frames import Channel
from penstock_vllm.vocabulary import TokenizerVocabulary
from support.plugin_client import QWEN
from support.strategies import CLUSTERS, seeds
from support.tokenizers_made import CORPUS, MadeTokenizer, made
from support.vllm_parsers import Answer, VllmParsers, vllm_parsers

pytestmark = pytest.mark.engine

IN_A_SOAK, IN_EVERY_RUN = 1_000_000, 2_000
BATCH = 100
# Each shape with the parser that vLLM has for a model of that kind: by the marker's id, or by its text.
PARSERS = {
    "qwen": "deepseek_r1",
    "gemma": "deepseek_r1",
    "plain_delimiters": "olmo3",
    "tiktoken": "olmo3",
    "llama": "olmo3",
    "mistral": "olmo3",
}
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_MARKER = re.compile("|".join(map(re.escape, MARKERS)).encode())
# What decoders differ in is shown elsewhere: space at the edges, and signs for bytes that are no text.
_NOISE = re.compile(r"[\s\ufffd]+")


class Speaker:
    """Makes up answers of one shape: perhaps a thought, an answer, perhaps some calls."""

    def __init__(self, shape: str, seed: int) -> None:
        self._chance = random.Random(f"{shape} {seed}")
        self._tokenizer = made(shape)
        self._shape = shape

    def answer(self) -> Answer:
        chance = self._chance
        thinks = chance.random() < 0.7
        ids = [*self._spell("<think>"), *self._prose(), *self._spell("</think>")] if thinks else []
        ids += self._prose()
        for _ in range(chance.choice([0, 0, 1, 2])):
            ids += [*self._spell("<tool_call>"), *self._spell(self._call()), *self._spell("</tool_call>")]
        return Answer(self._shape, PARSERS[self._shape] if thinks else None, ids)

    def _call(self) -> str:
        call = {"name": self._chance.choice(["f", "get_weather"]), "arguments": {"q": self._words(), "n": [1, 2.5]}}
        return f"\n{json.dumps(call, ensure_ascii=self._chance.random() < 0.5)}\n"

    def _prose(self) -> list[int]:
        """Text and random tokens, without a marker, however they come together."""
        while True:
            ids: list[int] = []
            for _ in range(self._chance.randint(0, 4)):
                ids += self._spell(self._words()) if self._chance.random() < 0.5 else self._random_ids()
            if not _contains_marker(self._tokenizer.tokenizer.decode(ids, skip_special_tokens=False)):
                return ids

    def _random_ids(self) -> list[int]:
        return self._chance.choices(self._ordinary, k=self._chance.randint(1, 8))

    @cached_property
    def _ordinary(self) -> list[int]:
        """Every token that is neither added nor a byte of a byte fallback, which is text only in whole runs."""
        tokenizer = self._tokenizer
        taken = {*tokenizer.added.values(), *(number for text, number in tokenizer.vocabulary.items() if "<0x" in text)}
        return sorted(set(tokenizer.vocabulary.values()) - taken)

    def _words(self) -> str:
        chance = self._chance
        text = chance.choice([chance.choice(CORPUS[:-1]), "".join(chance.choices(CLUSTERS, k=3)), "a < b <th >"])
        start = chance.randrange(len(text))
        return text[start : start + chance.randint(1, 25)]

    def _spell(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer.bytes and self._chance.random() < 0.3:
            return tokenizer.bytewise(text)
        return tokenizer.encode(text)


def _contains_marker(text: str) -> bool:
    return any(marker in text for marker in MARKERS)


def tagged(tokenizer: MadeTokenizer, table: Table, ids: Sequence[int], chance: random.Random) -> list[Run]:
    """The runs of an answer that came in steps of one or a few ids, neighbours of a channel together."""
    tagger = table.tagger(())
    rest = list(ids)
    out: list[tuple[int, int]] = []
    while rest:
        size = chance.choice([1, 1, 1, 2, 5])
        step, rest = rest[:size], rest[size:]
        runs = tagger.feed(step) if rest else tagger.finish(step, ended_by_token=False)
        out += [(channel, number) for channel, run in runs for number in run]
    assert [number for _, number in out] == list(ids)
    return [(channel, [n for _, n in group]) for channel, group in groupby(out, key=lambda pair: pair[0])]


def parted(tokenizer: MadeTokenizer, runs: list[Run]) -> dict[str, Any]:
    """What the channels hold as text. A token with parts of both a marker and a text gives the text its part."""
    piece = TokenizerVocabulary(tokenizer.tokenizer).piece
    texts = {Channel.REASONING: b"", Channel.ANSWER: b""}
    calls: list[bytes] = []
    place, opened = Channel.ANSWER, b""
    for channel, ids in runs:
        text = b"".join(map(piece, ids))
        if channel == Channel.MARKER:
            for kind, part in _cut(text):
                if kind == "marker":
                    opened, place = part, _behind(part)
                    calls += [b""] if place is Channel.TOOL else []
                elif place is Channel.TOOL:
                    calls[-1] += part
                else:
                    texts[place] += part
        elif channel == Channel.TOOL:
            calls[-1] += text
        else:
            assert (channel, opened) != (Channel.ANSWER, b"<think>")
            place = Channel(channel)
            texts[place] += text
    parsed = [json.loads(call.decode()) for call in calls]
    return {
        "reasoning": _squeezed(texts[Channel.REASONING].decode(errors="replace")),
        "content": _squeezed(texts[Channel.ANSWER].decode(errors="replace")),
        "calls": [(call["name"], call["arguments"]) for call in parsed],
    }


def _behind(marker: bytes) -> Channel:
    return {b"<think>": Channel.REASONING, b"<tool_call>": Channel.TOOL}.get(marker, Channel.ANSWER)


def _cut(text: bytes) -> Iterator[tuple[str, bytes]]:
    end = 0
    for found in _MARKER.finditer(text):
        yield "text", text[end : found.start()]
        yield "marker", found.group()
        end = found.end()
    yield "text", text[end:]


def _squeezed(text: str) -> str:
    return _NOISE.sub("", text)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmParsers]:
    with vllm_parsers() as process:
        for shape in PARSERS:
            file: Path = tmp_path_factory.mktemp(shape) / "tokenizer.json"
            file.write_text(made(shape).json, "utf-8")
            process.load(shape, file)
        yield process


@pytest.mark.parametrize("shape", PARSERS)
def test_the_channels_hold_what_vllms_own_parsers_find(vllm: VllmParsers, shape: str) -> None:
    tokenizer = made(shape)
    table = Table(QWEN, TokenizerVocabulary(tokenizer.tokenizer))
    for batch in seeds(*(-(-answers // (BATCH * len(PARSERS))) for answers in (IN_EVERY_RUN, IN_A_SOAK))):
        speaker, chance = Speaker(shape, batch), random.Random(batch)
        said = [speaker.answer() for _ in range(BATCH)]
        for answer, theirs in zip(said, vllm.parsed(said), strict=True):
            ours = parted(tokenizer, tagged(tokenizer, table, answer.ids, chance))
            assert ours["reasoning"] == _squeezed(theirs.reasoning or ""), answer
            assert ours["content"] == _squeezed(theirs.content or ""), answer
            assert ours["calls"] == theirs.calls, answer
