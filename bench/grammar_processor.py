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


def microseconds(call: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call: the median of seven rounds."""
    rounds: list[float] = []
    for _ in range(7):
        start = clock()
        for _ in range(times):
            call()
        rounds.append((clock() - start) / times)
    return median(rounds) * 1e6


def cpu_microseconds(call: Callable[[], object], times: int) -> float:
    """The same of the processor time of this thread, which others on the machine do not add to."""
    return microseconds(call, times, time.thread_time)


# -- the scheduler's hook --------------------------------------------------------------------------------


class Manager:
    """As much of vLLM's as the hook reads, and that does nothing with a token."""

    def __init__(self, backend: Any, ends: grammar_stop.Ends) -> None:
        self.backend, self.reasoner_cls, self.enable_in_reasoning = backend, None, False
        self._penstock_ends = ends

    def accept_tokens(self, _request: Any, _new_token_ids: list[int]) -> bool:
        return True


class Scheduler:
    """The same of the scheduler."""

    def __init__(self, manager: Manager) -> None:
        self.structured_output_manager = manager

    def _update_request_with_output(
        self, _request: Any, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        return new_token_ids, is_stale

    def update_from_output(self, request: Any, times: int) -> None:
        """What vLLM calls for each token of a request."""
        for _ in range(times):
            new, _stopped = self._update_request_with_output(request, [1], is_stale=False)
            self.structured_output_manager.accept_tokens(request, new)


class Request:
    """In front of the hook, with the grammar in the state after `said`."""

    def __init__(self, full: Any, backend: Any, regex: str | None, said: str) -> None:
        ids = [full.get_vocab()[letter] for letter in said]
        self.request_id = "r"
        self.sampling_params = SamplingParams()
        self.sampling_params.update_from_generation_config({}, full.eos_token_id)
        self.output_token_ids, self.num_output_tokens = ids, len(ids)
        self.structured_output_request = None
        if regex is not None:
            kind = StructuredOutputOptions.REGEX
            grammar = backend.compile_grammar(kind, regex, {full.eos_token_id})
            grammar.accept_tokens("r", ids)
            self.structured_output_request = SimpleNamespace(
                grammar=grammar, reasoning_ended=True, structured_output_key=(kind, regex)
            )


def hook_cost(scheduler: Scheduler, request: Request, beside: Request | None = None) -> float:
    """Microseconds a token that the hook adds where the request goes on: everything but vLLM's own part."""
    watch = grammar_stop.Watch(scheduler)
    without = cpu_microseconds(partial(scheduler.update_from_output, request, 2000), 1)
    for one in (request, beside):
        if one is not None:
            watch.sees(one)
    scheduler.update_from_output(request, 1)
    return (cpu_microseconds(partial(scheduler.update_from_output, request, 2000), 1) - without) / 2000


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
    print("| the scheduler's hook, added to a token | µs of CPU |\n|---|---|")
    structured = Request(full, backend, "[0-9]+", "12")
    for name, regex, said, beside in (
        ("free text", None, "", None),
        ("free text, while there are structured requests", None, "", structured),
        ("within a value that is not whole yet", "[a-z]{10}", "ab", None),
        ("a value that is whole and may grow", "[0-9]+", "12", None),
        ("a value that is whole and looks like its end, but is not", r"[0-9]{3}( \n[0-9]{3})?", "123", None),
    ):
        request = Request(full, backend, regex, said)
        cost = hook_cost(Scheduler(Manager(backend, ends)), request, beside)
        print(f"| {name} | {cost:.2f} |", flush=True)
    # What ends is told once: walked through from its beginning.
    machine = ends.machine("REGEX", r"[a-z]{100,2000}\s*")
    assert machine is not None

    def read() -> None:
        reading = Reading(machine)
        reading.feed("a" * 400)
        assert reading.catch_up()

    print(f"| once, at the end of a value of 400 characters with a tail | {cpu_microseconds(read, 3):.0f} |")


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
