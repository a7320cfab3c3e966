"""The two meters and the engine's own count."""

from typing import Any

import pytest

from penstock.core.accounting import Accounting, size_of
from penstock.core.events import Channel, EngineUsage, Event, Finished, Role, Text, ToolArguments, ToolDelta, Withheld


def test_generated_is_what_came_in_and_delivered_what_went_out() -> None:
    meters = Accounting()
    meters.generated(
        [Text(0, Channel.RAW, "é<x>", 2), ToolDelta(0, 0, "c", "f", "{}", 1), Finished(0, "stop", tokens=1)]
    )
    out = meters.feed([Text(0, Channel.ANSWER, "é", 2), Withheld(0, "marker", "<x>"), ToolArguments(0, "c", "{}", 1)])
    assert [type(event) for event in out] == [Text, ToolArguments]
    usage = meters.usage(final=True)
    assert usage.sizes["generated"] == usage.sizes["delivered"] + usage.sizes["marker"] == 7
    assert (usage.completion_tokens, usage.answer_tokens, usage.tool_tokens, usage.delivered_tokens) == (4, 2, 1, 3)


@pytest.mark.parametrize("kind", ["marker", "hidden", "stop", "moderation"])
def test_each_kind_of_withheld_text_has_its_count(kind: Any) -> None:
    meters = Accounting()
    assert meters.feed([Withheld(0, kind, "é", 3)]) == []
    assert meters.usage(final=True).sizes[kind] == 2
    assert meters.usage(final=True).reasoning_tokens == (3 if kind == "hidden" else 0)


def test_reasoning_is_counted_as_such_wherever_it_is_shown() -> None:
    meters = Accounting()
    meters.feed([Text(0, Channel.REASONING, "a", 1), Text(0, Channel.ANSWER, "b", 2, inlined=True)])
    meters.feed([Text(0, Channel.ANSWER, "<think>", added=True)])
    usage = meters.usage(final=True)
    assert (usage.reasoning_tokens, usage.answer_tokens) == (3, 0)
    assert usage.sizes["added"] == 7


def test_the_engine_s_total_settles_the_bill() -> None:
    meters = Accounting()
    meters.generated([Text(0, Channel.RAW, "a", 5)])
    running: dict[str, Any] = {"prompt_tokens": 9, "completion_tokens": 0}
    meters.feed([EngineUsage(running, final=False)])
    usage = meters.usage(final=False)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated, usage.engine_fields) == (9, 5, True, None)
    total = {**running, "completion_tokens": 8, "completion_tokens_details": {"reasoning_tokens": 6}}
    meters.feed([EngineUsage(total, final=True)])
    usage = meters.usage(final=True, wanted_tokens=meters.generated_tokens)
    assert (usage.completion_tokens, usage.reasoning_tokens, usage.wasted_tokens_after_cancel) == (8, 6, 3)
    assert usage.engine_fields == total
    assert not usage.estimated


def test_what_was_generated_after_nobody_wanted_it_is_waste() -> None:
    meters = Accounting()
    meters.generated([Text(0, Channel.RAW, "a", 5)])
    wanted = meters.generated_tokens
    meters.generated([Text(0, Channel.RAW, "b", 3)])
    assert meters.usage(final=True, wanted_tokens=wanted).wasted_tokens_after_cancel == 3
    assert meters.usage(final=True).wasted_tokens_after_cancel == 0


def test_a_total_that_is_too_small_does_not_take_back_what_was_heard() -> None:
    meters = Accounting()
    meters.generated([Text(0, Channel.RAW, "a", 5)])
    meters.feed([EngineUsage({"completion_tokens": 2}, final=True)])
    assert meters.usage(final=True).completion_tokens == 5


def test_tokens_of_a_choice_so_far() -> None:
    meters = Accounting()
    meters.generated([Text(0, Channel.RAW, "a", 2), Text(1, Channel.RAW, "b", 3), Text(0, Channel.RAW, "c", 1)])
    meters.feed([EngineUsage({"prompt_tokens": 9}, final=False)])
    assert meters.tokens_of(0) == (9, 3)
    assert meters.tokens_of(1) == (9, 3)
    assert meters.tokens_of(2) == (9, 0)
    assert meters.generated_tokens == 6
    assert meters.generated_bytes == 3


def test_the_size_of_what_was_never_sent() -> None:
    items: list[Event] = [
        Text(0, Channel.ANSWER, "é"),
        Text(0, Channel.ANSWER, "</think>", added=True),
        ToolArguments(0, "c", "{}"),
        Withheld(0, "marker", "<x>"),
        Role(0, "assistant"),
    ]
    assert size_of(items) == 7
