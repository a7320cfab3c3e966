"""Random grammars and values through vLLM's real back ends, held against an oracle that derives what could follow.

    .venv-vllm/bin/python tests/support/grammar_oracle.py SEED CASES

Run by the engine's interpreter. Each case makes up a language, writes it as a regular expression and as EBNF, lets a
back end mask a tiny vocabulary (half of them byte-level, half with a sign for a blank and byte tokens), and walks
through it at random, token by token. After each token the scheduler's rule and the processor's tensors say whether the
value is over; the oracle takes the language's derivative (Brzozowski) by the text instead, and looks through all that
could follow. Prints one JSON object; `wrong` is to be empty.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from penstock_vllm import grammar_tensors, notations
from penstock_vllm.grammar_stop import Ends, _Value
from penstock_vllm.tails import mask_tells_the_end
from penstock_vllm.vocabulary import BYTE_LETTERS, TokenizerVocabulary
from penstock_vllm.white_space import CHARACTERS, white_space_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.tokenizers_made import made

LETTERS = "ab1“é \n"
MERGES = ("  ", "\n\n", " a", "\n1", "ab", "1 ", "\n\n\n", " \n", "“a", "aé")
LONGEST = 40

# --- The oracle: languages as terms, and their derivatives ----------------------------------------------


@dataclass(frozen=True)
class Term:
    """`chars` of letters, or `row`, `one_of`, `star` of terms. The empty row is the empty text."""

    kind: str
    letters: frozenset[str] = frozenset()
    parts: tuple[Term, ...] = ()


EMPTY = Term("row")
NOTHING = Term("one_of")


def row(*parts: Term) -> Term:
    flat = [inner for part in parts for inner in (part.parts if part.kind == "row" else (part,))]
    if NOTHING in flat:
        return NOTHING
    return flat[0] if len(flat) == 1 else Term("row", parts=tuple(flat))


def one_of(*parts: Term) -> Term:
    flat = {inner for part in parts for inner in (part.parts if part.kind == "one_of" else (part,))}
    return flat.pop() if len(flat) == 1 else Term("one_of", parts=tuple(sorted(flat, key=repr)))


@cache
def is_whole(term: Term) -> bool:
    if term.kind == "row":
        return all(map(is_whole, term.parts))
    return term.kind == "star" or (term.kind == "one_of" and any(map(is_whole, term.parts)))


@cache
def after(term: Term, letter: str) -> Term:
    if term.kind == "chars":
        return EMPTY if letter in term.letters else NOTHING
    if term.kind == "one_of":
        return one_of(*(after(part, letter) for part in term.parts))
    if term.kind == "star":
        return row(after(term.parts[0], letter), term)
    if not term.parts:
        return NOTHING
    first, rest = term.parts[0], row(*term.parts[1:])
    own = row(after(first, letter), rest)
    return one_of(own, after(rest, letter)) if is_whole(first) else own


@cache
def could_add_text(term: Term) -> bool:
    """Whether any text of the language that is left has a letter that is no white space."""
    seen, todo = {term}, [term]
    while todo:
        one = todo.pop()
        for letter in LETTERS:
            following = after(one, letter)
            if following == NOTHING:
                continue
            if letter not in CHARACTERS:
                return True
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return False


# --- Languages made up ----------------------------------------------------------------------------------


def made_up(source: random.Random, depth: int = 0) -> tuple[Term, str, str]:
    """A language as a term, a regular expression, and EBNF."""
    kind = source.choice(("chars", "space", "row", "row", "one_of", "repeat") if depth < 3 else ("chars", "space"))
    if kind == "chars":
        return letters_of(frozenset(source.sample(LETTERS[:5], source.choice((1, 1, 1, 2, 3)))))
    if kind == "space":
        return letters_of(frozenset(source.choice((" ", "\n", " \n", " \n"))))
    if kind == "repeat":
        return repeated(source, made_up(source, depth + 1))
    parts = [made_up(source, depth + 1) for _ in range(source.choice((2, 2, 3)))]
    terms, regexes, grammars = zip(*parts, strict=True)
    if kind == "row":
        return row(*terms), "".join(regexes), " ".join(grammars)
    return one_of(*terms), "(" + "|".join(regexes) + ")", "(" + " | ".join(grammars) + ")"


def letters_of(letters: frozenset[str]) -> tuple[Term, str, str]:
    spelled = "".join(sorted(letters)).replace("\n", "\\n")
    return Term("chars", letters), f"[{spelled}]", f"[{spelled}]"


def repeated(source: random.Random, part: tuple[Term, str, str]) -> tuple[Term, str, str]:
    term, regex, grammar = part
    least, most, sign = source.choice(
        ((0, None, "*"), (0, None, "*"), (1, None, "+"), (0, 1, "?"), (0, 1, "?"), (2, 2, "{2}"), (1, 3, "{1,3}"))
    )
    rest = [Term("star", parts=(term,))] if most is None else [one_of(EMPTY, term)] * (most - least)
    return row(*[term] * least, *rest), f"({regex}){sign}", f"({grammar}){sign}"


def with_a_tail(source: random.Random) -> tuple[Term, str, str]:
    """Mostly such languages as are in question: a value, and white space behind it that may lead on."""
    value = made_up(source, 1)
    tail = repeated(source, letters_of(frozenset(source.choice((" ", " \n")))))
    parts = [value, tail]
    if source.random() < 0.5:
        more = made_up(source, 2)
        parts.append((one_of(EMPTY, more[0]), f"({more[1]})?", f"({more[2]})?"))
    terms, regexes, grammars = zip(*parts, strict=True)
    return row(*terms), "".join(regexes), " ".join(grammars)


# A grammar that only a stack can follow: which bracket is the last one.
NESTED = r"""
root ::= value
value ::= "(" ws value* ")" ws | [1a] ws
ws ::= ([ \n] ws)?
"""


def is_nested_whole(letters: str) -> bool:
    depth = 0
    for place, letter in enumerate(letters):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and letter in ")1a":
            return not letters[place + 1 :].strip()
    return False


# --- The walk -------------------------------------------------------------------------------------------


def byte_level() -> Any:
    letter = {byte: letter for letter, byte in BYTE_LETTERS.items()}
    spelled = ["".join(letter[byte] for byte in merge.encode()) for merge in MERGES]
    half = letter[0x20] + letter["“".encode()[0]]
    vocabulary = {piece: number for number, piece in enumerate([*letter.values(), *spelled, half, "<end>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def byte_fallback() -> Any:
    """SentencePiece's kind: a sign for a blank, and a token for each byte beside those of letters."""
    return PreTrainedTokenizerFast(tokenizer_object=made("llama").tokenizer, eos_token="</s>")


