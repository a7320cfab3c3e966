"""What moderation rules cost and hold back: `.venv/bin/python bench/moderation.py`.

Clean text (the pages under docs/, which hold no match of the shipped packs' rules but a few examples, which are cut
out) goes through the step in pieces of four characters, about a token. Printed: CPU microseconds per token with 0, 10,
100 and 500 rules and with the shipped packs, in one run; characters held after each token (p50, p99, most), and the
milliseconds that a held character waits at 50 tokens a second.
"""

import random
import re
import time
from pathlib import Path
from typing import Any

from penstock.core.events import Channel, Event, Text
from penstock.core.moderation import Moderation
from penstock.core.rules import Policy
from penstock.moderation_settings import ModerationSettings
from penstock.shell.rulebook import load_rulebook

DOCS = Path(__file__).parents[1] / "docs"
TOKEN_CHARS = 4
TOKENS = 40_000
TOKENS_PER_SECOND = 50


def clean_text() -> str:
    """Prose of the documentation, without code and tables, until there is enough."""
    pages = [path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))]
    prose = [line for page in pages for line in re.sub(r"(?s)```.*?```", "", page).splitlines() if line[:1] != "|"]
    text = "\n".join(line for line in prose if "@" not in line and "://" not in line)
    return (text * (1 + TOKENS * TOKEN_CHARS // len(text)))[: TOKENS * TOKEN_CHARS]


def made_rules(count: int) -> list[dict[str, Any]]:
    """Three literals for two expressions, as a word list beside key formats would be."""
    source = random.Random(count)
    letters = "abcdefghijklmnopqrstuvwxyz"
    rules: list[dict[str, Any]] = []
    for number in range(count):
        word = "".join(source.choices(letters, k=source.randint(5, 11)))
        if number % 5 < 3:
            rules.append({"id": f"word{number}", "literal": word, "whole_word": True})
        else:
            head = "".join(source.choices(letters, k=3))
            rules.append({"id": f"key{number}", "regex": rf"\b{head}[_-][0-9A-Za-z]{{12,40}}\b"})
    return rules


def policy(**settings: Any) -> tuple[Policy | None, float]:
    begun = time.perf_counter()
    book = load_rulebook(ModerationSettings.model_validate(settings))
    return (book.choose("m", "k") if book else None), time.perf_counter() - begun


def run(chosen: Policy | None, pieces: list[str]) -> tuple[float, list[int]]:
    """CPU seconds for all pieces, and what was held after each."""
    step = Moderation(chosen, most_held=4096)
    events: list[Event] = [Text(0, Channel.ANSWER, piece, 1) for piece in pieces]
    begun = time.thread_time()
    told = [step.feed([event]) for event in events]
    spent = time.thread_time() - begun
    held, sent, read = [], 0, 0
    for piece, out in zip(pieces, told, strict=True):
        read += len(piece)
        sent += sum(len(getattr(item, "text", "")) for item in out if not getattr(item, "added", False))
        held.append(read - sent)
    return spent, held


def waits(held: list[int]) -> list[float]:
    """For each token, in ms, how long its first character waited until it was sent."""
    out = []
    for place in range(len(held)):
        later = next((n for n in range(place, len(held)) if held[n] <= (n - place) * TOKEN_CHARS), len(held))
        out.append((later - place) * 1000 / TOKENS_PER_SECOND)
    return out


def quantile(values: list[Any], share: float) -> Any:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    text = clean_text()
    pieces = [text[at : at + TOKEN_CHARS] for at in range(0, len(text), TOKEN_CHARS)]
    print(f"{len(pieces)} tokens of {TOKEN_CHARS} characters")
    print(f"{'rules':<24}{'compile s':>10}{'µs/token':>10}", end="")
    print(f"{'held p50':>10}{'p99':>6}{'most':>6}{'wait ms p50':>13}{'p99':>8}")
    cases: list[tuple[str, dict[str, Any]]] = [("none", {})]
    cases += [(f"{count} made", {"rules": made_rules(count)}) for count in (10, 100, 500)]
    cases += [("pii, secrets, profanity", {"packs": ["pii", "secrets", "profanity"]})]
    for name, settings in cases:
        chosen, compiling = policy(**settings)
        runs = [run(chosen, pieces) for _ in range(3)]
        spent, held = min(runs, key=lambda one: one[0])
        waited = waits(held)
        print(
            f"{name:<24}{compiling:>10.2f}{spent / len(pieces) * 1e6:>10.2f}{quantile(held, 0.5):>10}"
            f"{quantile(held, 0.99):>6}{max(held):>6}{quantile(waited, 0.5):>13.0f}{quantile(waited, 0.99):>8.0f}"
        )


if __name__ == "__main__":
    main()
