"""Nothing of a match is sent, however the text is cut, and nothing else is kept: every shipped rule, every cut.

The oracle is plain `re` over the whole text: every character that any match of any rule covers must be missing, every
other one must be there, in order. It knows the packs' own words only; of Penstock it borrows the checksums.

`make soak` plants a million texts, in shards with seeds of their own, so that a part can be run:
`HYPOTHESIS_PROFILE=soak python -m pytest tests/properties/test_no_leak.py -k 'planted_among and 3'`.
"""

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from penstock.core.checksums import CHECKS
from penstock.core.commands import NoteIntervention
from penstock.core.events import Channel, Event, Finished, Moderated, Text, Withheld
from penstock.core.moderation import Moderation
from penstock.core.rules import Policy
from penstock.core.signals import ClientBacklog, EngineAnswered
from penstock.shell.rulebook import shipped_packs
from support import chunks
from support.documents import ROOT
from support.moderating import policy
from support.playbook import STARTED, Outcome, Step, ask, play
from support.tokenizers_made import made

SOAKS = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
SHARDS = range(10 if SOAKS else 1)
# Of each shard: texts through the step alone, disguised ones, and whole streams in all dialects.
CASES = 100_000 if SOAKS else 1_500
DISGUISED = 20_000 if SOAKS else 400
STREAMS = 500 if SOAKS else 12
PACKS = ROOT / "proxy" / "penstock" / "packs"

# One real-looking match for each shipped rule; a rule without one fails the first test.
PLANTED: dict[str, list[str]] = {
    "pii.card": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "pii.iban": ["GB29 NWBK 6016 1331 9268 19", "DE89370400440532013000"],
    "pii.email": ["jane.doe+news@mail.example.co.uk", "a@b.org"],
    "pii.phone": ["+49 (30) 1234-5678", "+14155552671"],
    "pii.phone_us": ["(415) 555-2671", "415-555-2671"],
    "pii.us_ssn": ["078-05-1121"],
    "pii.ip_address": ["8.8.8.8", "93.184.216.34"],
    "profanity": ["bullshit", "fucking"],
    "secrets.private_key": [
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\nIBAAKC\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIIE",
    ],
    "secrets.jwt": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9"],
    "secrets.aws_access_key": ["AKIAIOSFODNN7EXAMPLE"],
    "secrets.github": ["ghp_0123456789abcdefghijABCDEFGHIJ012345", "github_pat_11ABCDEFG0abcdefghijklmn"],
    "secrets.gitlab": ["glpat-0123456789abcdefghij"],
    "secrets.slack": ["xoxb-123456789012-abcdef"],
    "secrets.slack_webhook": ["https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXX"],
    "secrets.openai": ["sk-proj-abcdefghijklmnopqrst0123"],
    "secrets.stripe": ["sk_live_0123456789abcdefgh"],
    "secrets.google": ["AIzaSyA0123456789abcdefghijklmnopqrstuvw"],
    "secrets.huggingface": ["hf_abcdefghijklmnopqrstuvwxyz012345"],
    "secrets.npm": ["npm_0123456789abcdefghijklmnopqrstuvwxyz"],
    "secrets.pypi": ["pypi-AgEIcHlwaS5vcmcCJGFiY2RlZmdoaWprbG1ub3BxcnN0dXZ3eHl6"],
    "secrets.sendgrid": ["SG.abcdefghijklmnopqrst.uvwxyz0123456789ABCDEFGHIJ"],
    "secrets.url_password": ["postgres://user:pa55word@db.example.com"],
}
FILLERS = [
    "",
    " ",
    ", ",
    "the ",
    "x",
    "9",
    "-",
    "ж",
    "日本",
    "+",
    "@",
    ".",
    "\n",
    "sk",
    "AK",
    "4",
    "ey",
    "ghp_",
    "://",
    "A",
]
PLACEHOLDER = "\ue000"


