"""What structured answers cost in tokens on the real engine: without a stop of ours, the scheduler's, the processor's.

    .venv/bin/python bench/grammar_stop.py [BACK_END …]

The tiny model of `examples/tiny_vllm` answers the same requests each way, under each back end (two engine starts
a back end, some 40 s each). For each case it prints the mean number of tokens, why the answers ended, and
how many values are the same as without a stop; every value that ended is checked to be valid.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from support.engine import Engine, running_engine  # noqa: E402

BACK_ENDS: Final = ("xgrammar", "guidance", "outlines")
MOST_TOKENS: Final = 200
DRAWS: Final = 20

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    constraint: Json
    is_valid: Callable[[str], bool]


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda value: re.fullmatch(pattern, value) is not None


def is_object(value: str) -> bool:
    return set(json.loads(value)) == {"a", "b"}


SCHEMA: Final = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CASES: Final = (
    Case(r"regex [0-9]{3}\s*", {"regex": r"[0-9]{3}\s*"}, matches("[0-9]{3}")),
    Case(
        "EBNF with a tail",
        {"grammar": 'root ::= "(" ws [0-9]{2} ws ")" ws\nws ::= ([ \\t\\n] ws)?'},
        matches(r"\(\s*[0-9]{2}\s*\)"),
    ),
    Case("JSON schema", {"json": SCHEMA}, is_object),
    Case("regex [0-9]+, not to be cut", {"regex": "[0-9]+"}, matches("[0-9]+")),
    Case(
        r"regex [0-9]{2}(\n\n[0-9]{2})?\s*, not to be cut",
        {"regex": r"[0-9]{2}(\n\n[0-9]{2})?\s*"},
        matches(r"[0-9]{2}(\n\n[0-9]{2})?"),
    ),
)
OFF: Final = {"vllm_xargs": {"grammar_stop": 0, "white_space_run": 0}}


@dataclass(frozen=True)
class Answer:
    text: str
    reason: str
    stop: str | None
    tokens: int


def ask(engine: Engine, case: Case, temperature: float, seed: int, more: Json) -> Answer:
    body = {
        "model": engine.model,
        "messages": [{"role": "user", "content": "A value, please."}],
        "max_tokens": MOST_TOKENS,
        "temperature": temperature,
        "seed": seed,
        "chat_template_kwargs": {"enable_thinking": False},
        "structured_outputs": case.constraint,
        **more,
    }
    request = Request(
        f"{engine.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=120) as response:
        answer = json.load(response)
    [choice] = answer["choices"]
    return Answer(
        choice["message"]["content"],
        choice["finish_reason"],
        choice["stop_reason"],
        answer["usage"]["completion_tokens"],
    )


@contextmanager
def engine_with(back_end: str, **environment: str) -> Iterator[Engine]:
    chosen = json.dumps({"backend": back_end})
    arguments = ("--structured-outputs-config", chosen, "--reasoning-parser", "")
    with running_engine(*arguments, environment={"VLLM_PLUGINS": "penstock", **environment}) as engine:
        yield engine


def measure(engine: Engine, case: Case, more: Json) -> dict[float, list[Answer]]:
    return {
        0.0: [ask(engine, case, 0, 0, more)],
        1.0: [ask(engine, case, 1, seed, more) for seed in range(DRAWS)],
    }


def report(
    back_end: str, case: Case, way: str, answers: dict[float, list[Answer]], plain: dict[float, list[Answer]]
) -> None:
    for temperature, some in answers.items():
        whole = [answer for answer in some if answer.reason == "stop"]
        if broken := [answer for answer in whole if not case.is_valid(answer.text.rstrip())]:
            sys.exit(f"{way} cut a value: {broken[0]}")
        pairs = list(zip(some, plain[temperature], strict=True))
        both = [(one, other) for one, other in pairs if one.reason == other.reason == "stop"]
        same = sum(one.text.rstrip() == other.text.rstrip() for one, other in both)
        causes = Counter(answer.stop or ("eos" if answer.reason == "stop" else "max_tokens") for answer in some)
        tokens = fmean(answer.tokens for answer in some)
        named = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        print(
            f"| {back_end} | {case.name} | {temperature:g} | {way} | {tokens:.1f} | {named} | {same}/{len(both)} |",
            flush=True,
        )


def main() -> None:
    print("| back end | case | T | stop | tokens | causes | same value |\n|---|---|---|---|---|---|---|")
    for back_end in sys.argv[1:] or BACK_ENDS:
        cases = [case for case in CASES if back_end != "outlines" or "grammar" not in case.constraint]
        with engine_with(back_end) as engine:
            plain = {case.name: measure(engine, case, OFF) for case in cases}
            scheduler = {case.name: measure(engine, case, {}) for case in cases}
        with engine_with(back_end, PENSTOCK_GRAMMAR_STOP="off") as engine:
            processor = {case.name: measure(engine, case, {}) for case in cases}
        for case in cases:
            for way, answers in (("none", plain), ("scheduler and guard", scheduler), ("processor", processor)):
                report(back_end, case, way, answers[case.name], plain[case.name])


if __name__ == "__main__":
    main()
