"""What the grammar stop costs at a vocabulary of 152,000: the scheduler's hook by the token, the processor by the step.

    .venv-vllm/bin/python bench/grammar_processor.py

Run by the engine's interpreter. The processor is timed on CUDA where there is one, otherwise on the CPU: beside the
time of reading the logits once, which nothing that looks at them can do without. On CUDA every step runs under
PyTorch's check for synchronisation, which raises at the first.
"""

import random
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from penstock_vllm import grammar_stop, grammar_tensors
from penstock_vllm.language import Reading
from penstock_vllm.vocabulary import BYTE_LETTERS, TokenizerVocabulary
from penstock_vllm.white_space import white_space_tokens

VOCABULARY: Final = 151_936
BATCHES: Final = (1, 8, 64, 256)
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz0123456789"


def tokenizer() -> Any:
    """Byte-level, with white space in all the lengths that large vocabularies have."""
    letter = {byte: letter for letter, byte in BYTE_LETTERS.items()}
    source = random.Random(1)
    pieces = dict.fromkeys(letter.values())
    pieces.update(dict.fromkeys(letter[0x20] * count for count in range(2, 84)))
    pieces.update(dict.fromkeys(letter[0x0A] * count for count in range(2, 20)))
    while len(pieces) < VOCABULARY - 1:
        blank = source.choice(("", letter[0x20]))
        pieces[blank + "".join(source.choices(LETTERS, k=source.randint(2, 7)))] = None
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<end>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def microseconds(call: Callable[[], object], times: int) -> float:
    """Of one call: the median of seven rounds."""
    rounds: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(times):
            call()
        rounds.append((time.perf_counter() - start) / times)
    return median(rounds) * 1e6


# -- the scheduler's hook --------------------------------------------------------------------------------


class Scheduled:
    """One request in front of the hook, with the grammar in the state after `said`."""

    def __init__(self, full: Any, backend: Any, ends: grammar_stop.Ends, regex: str | None, said: str) -> None:
        ids = [full.get_vocab()[letter] for letter in said]
        parameters = SamplingParams()
        parameters.update_from_generation_config({}, full.eos_token_id)
        structured = None
        self.grammar = None
        if regex is not None:
            kind = StructuredOutputOptions.REGEX
            self.grammar = backend.compile_grammar(kind, regex, {full.eos_token_id})
            self.grammar.accept_tokens("r", ids)
            structured = SimpleNamespace(
                grammar=self.grammar, reasoning_ended=True, structured_output_key=(kind, regex)
            )
        self.request = SimpleNamespace(
            request_id="r",
            structured_output_request=structured,
            sampling_params=parameters,
            output_token_ids=ids,
            num_output_tokens=len(ids),
        )
        manager = SimpleNamespace(backend=backend, reasoner_cls=None, enable_in_reasoning=False, _penstock_ends=ends)
        self.scheduler = SimpleNamespace(structured_output_manager=manager)


def hook_cost(scheduled: Scheduled) -> float:
    """Microseconds a token that the hook adds where the request goes on: everything but vLLM's own part."""

    def update(_scheduler: Any, _request: Any, new_token_ids: list[int]) -> tuple[list[int], bool]:
        return new_token_ids, False

    def accept(_manager: Any, _request: Any, _ids: list[int]) -> bool:
        return True

    hooked = grammar_stop._watched(update, accept)
    once = grammar_stop._once(accept)
    ids = [1]
    scheduler, request = scheduled.scheduler, scheduled.request

    def with_hook() -> None:
        hooked(scheduler, request, ids)
        once(scheduler.structured_output_manager, request, ids)

    def without() -> None:
        update(scheduler, request, ids)
        accept(scheduler.structured_output_manager, request, ids)

    with_hook()
    return microseconds(with_hook, 2000) - microseconds(without, 2000)