@cache
def rules() -> list[dict[str, Any]]:
    """Every shipped rule as its file has it, with a placeholder that no text holds."""
    packs = [yaml.safe_load((PACKS / f"{name}.yaml").read_text("utf-8")) for name in shipped_packs()]
    return [{**rule, "placeholder": PLACEHOLDER} for pack in packs for rule in pack["rules"]]


@cache
def chosen() -> Policy:
    return policy(*rules())


@cache
def oracle() -> list[tuple[re.Pattern[str], Any]]:
    found = []
    for rule in rules():
        if "regex" in rule:
            found.append((re.compile(rule["regex"], re.ASCII), CHECKS.get(rule.get("check", ""))))
        else:
            words = "|".join(sorted(map(re.escape, rule["words"]), key=len, reverse=True))
            found.append((re.compile(rf"\b(?:{words})\b", re.ASCII | re.IGNORECASE), None))
    return found


def without_matches(text: str) -> str:
    """`text` without every character that a match covers, whichever its start and (where checked) its end."""
    return "".join(letter for letter, hit in zip(text, covered_by_matches(text), strict=True) if not hit)


def covered_by_matches(text: str) -> bytearray:
    covered = bytearray(len(text))
    for pattern, check in oracle():
        found = pattern.search(text)
        while found is not None:
            start, end = found.span()
            if check is not None:
                ends = (e for e in range(end, start, -1) if is_match(pattern, text, start, e))
                end = next((e for e in ends if check(text[start:e])), start)
            covered[start:end] = b"\1" * (end - start)
            found = pattern.search(text, start + 1)
    return covered


def is_match(pattern: re.Pattern[str], text: str, start: int, end: int) -> bool:
    """Whether a match goes from start to end, the edge of the word being that of the whole text."""
    edge = end == len(text) or not re.match(r"\w", text[end], re.ASCII)
    return pattern.fullmatch(text, start, end) is not None and (edge or not pattern.pattern.endswith(r"\b"))


def moderated(pieces: list[str]) -> tuple[str, list[tuple[Any, ...]]]:
    """What a client is sent of an answer in these pieces, and what it is told about it."""
    step = Moderation(chosen(), most_held=4096)
    out: list[Event] = []
    for piece in pieces:
        out += step.feed([Text(0, Channel.ANSWER, piece, 1)])
    out += step.feed([Finished(0, "stop")]) + step.flush()
    whole = sum(len(item.text) for item in out if isinstance(item, Withheld | Text) and not _is_added(item))
    assert whole == sum(map(len, pieces))
    assert sum(getattr(item, "tokens", 0) for item in out) == len(pieces)
    told = [(item.rule, item.length) for item in out if isinstance(item, Moderated)]
    return "".join(item.text for item in out if isinstance(item, Text)), told


def _is_added(item: Event) -> bool:
    return isinstance(item, Text) and item.added


def planted(source: random.Random, most: int = 3) -> str:
    """Matches among fillers that nearly belong to them, whole and cut short."""
    matches = [match for group in PLANTED.values() for match in group]
    parts = []
    for _ in range(source.randint(1, most)):
        match = source.choice(matches)
        parts.append(match if source.random() < 0.7 else match[: source.randint(1, len(match))])
        parts += source.choices(FILLERS, k=source.randint(0, 3))
    return source.choice(FILLERS) + "".join(parts)


def cut_at_random(text: str, source: random.Random, most: int) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = source.randint(1, most)
        pieces.append(text[at : at + size])
        at += size
    return pieces


@cache
def tokenizer(shape: str) -> Tokenizer:
    return Tokenizer.from_str(made(shape).json)


def tokenised(text: str, shape: str, dropout: float) -> list[str]:
    """The text as tokens cut it; with dropout every call cuts it another way (BPE-dropout)."""
    cutter = tokenizer(shape)
    cutter.model.dropout = dropout or None
    ends = sorted({end for _, end in cutter.encode(text, add_special_tokens=False).offsets} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]


def test_every_shipped_rule_has_a_planted_match_that_it_finds() -> None:
    assert {rule["id"] for rule in rules()} == set(PLANTED)
    for rule, matches in PLANTED.items():
        for match in matches:
            shown, told = moderated([f"see {match} now"])
            assert match not in shown, rule
            assert rule in [name for name, _ in told]


