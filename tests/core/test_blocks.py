"""Which block each piece belongs to, and that every block has one start and one end."""

from penstock.core.blocks import Blocks
from penstock.core.events import (
    BlockEnded,
    BlockStarted,
    Channel,
    Event,
    Finished,
    Role,
    Text,
    ToolArguments,
    ToolEnded,
    ToolReady,
    ToolStarted,
    Warned,
)

ROLE = Role(0, "assistant")


def answer(text: str, block: int = 0) -> Text:
    return Text(0, Channel.ANSWER, text, block=block)


def thought(text: str, tokens: int = 0) -> Text:
    return Text(0, Channel.REASONING, text, tokens)


def test_a_change_of_channel_is_a_new_block() -> None:
    events = Blocks().feed([thought("é", tokens=2), thought("m"), answer("a")])
    assert events == [
        ROLE,
        BlockStarted(0, 0, Channel.REASONING),
        thought("é", tokens=2),
        thought("m"),
        BlockEnded(0, 0, Channel.REASONING, 3, 2, "complete"),
        BlockStarted(0, 1, Channel.ANSWER),
        answer("a", block=1),
    ]


def test_the_role_is_told_once_and_first() -> None:
    assert Blocks().feed([Role(0, "tool"), ROLE, answer("a"), ROLE])[:2] == [
        Role(0, "tool"),
        BlockStarted(0, 0, Channel.ANSWER),
    ]


def test_a_call_closes_the_text_and_stays_open_under_the_next() -> None:
    started, ready = ToolStarted(0, "c", 0, "f"), ToolReady(0, "c", "f", "{}")
    arguments, ended = ToolArguments(0, "c", "{}"), ToolEnded(0, "c", "{}", True, None, "complete")
    events = Blocks().feed([answer("a"), started, answer("b"), arguments, ready, ended, answer("c")])
    kinds = [type(event).__name__ for event in events]
    assert kinds == [
        "Role",
        "BlockStarted",
        "Text",
        "BlockEnded",
        "ToolStarted",
        "BlockStarted",
        "Text",
        "ToolArguments",
        "ToolReady",
        "ToolEnded",
        "Text",
    ]
    assert started.block == arguments.block == ready.block == ended.block == 1
    assert events[-1] == answer("c", block=2)


def test_a_call_that_opens_the_answer_has_the_role_before_it() -> None:
    assert Blocks().feed([ToolStarted(0, "c", 0, "f")])[0] == ROLE


def test_a_finish_closes_the_block_and_is_told_once() -> None:
    blocks = Blocks()
    finished = Finished(0, "length", reason="length")
    events = blocks.feed([answer("a"), finished, Finished(0, "stop", reason="stop"), ROLE])
    assert events[-2:] == [BlockEnded(0, 0, Channel.ANSWER, 1, 0, "incomplete"), finished]
    assert blocks.is_finished(0)
    assert not blocks.is_finished(1)
    assert blocks.finish_reasons == ["length"]


def test_reasons_are_told_by_choice_not_by_time() -> None:
    blocks = Blocks()
    blocks.feed([Finished(1, "stop", reason="stop"), Finished(0, "length", reason="length")])
    assert blocks.finish_reasons == ["length", "stop"]


def test_choices_are_numbered_apart() -> None:
    events = Blocks().feed([answer("a"), Text(1, Channel.ANSWER, "b"), thought("c")])
    assert [(e.choice, e.block) for e in events if isinstance(e, BlockStarted)] == [(0, 0), (1, 0), (0, 1)]


def test_breaking_off_closes_what_is_open_as_incomplete() -> None:
    blocks = Blocks()
    blocks.feed([answer("a"), Text(1, Channel.REASONING, "b"), Finished(1, "stop", reason="stop")])
    assert blocks.break_off() == [BlockEnded(0, 0, Channel.ANSWER, 1, 0, "incomplete")]
    assert blocks.break_off() == []


def test_what_belongs_to_no_choice_passes() -> None:
    items: list[Event] = [Warned("x", "y")]
    assert Blocks().feed(items) == items