def time_the_hook(full: Any) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="any")),
        structured_outputs_config=SimpleNamespace(disable_any_whitespace=False),
        speculative_config=None,
    )
    backend = XgrammarBackend(config, tokenizer=full, vocab_size=VOCABULARY)
    start = time.perf_counter()
    ends = grammar_stop.Ends(full)
    print(f"\nlooking through the vocabulary, once at the start: {(time.perf_counter() - start) * 1e3:.0f} ms\n")
    print("| the scheduler's hook, added to a token (CPU) | µs |\n|---|---|")
    for name, regex, said in (
        ("free text", None, ""),
        ("within a value that is not whole yet", "[a-z]{10}", "ab"),
        ("a value that is whole and may grow", "[0-9]+", "12"),
        ("a value that is whole and looks like its end, but is not", r"[0-9]{3}( \n[0-9]{3})?", "123"),
    ):
        print(f"| {name} | {hook_cost(Scheduled(full, backend, ends, regex, said)):.2f} |", flush=True)
    # What ends is told once: walked through from its beginning.
    machine = ends.machine("REGEX", r"[a-z]{100,2000}\s*")
    assert machine is not None
    reading = microseconds(lambda: Reading(machine).feed("a" * 400), 3)
    print(f"| once, at the end of a value of 400 characters with a tail | {reading:.0f} |")


# -- the processor's tensors -------------------------------------------------------------------------------


class Timed:
    """`call` on the device, in microseconds a step: nothing is waited for within, and everything before the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        if self._device.type != "cuda":
            return microseconds(call, 5)
        rounds: list[float] = []
        for _ in range(7):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            begin.record()
            for _ in range(50):
                call()
            end.record()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            rounds.append(begin.elapsed_time(end) / 50 * 1e3)
        return median(rounds)


def time_the_tensors(full: Any, device: torch.device) -> None:
    inner = TokenizerVocabulary(full._tokenizer)
    white = white_space_tokens(inner, full.get_vocab())
    single = [number for number in range(VOCABULARY - 1) if len(inner.piece(number)) == 1]
    end = full.eos_token_id
    vocabulary = grammar_tensors.Vocabulary(white.whole, white.fragments, [end], single, VOCABULARY, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    timed = Timed(device)
    print(f"\n| rows ({name}) | read once µs | edit µs | ratio | edit and count runs µs | one row of them µs |")
    print("|---|---|---|---|---|---|")
    for rows in BATCHES:
        logits = torch.randn(rows, VOCABULARY, device=device)
        ends = torch.full((rows,), end, device=device)
        runs = torch.zeros(rows, dtype=torch.int64, device=device)
        bounds = torch.full((rows,), 32, device=device)
        slots = torch.arange(rows, device=device)
        positions = torch.full((rows,), 600, device=device)
        history = torch.randint(0, VOCABULARY, (rows, 2048), dtype=torch.int32, device=device)
        first, fed = torch.full((rows,), 100, device=device), history[:, 600].contiguous()
        one = torch.zeros(1, dtype=torch.int64, device=device)

        tokens = (history, first, slots, positions, torch.zeros_like(slots), fed, 32)

        def counted(logits: torch.Tensor, ends: torch.Tensor, bounds: torch.Tensor, tokens: Any) -> None:
            counts = grammar_tensors.white_space_run(vocabulary, *tokens)
            grammar_tensors.edit(logits, vocabulary, ends, counts, bounds)

        once = timed(partial(logits.amax, 1))
        whole = timed(partial(grammar_tensors.edit, logits, vocabulary, ends, runs, bounds))
        with_runs = timed(partial(counted, logits, ends, bounds, tokens))
        few = (one, vocabulary, ends[:1], runs[:1], bounds[:1])
        alone = timed(partial(grammar_tensors.edit_rows, logits, *few))
        print(f"| {rows} | {once:.0f} | {whole:.0f} | {whole / once:.2f} | {with_runs:.0f} | {alone:.0f} |", flush=True)


def main() -> None:
    full = tokenizer()
    if "--tensors" not in sys.argv:
        time_the_hook(full)
    time_the_tensors(full, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
