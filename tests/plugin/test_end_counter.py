"""Every cause is counted once, whoever asked: what the engine ended, what vLLM's front end did, and who left."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from penstock_vllm import tap
from penstock_vllm.end_counter import Count, counter, nobody


@dataclass
class Output:
    __struct_fields__ = ("request_id", "new_token_ids", "finish_reason", "stop_reason", "prefill_stats")

    request_id: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    new_token_ids: list[int] = field(default_factory=list)
    prefill_stats: Any = None


class State:
    def __init__(self) -> None:
        self.external_req_id = self.request_index = self.prompt_token_ids = self.prompt_len = None


class OutputProcessor:
    """As vLLM's: forgets what has ended, and finds stop strings by itself."""

    def __init__(self, *requests: str) -> None:
        self.request_states = {request: State() for request in requests}
        self.finds_a_string_in: list[str] = []

    def process_outputs(self, engine_core_outputs: list[Output]) -> Any:
        for output in engine_core_outputs:
            if output.finish_reason is not None or output.request_id in self.finds_a_string_in:
                self.request_states.pop(output.request_id, None)
        return SimpleNamespace(reqs_to_abort=self.finds_a_string_in)

    def abort_requests(self, requests: list[str]) -> None:
        for request in requests:
            self.request_states.pop(request, None)


@pytest.fixture
def counts() -> Counter[str]:
    return Counter()


@pytest.fixture
def processor(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> OutputProcessor:
    def count(cause: str, number: int) -> None:
        counts[cause] += number

    hooked = type("Hooked", (OutputProcessor,), dict(OutputProcessor.__dict__))
    assert tap.install_on(hooked, Output, State, count=count) is None
    monkeypatch.setattr(tap, "MODEL_ENDS", {2})
    made: OutputProcessor = hooked(*map(str, range(12)))
    return made


def test_every_cause(processor: OutputProcessor, counts: Counter[str]) -> None:
    processor.process_outputs(
        [
            Output("0"),
            Output("1", "stop"),
            Output("2", "stop", 2),
            Output("3", "stop", 42),
            Output("4", "stop", "grammar"),
            Output("5", "length"),
            Output("6", "error"),
            Output("7", "repetition", "repetition_detected"),
            Output("8", "abort"),
        ]
    )
    processor.finds_a_string_in = ["9"]
    processor.process_outputs([Output("9"), Output("1", "stop")])
    processor.finds_a_string_in = []
    processor.abort_requests(["10", "11", "1"])
    # What the engine says of those that have left is not counted again.
    processor.process_outputs([Output("10", "abort"), Output("0")])
    assert counts == {
        "eos": 2,
        "stop_token": 1,
        "grammar": 1,
        "max_tokens": 1,
        "error": 1,
        "repetition": 1,
        "abort": 3,
        "stop_string": 1,
    }


def test_without_prometheus_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    counting: Count = counter.__wrapped__()
    assert counting is nobody
    counting("eos", 1)
