"""Grammars as people write them, and worse, through vLLM's real back ends; what could follow is asked of the back end.

    .venv-vllm/bin/python tests/support/wild_grammars.py SEED WALKS

Run by the engine's interpreter. Beside `grammar_oracle`, which makes up languages whose meaning it knows, these use
what no oracle of ours need understand: flags, classes of Unicode, JSON schemas, structural tags. Each is walked through
at random. Where the rule says that the value is over, the back end is led on by white space in every way: it must not
allow text anywhere. Where nothing may follow, the rule must say so. Prints one JSON object; `wrong` is to be empty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.v1.structured_output.backend_types import StructuredOutputOptions

from penstock_vllm.grammar_stop import _Value
from penstock_vllm.white_space import CHARACTERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.grammar_oracle import Walks, byte_level

LONGEST = 60
DEEPEST = 7
MOST_WAYS = 40
ALL = ("xgrammar", "guidance", "outlines")
NOT_OUTLINES = ("xgrammar", "guidance")

# Not read here, or read wider than they are.
NOT_READ = (
    r"a[^\S]*",
    r"(?i)a( b)?\s*",
    r"(?i:A)( B)?",
    r"(?s)a.?\s*",
    r"(?x) a \s* # b",
    r"\p{L}( \p{L})?\s*",
    r"\p{Zs}*a\p{Zs}*",
    r"a[[:space:]]*",
    r"a[[:space:]b]*",
    r"[a-c&&b-d]\s*",
    r"a(?= )( b)?\s*",
    r"a\b( b)?\s*",
    r"a\<( b)?\s*",
    r"a\R?\s*b?",
    r"a\h*b?",
    r"\Aa\s*\z",
    'root ::= (= "a") "a" " "*',
    'root ::= TagDispatch(("<a>", b), stop_eos=true)\nb ::= "b" " "*',
    'start: "a"i " "*',
    '%ignore /[ \\n]+/\nstart: "a" "b"?',
    "start: A\nA: /(?i)a( b)?/",
)
REGEXES = (
    # Beginnings of each other.
    r"New( York)?\s*",
    r"(a|ab|ab 1)\s*",
    r"a|a |a b",
    r"a(\n\n\n\nb)?\n*",
    r"[ab]+(,[ab]+)*( +1)?",
    r"(a ?)+",
    r"(a ?){1,3}\s*",
    r"(a( b)?\s*)+",
    r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?",
    # White space in the middle, before, and alone.
    r"a\s*b?",
    r"a\s*b?\s*",
    r"\s*a\s*",
    r"\s*",
    r"(\s*a)*\s*",
    r"\s*(a\s*)?",
    r"",
    r"a?",
    # White space of more than one byte, and letters that begin as it does.
    "a[\u00a0\u3000]*",
    "a[\u2000-\u200a\u3042]*",
    "a(\u3000あ)?",
    "a(\u3000|\u3001)?\\s*",
    "a(\u00a0é)?[ \u00a0]*",
    "a[\\s\u200b]*",
    "a[\\s\ufeff]*",
    r"a[\x1c-\x20]*",
    r"a\v*",
    r"a[\x85\u2028]*",
    r"a[^b]?",
    r"a[^\s]?\s*",
    r"a\W*",
    r"a\D?\s*",
    r"a.?",
    r"a.*",
    # What notations leave open.
    r"^a\s*$",
    r"a$\s*",
    r"a\ ?b?",
    r"a{2}{2}\s*",
    r"a{1,2}?\s*b?",
    r"(a+?b*?)\s*",
    r"(?:a)(?P<x> b)?",
    r"(a|)(b|)\s*",
    r"(|a| b)",
    r"a\n\n?b?",
    r"[a\-\]]\s*",
    r"[\n-a]\s*b?",
    r"a[ -!]*",
    r"\x61\u0020?\x{62}?",
    r"a\/?\s*",
    r"a\#?\s*",
    r"a}?]?\s*",
    r"a\_?\s*",
    # What is not read here, or wider than it is.
)
GRAMMARS = (
    'root ::= "a" (" " "b")? ws\nws ::= [ \\n]*',
    'root ::= "a" tail?\ntail ::= " " tail | " b"',
    'root ::= "(" root ")" ws | "1" ws\nws ::= ([ \\n] ws)?',
    'root ::= root " " "a" | "a"',
    'root ::= item (" "+ item)* " "*\nitem ::= [ab] | "(" root ")"',
    'root ::= [^ ]+ (" " [^ ]+)?',
    'root ::= "" | " " | " a"',
    'root ::= ""',
    'root ::= " "*',
    'root ::= a b c\na ::= "a"?\nb ::= " "*\nc ::= "c"?',
    'root ::= "a" # "b"\n ws\nws ::= " "* # (ws "b")',
    'root ::= "a\\x20\\u0020"? "\\n"{0,2} "b"?',
    'root ::= ("a" "\\u3000"?) | ("a" "\\u3000" "\\u3001")',
    'root ::= "a" ("\\n" | "\\r\\n" "b")*',
    'start: "a" (" b")? WS*\nWS: /[ \\n]/',
    "start: A B? \nA: /a+/\nB: / +b?/",
    "start: /a( b)?/ /\\s*/",
    'start: item+\nitem: "a" " "?',
    'start: "a" ~ 1..3 " "?',
    'start: ("a" | "a b") " "?',
    'start: "a" [" b"] " "?',
)
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": 1, "maximum": 120},
    {"type": "string"},
    {"type": "string", "maxLength": 2},
    {"type": "string", "pattern": "^a( b)?\\s*$"},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["a", "a b", 1, 12, None]},
    {"const": "a "},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    {"type": "array", "items": {"enum": ["a"]}},
    OBJECT,
    {"type": "object", "properties": {"a": OBJECT, "b": {"type": "null"}}, "additionalProperties": False},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}},
)
CHOICES = (["a", "ab"], ["a", "a b"], ["a", "a\n"], ["New", "New York"], [" ", " a"], ["a ", "a"])
TAGS = (
    {"structures": [{"begin": "<a>", "schema": OBJECT, "end": "</a>"}], "triggers": ["<a"]},
    {"structures": [{"begin": "<a>", "schema": {"enum": [1]}, "end": " "}], "triggers": ["<"]},
)


def cases() -> Iterator[tuple[str, str, str]]:
    """Back end, kind and source."""
    for name in ALL:
        yield from ((name, kind_of(written), written) for written in (*REGEXES, *NOT_READ))
        yield from ((name, "JSON", json.dumps(schema)) for schema in SCHEMAS)
        yield from ((name, "CHOICE", json.dumps(choice)) for choice in CHOICES)
    for name in NOT_OUTLINES:
        yield from ((name, "GRAMMAR", grammar) for grammar in GRAMMARS)
        yield from ((name, "STRUCTURAL_TAG", json.dumps(tag)) for tag in TAGS)
        yield name, "JSON_OBJECT", ""


def kind_of(written: str) -> str:
    return "GRAMMAR" if "::=" in written or "start:" in written else "REGEX"


class WildWalks(Walks):
    def run(self, walks: int) -> None:
        for name, kind, source in cases():
            try:
                self.compiled(name, kind, source)
            except Exception:  # a back end that refuses a language is no matter of ours
                self.counts["refused"] += 1
                continue
            self.counts["cases"] += 1
            for _ in range(walks):
                self.wild_walk(name, kind, source)

    def compiled(self, name: str, kind: str, source: str) -> Any:
        return self.backends[name].compile_grammar(StructuredOutputOptions[kind], source, {self.end})

    def wild_walk(self, name: str, kind: str, source: str) -> None:
        grammar = self.compiled(name, kind, source)
        parameters = SamplingParams(max_tokens=LONGEST)
        parameters.update_from_generation_config({}, self.end)
        said: list[int] = []
        request = SimpleNamespace(
            request_id="r",
            structured_output_request=SimpleNamespace(
                grammar=grammar, reasoning_ended=True, structured_output_key=(StructuredOutputOptions[kind], source)
            ),
            sampling_params=parameters,
            output_token_ids=said,
            num_output_tokens=0,
        )
        backend = self.backends[name]
        # (Outlines hides tokens, so that more is over for it than its expression says.)
        is_clear = name != "outlines" and kind in ("REGEX", "GRAMMAR") and source not in NOT_READ
        value = _Value(
            self.ends, SimpleNamespace(backend=backend, reasoner_cls=None, enable_in_reasoning=False), request
        )
        while len(said) < LONGEST:
            going_on = [number for number in self.allowed(backend, grammar) if number != self.end]
            if not going_on:
                return
            said.append(self.next_of(going_on))
            request.num_output_tokens += 1
            if not grammar.accept_tokens("r", said[-1:]):
                self.counts["dead ends"] += 1  # outlines allows tokens from which nothing leads on
                return
            over = value.is_over(request)
            where = {"backend": name, "kind": kind, "grammar": source, "said": self.written(said)}
            if over:
                self.counts["ended"] += 1
                follows = self.text_that_follows(name, kind, source, said)
                if follows is not None:
                    self.wrong.append({**where, "over": True, "follows": self.written(follows)})
                return
            must_tell = self.accepts(grammar) and (is_clear or self.allowed(backend, grammar) == [self.end])
            if must_tell and self.text_that_follows(name, kind, source, said) is None:
                self.wrong.append({**where, "over": False})
                return

    def accepts(self, grammar: Any) -> bool:
        matcher = getattr(grammar, "ll_matcher", None)
        return bool(grammar.validate_tokens([self.end])) or (matcher is not None and matcher.is_stopped())

    def next_of(self, ids: list[int]) -> int:
        """Half of the time an ASCII token, so that strings and numbers get on."""
        plain = [number for number in ids if all(0x20 < byte < 0x7F for byte in self.bytes[number])]
        return self.source.choice(plain if plain and self.source.random() < 0.5 else ids)

    def written(self, ids: list[int]) -> str:
        return b"".join(self.bytes[number] for number in ids).decode(errors="backslashreplace")

    def text_that_follows(self, name: str, kind: str, source: str, said: list[int]) -> list[int] | None:
        """Tokens behind `said` that end in one that is neither white space nor the beginning of such a character."""
        backend = self.backends[name]
        todo: list[list[int]] = [[]]
        while todo:
            more = todo.pop(0)
            grammar = self.compiled(name, kind, source)
            if not all(grammar.accept_tokens("r", [number]) for number in (*said, *more)):
                continue
            for number in self.allowed(backend, grammar):
                follows = [*more, number]
                if number == self.end:
                    continue
                if not is_blank(b"".join(self.bytes[one] for one in follows)):
                    return follows
                if len(follows) < DEEPEST and len(todo) < MOST_WAYS:
                    todo.append(follows)
        return None


def is_blank(text: bytes) -> bool:
    """White space, which may end within a character."""
    return any(
        CHARACTERS.issuperset(text[: len(text) - cut].decode(errors="replace"))
        and (not cut or any(letter.encode().startswith(text[len(text) - cut :]) for letter in CHARACTERS))
        for cut in range(3)
    )


def main() -> None:
    seed, walks = map(int, sys.argv[1:3])
    wild = WildWalks(seed, byte_level())
    wild.run(walks)
    print(json.dumps({"counts": wild.counts, "wrong": wild.wrong}, ensure_ascii=False))


if __name__ == "__main__":
    main()
