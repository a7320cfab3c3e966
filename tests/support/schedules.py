"""The grammar stop and the output tap under every way to schedule, in vLLM's own engine: speculation, preemption,
chunked prefill.

    .venv-vllm/bin/python tests/support/schedules.py SCHEDULE

Run by the engine's interpreter; the tiny model, at temperature 0, which then says nothing but twos and white space.
Prints one JSON object: what was said, why it ended, and what happened on the way.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny_vllm"))
serve = import_module("serve")
# One process for all: most of an engine's start is its processes importing it.
os.environ.update(serve.ENVIRONMENT, VLLM_PLUGINS="penstock", VLLM_ENABLE_V1_MULTIPROCESSING="0")

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.sampling_params import StructuredOutputsParams  # noqa: E402

from penstock.core.frames import Tokens, read_message  # noqa: E402
from penstock_vllm import frames, tap  # noqa: E402
from penstock_vllm.channels import Table  # noqa: E402
from penstock_vllm.streams import Stream  # noqa: E402
from penstock_vllm.vocabulary import TokenizerVocabulary, fast_tokenizer  # noqa: E402

NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
# Room for some four of the requests at once, and prompts in several steps each.
TIGHT = {"num_gpu_blocks_override": 24, "block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 16}
SCHEDULES: dict[str, dict[str, Any]] = {
    "speculative": {"speculative_config": NGRAMS, **TIGHT},
    "asynchronous": {"async_scheduling": True, **TIGHT},
}
LENGTHS = (3, 40, 80, 120, 5, 60, 100, 9, 33, 64)


class Listener:
    """What a sidecar would hear of one request, and nothing that makes it wait."""

    waiting_bytes = 0

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.put = self.records.append

    def commit(self) -> None:
        """There is nobody to send to."""

    def runs(self) -> list[tuple[int, ...]]:
        """The ids of each step."""
        told = read_message(frames.message(self.records))
        return [record.ids for record in told if isinstance(record, Tokens)]


def listen(engine: LLM, requests: int) -> list[Listener]:
    """To the first `requests` of an engine, which it calls by their numbers."""
    if problem := tap.install():
        raise SystemExit(problem)
    tokenizer = fast_tokenizer(engine.get_tokenizer())
    assert tokenizer is not None
    family = {"start": "answer", "states": {"answer": {"channel": "answer", "on": {}}}}
    table = Table(family, TokenizerVocabulary(tokenizer))
    listeners = [Listener() for _ in range(requests)]
    for number, listener in enumerate(listeners):
        box: Any = listener
        tap.OPEN_STREAMS.add(str(number), Stream(number + 1, box, table, lambda: None))
    return listeners


def run(options: dict[str, Any]) -> dict[str, Any]:
    engine = LLM(
        model=str(serve.model_directory()),
        max_model_len=512,
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **options,
    )
    prompts = [f"Number {number}, please. " * 5 for number in range(len(LENGTHS))]
    wanted = [
        SamplingParams(
            temperature=0, max_tokens=300, structured_outputs=StructuredOutputsParams(regex=rf"[0-9]{{{length}}}\s*")
        )
        for length in LENGTHS
    ]
    listeners = listen(engine, len(LENGTHS))
    outputs = [output.outputs[0] for output in engine.generate(prompts, wanted, use_tqdm=False)]
    heard = [listener.runs() for listener in listeners]
    # Room is given back whole: a second round is served as the first. Its grammars are known, so all begin at once.
    again = [output.outputs[0].text for output in engine.generate(prompts, wanted, use_tqdm=False)]
    metrics = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    scheduler = vars(engine.llm_engine.engine_core.engine_core.scheduler)
    hooked = ["_update_request_with_output" in scheduler]
    engine.generate(prompts[:1], SamplingParams(max_tokens=2), use_tqdm=False)
    hooked.append("_update_request_with_output" in scheduler)
    return {
        "lengths": LENGTHS,
        "texts": [output.text for output in outputs],
        "tokens": [len(output.token_ids) for output in outputs],
        "tokens that were not heard as they were said": [
            number
            for number, (output, runs) in enumerate(zip(outputs, heard, strict=True))
            if [token for run in runs for token in run] != list(output.token_ids)
        ],
        "longest run": max(len(run) for runs in heard for run in runs[:-1]),
        "reasons": sorted({f"{output.finish_reason} {output.stop_reason}" for output in outputs}),
        "same again": again == [output.text for output in outputs],
        "hooked with and without": hooked,
        "preemptions": metrics.get("vllm:num_preemptions"),
        "accepted drafts": metrics.get("vllm:spec_decode_num_accepted_tokens"),
        "cache usage": metrics.get("vllm:kv_cache_usage_perc"),
    }


def main() -> None:
    print(json.dumps(run(SCHEDULES[sys.argv[1]])))


if __name__ == "__main__":
    main()
