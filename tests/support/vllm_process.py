"""A process of vLLM's interpreter that answers questions, one JSON line for each: an oracle without an engine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from support.engine import ROOT, interpreter


class VllmProcess:
    """One question at a time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's side ended with status {self._process.wait()}")
        return json.loads(line)


@contextmanager
def vllm_process(module: str) -> Iterator[VllmProcess]:
    """Runs `module` there, from its start to its end. Raises `EngineUnavailable` without vLLM's interpreter."""
    with subprocess.Popen(
        [str(interpreter()), "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT / "tests",
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    ) as process:
        try:
            yield VllmProcess(process)
        finally:
            process.kill()


@contextmanager
def answering_in_vllm() -> Iterator[IO[str]]:
    """On its side: where the answers go. What vLLM prints while it is imported must not get between them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    yield answers
    sys.stdout.flush()
