"""vLLM's own detokeniser, asked what text it makes of token ids: the oracle for Penstock's.

    with vllm_detokenizer() as vllm:
        vllm.load("qwen", Path("tokenizer.json"))
        [texts] = vllm.texts([Case("qwen", prompt=[1, 2], steps=[[3], [4, 5]])])

It runs in the engine's interpreter, without an engine: loading it takes some ten seconds, a case a fraction of a
millisecond.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from support.vllm_process import VllmProcess, answering_in_vllm, vllm_process


@dataclass(frozen=True)
class Case:
    """One choice: the ids of its prompt, and those that each engine step brought."""

    tokenizer: str
    prompt: Sequence[int]
    steps: Sequence[Sequence[int]]
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stopped: bool = False
    """Whether the last id is the token that stopped the choice (EOS, a stop token)."""


class VllmDetokenizer:
    def __init__(self, process: VllmProcess) -> None:
        self._process = process

    def load(self, name: str, tokenizer_json: Path) -> str:
        """Loads a tokenizer as vLLM does and returns what it writes back as its `tokenizer.json`."""
        answer: str = self._process.ask({"load": name, "file": str(tokenizer_json)})
        return answer

    def texts(self, cases: Sequence[Case]) -> list[list[str]]:
        """What vLLM adds to the text at each step of each case."""
        answer: list[list[str]] = self._process.ask({"cases": [asdict(case) for case in cases]})
        return answer


@contextmanager
def vllm_detokenizer() -> Iterator[VllmDetokenizer]:
    """The process, from its start to its end. Raises `EngineUnavailable` without vLLM's interpreter."""
    with vllm_process("support.vllm_detokenizer") as process:
        yield VllmDetokenizer(process)


# --- In vLLM's interpreter ----------------------------------------------------------------------------


def answer_all(questions: IO[str], answers: IO[str]) -> None:
    """Serves `VllmDetokenizer`: one JSON line for each of its questions."""
    from transformers import PreTrainedTokenizerFast
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

    logging.disable()  # vLLM logs every odd id and every invalid prefix; here they are meant
    tokenizers: dict[str, Any] = {}

    def load(name: str, file: str) -> str:
        tokenizers[name] = PreTrainedTokenizerFast(tokenizer_file=file)
        return str(tokenizers[name].backend_tokenizer.to_str())

    def texts(case: Any) -> list[str]:
        sampling = SimpleNamespace(
            skip_special_tokens=case["skip_special_tokens"],
            spaces_between_special_tokens=case["spaces_between_special_tokens"],
            stop=[],
            min_tokens=0,
            include_stop_str_in_output=False,
        )
        request: Any = SimpleNamespace(request_id="", prompt_token_ids=case["prompt"], sampling_params=sampling)
        detokenizer = IncrementalDetokenizer.from_new_request(tokenizers[case["tokenizer"]], request)
        assert isinstance(detokenizer, FastIncrementalDetokenizer)
        out: list[str] = []
        for number, ids in enumerate(case["steps"], start=1):
            is_last = number == len(case["steps"])
            detokenizer.update(ids, stop_terminated=is_last and case["stopped"])
            out.append(detokenizer.get_next_output_text(finished=is_last, delta=True))
        return out

    for line in questions:
        question = json.loads(line)
        if "load" in question:
            answer: Any = load(question["load"], question["file"])
        else:
            answer = [texts(case) for case in question["cases"]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with answering_in_vllm() as channel:
        answer_all(sys.stdin, channel)