@pytest.mark.parametrize("rule", PLANTED)
def test_at_every_cut(rule: str) -> None:
    for match in PLANTED[rule]:
        text = f"see {match} now"
        expected = without_matches(text)
        whole = moderated([text])
        assert whole[0].replace(PLACEHOLDER, "") == expected
        cuts = [[text[:at], text[at:]] for at in range(1, len(text))]
        for pieces in [*cuts, list(text)]:
            assert moderated(pieces) == whole


def test_at_every_two_cuts() -> None:
    source = random.Random("two cuts")
    for matches in PLANTED.values():
        text = f"a {matches[0]}, b"
        whole = moderated([text])
        cuts = [(one, other) for other in range(2, len(text)) for one in range(1, other)]
        for one, other in cuts if SOAKS else source.sample(cuts, 12):
            assert moderated([text[:one], text[one:other], text[other:]]) == whole


@pytest.mark.parametrize("shape", ["qwen", "llama"])
def test_in_many_tokenisations(shape: str) -> None:
    source = random.Random(shape)
    for dropout in (0.0, 0.1, 0.5, 0.9):
        for _ in range(CASES // 50 * len(SHARDS)):
            text = planted(source)
            assert moderated(tokenised(text, shape, dropout))[0].replace(PLACEHOLDER, "") == without_matches(text)


@pytest.mark.parametrize("shard", SHARDS)
def test_planted_among_what_nearly_belongs_to_it(shard: int) -> None:
    source = random.Random(f"planted {shard}")
    for number in range(CASES):
        text = planted(source)
        pieces = cut_at_random(text, source, 1 if number % 4 == 0 else source.choice([3, 8, 30]))
        shown, _ = moderated(pieces)
        assert shown.replace(PLACEHOLDER, "") == without_matches(text), (text, pieces)


# --- Made hard to read ------------------------------------------------------------------------------

INVISIBLE = "\u200b\u00ad\u2060\u202e\u200f\ufeff\ufe0f\u0301\u0489\x00\x7f\U000e0041"


def disguised(letter: str, source: random.Random) -> str:
    """The letter in full width or bold, and what nobody sees behind it."""
    look, code = letter, ord(letter)
    if source.random() < 0.2 and 0x21 <= code < 0x7F:
        look = chr(code + 0xFEE0)
    elif source.random() < 0.1 and letter.isascii() and letter.isalpha():
        look = chr(code - ord("A") + 0x1D400) if letter.isupper() else chr(code - ord("a") + 0x1D41A)
    return look + "".join(source.choices(INVISIBLE, k=source.choice([0, 0, 0, 1, 2])))


def visible(text: str) -> str:
    return "".join(letter for letter in text if letter not in INVISIBLE)


@pytest.mark.parametrize("shard", SHARDS)
def test_disguised(shard: int) -> None:
    source = random.Random(f"disguised {shard}")
    for _ in range(DISGUISED):
        text = planted(source, most=2)
        letters = [disguised(letter, source) for letter in text]
        pieces = cut_at_random("".join(letters), source, source.choice([1, 4, 30]))
        hits = covered_by_matches(text)
        expected = "".join(letter for letter, hit in zip(letters, hits, strict=True) if not hit)
        shown, _ = moderated(pieces)
        assert visible(shown.replace(PLACEHOLDER, "")) == visible(expected), (text, pieces)


# --- All the way to the wire ------------------------------------------------------------------------

# What stands in ids and numbers of the envelope is shorter.
SIGHT = 10


@dataclass(frozen=True)
class Said:
    """What a model says in a stream: each lane's text and the pieces that it came in."""

    reasoning: str
    answer: str
    argument: str
    streamed: list[Step]
    whole: bytes

    @property
    def secrets(self) -> set[str]:
        """Each part of a match of which the sight would be a leak, as it is and as JSON spells it."""
        lanes = (self.reasoning, self.answer, self.argument)
        shown = "\n".join(map(without_matches, lanes))
        parts: set[str] = set()
        for text in lanes:
            hits = covered_by_matches(text)
            for at in range(len(text) - SIGHT + 1):
                part = text[at : at + SIGHT]
                if all(hits[at : at + SIGHT]) and part not in shown:
                    parts |= {part, json.dumps(part)[1:-1], json.dumps(json.dumps(part)[1:-1])[1:-1]}
        return parts


def spelled_in_json(text: str, source: random.Random) -> str:
    """With as many escapes as JSON allows, or few."""
    share = source.choice([0, 0, 0.1, 0.9])
    escapes = (f"\\u{ord(letter):04x}" if source.random() < share else json.dumps(letter)[1:-1] for letter in text)
    return "".join(escapes)


def said(source: random.Random) -> Said:
    reasoning, answer = planted(source, most=2), planted(source, most=2)
    argument = planted(source, most=1)
    arguments = f'{{"say": "{spelled_in_json(argument, source)}"}}'
    size = source.choice([1, 4, 12])
    pieces = [
        *map(chunks.reasoning, cut_at_random(reasoning, source, size)),
        *map(chunks.content, cut_at_random(answer, source, size)),
        chunks.tool(call_id="call_1", name="tell"),
        *(chunks.tool(arguments=piece) for piece in cut_at_random(arguments, source, size)),
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "tell", "arguments": arguments}}
    message = {"reasoning": reasoning, "content": answer, "tool_calls": [call]}
    streamed: list[Step] = [*chunks.answer(*pieces, reason="tool_calls")]
    if source.random() < 0.3:  # the engine's connection merges and splits what it sends
        data = b"".join(step for step in streamed if isinstance(step, bytes))
        edges = sorted(source.sample(range(1, len(data)), 20))
        streamed = [data[start:end] for start, end in zip([0, *edges], [*edges, len(data)], strict=True)]
    return Said(reasoning, answer, argument, streamed, chunks.whole(message, finish_reason="tool_calls"))


