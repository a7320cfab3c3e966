"""The hook on vLLM's output processor, on classes that look like vLLM's: what it tells, and when it steps aside."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.core.frames import Begin, End, EngineFailed, Finish, Record, Tag, Tokens, read_message
from penstock_vllm import tap
from penstock_vllm.channels import Table
from penstock_vllm.frames import Cause
from penstock_vllm.outbox import Outbox
from penstock_vllm.streams import OpenStreams, Stream
from support.reference_tagger import FakeVocabulary

THINK, END_OF_THINK, EOS, SECOND_EOS = 100, 101, 102, 103
FAMILY: dict[str, Any] = {
    "start": "answer",
    "states": {
        "answer": {"channel": "answer", "on": {"<think>": "reasoning"}},
        "reasoning": {"channel": "reasoning", "on": {"</think>": "answer"}},
    },
}
VOCABULARY = FakeVocabulary([b"x"] * 104, {"<think>": THINK, "</think>": END_OF_THINK}, frozenset({EOS}))


class FinishReason(IntEnum):
    """As vLLM has it: a number that spells itself."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass
class Output:
    """As vLLM's EngineCoreOutput, which is a msgspec Struct."""

    __struct_fields__ = ("request_id", "new_token_ids", "finish_reason", "stop_reason", "prefill_stats")

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prefill_stats: Any = None


class State:
    """As vLLM's RequestState."""

    def __init__(self, external_req_id: str, index: int = 0, prompt: Sequence[int] | None = (7, 8, 9)) -> None:
        self.external_req_id = external_req_id
        self.request_index = index
        self.prompt_token_ids = prompt
        self.prompt_len = len(prompt) if prompt is not None else 12


@dataclass
class Engine:
    """A hooked processor with the streams that the hook tells; `said` is what the sidecar got."""

    streams: OpenStreams
    processor: Any
    box: Outbox
    stopped: list[int] = field(default_factory=list)

    def open(self, number: int, request_id: str, **more: Any) -> Stream:
        table = Table(FAMILY, VOCABULARY)
        stream = Stream(number, self.box, table, lambda: self.stopped.append(number), **more)
        self.streams.add(request_id, stream)
        return stream

    def step(self, *outputs: Output) -> Any:
        return self.processor.process_outputs(list(outputs), 1.5, iteration_stats="stats")

    async def said(self) -> list[Record]:
        message = await self.box.next()
        assert isinstance(message, bytes)
        return read_message(message)


@pytest.fixture
def engine() -> Engine:
    streams = OpenStreams()
    processor = new_processor()
    assert tap.install_on(processor, Output, State, streams) is None
    return Engine(streams, processor(), Outbox(10_000, lambda numbers: None))


def new_processor() -> Any:
    class OutputProcessor:
        def __init__(self) -> None:
            self.request_states: dict[str, State] = {"a-1": State("a"), "b-1": State("b", 0), "b-2": State("b", 1)}
            self.seen: list[Any] = []

        def process_outputs(
            self, engine_core_outputs: list[Output], engine_core_timestamp: float, iteration_stats: Any = None
        ) -> str:
            self.seen.append((engine_core_outputs, engine_core_timestamp, iteration_stats))
            return "vLLM's own"

    return OutputProcessor


# --- What is told -----------------------------------------------------------------------------------------


async def test_a_stream_from_its_first_step_to_its_last(engine: Engine) -> None:
    engine.open(5, "a")
    engine.step(Output("a-1", [THINK], prefill_stats=SimpleNamespace(num_cached_tokens=2)))
    engine.step(Output("a-1", [1, 2, END_OF_THINK, 3]))
    engine.step(Output("a-1", []))
    engine.step(Output("a-1", [4, EOS], FinishReason.STOP))
    assert await engine.said() == [
        Begin(5, 3, 2, (7, 8, 9), "answer"),
        Tokens(5, 0, Tag.MARKER, (THINK,)),
        Tokens(5, 0, Tag.REASONING, (1, 2)),
        Tokens(5, 0, Tag.MARKER, (END_OF_THINK,)),
        Tokens(5, 0, Tag.ANSWER, (3,)),
        Tokens(5, 0, Tag.ANSWER, (4,)),
        Tokens(5, 0, Tag.MARKER, (EOS,)),
        Finish(5, 0, "eos", "stop", None),
        End(5),
    ]


