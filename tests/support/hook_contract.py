"""The grammar stop on vLLM's real scheduler classes, requests and back ends, a step at a time, without an engine.

    .venv-vllm/bin/python tests/support/hook_contract.py

Run by the engine's interpreter. Each function is one check; what fails raises, and the names of those that ran are
printed as one JSON list. Steps of several tokens come from speculation: what they bring is made up here.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_PLUGINS"] = "penstock"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny_vllm"))

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from penstock_vllm import grammar_stop, register

TOKENIZER = get_tokenizer(str(import_module("serve").model_directory()))
END = TOKENIZER.eos_token_id
BACK_ENDS = {"xgrammar": XgrammarBackend, "guidance": GuidanceBackend, "outlines": OutlinesBackend}
TAIL = r"[0-9]{3}\s*"

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(
        hf_config=SimpleNamespace(model_type="tiny"), enable_return_routed_experts=False, is_diffusion=False
    ),
    structured_outputs_config=SimpleNamespace(disable_any_whitespace=False, disable_additional_properties=False),
    speculative_config=SimpleNamespace(num_speculative_tokens=8),
    num_speculative_tokens=8,
)


def ids(text: str) -> list[int]:
    """One for each character."""
    return [TOKENIZER.encode(letter, add_special_tokens=False)[0] for letter in text]


class Step:
    """A scheduler with one running request, as far as its part of an engine step goes."""

    def __init__(self, kind: type[Any], back_end: str, regex: str | None = TAIL, **fields: Any) -> None:
        structured = None if regex is None else StructuredOutputsParams(regex=regex)
        parameters = SamplingParams(structured_outputs=structured, **{"max_tokens": 100, **fields})
        parameters.update_from_generation_config({}, END)
        self.back_end = back_end
        self.request = Request("r", [1, 2, 3], parameters, None)
        self.request.status = RequestStatus.RUNNING
        manager = StructuredOutputManager.__new__(StructuredOutputManager)
        manager.vllm_config, manager.reasoner_cls, manager.enable_in_reasoning = CONFIG, None, False
        manager.tokenizer = TOKENIZER
        if regex is not None:
            assert self.request.structured_output_request is not None
            manager.backend = BACK_ENDS[back_end](CONFIG, tokenizer=TOKENIZER, vocab_size=len(TOKENIZER))
            self.request.structured_output_request.grammar = manager._create_grammar(self.request)
        self.scheduler: Any = object.__new__(kind)
        self.scheduler.structured_output_manager = manager
        self.scheduler.max_model_len = 1000
        self.scheduler.vllm_config = CONFIG
        self.scheduler.kv_cache_manager = SimpleNamespace(cache_blocks=lambda *_: None)
        self.watch = grammar_stop.Watch(self.scheduler)
        self.watch.sees(self.request)

    def brings(self, text: str, *more: int) -> tuple[list[int], bool]:
        """What vLLM makes of these tokens; also advances the grammar, as it does next."""
        new = [*ids(text), *more]
        self.request.num_output_placeholders = len(new)
        kept, stopped = self.scheduler._update_request_with_output(self.request, new)
        assert self.scheduler.structured_output_manager.accept_tokens(self.request, kept)
        return kept, stopped

    @property
    def end(self) -> tuple[str, str | int | None]:
        return self.request.status.name, self.request.stop_reason


def every(regex: str | None = TAIL, **fields: Any) -> list[Step]:
    return [Step(kind, name, regex, **fields) for kind in (Scheduler, AsyncScheduler) for name in BACK_ENDS]


# --- The hook -----------------------------------------------------------------------------------------------


def check_it_is_installed_once_however_often() -> None:
    register.register()
    first = Scheduler.add_request
    register.register()
    assert register.grammar_stop_problem() is None
    assert Scheduler.add_request is first


def check_the_tail_of_a_step_is_trimmed() -> None:
    for step in every():
        assert step.brings("12") == (ids("12"), False)
        assert step.brings("3\n\n \n") == ([*ids("3"), END], True)
        assert list(step.request.output_token_ids) == [*ids("123"), END]
        assert step.end == ("FINISHED_STOPPED", "grammar")


def check_the_books_of_an_asynchronous_schedule_balance() -> None:
    for name in BACK_ENDS:
        step = Step(AsyncScheduler, name)
        step.brings("123\n\n")
        # Three of five places were given back; the end that the hook wrote had none.
        assert step.request.num_output_placeholders == 2


def check_what_a_preempted_request_had_on_the_way_gives_no_place_back() -> None:
    step = Step(AsyncScheduler, "xgrammar")
    step.request.num_output_placeholders, step.request.status = 0, RequestStatus.PREEMPTED
    kept, stopped = step.scheduler._update_request_with_output(step.request, ids("123\n"), is_stale=True)
    assert (kept, stopped) == ([*ids("123"), END], True)
    assert (step.request.num_output_placeholders, *step.end) == (0, "FINISHED_STOPPED", "grammar")


def check_what_could_grow_goes_on() -> None:
    for step in every(r"[0-9]{1,3}( [0-9])?\s*"):
        assert step.brings("12") == (ids("12"), False)
        assert step.brings("3") == (ids("3"), False)
        assert step.brings(" 4  ") == ([*ids(" 4"), END], True)


def check_a_value_of_any_length_up_to_its_most() -> None:
    for step in every(r"[0-9]{1,4}\s*"):
        for digit in "155":
            assert step.brings(digit) == (ids(digit), False)
        assert step.brings("7") == ([*ids("7"), END], True)
    for step in every(r"[0-9]{1,4}\s*"):
        assert step.brings("15") == (ids("15"), False)
        assert step.brings("\n") == ([*ids("\n"), END], True)


def check_the_value_begins_behind_the_reasoning() -> None:
    [mark] = ids("#")

    class Reasoner:
        def is_reasoning_end(self, prompt: list[int]) -> bool:
            return mark in prompt

        def is_reasoning_end_streaming(self, _all: list[int], new: list[int]) -> bool:
            return mark in new

    for ended, prompt, said in (
        (True, [1], ""),
        (None, [1, mark], ""),
        (None, [1], "5 123 #"),
        (False, [1], "123\n\n#"),
    ):
        for step in every(r"[0-9]{1,4}\s*"):
            if ended is None and not said and step.back_end == "guidance":
                continue  # it does not count what it took: the value may have begun with the second token
            manager, structured = step.scheduler.structured_output_manager, step.request.structured_output_request
            manager.reasoner_cls, manager._get_reasoner = Reasoner, lambda _request: Reasoner()
            step.request.prompt_token_ids, structured.reasoning_ended = prompt, ended
            if said:
                assert step.brings(said) == (ids(said), False)
            assert step.brings("155") == (ids("155"), False)
            assert step.brings("7 ") == ([*ids("7"), END], True), (ended, said, step.scheduler)


def check_vllms_own_stops_come_first() -> None:
    for step in every(max_tokens=3):
        assert step.brings("123\n") == (ids("123"), True)
        assert step.end == ("FINISHED_LENGTH_CAPPED", None)
    [five] = ids("5")
    # (xgrammar allows a stop token of the request only where the value may end.)
    for name in ("guidance", "outlines"):
        step = Step(Scheduler, name, stop_token_ids=[five])
        assert step.brings("15") == (ids("15"), True)
        assert step.end == ("FINISHED_STOPPED", five)
    for step in every("[0-9]+"):
        assert step.brings("12", END) == ([*ids("12"), END], True)
        assert step.end == ("FINISHED_STOPPED", None)


def check_a_request_with_logprobs_is_left_its_own_end() -> None:
    for step in every(logprobs=1):
        assert step.brings("123") == (ids("123"), False)
        manager, grammar = step.scheduler.structured_output_manager, step.request.structured_output_request.grammar
        bits = manager.backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(bits, 0)
        row = bits[0].numpy().view("uint32")
        assert [number for number in range(len(TOKENIZER)) if row[number // 32] >> (number % 32) & 1] == [END]
        assert manager.validate_tokens(step.request, ids("\n")) == []
        assert step.brings("", END) == ([END], True)
        assert step.end == ("FINISHED_STOPPED", "grammar")


def check_a_token_that_the_grammar_refuses_is_for_vllm_to_judge() -> None:
    for step in every():
        new = ids("1a2")
        step.request.num_output_placeholders = len(new)
        kept, stopped = step.scheduler._update_request_with_output(step.request, new)
        assert (kept, stopped) == (ids("1a2"), False)
        assert not step.scheduler.structured_output_manager.accept_tokens(step.request, kept)
    for step in every(stop_token_ids=ids("a")):
        step.request.num_output_placeholders = 3
        kept, stopped = step.scheduler._update_request_with_output(step.request, ids("1a2"))
        assert (kept, stopped) == (ids("1a"), True)
        assert not step.scheduler.structured_output_manager.accept_tokens(step.request, kept)


def check_an_error_of_ours_lets_the_request_go_on() -> None:
    original = grammar_stop.Ends.left
    grammar_stop.Ends.left = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]  # on purpose
    try:
        for name in ("xgrammar", "outlines"):
            step = Step(Scheduler, name)
            assert step.brings("123") == (ids("123"), False)
    finally:
        grammar_stop.Ends.left = original  # type: ignore[method-assign]  # as it was


def check_free_text_is_not_touched() -> None:
    hooked = {"_update_request_with_output", "accept_tokens"}
    for step in every(None):
        assert step.brings("12 34") == (ids("12 34"), False)
        assert grammar_stop._STATE not in vars(step.request)
        assert not hooked & {*vars(step.scheduler), *vars(step.scheduler.structured_output_manager)}
    # Beside a structured request it is looked at, and no more; and where that has gone, no longer.
    for step in every():
        free = Request("free", [1], SamplingParams(max_tokens=100), None)
        step.watch.sees(free)
        assert hooked < {*vars(step.scheduler), *vars(step.scheduler.structured_output_manager)}
        step.request, structured = free, weakref.ref(step.request)
        assert step.brings("123\n") == (ids("123\n"), False)
        assert structured() is None
        step.watch.sees(free)
        assert not hooked & {*vars(step.scheduler), *vars(step.scheduler.structured_output_manager)}


def check_a_grammar_that_is_not_read_ends_where_nothing_may_follow() -> None:
    for name, regex in (
        ("xgrammar", r"[&&0-9]( [0-9])?"),
        ("guidance", r"\p{Nd}( [0-9])?"),
        ("outlines", r"(?i:[0-9])( [0-9]?)?"),
    ):
        step = Step(Scheduler, name, regex)
        assert step.brings("1") == (ids("1"), False)
        assert step.brings(" 2") == ([*ids(" 2"), END], True)
        assert step.end == ("FINISHED_STOPPED", "grammar")


def check_a_long_value_is_read_a_part_at_a_time() -> None:
    """No step waits for all of it: it ends some tokens of white space later."""
    for name in ("xgrammar", "guidance"):
        step = Step(Scheduler, name, r"([a-z]{2})+[0-9]\s*", max_tokens=20_000)
        step.scheduler.max_model_len = 20_000
        assert step.brings("ab" * 5_000) == (ids("ab" * 5_000), False)
        kept, stopped = step.brings("1" + "\n" * 20)
        assert stopped
        assert 2 < len(kept) < 10, len(kept)


def check_streaming_input_is_not_ended() -> None:
    step = Step(Scheduler, "xgrammar")
    step.request.resumable = True
    assert step.brings("123") == (ids("123"), False)


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