def lagging(steps: list[Step], source: random.Random) -> list[Step]:
    """The same to a client that takes nothing for a while."""
    begins = source.randint(1, len(steps) - 1)
    ends = source.randint(begins, len(steps))
    return [
        *steps[:begins],
        ClientBacklog(1 << 19, STARTED),
        *steps[begins:ends],
        ClientBacklog(0, STARTED),
        *steps[ends:],
    ]


def wires(one: Said, source: random.Random) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """The same answer in every dialect, streamed and not, also to a client that lags: its bytes, and what they say."""
    setting: dict[str, Any] = {"policy": chosen()}
    body = ask(tools=["tell"])
    for dialect in ("sse", "ndjson"):
        for name, steps in ((dialect, one.streamed), (f"lagging {dialect}", lagging(one.streamed, source))):
            outcome = play(body, steps, dialect=dialect, **setting)
            yield name, outcome.data, of_events(outcome.events)
    for name, steps in (("chat", one.streamed), ("lagging chat", lagging(one.streamed, source))):
        outcome = play(body, steps, dialect="chat", **setting)
        yield name, outcome.data, of_chunks([chunk for chunk in outcome.chat_chunks() if isinstance(chunk, dict)])
    folded = play(body, one.streamed, dialect="folded", **setting).body
    yield "folded", json.dumps(folded).encode(), of_folded(folded)
    whole = play(body, [EngineAnswered(one.whole, STARTED)], dialect="chat_whole", **setting).body
    yield "chat_whole", json.dumps(whole).encode(), of_message(whole["choices"][0]["message"])


def of_events(events: list[dict[str, Any]]) -> dict[str, str]:
    told = {"delta.reasoning": "", "delta.text": "", "tool_call.arguments_chunk": ""}
    for event in events:
        if event["type"] in told:
            told[event["type"]] += event["text"]
    for event in (event for event in events if event["type"] == "moderation"):
        block = "".join(e["text"] for e in events if e.get("block") == event["block"] and e["type"] in told)
        assert block[event["offset"] : event["offset"] + event["length"]] == PLACEHOLDER
    reasoning, answer, arguments = told.values()
    assert [event["arguments"] for event in events if event["type"] == "tool_call.end"] == [arguments]
    ready = [event["arguments"] for event in events if event["type"] == "tool_call.ready"]
    assert ready == [json.loads(arguments)]
    return {"reasoning": reasoning, "answer": answer, "argument": json.loads(arguments)["say"]}