async def test_the_choices_of_a_request_go_their_own_ways_and_end_together(engine: Engine) -> None:
    engine.open(5, "b", choices=2)
    engine.step(Output("b-1", [THINK]), Output("b-2", [1]))
    engine.step(Output("b-1", [2], FinishReason.LENGTH), Output("b-2", [3]))
    engine.step(Output("b-2", [4], FinishReason.LENGTH))
    said = await engine.said()
    assert [record for record in said if isinstance(record, Begin)] == [Begin(5, 3, 0, (7, 8, 9), "answer")]
    assert [(record.choice, record.tag, record.ids) for record in said if isinstance(record, Tokens)] == [
        (0, Tag.MARKER, (THINK,)),
        (1, Tag.ANSWER, (1,)),
        (0, Tag.REASONING, (2,)),
        (1, Tag.ANSWER, (3,)),
        (1, Tag.ANSWER, (4,)),
    ]
    assert [record for record in said if isinstance(record, (Finish, End))] == [
        Finish(5, 0, "max_tokens", "length", None),
        Finish(5, 1, "max_tokens", "length", None),
        End(5),
    ]


async def test_a_prompt_of_embeddings_has_a_length_and_no_ids(engine: Engine) -> None:
    engine.processor.request_states["a-1"] = State("a", prompt=None)
    engine.open(5, "a")
    engine.step(Output("a-1", [1]))
    assert (await engine.said())[0] == Begin(5, 12, 0, (), "answer")


async def test_all_streams_of_a_step_are_one_message(engine: Engine) -> None:
    engine.open(5, "a")
    engine.open(6, "b", choices=2)
    engine.step(Output("a-1", [1]), Output("somebody-else", [1]), Output("b-1", [2]))
    assert [record.stream for record in await engine.said()] == [5, 5, 6, 6]


def test_vllm_gets_every_step_as_it_is_and_its_own_answer_back(engine: Engine) -> None:
    outputs = [Output("a-1", [1])]
    assert engine.processor.process_outputs(outputs, 1.5, iteration_stats="stats") == "vLLM's own"
    engine.open(5, "a")
    assert engine.processor.process_outputs(outputs, 1.5, iteration_stats="stats") == "vLLM's own"
    assert engine.processor.seen == [(outputs, 1.5, "stats")] * 2


async def test_a_closed_stream_is_told_nothing_more(engine: Engine) -> None:
    stream = engine.open(5, "a")
    engine.open(6, "b")
    engine.step(Output("a-1", [1]), Output("b-1", [1]))
    stream.abort()
    engine.step(Output("a-1", [2]), Output("b-1", [2]))
    engine.streams.remove("a")
    engine.step(Output("a-1", [3]), Output("b-1", [3]))
    said = await engine.said()
    assert [record.ids for record in said if isinstance(record, Tokens) and record.stream == 5] == [(1,)]
    assert [record.ids for record in said if isinstance(record, Tokens) and record.stream == 6] == [(1,), (2,), (3,)]
    assert engine.stopped == [5]
    assert list(engine.streams.choices) == ["b-1"]


@pytest.mark.parametrize(
    ("reason", "stop", "cause", "last_is_marker"),
    [
        (FinishReason.STOP, None, Cause.EOS, True),
        (FinishReason.STOP, SECOND_EOS, Cause.EOS, True),
        (FinishReason.STOP, 42, Cause.STOP_TOKEN, True),
        (FinishReason.STOP, "grammar", Cause.GRAMMAR, True),
        (FinishReason.STOP, "END", Cause.STOP_STRING, False),
        (FinishReason.LENGTH, None, Cause.MAX_TOKENS, False),
        (FinishReason.ABORT, None, Cause.ABORT, False),
        (FinishReason.REPETITION, "repetition_detected", Cause.REPETITION, False),
    ],
)
async def test_causes(
    engine: Engine, reason: FinishReason, stop: int | str | None, cause: Cause, last_is_marker: bool
) -> None:
    engine.open(5, "a", own_stop_ids=frozenset({42}))
    engine.step(Output("a-1", [1, 2], reason, stop))
    _, *tokens, finish, end = await engine.said()
    tag = Tag.MARKER if last_is_marker else Tag.ANSWER
    assert [(record.tag, record.ids[-1]) for record in tokens if isinstance(record, Tokens)][-1] == (tag, 2)
    assert finish == Finish(5, 0, cause.name.lower(), str(reason), stop)
    assert end == End(5)


async def test_a_stop_token_that_the_request_wants_to_see_is_no_marker(engine: Engine) -> None:
    engine.open(5, "a", own_stop_ids=frozenset({42}), shows_stop_tokens=True)
    engine.step(Output("a-1", [1, 42], FinishReason.STOP, 42))
    assert (await engine.said())[1] == Tokens(5, 0, Tag.ANSWER, (1, 42))


def test_a_reason_that_is_not_known_yet() -> None:
    assert tap.cause_of("new-in-1.0", None) is Cause.UNKNOWN


