"""The logits processor: bounds runaway white space inside a structured value, and ends a whole one on the device.

Chosen by `--logits-processors penstock_vllm.grammar_processor:GrammarStop`; the path is stable. One class for both of
vLLM's runners: it is constructed with `(config, device, is_pin_memory)` by the first and `(config, request_states)` by
Model Runner V2. The arithmetic is in `grammar_tensors`, which is all that runs on the device.

Not offered as an entry point: the mere presence of one drops vLLM 0.22 to 0.30 to its first runner.
"""

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunnersProcessor

from penstock_vllm import grammar_tensors, notations
from penstock_vllm.grammar_stop import REQUEST_SETTING
from penstock_vllm.language import UnclearError
from penstock_vllm.register import grammar_stop_problem
from penstock_vllm.tails import mask_tells_the_end
from penstock_vllm.vocabulary import TokenizerVocabulary, end_ids, fast_tokenizer
from penstock_vllm.white_space import WhiteSpaceTokens, white_space_tokens

_log = logging.getLogger("vllm.penstock")

BASES: list[type] = [FirstRunnersProcessor]
try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnersProcessor

    BASES.append(SecondRunnersProcessor)
except ImportError:  # vLLM before 0.31
    pass

SETTING: Final = "PENSTOCK_WHITE_SPACE_RUN"
RUN_REQUEST_SETTING: Final = "white_space_run"
DEFAULT_RUN: Final = 32
MOST_RUN: Final = 256


def default_run() -> int:
    """The bound for requests that name none, from PENSTOCK_WHITE_SPACE_RUN. Raises ValueError for what is none."""
    setting = os.environ.get(SETTING, str(DEFAULT_RUN))
    if not setting.isdecimal() or int(setting) > MOST_RUN:
        raise ValueError(f"{SETTING} is {setting!r}; it must be a number of tokens from 0 (no bound) to {MOST_RUN}")
    return int(setting)


@dataclass(slots=True)
class Part:
    """What the processor does for one request. `said` is the first runner's own growing list of output ids."""

    end: int
    """The id to leave where the value is whole; -1 where that is not for the mask to tell."""
    bound: int
    said: list[int] | None
    seen: int = 0
    run: int = 0

    def catch_up(self, blanks: frozenset[int]) -> None:
        """Counts the white-space tokens in a row up to the last one said."""
        assert self.said is not None
        while self.seen < len(self.said) and self.said[self.seen] >= 0:  # -1 stands for one not known yet
            self.run = self.run + 1 if self.said[self.seen] in blanks else 0
            self.seen += 1