def of_chunks(told: list[dict[str, Any]]) -> dict[str, str]:
    deltas = [choice["delta"] for chunk in told for choice in chunk["choices"]]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    arguments = "".join(call.get("arguments") or "" for call in calls)
    reasoning = "".join(delta.get("reasoning") or "" for delta in deltas)
    answer = "".join(delta.get("content") or "" for delta in deltas)
    return {"reasoning": reasoning, "answer": answer, "argument": json.loads(arguments)["say"]}


def of_folded(folded: dict[str, Any]) -> dict[str, str]:
    reasoning, answer, call = folded["choices"][0]["blocks"]
    return {"reasoning": reasoning["text"], "answer": answer["text"], "argument": call["arguments"]["say"]}


def of_message(message: dict[str, Any]) -> dict[str, str]:
    [call] = message["tool_calls"]
    argument = json.loads(call["function"]["arguments"])["say"]
    return {"reasoning": message["reasoning"] or "", "answer": message["content"] or "", "argument": argument}


@pytest.mark.parametrize("shard", SHARDS)
def test_streams_in_every_dialect(shard: int) -> None:
    source = random.Random(f"streams {shard}")
    for _ in range(STREAMS):
        one = said(source)
        secrets = one.secrets
        for name, data, told in wires(one, source):
            # One look at each dialect is enough to compare what is said; the bytes are searched besides.
            for lane, text in told.items():
                assert text.replace(PLACEHOLDER, "") == without_matches(getattr(one, lane)), (name, lane, one)
            seen = data.decode()
            assert not [part for part in secrets if part in seen], (name, one)


@pytest.mark.parametrize("rule", PLANTED)
def test_no_dialect_shows_it(rule: str) -> None:
    source = random.Random(rule)
    for match in PLANTED[rule]:
        text = f"see {match} now"
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "tell", "arguments": json.dumps({"say": text})},
        }
        pieces = [
            *map(chunks.reasoning, cut_at_random(text, source, 4)),
            *map(chunks.content, cut_at_random(text, source, 4)),
            chunks.tool(call_id="call_1", name="tell"),
            *(chunks.tool(arguments=piece) for piece in cut_at_random(json.dumps({"say": text}), source, 4)),
        ]
        message = {"reasoning": text, "content": text, "tool_calls": [call]}
        whole = chunks.whole(message, finish_reason="tool_calls")
        one = Said(text, text, text, [*chunks.answer(*pieces, reason="tool_calls")], whole)
        for name, data, told in wires(one, source):
            assert {text.replace(PLACEHOLDER, "") for text in told.values()} == {without_matches(text)}, name
            assert not [part for part in one.secrets if part in data.decode()], name


@pytest.mark.parametrize("cutting", [1, 4, 30])
def test_an_answer_that_is_not_streamed_gets_the_same_verdicts(cutting: int) -> None:
    """The same rules find the same text at the same place of the same channel, and the same text is told."""
    source = random.Random(f"verdicts {cutting}")
    for _ in range(STREAMS):
        text = planted(source)
        streamed = play(None, chunks.answer_of(cut_at_random(text, source, cutting)), policy=chosen())
        answered = EngineAnswered(chunks.whole({"content": text}), STARTED)
        whole = play(None, [answered], policy=chosen(), dialect="chat_whole")
        assert noted(streamed) == noted(whole)
        assert of_events_text(streamed.events) == (whole.body["choices"][0]["message"]["content"] or "")


def noted(outcome: Outcome) -> set[tuple[Any, ...]]:
    notes = [command.intervention for command in outcome.commands if isinstance(command, NoteIntervention)]
    return {(note.rule, note.action, note.category, note.channel, note.start, note.text) for note in notes}


def of_events_text(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "delta.text")
