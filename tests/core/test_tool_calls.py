"""Markup and deltas -> whole calls: how a call is written, cut and spoilt."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import (
    Channel,
    Event,
    Finished,
    Text,
    ToolArguments,
    ToolDelta,
    ToolEnded,
    ToolMarkup,
    ToolReady,
    ToolStarted,
    Warned,
    Withheld,
)
from penstock.core.schemas import Schema
from penstock.core.tool_calls import ToolCalls
from support.strategies import argument_objects, hermes_bodies, pieces_of, thorough

HEAD = '{"name": "f", "arguments": '


def tools(*offered: str) -> ToolCalls:
    return ToolCalls(dict.fromkeys(offered or ("f", "g")), lambda choice, index: f"call_{choice}_{index}")


def markup(*pieces: str, closed: bool = True, syntax: str = "hermes", name: str | None = None) -> list[Event]:
    """What the channel step says of one call in the text."""
    opened = ToolMarkup(0, syntax, "", phase="opened", name=name)
    return [
        opened,
        *(ToolMarkup(0, syntax, piece, tokens=1) for piece in pieces),
        ToolMarkup(0, syntax, "", phase="closed" if closed else "cut"),
    ]


def stop(reason: Any = "stop") -> Finished:
    return Finished(0, reason, reason=reason)


def read(*items: Event, step: ToolCalls | None = None) -> list[Event]:
    step = step or tools()
    return [event for item in items for event in step.feed([item])]


def ready(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.name, event.arguments) for event in events if isinstance(event, ToolReady)]


def ended(events: list[Event]) -> ToolEnded:
    (end,) = [event for event in events if isinstance(event, ToolEnded)]
    return end


def kinds(events: list[Event]) -> list[str]:
    names = [type(event).__name__ for event in events if not isinstance(event, Withheld)]
    return [name for n, name in enumerate(names) if n == 0 or name != names[n - 1]]


# --- Calls in the text ----------------------------------------------------------------------------


def test_a_call_starts_with_its_name_and_is_ready_at_its_end() -> None:
    events = read(*markup('{"name": "f", "argu', 'ments": {"a"', ": 1}", "}"))
    assert kinds(events) == ["ToolStarted", "ToolArguments", "ToolReady", "ToolEnded"]
    assert ready(events) == [("f", '{"a": 1}')]
    assert "".join(e.text for e in events if isinstance(e, Withheld)) == HEAD + "}"


def test_the_start_comes_before_the_arguments_are_whole() -> None:
    assert isinstance(read(*markup('{"name": "f", "arguments": {"a', closed=False))[0], ToolStarted)


def test_tokens_are_counted_once() -> None:
    events = read(*markup('{"name": "f"', ', "arguments": {"a": 1}', "}", "\n"))
    counted = [event.tokens for event in events if isinstance(event, ToolArguments | Withheld)]
    assert sum(counted) == 4


@pytest.mark.parametrize(
    "body",
    [
        '{"name":"f","arguments":{"a":1}}',
        '\n{"name": "f", "parameters": {"a":1}}\n',
        '{"arguments": {"a":1}, "name": "f"}',
        '{"id": "x", "name": "f", "arguments": {"a":1}}',
        '{"name": "f", "arguments": {"a":1}, "id": "x"}',
        '{ "name" : "\\u0066" , "arguments" : {"a":1} }',
        '{"name": "f", "id": [1, {"b": "}"}], "arguments": {"a":1}}',
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_order_of_keys(body: str, size: int) -> None:
    events = read(*markup(*(body[n : n + size] for n in range(0, len(body), size))))
    assert ready(events) == [("f", '{"a":1}')]


def test_a_call_without_arguments_in_another_order() -> None:
    assert ready(read(*markup('{"id": 1, "name": "f"}'))) == [("f", "{}")]


def test_arguments_of_several_lines_are_ready_on_one() -> None:
    assert ready(read(*markup('{"name": "f", "arguments": {\n"a": 1\r\n}}'))) == [("f", '{ "a": 1 }')]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("", "the call is not a JSON object with a name and arguments"),
        ("get_weather(Paris)", "the call is not a JSON object with a name and arguments"),
        ('["f", {}]', "the call is not a JSON object with a name and arguments"),
        ('{"arguments": {}}', "the call is not a JSON object with a name and arguments"),
        ('{"name": 5, "arguments": {}}', "the call is not a JSON object with a name and arguments"),
        ('{"id": 1, "name": "f", "arguments": [1]}', "the arguments are not a JSON object"),
        ('{"id": 1, "name": "f", "arguments": "{}"}', "the arguments are not a JSON object"),
        ('{"name": "f", "arguments": {"a": 1}', "the call is not one closed JSON object"),
        ('{"name": "f", "arguments": {"a": 1}} and more', "the call is not one closed JSON object"),
        ('{"name": "f", "arguments": {"a": 1}, "name": "g"}', "the call is not one closed JSON object"),
        ('{"name": "f", "arguments": {"a": 1}' + " " * 3000 + "}", "the call is not one closed JSON object"),
        ('{"name": "f", "arguments": {"a": 1', "the call is not one closed JSON object"),
        ('{"name": "f", "arguments": {a: 1}}', "the arguments are not JSON"),
        ('{"name": "h", "arguments": {}}', "the request offers no tool called 'h'"),
        ('{"name": "", "arguments": {}}', "the model named no tool"),
        ('{"name": "a\nb", "arguments": {}}', "the call is not a JSON object with a name and arguments"),
        ('{"arguments": ' + '{"a":' * 2000 + "1" + "}" * 2000 + ', "name": "f"}', "the call is not a JSON object"),
    ],
)
@pytest.mark.parametrize("size", [1, 10_000])
def test_what_is_wrong_with_a_call(body: str, problem: str, size: int) -> None:
    events = read(*markup(*(body[n : n + size] for n in range(0, len(body), size))))
    assert ready(events) == []
    assert (ended(events).problem or "").startswith(problem)
    assert not ended(events).valid


def test_a_name_of_any_length_is_read_the_same_however_it_is_cut() -> None:
    name = "f" * 3000
    body = f'{{"name": "{name}", "arguments": {{}}}}'
    for pieces in ([body], list(body)):
        assert ready(read(*markup(*pieces), step=tools(name))) == [(name, "{}")]


@thorough(500)
@given(st.data(), argument_objects)
def test_markup_and_arguments_are_all_of_the_text(data: st.DataObject, arguments: dict[str, Any]) -> None:
    body = data.draw(hermes_bodies("f", arguments))
    events = read(*markup(*data.draw(pieces_of(body))))
    told = sum(len(event.text) for event in events if isinstance(event, Withheld | ToolArguments))
    assert told == len(body)
    assert len(ready(events)) == 1


# --- Where a call in the text ends ----------------------------------------------------------------


def test_a_call_whose_end_mark_is_missing_is_ready_if_its_json_is_whole() -> None:
    events = read(*markup('{"name": "f", "arguments": {"a":1}}', closed=False), stop())
    assert ready(events) == [("f", '{"a":1}')]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "tool_calls"


def test_harmony_ends_its_call_with_a_token_that_engines_leave_out() -> None:
    events = read(*markup('{"a":', "1}", closed=False, syntax="arguments", name="f"), stop())
    assert ready(events) == [("f", '{"a":1}')]


def test_a_call_that_the_length_cut_is_not_ready() -> None:
    for pieces in (['{"name": "f", "arguments": {"a":1'], ['{"name"']):
        events = read(*markup(*pieces, closed=False), stop("length"))
        assert ready(events) == []
        assert ended(events).status == "incomplete"


def test_harmony_arguments_that_the_length_cut_before_they_began() -> None:
    events = read(*markup(closed=False, syntax="arguments", name="f"), stop("length"))
    assert ready(events) == []
    assert ended(events).problem == "the answer ended before the arguments"


def test_harmony_without_a_name() -> None:
    assert ended(read(*markup("{}", syntax="arguments"))).problem == "the model named no tool"


def test_a_whole_call_ends_where_text_begins() -> None:
    text = Text(0, Channel.ANSWER, "and")
    events = read(*markup('{"a": 1}', closed=False, syntax="arguments", name="f"), text)
    assert kinds(events) == ["ToolStarted", "ToolArguments", "ToolReady", "ToolEnded", "Text"]


def test_an_open_call_stays_open_under_text_until_the_finish() -> None:
    step = tools()
    events = read(*markup('{"a"', closed=False, syntax="arguments", name="f"), Text(0, Channel.ANSWER, "x"), step=step)
    assert kinds(events) == ["ToolStarted", "ToolArguments", "Text"]
    assert ended(read(stop(), step=step)).status == "complete"


# --- Deltas ---------------------------------------------------------------------------------------


def delta(arguments: str = "", index: int = 0, call_id: str | None = None, name: str | None = None) -> ToolDelta:
    return ToolDelta(0, index, call_id, name, arguments)


def test_a_call_that_never_has_a_name() -> None:
    assert ended(read(delta("{}"), stop())).problem == "the model named no tool"


def test_arguments_that_are_whole_before_their_name() -> None:
    assert kinds(read(delta("{}"), delta(name="f"), stop())) == [
        "ToolStarted",
        "ToolArguments",
        "ToolReady",
        "ToolEnded",
        "Finished",
    ]


def test_a_broken_off_call_without_a_name_was_never_told() -> None:
    step = tools()
    step.feed([delta('{"a"')])
    assert step.flush() == [Withheld(0, "marker", '{"a"')]


def test_a_broken_off_call_is_never_ready() -> None:
    step = tools()
    step.feed([delta("{}", name="f")])
    (end,) = step.flush()
    assert isinstance(end, ToolEnded)
    assert (end.valid, end.status) == (False, "incomplete")


def test_a_name_that_comes_late_ends_the_whole_call_before_it() -> None:
    events = read(delta("{}", 0, name="f"), delta("{", 1), delta(index=1, name="g"), delta("}", 1), stop())
    assert ready(events) == [("f", "{}"), ("g", "{}")]
    starts = [n for n, event in enumerate(events) if isinstance(event, ToolStarted)]
    assert isinstance(events[starts[1] - 1], ToolEnded)


def test_a_new_id_without_a_name_is_a_new_call_once_there_are_arguments() -> None:
    events = read(delta("{}", 0, "c1", "f"), delta("", 0, "c2"), delta("{}", 0, None, "g"), stop())
    assert ready(events) == [("f", "{}"), ("g", "{}")]


def test_arguments_that_come_too_late() -> None:
    step = tools()
    events = read(delta("{}", name="f"), Text(0, Channel.ANSWER, "x"), delta(" "), delta("{}"), step=step)
    assert [event.code for event in events if isinstance(event, Warned)] == ["late_arguments"]
    assert [event.text for event in events if isinstance(event, Withheld)] == [" ", "{}"]
    assert read(delta(), step=step) == []


def test_tokens_of_an_empty_delta_are_counted() -> None:
    events = read(ToolDelta(0, 0, "c", "f", "", tokens=2))
    assert [event.tokens for event in events if isinstance(event, Withheld)] == [2]


def test_other_choices_are_not_touched() -> None:
    step = tools()
    step.feed([delta("{}", name="f")])
    other: list[Event] = [Text(1, Channel.ANSWER, "x"), Finished(1, "stop", reason="stop")]
    assert step.feed(other) == other


def test_without_any_call_nothing_is_looked_at() -> None:
    items: list[Event] = [Text(0, Channel.ANSWER, "x")]
    assert tools().feed(items) is items


@pytest.mark.parametrize(("reason", "cause", "told"), [("stop", "eos", "tool_calls"), ("stop", "stop_string", "stop")])
def test_a_finish_after_valid_calls_is_for_the_calls(reason: Any, cause: str, told: str) -> None:
    finished = Finished(0, "stop", reason=reason, cause=cause)
    read(delta("{}", name="f"), finished)
    assert finished.reason == told


def test_a_finish_after_a_call_that_is_not_valid_stays_what_it_is() -> None:
    finished = Finished(0, "stop", reason="stop")
    read(delta("{", name="f"), finished)
    assert finished.reason == "stop"


# --- Engines that say things twice ----------------------------------------------------------------


def doubled(*items: ToolDelta) -> list[Event]:
    """Each delta twice; where the engine counts, the second adds no tokens."""
    return [one for item in items for one in (item, replace(item, tokens=0))]


def warnings(events: list[Event]) -> list[str]:
    return [event.code for event in events if isinstance(event, Warned)]


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("pieces", [['{"a":', " 1}"], list('{"a": "000", "b": [[1, 1]]}'), ["{}"]])
def test_each_chunk_sent_twice_counts_once(tokens: int, pieces: list[str]) -> None:
    head = ToolDelta(0, 0, "c", "f", "", tokens)
    rest = [ToolDelta(0, 0, None, None, piece, tokens) for piece in pieces]
    events = read(*doubled(head, *rest), stop())
    assert ready(events) == [("f", "".join(pieces))]
    assert warnings(events) == ["doubled_delta"]
    assert "".join(event.text for event in events if isinstance(event, Withheld)) == "".join(pieces)


@pytest.mark.parametrize("call_id", ["c", None])
def test_a_whole_call_in_one_chunk_sent_twice(call_id: str | None) -> None:
    events = read(*doubled(ToolDelta(0, 0, call_id, "f", '{"a": 1}'), ToolDelta(0, 1, None, "g", "{}")), stop())
    assert ready(events) == [("f", '{"a": 1}'), ("g", "{}")]


def test_the_whole_of_the_arguments_again_at_the_end_of_the_stream() -> None:
    """vLLM's flush of what a parser has not streamed repeats what it has (vllm-project/vllm, xlam parser)."""
    events = read(delta('{"a": ', name="f"), delta("1}"), delta('{"a": 1}'), stop())
    assert ready(events) == [("f", '{"a": 1}')]
    assert warnings(events) == ["doubled_delta"]


