"""Nothing of a match is sent, however the text is cut, and nothing else is kept: every shipped rule, every cut.

The oracle is plain `re` over the whole text: every character that any match of any rule covers must be missing, every
other one must be there, in order. It knows the packs' own words only; of Penstock it borrows the checksums.
"""

import json
import os
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from penstock.core.checksums import CHECKS
from penstock.core.events import Channel, Event, Finished, Moderated, Text, Withheld
from penstock.core.moderation import Moderation
from penstock.core.signals import ClientBacklog, EngineAnswered
from penstock.shell.rulebook import shipped_packs
from support import chunks
from support.documents import ROOT
from support.moderating import policy
from support.playbook import STARTED, Step, play
from support.tokenizers_made import made

SOAKS = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
CASES = 1_000_000 if SOAKS else 1_500
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
    return "".join(letter for letter, hit in zip(text, covered, strict=True) if not hit)


def is_match(pattern: re.Pattern[str], text: str, start: int, end: int) -> bool:
    """Whether a match goes from start to end, the edge of the word being that of the whole text."""
    edge = end == len(text) or not re.match(r"\w", text[end], re.ASCII)
    return pattern.fullmatch(text, start, end) is not None and (edge or not pattern.pattern.endswith(r"\b"))


def moderated(pieces: list[str]) -> tuple[str, list[tuple[Any, ...]]]:
    """What a client is sent of an answer in these pieces, and what it is told about it."""
    step = Moderation(policy(*rules()), most_held=4096)
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


@pytest.mark.parametrize("shape", ["qwen", "llama"])
def test_in_many_tokenisations(shape: str) -> None:
    source = random.Random(shape)
    for dropout in (0.0, 0.1, 0.5, 0.9):
        for _ in range(CASES // 50):
            text = planted(source)
            assert moderated(tokenised(text, shape, dropout))[0].replace(PLACEHOLDER, "") == without_matches(text)


def test_planted_among_what_nearly_belongs_to_it() -> None:
    source = random.Random("planted")
    for number in range(CASES):
        text = planted(source)
        pieces = cut_at_random(text, source, 1 if number % 4 == 0 else source.choice([3, 8, 30]))
        shown, _ = moderated(pieces)
        assert shown.replace(PLACEHOLDER, "") == without_matches(text), (text, pieces)


# --- All the way to the wire ------------------------------------------------------------------------


def wires(pieces: list[str]) -> Iterator[tuple[str, bytes]]:
    """The same answer in every dialect, streamed and not, also to a client that lags."""
    streamed = chunks.answer_of(pieces)
    rule_set = policy(*rules())
    for dialect in ("sse", "ndjson", "chat"):
        yield dialect, play(None, streamed, policy=rule_set, dialect=dialect).data
        lagging: list[Step] = [streamed[0], ClientBacklog(1 << 17, STARTED), *streamed[1:], ClientBacklog(0, STARTED)]
        yield f"lagging {dialect}", play(None, lagging, policy=rule_set, dialect=dialect).data
    yield "folded", json.dumps(play(None, streamed, policy=rule_set, dialect="folded").body).encode()
    whole = EngineAnswered(chunks.whole({"content": "".join(pieces)}), STARTED)
    yield "chat_whole", json.dumps(play(None, [whole], policy=rule_set, dialect="chat_whole").body).encode()


@pytest.mark.parametrize("rule", PLANTED)
def test_no_dialect_shows_it(rule: str) -> None:
    source = random.Random(rule)
    for match in PLANTED[rule]:
        # The shortest part whose sight would be a leak; shorter ones stand in ids and numbers of the envelope.
        parts = {match[at : at + 10] for at in range(max(1, len(match) - 9))}
        for name, data in wires(cut_at_random(f"see {match} now", source, 4)):
            text = data.decode()
            assert not [part for part in parts if json.dumps(part)[1:-1] in text], (name, text)
