"""The grammar stop, its logits processor and the tap against vLLM's own classes, run by the engine's interpreter."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.engine import ROOT, interpreter

pytestmark = pytest.mark.engine

SUPPORT = Path(ROOT, "tests", "support")


def told_by(script: str, *arguments: str) -> Any:
    command = [str(interpreter()), str(SUPPORT / script), *arguments]
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hook_on_the_scheduler() -> None:
    assert len(told_by("hook_contract.py")) >= 15


def test_the_processor_and_both_runners() -> None:
    assert len(told_by("processor_contract.py")) >= 14


@pytest.mark.parametrize("schedule", ["speculative", "asynchronous"])
def test_schedules(schedule: str) -> None:
    """Small batches, chunked prefill, preemption; drafts by n-grams, or a step ahead of the model."""
    told = told_by("schedules.py", schedule)
    assert [len(text) for text in told["texts"]] == told["lengths"]
    assert all(text.isdecimal() for text in told["texts"])
    assert told["tokens"] == [length + 1 for length in told["lengths"]]
    assert told["tokens that were not heard as they were said"] == []
    assert told["longest run"] > 1 or schedule != "speculative"
    assert told["reasons"] == ["stop grammar"]
    assert told["same again"]
    assert told["hooked with and without"] == [True, False]
    assert told["preemptions"] > 0
    assert told["cache usage"] == 0
    assert (told["accepted drafts"] or 0) > 100 or schedule != "speculative"