def test_a_final_chunk_that_repeats_id_and_name() -> None:
    events = read(delta('{"a": ', 0, "c", "f"), delta("1}", 0, "c", "f"), stop("tool_calls"))
    assert ready(events) == [("f", '{"a": 1}')]
    assert warnings(events) == []


@pytest.mark.parametrize("tail", ["}", '{"a"', "x", '{"a": 2}'])
@pytest.mark.parametrize("after", [stop(), Text(0, Channel.ANSWER, "x")])
def test_anything_else_behind_the_last_brace_is_theirs(tail: str, after: Event) -> None:
    events = read(delta('{"a": 1}', name="f"), delta(tail), after, stop())
    assert ready(events) == []
    assert ended(events).arguments == '{"a": 1}' + tail


def test_equal_pieces_that_are_counted_are_not_doubled() -> None:
    pieces = ['{"a": ', "0", "1", "1", "1", "1", "}"]
    events = read(delta(call_id="c", name="f"), *(ToolDelta(0, 0, None, None, piece, 1) for piece in pieces), stop())
    assert ended(events).arguments == '{"a": 01111}'
    assert warnings(events) == []


def test_space_behind_the_last_brace_is_no_loss() -> None:
    events = read(delta('{"a": 1}', name="f"), delta("\n"), delta(" "), stop())
    assert ready(events) == [("f", '{"a": 1}')]
    assert ended(events).arguments == '{"a": 1}\n '


