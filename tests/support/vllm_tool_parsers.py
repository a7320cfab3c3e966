"""vLLM's own tool parsers, asked what calls they read in a text: the oracle for Penstock's.

    calls = vllm_calls([Case("hermes", '<tool_call>…</tool_call>', [tool])])

They run in the engine's interpreter, without an engine, over a vocabulary that has nothing but the markers: loading
vLLM takes some ten seconds, a case a fraction of a millisecond. Harmony's parser reads gpt-oss's own token ids, so it
gets the real vocabulary; vLLM would download it, here a package of the tests brings it.
"""

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.engine import ROOT, interpreter

Json = dict[str, Any]
Call = tuple[str, Json]
_MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
)
_FIRST = 0x110000  # ids below are characters


@dataclass(frozen=True)
class Case:
    """`parser` is what vLLM calls it (`--tool-call-parser`); `openai` is Harmony."""

    parser: str
    text: str
    tools: Sequence[Json]


def vllm_calls(cases: Sequence[Case]) -> list[list[Call]]:
    """The calls that vLLM reads in each text, as names and parsed arguments."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "o200k_base.tiktoken").write_bytes(_vocabulary_of_gpt_oss())
        process = subprocess.run(
            [str(interpreter()), "-m", "support.vllm_tool_parsers"],
            cwd=ROOT / "tests",
            input=json.dumps([asdict(case) for case in cases]).encode(),
            capture_output=True,
            timeout=180,
            check=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "TIKTOKEN_ENCODINGS_BASE": folder},
        )
    answers = json.loads(process.stdout.splitlines()[-1])
    return [[(name, arguments) for name, arguments in calls] for calls in answers]


def _vocabulary_of_gpt_oss() -> bytes:
    """The file that `openai_harmony` wants, which it checks by its digest. Of the package nothing is imported."""
    package = find_spec("bpe_openai")
    assert package is not None
    assert package.submodule_search_locations is not None
    [folder] = package.submodule_search_locations
    return gzip.decompress((Path(folder) / "data" / "o200k_base.tiktoken.gz").read_bytes())


class _Vocabulary:
    """As much of a tokenizer as the parsers ask for: the markers, and each character."""

    all_special_ids: Sequence[int] = ()
    all_special_tokens: Sequence[str] = ()
    is_fast = True

    def __init__(self, markers: Sequence[str]) -> None:
        self._ids = {marker: _FIRST + number for number, marker in enumerate(markers)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    get_added_vocab = get_vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        ids = []
        while text:
            marker = next((marker for marker in self._ids if text.startswith(marker)), text[0])
            ids.append(self._ids.get(marker) or ord(marker))
            text = text[len(marker) :]
        return ids

    def decode(self, ids: Any, **_: Any) -> str:
        words = {number: marker for marker, number in self._ids.items()}
        return "".join(words.get(one) or chr(one) for one in ([ids] if isinstance(ids, int) else ids))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._ids.get(token)


def _read(case: Json) -> list[Any]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(model="m", messages=[], tools=case["tools"])
    read = _read_harmony if case["parser"] == "openai" else _read_text
    return [(call.name, json.loads(call.arguments)) for call in read(case, request)]


def _read_text(case: Json, request: Any) -> list[Any]:
    from vllm.tool_parsers import ToolParserManager

    # vLLM takes a vocabulary without this one for that of a Mistral that writes its calls as a list.
    markers = [*_MARKERS, *([] if "[TOOL_CALLS] [" in case["text"] else ["[ARGS]"])]
    parser = ToolParserManager.get_tool_parser(case["parser"])(_Vocabulary(markers), request.tools)
    return [call.function for call in parser.extract_tool_calls(case["text"], request).tool_calls]


def _read_harmony(case: Json, request: Any) -> list[Any]:
    """vLLM's parser for gpt-oss reads ids, and every call that it finds."""
    from vllm.entrypoints.openai.parser.harmony_utils import get_encoding
    from vllm.parser.parser_manager import ParserManager

    made = ParserManager.get_parser("openai", "openai_gptoss", enable_auto_tools=True, is_harmony=True)
    assert made is not None
    ids = get_encoding().encode(case["text"], allowed_special="all")
    _, _, calls = made(_Vocabulary(()), request.tools).parse(case["text"], request, model_output_token_ids=ids)
    return calls or []


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.stdout.write("\n" + json.dumps([_read(case) for case in json.load(sys.stdin)]) + "\n")