# --- Errors -----------------------------------------------------------------------------------------------


async def test_an_engine_error_before_the_first_token_is_a_refusal(engine: Engine) -> None:
    engine.open(5, "a")
    engine.step(Output("a-1", [], FinishReason.ERROR))
    assert await engine.box.next() == (
        '{"op": "refused", "stream": 5, "status": 500, "body": {"error": {"message": "Internal server error", '
        '"type": "InternalServerError", "param": null, "code": 500}}}'
    )
    assert engine.stopped == [5]


async def test_an_engine_error_in_the_middle(engine: Engine) -> None:
    engine.open(5, "b", choices=2)
    engine.step(Output("b-1", [1]), Output("b-2", [1]))
    engine.step(Output("b-1", [2], FinishReason.ERROR), Output("b-2", [3]))
    said = await engine.said()
    assert said[-2] == Tokens(5, 0, Tag.ANSWER, (2,))
    assert isinstance(said[-1], EngineFailed)
    assert said[-1].status == 500
    assert b"Internal server error" in said[-1].body
    assert engine.stopped == [5]


async def test_what_is_held_goes_out_before_an_error(engine: Engine) -> None:
    spelled = {"start": "a", "states": {"a": {"channel": "answer", "on": {"xxx": "a"}}}}
    stream = engine.open(5, "b", choices=2)
    stream._table = Table(spelled, VOCABULARY)
    engine.step(Output("b-1", [1, 2]), Output("b-2", [3]))
    stream.fail(500, {"error": {}})
    engine.streams.commit()
    _, *tokens, failed = await engine.said()
    assert sorted(record.ids for record in tokens if isinstance(record, Tokens)) == [(1, 2), (3,)]
    assert isinstance(failed, EngineFailed)


async def test_an_error_of_our_own_ends_its_stream_and_no_other(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.open(5, "a")
    engine.open(6, "b")
    engine.step(Output("a-1", [1]), Output("b-1", [1]))
    with caplog.at_level(logging.ERROR, "vllm.penstock"):
        assert engine.step(Output("a-1", [-1]), Output("b-1", [2])) == "vLLM's own"
        engine.step(Output("a-1", [-1]), Output("b-1", [3]))
    assert len(caplog.records) == 1
    said = await engine.said()
    assert [type(record) for record in said if record.stream == 5] == [Begin, Tokens, EngineFailed]
    assert [record.ids for record in said if isinstance(record, Tokens) and record.stream == 6] == [(1,), (2,), (3,)]


async def test_a_step_that_cannot_be_read_ends_the_streams_and_vllm_goes_on(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.open(5, "a")
    with caplog.at_level(logging.ERROR, "vllm.penstock"):
        assert engine.step(SimpleNamespace()) == "vLLM's own"  # type: ignore[arg-type]
    assert len(caplog.records) == 1
    assert engine.stopped == [5]


# --- Installing -------------------------------------------------------------------------------------------


def test_installing_twice_hooks_once() -> None:
    processor = new_processor()
    assert tap.install_on(processor, Output, State) is None
    hooked = processor.process_outputs
    assert tap.install_on(processor, Output, State) is None
    assert processor.process_outputs is hooked
    assert hooked.__name__ == "process_outputs"


def test_without_vllm_it_says_so() -> None:
    assert "No module named 'vllm'" in (tap.install() or "")


class WithoutMethod:
    pass


class OtherNames:
    def process_outputs(self, outputs: Any) -> None: ...


class Coroutine:
    async def process_outputs(self, engine_core_outputs: Any) -> None: ...


class WithoutStates:
    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def process_outputs(self, engine_core_outputs: Any) -> None: ...


@pytest.mark.parametrize(
    ("processor", "output", "state", "problem"),
    [
        (WithoutMethod, Output, State, "OutputProcessor has no process_outputs"),
        (OtherNames, Output, State, "process_outputs takes ['self', 'outputs']"),
        (Coroutine, Output, State, "is not what this plugin knows"),
        (WithoutStates, Output, State, "OutputProcessor has no request_states"),
        (
            new_processor(),
            SimpleNamespace(__struct_fields__=["request_id"]),
            State,
            "EngineCoreOutput has no finish_re",
        ),
        (new_processor(), Output, WithoutStates, "RequestState has no external_req_id, prompt_len"),
        (new_processor(), Output, object, "RequestState has no"),
    ],
)
def test_another_vllm_is_left_alone(processor: Any, output: Any, state: Any, problem: str) -> None:
    before = getattr(processor, "process_outputs", None)
    assert problem in (tap.install_on(processor, output, state) or "")
    assert getattr(processor, "process_outputs", None) is before
