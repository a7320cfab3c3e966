"""The logits processor against vLLM's real base classes and loaders, both interfaces, on CPU and meta tensors.

    .venv-vllm/bin/python tests/support/processor_contract.py

Run by the engine's interpreter. Each function is one check; what fails raises,
and the names of those that ran are printed as one JSON list. Model Runner V2 does not run on a CPU: what it would hand
over is made by hand here, from its own classes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as First

from penstock_vllm import grammar_processor, grammar_tensors
from penstock_vllm.grammar_processor import GrammarStop

PATH = "penstock_vllm.grammar_processor:GrammarStop"
NEVER = float("-inf")
CPU = torch.device("cpu")
TAIL = r"[0-9]{3}\s*"
RUN = 4

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny_vllm"))
MODEL = str(import_module("serve").model_directory())
TOKENIZER = get_tokenizer(MODEL)
SIZE = len(TOKENIZER)
END = TOKENIZER.eos_token_id
[SPACE] = TOKENIZER.encode(" ", add_special_tokens=False)
[LINE] = TOKENIZER.encode("\n", add_special_tokens=False)
[BRACE] = TOKENIZER.encode("}", add_special_tokens=False)
[ONE] = TOKENIZER.encode("1", add_special_tokens=False)

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(
        tokenizer=MODEL,
        model=MODEL,
        runner_type="generate",
        tokenizer_mode="auto",
        tokenizer_revision=None,
        trust_remote_code=False,
        skip_tokenizer_init=False,
        get_vocab_size=lambda: SIZE,
        try_get_generation_config=dict,
    ),
    scheduler_config=SimpleNamespace(max_num_seqs=8),
    speculative_config=None,
)


def asked(backend: str = "xgrammar", **fields: Any) -> SamplingParams:
    constraint = {name: fields.pop(name) for name in ("regex", "json", "grammar", "choice") if name in fields}
    structured = StructuredOutputsParams(**constraint) if constraint else None
    if structured is not None:
        structured._backend = backend
    parameters = SamplingParams(structured_outputs=structured, **fields)
    parameters.update_from_generation_config({}, END)
    return parameters


def first() -> GrammarStop:
    return GrammarStop(CONFIG, CPU, False)


def added(processor: GrammarStop, *requests: tuple[SamplingParams, list[int]]) -> None:
    rows = [(row, parameters, [1], said) for row, (parameters, said) in enumerate(requests)]
    processor.update_state(BatchUpdate(len(rows), removed=[], added=rows, moved=[]))


def masked(*rows: list[int] | None) -> torch.Tensor:
    """Logits as the grammar leaves them: only these ids, or all of them."""
    logits = torch.randn(len(rows), SIZE)
    for row, ids in enumerate(rows):
        if ids is not None:
            kept = logits[row, ids].clone()
            logits[row] = NEVER
            logits[row, ids] = kept
    return logits


def refusal(call: Callable[..., object], *arguments: object) -> str:
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def left(row: torch.Tensor) -> list[int]:
    ids: list[int] = (row > NEVER).nonzero().flatten().tolist()
    return ids


# --- Loading ------------------------------------------------------------------------------------------------


def check_the_first_runner_loads_it() -> None:
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns

    assert _load_logitsprocs_by_fqcns([PATH]) == [GrammarStop]
    assert issubclass(GrammarStop, First)
    assert first().is_argmax_invariant() is False


def check_the_second_runner_loads_it() -> None:
    if len(grammar_processor.BASES) == 1:
        return
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

    assert _load_v2_logitsprocs_by_fqcns([PATH]) == [GrammarStop]


def check_bad_values_are_refused_by_name() -> None:
    for name, value, said in (
        ("white_space_run", -1, "no number of tokens from 0 (no bound) to 256"),
        ("white_space_run", 257, "no number of tokens from 0 (no bound) to 256"),
        ("white_space_run", "many", "no number of tokens from 0 (no bound) to 256"),
        ("grammar_stop", 2, "neither 0 nor 1"),
    ):
        refused = refusal(GrammarStop.validate_params, SamplingParams(extra_args={name: value}))
        assert refused == f"vllm_xargs.{name}: {value!r} is {said}", refused
    GrammarStop.validate_params(SamplingParams(extra_args={"white_space_run": 8, "grammar_stop": 0}))
    GrammarStop.validate_params(SamplingParams())


def check_a_bad_setting_stops_the_server_at_its_start() -> None:
    os.environ["PENSTOCK_WHITE_SPACE_RUN"] = "300"
    refused = refusal(first)
    del os.environ["PENSTOCK_WHITE_SPACE_RUN"]
    assert refused.startswith("PENSTOCK_WHITE_SPACE_RUN is '300'; it must be"), refused


# --- The first runner ---------------------------------------------------------------------------------------


def check_a_whole_value_is_ended() -> None:
    processor = first()
    added(processor, (asked(regex=TAIL), []), (asked(regex=TAIL), []), (asked(), []))
    logits = masked([END, SPACE, LINE], [ONE], None)
    free = logits[2].clone()
    out = processor.apply(logits)
    assert left(out[0]) == [END]
    assert left(out[1]) == [ONE]
    assert torch.equal(out[2], free)


def check_what_could_still_grow_is_not() -> None:
    processor = first()
    rows = [
        asked(regex=r"[0-9]{3}(\s+[0-9]{3})?"),
        asked(regex=TAIL, ignore_eos=True),
        asked(regex=TAIL, extra_args={"grammar_stop": 0}),
        asked(regex=TAIL, backend="outlines"),
    ]
    added(processor, *((parameters, []) for parameters in rows))
    out = processor.apply(masked(*[[END, SPACE]] * 3, [END, SPACE, ONE]))
    assert [left(row) for row in out] == [sorted([END, SPACE])] * 3 + [sorted([END, SPACE, ONE])]


def check_rows_move_and_go() -> None:
    processor = first()
    added(processor, (asked(regex=TAIL), []), (asked(), []), (asked(regex=TAIL), []))
    one_way, swap = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=[(0, 1, swap)]))
    assert [len(left(row)) for row in processor.apply(masked(*[[END, SPACE]] * 3))] == [2, 1, 1]
    processor.update_state(BatchUpdate(2, removed=[1], added=[], moved=[(2, 1, one_way)]))
    assert [len(left(row)) for row in processor.apply(masked(*[[END, SPACE]] * 2))] == [2, 1]
    processor.update_state(BatchUpdate(0, removed=[1, 0], added=[], moved=[]))
    assert [len(left(row)) for row in processor.apply(masked([END, SPACE]))] == [2]


def check_the_guard_ends_a_run() -> None:
    processor = first()
    said: list[int] = [ONE]
    added(processor, (asked(json={"type": "object"}, extra_args={"white_space_run": RUN}), said))
    for _ in range(RUN):
        logits = masked([SPACE, LINE, BRACE])
        before = logits.clone()
        assert torch.equal(processor.apply(logits), before)
        said.append(SPACE)
    assert left(processor.apply(masked([SPACE, LINE, BRACE]))[0]) == [BRACE]
    # Nothing else is allowed, or no grammar is in force.
    assert left(processor.apply(masked([SPACE, LINE]))[0]) == sorted([SPACE, LINE])
    assert left(processor.apply(masked(None))[0]) == list(range(SIZE))
    said.append(BRACE)
    assert left(processor.apply(masked([SPACE, BRACE]))[0]) == sorted([SPACE, BRACE])


def check_an_id_that_is_not_known_yet_is_waited_for() -> None:
    processor = first()
    said = [SPACE] * RUN + [-1]
    added(processor, (asked(json={"type": "object"}, extra_args={"white_space_run": RUN + 1}), said))
    assert len(left(processor.apply(masked([SPACE, BRACE]))[0])) == 2
    said[-1] = SPACE
    assert left(processor.apply(masked([SPACE, BRACE]))[0]) == [BRACE]


def check_not_a_number_is_no_end() -> None:
    processor = first()
    added(processor, (asked(regex=TAIL), []))
    logits = masked([END, SPACE])
    logits[0, ONE] = float("nan")
    assert len(left(processor.apply(logits)[0])) == 2


def check_few_rows_of_many_are_edited_apart() -> None:
    processor = first()
    added(processor, *((asked(**({"regex": TAIL} if row == 5 else {})), []) for row in range(8)))
    logits = masked(*[[END, SPACE]] * 8)
    before = logits.clone()
    out = processor.apply(logits)
    assert left(out[5]) == [END]
    assert torch.equal(out[:5], before[:5])
    assert torch.equal(out[6:], before[6:])


# --- Model Runner V2 ----------------------------------------------------------------------------------------


def states(slots: int = 8) -> Any:
    return SimpleNamespace(
        device=CPU,
        max_num_reqs=slots,
        vocab_size=SIZE,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(slots, 64, dtype=torch.int32)),
        prompt_len=SimpleNamespace(gpu=torch.full((slots,), 2, dtype=torch.int32)),
    )


def context(slots: list[int], rows: list[int], positions: list[int], local: list[int], fed: list[int]) -> Any:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    return LogitsContext(
        expanded_idx_mapping=torch.tensor(rows, dtype=torch.int32),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping_np=numpy.array(slots, dtype=numpy.int32),
        expanded_local_pos=torch.tensor(local, dtype=torch.int32),
        input_ids=torch.tensor(fed, dtype=torch.int32),
        pos=torch.tensor(positions, dtype=torch.int64),
        seq_lens_upper_bound_np=numpy.array(positions, dtype=numpy.int32) + 1,
    )


def check_the_second_runner_ends_a_whole_value() -> None:
    if len(grammar_processor.BASES) == 1:
        return
    processor = GrammarStop(CONFIG, states())
    assert processor.add_request(3, asked(regex=TAIL)) is True
    assert processor.add_request(5, asked()) is False
    processor.apply_staged_writes()
    # Rows in another order than slots, and one that stands for nobody.
    ctx = context([5, 3], [5, 3, -1], [4, 4, 0], [0, 0, 0], [ONE, ONE, 0])
    out = processor.apply(masked(*[[END, SPACE]] * 3), ctx)
    assert [len(left(row)) for row in out] == [2, 1, 2]
    # The slot goes to another request.
    assert processor.add_request(3, asked()) is False
    processor.apply_staged_writes()
    out = processor.apply(masked([END, SPACE]), context([3], [3], [4], [0], [ONE]))
    assert len(left(out[0])) == 2


def check_the_second_runner_counts_runs_over_drafts() -> None:
    if len(grammar_processor.BASES) == 1:
        return
    shared = states()
    processor = GrammarStop(CONFIG, shared)
    processor.add_request(1, asked(json={"type": "object"}, extra_args={"white_space_run": RUN}))
    processor.add_request(2, asked(json={"type": "object"}, extra_args={"white_space_run": RUN}))
    processor.apply_staged_writes()
    # Slot 1: a prompt that ends in white space, two committed blanks, and two drafted ones. Slot 2: a brace between.
    shared.all_token_ids.gpu[1, :6] = torch.tensor([SPACE, SPACE, ONE, SPACE, SPACE, BRACE])
    shared.all_token_ids.gpu[2, :6] = torch.tensor([SPACE, SPACE, SPACE, SPACE, SPACE, SPACE])
    ctx = context(
        [1, 2],
        [1, 1, 1, 2, 2],
        [4, 5, 6, 4, 5],
        [0, 1, 2, 0, 1],
        [SPACE, SPACE, LINE, SPACE, SPACE],
    )
    out = processor.apply(masked(*[[SPACE, BRACE]] * 5), ctx)
    # Runs of 2, 3, 4 and of 3, 4: the prompt's own white space does not count.
    assert [len(left(row)) for row in out] == [2, 2, 1, 2, 1]


# --- The tensor part ----------------------------------------------------------------------------------------


def check_nothing_is_asked_back_from_the_device() -> None:
    """A meta tensor has no values: whatever would bring one to the host raises."""
    meta = torch.device("meta")
    vocabulary = grammar_tensors.Vocabulary([SPACE, LINE], [7], [END], [ONE, BRACE], SIZE, CPU)
    for name in ("beside_text", "is_blank", "probe", "blanks"):
        setattr(vocabulary, name, getattr(vocabulary, name).to(meta))
    for rows in (1, 16):
        logits = torch.empty(rows, SIZE, device=meta)
        numbers = torch.empty(rows, dtype=torch.int64, device=meta)
        grammar_tensors.edit(logits, vocabulary, numbers, numbers, numbers)
        grammar_tensors.edit_rows(logits, numbers, vocabulary, numbers, numbers, numbers)
        runs = grammar_tensors.white_space_run(
            vocabulary,
            torch.empty(8, 64, dtype=torch.int32, device=meta),
            torch.empty(8, dtype=torch.int32, device=meta),
            numbers,
            numbers,
            numbers,
            torch.empty(rows, dtype=torch.int32, device=meta),
            32,
        )
        assert (runs.shape, runs.device) == ((rows,), meta)


def main() -> None:
    checks: dict[str, Callable[[], None]] = {
        name: check for name, check in globals().items() if name.startswith("check_")
    }
    for name, check in checks.items():
        try:
            check()
        except BaseException:
            print(f"failed: {name}", file=sys.stderr)
            raise
    print(json.dumps(list(checks)))


if __name__ == "__main__":
    main()