# --- The schema of the request --------------------------------------------------------------------

DAYS = Schema({"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ('{"days": 2}', None),
        ('{"days": "2"}', "the arguments do not fit the schema of 'f': at $.days: it breaks type: \"integer\""),
        ("", "the arguments do not fit the schema of 'f': at $: a required property is missing, required: [\"days\"]"),
    ],
)
def test_what_does_not_fit_is_never_ready(arguments: str, problem: str | None) -> None:
    step = ToolCalls({"f": DAYS}, lambda choice, index: f"call_{choice}_{index}")
    events = read(delta(arguments, name="f"), stop("tool_calls"), step=step)
    assert ended(events).problem == problem
    assert len(ready(events)) == (problem is None)


@thorough(400)
@given(st.data(), st.one_of(argument_objects.map(json.dumps), st.text(max_size=40), st.binary(max_size=40).map(repr)))
def test_whatever_the_arguments_are_nothing_invalid_is_ready(data: st.DataObject, arguments: str) -> None:
    step = ToolCalls({"f": DAYS}, lambda choice, index: f"call_{choice}_{index}")
    pieces = data.draw(pieces_of(arguments))
    events = read(delta(name="f", call_id="c"), *map(delta, pieces), stop(), step=step)
    for _, text in ready(events):
        assert DAYS.problem(json.loads(text)) is None
    assert len([event for event in events if isinstance(event, ToolEnded)]) == 1
