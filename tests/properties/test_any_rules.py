"""Any rules over any text in any pieces: what is sent, told and noted is that of the text in one piece.

Rules are drawn from a grammar over few letters, so that they overlap, nest and nearly match; redacting, halting and
flagging ones together, with words' edges and checks of case. The oracle of what redaction hides is plain `re`.
"""

import os
import random
import re
from typing import Any

import pytest

from penstock.core.events import Channel, Event, Finished, Moderated, Text, Withheld
from penstock.core.moderation import Moderation
from penstock.core.rules import Policy
from penstock.moderation_settings import ModerationSettings
from penstock.settings import SettingsError
from penstock.shell.rulebook import load_rulebook

SOAKS = os.environ.get("HYPOTHESIS_PROFILE") == "soak"

BOOKS = 3_000 if SOAKS else 60
TEXTS = 30
LETTERS = "ab1- "


def expression(source: random.Random, depth: int = 2) -> str:
    pieces = []
    for _ in range(source.randint(1, 3)):
        kind = source.random()
        if depth and kind < 0.2:
            pieces.append(f"(?:{expression(source, depth - 1)}|{expression(source, depth - 1)})")
        elif kind < 0.4:
            pieces.append(source.choice(["[ab]", "[0-9]", "[^a]", "[a-b1]", ".", r"\w", r"\s"]))
        else:
            pieces.append(re.escape(source.choice(LETTERS)))
        if source.random() < 0.3:
            low = source.randint(0, 2)
            pieces[-1] = f"(?:{pieces[-1]}){{{low},{low + source.randint(0, 3)}}}"
    return "".join(pieces)


def rule(source: random.Random, number: int) -> dict[str, Any]:
    edge = [r"\b" if source.random() < 0.3 else "" for _ in range(2)]
    action = source.choice(["redact", "redact", "redact", "halt", "flag"])
    shape: dict[str, Any] = {"regex": f"{edge[0]}{expression(source)}{edge[1]}"}
    if source.random() < 0.3:
        word = "".join(source.choices(LETTERS[:4], k=source.randint(1, 4)))
        shape = {"literal": word, "whole_word": source.random() < 0.5}
    return {"id": f"r{number}", "action": action, "placeholder": "#", "ignore_case": source.random() < 0.5, **shape}


def book(source: random.Random) -> tuple[list[dict[str, Any]], Policy] | None:
    rules = [rule(source, number) for number in range(source.randint(1, 4))]
    try:
        made = load_rulebook(ModerationSettings.model_validate({"rules": rules, "hold_chars": 64}))
    except SettingsError:
        return None  # the empty text, or ways without number
    assert made is not None
    chosen = made.choose("m", "k")
    assert chosen is not None
    return rules, chosen


def moderated(chosen: Policy, pieces: list[str]) -> tuple[str, list[Any], list[Any]]:
    """What is sent, what is told and what is noted, whatever the order of those that concern the same place."""
    step = Moderation(chosen, most_held=64)
    out: list[Event] = []
    for piece in pieces:
        out += step.feed([Text(0, Channel.ANSWER, piece, 1)])
    out += step.feed([Finished(0, "stop")]) + step.flush()
    written = sum(len(e.text) for e in out if isinstance(e, Withheld) or (isinstance(e, Text) and not e.added))
    assert written == sum(map(len, pieces))
    told = sorted((e.action, e.rule) for e in out if isinstance(e, Moderated) and e.action != "redact")
    noted = sorted((n.rule, n.action, n.start, n.text) for n in step.take_notes())
    return "".join(e.text for e in out if isinstance(e, Text)), told, noted


def hidden(rules: list[dict[str, Any]], text: str) -> str:
    """The text without each character that the match beginning somewhere covers, as `re` prefers it there."""
    covered = bytearray(len(text))
    for one in rules:
        if one["action"] != "redact":
            continue
        shape = one.get("regex") or (r"(?<!\w){}(?!\w)" if one["whole_word"] else "{}").format(
            re.escape(one["literal"])
        )
        flags = re.ASCII | (re.IGNORECASE if one["ignore_case"] else 0)
        pattern = re.compile(shape, flags)
        found = pattern.search(text)
        while found is not None:
            covered[found.start() : found.end()] = b"\1" * len(found.group())
            found = pattern.search(text, found.start() + 1)
    return "".join(letter for letter, hit in zip(text, covered, strict=True) if not hit)


@pytest.mark.parametrize("shard", range(4))
def test_any_rules(shard: int) -> None:
    source = random.Random(f"rules {shard}")
    for _ in range(BOOKS // 4):
        if (made := book(source)) is None:
            continue
        rules, chosen = made
        for _ in range(TEXTS):
            text = "".join(source.choices(LETTERS + "A", k=source.randint(1, 14)))
            whole = moderated(chosen, [text])
            at = source.randint(0, len(text))
            for pieces in (list(text), [piece for piece in (text[:at], text[at:]) if piece]):
                assert moderated(chosen, pieces) == whole, (rules, text, pieces)
            if not any(one["action"] == "halt" for one in rules):
                assert whole[0].replace("#", "") == hidden(rules, text), (rules, text)
