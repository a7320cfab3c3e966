"""Make the real vLLM say a given text at a given pace. For tests, demonstrations and measurements only.

vLLM's V1 model runner loads the class by `--logits-processors scripted:Scripted` with this directory on
PYTHONPATH. What a request may carry in `vllm_xargs`:

    script            token ids that the model "chooses", one after the other; past its end it starts again
    script_1, _2 …    another script for choice 1, 2 … of a request with n > 1; such a request sets `seed: 0`
    script_pause_ms   the engine sleeps so long in every step of this request
    script_start_ms   the engine sleeps so long once, before the first token

A sleep holds up every request of that step, as a slow GPU would. Aborts are seen between steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


@dataclass(slots=True)
class Part:
    """What one row of the batch is to say. `said` is vLLM's own growing list of output ids."""

    script: list[int]
    said: list[int]
    pause_ms: float
    start_ms: float

    def next_id(self) -> int:
        return self.script[len(self.said) % len(self.script)]

    def sleep_ms(self) -> float:
        start, self.start_ms = self.start_ms, 0.0
        return start + self.pause_ms


class Scripted(LogitsProcessor):
    def __init__(self, _config: VllmConfig, _device: torch.device, _pinned: bool) -> None:
        self.parts: dict[int, Part] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what cannot be a script, so that the caller gets a 400 and the engine stays up."""
        for name, value in (sampling_params.extra_args or {}).items():
            if name in ("script_pause_ms", "script_start_ms"):
                valid = isinstance(value, (int, float)) and 0 <= value <= 60_000
            elif name == "script" or name.startswith("script_"):
                valid = isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)
            else:
                continue
            if not valid:
                raise ValueError(f"vllm_xargs.{name}: {value!r} is neither token ids nor milliseconds")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.parts.pop(row, None)
        for row, params, _, said in batch_update.added:
            self.parts.pop(row, None)
            if part := part_of(params, said):
                self.parts[row] = part
        for source, target, how in batch_update.moved:
            self._move(source, target, swap=how == MoveDirectionality.SWAP)

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        moving, displaced = self.parts.pop(source, None), self.parts.pop(target, None)
        if moving is not None:
            self.parts[target] = moving
        if swap and displaced is not None:
            self.parts[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.parts:
            return logits
        time.sleep(max(part.sleep_ms() for part in self.parts.values()) / 1000)
        for row, part in self.parts.items():
            if part.script and row < logits.shape[0]:
                logits[row].fill_(float("-inf"))
                logits[row, part.next_id()] = 0.0
        return logits


def part_of(params: SamplingParams | None, said: list[int]) -> Part | None:
    wanted: dict[str, Any] = (params.extra_args or {}) if params is not None else {}
    # vLLM gives choice i of a seeded request the seed `seed + i`, and nothing else that tells choices apart.
    choice = (params.seed or 0) if params is not None else 0
    script = wanted.get(f"script_{choice}", wanted.get("script", []))
    pause_ms, start_ms = wanted.get("script_pause_ms", 0.0), wanted.get("script_start_ms", 0.0)
    if not script and not pause_ms and not start_ms:
        return None
    return Part(script, said, float(pause_ms), float(start_ms))
