"""vLLM's own reasoning and tool parsers, asked what they make of an answer: the oracle for the plugin's channels.

    with vllm_parsers() as vllm:
        vllm.load("qwen", Path("tokenizer.json"))
        [parsed] = vllm.parsed([Answer("qwen", "deepseek_r1", ids)])

It runs in the engine's interpreter, without an engine.
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
class Answer:
    """What a model said. `parser` is the name of vLLM's reasoning parser, or None for an answer without thought."""

    tokenizer: str
    parser: str | None
    ids: Sequence[int]


@dataclass(frozen=True)
class Parsed:
    """What vLLM makes of it: the thought, the answer's text, and each call's name and arguments."""

    reasoning: str | None
    content: str | None
    calls: list[tuple[str, Any]]


class VllmParsers:
    def __init__(self, process: VllmProcess) -> None:
        self._process = process

    def load(self, name: str, tokenizer_json: Path) -> None:
        self._process.ask({"load": name, "file": str(tokenizer_json)})

    def parsed(self, answers: Sequence[Answer]) -> list[Parsed]:
        told = self._process.ask({"answers": [asdict(answer) for answer in answers]})
        return [Parsed(r, c, [(name, arguments) for name, arguments in calls]) for r, c, calls in told]


@contextmanager
def vllm_parsers() -> Iterator[VllmParsers]:
    """The process, from its start to its end. Raises `EngineUnavailable` without vLLM's interpreter."""
    with vllm_process("support.vllm_parsers") as process:
        yield VllmParsers(process)


# --- In vLLM's interpreter ----------------------------------------------------------------------------


def answer_all(questions: IO[str], answers: IO[str]) -> None:
    from transformers import PreTrainedTokenizerFast
    from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser
    from vllm.reasoning.olmo3_reasoning_parser import Olmo3ReasoningParser
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    logging.disable()
    tokenizers: dict[str, Any] = {}
    request: Any = SimpleNamespace(tools=[], tool_choice="auto")

    def reasoning_parser(name: str, tokenizer: Any) -> Any:
        if name == "deepseek_r1":
            return DeepSeekR1ReasoningParser(tokenizer)
        # Its constructor looks for Olmo's own spelling of the marker; the text is parsed without.
        return object.__new__(Olmo3ReasoningParser)

    def parsed(answer: Any) -> list[Any]:
        tokenizer = tokenizers[answer["tokenizer"]]
        text: str = tokenizer.decode(answer["ids"], skip_special_tokens=True)
        reasoning, content = None, text
        if answer["parser"] is not None:
            reasoning, content = reasoning_parser(answer["parser"], tokenizer).extract_reasoning(text, request)
        found = Hermes2ProToolParser(tokenizer).extract_tool_calls(content or "", request)
        calls = [[call.function.name, json.loads(call.function.arguments)] for call in found.tool_calls]
        return [reasoning, found.content, calls]

    for line in questions:
        question = json.loads(line)
        if "load" in question:
            tokenizers[question["load"]] = PreTrainedTokenizerFast(tokenizer_file=question["file"])
            answer: Any = None
        else:
            answer = [parsed(one) for one in question["answers"]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with answering_in_vllm() as channel:
        answer_all(sys.stdin, channel)
