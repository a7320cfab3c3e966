"""What structured answers cost in tokens on the real engine: without a stop of ours, the scheduler's, the processor's.

    .venv-vllm/bin/python bench/grammar_stop.py [BACK_END …]

Run by the engine's interpreter. The tiny model of `examples/tiny_vllm` answers the same requests each way, under each
back end (two engines a back end, one after the other). For each case it prints the mean number of tokens, why the
answers ended, and how many values are the same as without a stop; every value that ended is checked to be valid.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "tiny_vllm")]

BACK_ENDS: Final = ("xgrammar", "guidance", "outlines")
MOST_TOKENS: Final = 200
DRAWS: Final = 40

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
OFF: Final = {"grammar_stop": 0, "white_space_run": 0}


@dataclass(frozen=True)
class Answer:
    text: str
    reason: str
    stop: str | int | None
    tokens: int


# -- within an engine ------------------------------------------------------------------------------------


def measure(back_end: str, ways: list[str]) -> Json:
    """The answers of each way and case, at temperature 0 and 1."""
    serve = import_module("serve")
    os.environ.update(serve.ENVIRONMENT, VLLM_PLUGINS="penstock", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ["PENSTOCK_GRAMMAR_STOP"] = "off" if ways == ["processor"] else "on"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    engine = LLM(
        model=str(serve.model_directory()),
        max_model_len=512,
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        structured_outputs_config={"backend": back_end},
        logits_processors=["penstock_vllm.grammar_processor:GrammarStop"],
    )

    def answers(case: Case, temperature: float, given: Json) -> list[Answer]:
        wanted = [
            SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=MOST_TOKENS,
                structured_outputs=StructuredOutputsParams(**case.constraint),
                extra_args=given,
            )
            for seed in range(DRAWS if temperature else 1)
        ]
        outputs = engine.generate(["A value, please."] * len(wanted), wanted, use_tqdm=False)
        firsts = [output.outputs[0] for output in outputs]
        return [Answer(one.text, one.finish_reason, one.stop_reason, len(one.token_ids)) for one in firsts]

    told: Json = {}
    for way in ways:
        for case in cases_of(back_end):
            for temperature in (0, 1):
                some = answers(case, temperature, OFF if way == "none" else {})
                told[f"{way} {case.name} {temperature}"] = [vars(one) for one in some]
    return told


# -- the table -------------------------------------------------------------------------------------------


def cases_of(back_end: str) -> list[Case]:
    return [case for case in CASES if back_end != "outlines" or "grammar" not in case.constraint]


def told_by(back_end: str, *ways: str) -> Json:
    command = [sys.executable, __file__, "--within", back_end, *ways]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    told: Json = json.loads(done.stdout.splitlines()[-1])
    return told


def report(back_end: str, case: Case, temperature: int, told: Json) -> None:
    plain = [Answer(**one) for one in told[f"none {case.name} {temperature}"]]
    for way in ("none", "scheduler and guard", "processor"):
        some = [Answer(**one) for one in told[f"{way} {case.name} {temperature}"]]
        whole = [answer for answer in some if answer.reason == "stop"]
        if broken := [answer for answer in whole if not case.is_valid(answer.text.rstrip())]:
            sys.exit(f"{way} cut a value: {broken[0]}")
        both = [(one, other) for one, other in zip(some, plain, strict=True) if one.reason == other.reason == "stop"]
        same = sum(one.text.rstrip() == other.text.rstrip() for one, other in both)
        causes = Counter(cause_of(answer) for answer in some)
        named = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        tokens = fmean(answer.tokens for answer in some)
        print(f"| {back_end} | {case.name} | {temperature} | {way} | {tokens:.1f} | {named} | {same}/{len(both)} |")


def cause_of(answer: Answer) -> str:
    return "max_tokens" if answer.reason == "length" else "grammar" if answer.stop == "grammar" else "eos"


def main() -> None:
    if sys.argv[1:2] == ["--within"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3:])))
        return
    print("| back end | case | T | stop | tokens | causes | same value |\n|---|---|---|---|---|---|---|")
    for back_end in sys.argv[1:] or BACK_ENDS:
        told = {**told_by(back_end, "none", "scheduler and guard"), **told_by(back_end, "processor")}
        for case in cases_of(back_end):
            for temperature in (0, 1):
                report(back_end, case, temperature, told)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