class GrammarStop(*BASES):  # type: ignore[misc]  # which bases there are depends on vLLM
    def __init__(self, config: Any, second: Any, is_pin_memory: bool | None = None) -> None:
        self._is_first = is_pin_memory is not None
        self._states = None if self._is_first else second
        self._device = torch.device(second if self._is_first else second.device)
        self._default_run = default_run()
        # The scheduler's hook ends a value a step earlier, and by its grammar.
        self._ends_values = grammar_stop_problem() is not None
        self._blanks: frozenset[int] = frozenset()
        self._vocabulary = self._learn(config)
        self._parts: dict[int, Part] = {}
        self._packed: tuple[object, torch.Tensor] | None = None
        slots = 0 if self._is_first else second.max_num_reqs
        self._slot_ends = torch.full((slots,), -1, dtype=torch.int64, device=self._device)
        self._slot_bounds = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._written: set[int] = set()

    def _learn(self, config: Any) -> "grammar_tensors.Vocabulary | None":
        from vllm.tokenizers import cached_tokenizer_from_config

        full = cached_tokenizer_from_config(model_config=config.model_config)
        fast = fast_tokenizer(full)
        if fast is None:
            _log.warning("penstock: the logits processor is off: this tokenizer has no fast form")
            return None
        vocabulary = TokenizerVocabulary(fast)
        tokens = fast.get_vocab(with_added_tokens=False)
        white: WhiteSpaceTokens = white_space_tokens(vocabulary, tokens)
        self._blanks = frozenset((*white.whole, *white.fragments))
        single = [number for number in tokens.values() if len(vocabulary.piece(number)) == 1]
        size = config.model_config.get_vocab_size()
        ends = end_ids(full, config.model_config)
        return grammar_tensors.Vocabulary(white.whole, white.fragments, ends, single, size, self._device)

    # --- Requests ---------------------------------------------------------------------------------------

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for what cannot be, so that the caller gets a 400."""
        given = sampling_params.extra_args or {}
        run = given.get(RUN_REQUEST_SETTING, 0)
        if type(run) is not int or not 0 <= run <= MOST_RUN:
            raise ValueError(
                f"vllm_xargs.{RUN_REQUEST_SETTING}: {run!r} is no number of tokens from 0 (no bound) to {MOST_RUN}"
            )
        if given.get(REQUEST_SETTING, 1) not in (0, 1):
            raise ValueError(f"vllm_xargs.{REQUEST_SETTING}: {given[REQUEST_SETTING]!r} is neither 0 nor 1")

    def _part(self, params: Any, said: list[int] | None) -> Part | None:
        wanted = getattr(params, "structured_outputs", None)
        if self._vocabulary is None or wanted is None or wanted.all_constraints_none():
            return None
        given = params.extra_args or {}
        bound = given.get(RUN_REQUEST_SETTING, self._default_run)
        end = -1
        if self._ends_values and given.get(REQUEST_SETTING, 1) and params.eos_token_id is not None:
            source = ("regex", wanted.regex) if wanted.regex else ("grammar", wanted.grammar)
            if source[1] and _mask_tells(*source, getattr(wanted, "_backend", None)):
                end = params.eos_token_id
        return Part(end, bound, said) if bound or end >= 0 else None

    # --- The first runner -------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._parts.pop(row, None)
        for row, params, _prompt, said in batch_update.added:
            self._parts.pop(row, None)
            if part := self._part(params, said):
                self._parts[row] = part
        for source, target, how in batch_update.moved:
            moving, displaced = self._parts.pop(source, None), self._parts.pop(target, None)
            if moving is not None:
                self._parts[target] = moving
            if how.name == "SWAP" and displaced is not None:
                self._parts[source] = displaced

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        if self._parts and self._vocabulary is not None:
            if ctx is None:
                self._apply_first(logits, self._vocabulary)
            else:
                self._apply_second(logits, ctx, self._vocabulary)
        return logits

    def _apply_first(self, logits: torch.Tensor, vocabulary: grammar_tensors.Vocabulary) -> None:
        rows = []
        for row, part in self._parts.items():
            part.catch_up(self._blanks)
            if row < len(logits) and (part.end >= 0 or 0 < part.bound <= part.run):
                rows.append((row, part.end, part.run, part.bound))
        if not rows:
            return
        packed = self._sent(sorted(rows), len(logits))
        if len(rows) * 2 > len(logits):
            grammar_tensors.edit(logits, vocabulary, packed[1], packed[2], packed[3])
        else:
            grammar_tensors.edit_rows(logits, packed[0], vocabulary, packed[1], packed[2], packed[3])

    def _sent(self, rows: list[tuple[int, int, int, int]], count: int) -> torch.Tensor:
        """Numbers, ends, runs and bounds of the rows on the device: of all rows where most of them matter."""
        key = (rows, count)
        if self._packed is None or self._packed[0] != key:
            if len(rows) * 2 > count:
                by_row = {row[0]: row for row in rows}
                rows = [by_row.get(row, (row, -1, 0, 0)) for row in range(count)]
            packed = torch.tensor(list(zip(*rows, strict=True)), dtype=torch.int64)
            self._packed = key, self._to_device(packed)
        return self._packed[1]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    # --- Model Runner V2 --------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._parts.pop(req_idx, None)
        self._written.add(req_idx)
        part = self._part(sampling_params, None)
        if part is None:
            return False
        self._parts[req_idx] = part
        return True

    def apply_staged_writes(self) -> None:
        if not self._written:
            return
        slots = sorted(self._written)
        self._written.clear()
        parts = [self._parts.get(slot, _NO_PART) for slot in slots]
        rows = [slots, [part.end for part in parts], [part.bound for part in parts]]
        packed = self._to_device(torch.tensor(rows, dtype=torch.int64))
        self._slot_ends.index_copy_(0, packed[0], packed[1])
        self._slot_bounds.index_copy_(0, packed[0], packed[2])

    def _apply_second(self, logits: torch.Tensor, ctx: Any, vocabulary: grammar_tensors.Vocabulary) -> None:
        assert self._states is not None
        matter = [slot in self._parts for slot in ctx.idx_mapping_np.tolist()]
        if not any(matter):
            return
        known = ctx.expanded_idx_mapping >= 0
        slots = ctx.expanded_idx_mapping.clamp_min(0).long()
        ends = torch.where(known, self._slot_ends[slots], -1)
        bounds = torch.where(known, self._slot_bounds[slots], 0)
        longest = max(part.bound for part in self._parts.values())
        runs = torch.zeros_like(bounds)
        if longest:
            states = self._states
            runs = grammar_tensors.white_space_run(
                vocabulary,
                states.all_token_ids.gpu,
                states.prompt_len.gpu,
                slots,
                ctx.pos.long(),
                ctx.expanded_local_pos.long(),
                ctx.input_ids,
                longest,
            )
        # Without drafts a row is a request, so that the host knows which rows matter.
        if len(matter) == len(logits) and sum(matter) * 2 <= len(matter):
            rows = self._to_device(torch.from_numpy(numpy.flatnonzero(matter)))
            grammar_tensors.edit_rows(logits, rows, vocabulary, ends[rows], runs[rows], bounds[rows])
        else:
            grammar_tensors.edit(logits, vocabulary, ends, runs, bounds)


_NO_PART: Final = Part(-1, 0, None)


@functools.lru_cache(maxsize=256)
def _mask_tells(kind: str, source: str, backend: str | None) -> bool:
    try:
        read = notations.regular_expression if kind == "regex" else notations.grammar
        return mask_tells_the_end(read(source), masks_are_whole=backend in ("xgrammar", "guidance"))
    except (UnclearError, RecursionError):
        return False