class Walks:
    def __init__(self, seed: int, tokenizer: Any) -> None:
        self.source = random.Random(seed)
        self.tokenizer = tokenizer
        self.end = self.tokenizer.eos_token_id
        size = len(self.tokenizer)
        config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="tiny")),
            structured_outputs_config=SimpleNamespace(
                disable_any_whitespace=False, disable_additional_properties=False
            ),
            speculative_config=None,
        )
        self.backends = {
            name: kind(config, tokenizer=self.tokenizer, vocab_size=size)
            for name, kind in (
                ("xgrammar", XgrammarBackend),
                ("guidance", GuidanceBackend),
                ("outlines", OutlinesBackend),
            )
        }
        self.ends = Ends(self.tokenizer)
        vocabulary = TokenizerVocabulary(self.tokenizer._tokenizer)
        self.bytes = [vocabulary.piece(number) for number in range(size)]
        white = white_space_tokens(vocabulary, self.tokenizer.get_vocab())
        single = [number for number in range(size - 1) if len(self.bytes[number]) == 1]
        self.tensors = grammar_tensors.Vocabulary(
            white.whole, white.fragments, [self.end], single, size, torch.device("cpu")
        )
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    def case(self) -> None:
        if self.source.random() < 0.05:
            name = self.source.choice(("xgrammar", "guidance"))
            grammar = self.backends[name].compile_grammar(StructuredOutputOptions.GRAMMAR, NESTED, {self.end})
            self.counts["nested"] += 1
            self.walk(is_nested_whole, grammar, name, "GRAMMAR", NESTED, trusts_masks=False)
            return
        term, regex, ebnf = with_a_tail(self.source) if self.source.random() < 0.7 else made_up(self.source)
        name = self.source.choice(tuple(self.backends))
        kind = "REGEX" if name == "outlines" else self.source.choice(("REGEX", "GRAMMAR"))
        text = regex if kind == "REGEX" else f"root ::= {ebnf}"
        try:
            grammar = self.backends[name].compile_grammar(StructuredOutputOptions[kind], text, {self.end})
        except Exception:  # a back end that refuses a language is no matter of ours
            self.counts["refused"] += 1
            return
        read = notations.regular_expression(text) if kind == "REGEX" else notations.grammar(text)
        trusts_masks = mask_tells_the_end(read, masks_are_whole=name != "outlines")

        def expected(letters: str) -> bool:
            rest = term
            for letter in letters:
                rest = after(rest, letter)
            return is_whole(rest) and not could_add_text(rest)

        self.walk(expected, grammar, name, kind, text, trusts_masks=trusts_masks)

    def walk(
        self, is_over: Callable[[str], bool], grammar: Any, name: str, kind: str, text: str, *, trusts_masks: bool
    ) -> None:
        backend = self.backends[name]
        parameters = SamplingParams(max_tokens=LONGEST)
        parameters.update_from_generation_config({}, self.end)
        request = SimpleNamespace(
            request_id="r",
            structured_output_request=SimpleNamespace(
                grammar=grammar,
                reasoning_ended=True,
                structured_output_key=(StructuredOutputOptions[kind], text),
            ),
            sampling_params=parameters,
            output_token_ids=[],
            num_output_tokens=0,
        )
        manager = SimpleNamespace(backend=backend, reasoner_cls=None, enable_in_reasoning=False)
        value = _Value(self.ends, manager, request)
        self.counts["walks"] += 1
        while request.num_output_tokens < LONGEST:
            allowed = self.allowed(backend, grammar)
            going_on = [number for number in allowed if number != self.end]
            if not going_on:
                return
            token = self.source.choice(going_on)
            request.output_token_ids.append(token)
            request.num_output_tokens += 1
            self.counts["tokens"] += 1
            if not grammar.accept_tokens("r", [token]):
                self.counts["dead ends"] += 1  # outlines allows tokens from which nothing leads on
                return
            said = b"".join(self.bytes[number] for number in request.output_token_ids)
            over = value.is_over(request)
            try:
                expected = is_over(said.decode())
            except UnicodeDecodeError:
                expected = False
            if name == "outlines" and not expected:
                # It hides tokens after which a whole value would not be whole: what it never allows cannot follow.
                expected = self.allowed(backend, grammar) == [self.end]
            where = {"backend": name, "kind": kind, "grammar": text, "said": said.decode(errors="backslashreplace")}
            if expected and not over and not grammar.validate_tokens([self.end]):
                self.counts["not accepted by the back end"] += 1  # outlines, in rare ambiguous expressions
                return
            if over != expected:
                self.wrong.append({**where, "over": over, "expected": expected})
                return
            if trusts_masks and self.cut_by_tensors(backend, grammar) and not expected:
                self.wrong.append({**where, "cut by": "tensors"})
                return
            if over:
                self.counts["ended"] += 1
                return

    def mask(self, backend: Any, grammar: Any) -> torch.Tensor:
        bits = backend.allocate_token_bitmask(1)
        bits.fill_(0)
        grammar.fill_bitmask(bits, 0)
        numbers = torch.arange(len(self.bytes))
        mask: torch.Tensor = (bits[0][numbers // 32] >> (numbers % 32)) & 1
        return mask.bool()

    def allowed(self, backend: Any, grammar: Any) -> list[int]:
        numbers: list[int] = self.mask(backend, grammar).nonzero().flatten().tolist()
        return numbers

    def cut_by_tensors(self, backend: Any, grammar: Any) -> bool:
        mask = self.mask(backend, grammar)
        logits = torch.where(mask, 0.0, float("-inf"))[None]
        zero = torch.zeros(1, dtype=torch.int64)
        grammar_tensors.edit(logits, self.tensors, torch.tensor([self.end]), zero, zero)
        left: list[int] = (logits[0] > float("-inf")).nonzero().flatten().tolist()
        cut = left == [self.end] and int(mask.sum()) > 1
        self.counts["ended by tensors"] += cut
        return cut


def main() -> None:
    seed, cases = map(int, sys.argv[1:3])
    counts: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    for tokenizer in (byte_level(), byte_fallback()):
        walks = Walks(seed, tokenizer)
        for _ in range(cases // 2):
            walks.case()
        counts += walks.counts
        wrong += walks.wrong[:20]
    print(json.dumps({"counts": counts, "wrong": wrong}))


if __name__ == "__main__":
    main()
