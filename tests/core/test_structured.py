"""Final values: told once, whole and valid; a part is never claimed to be one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import chunks
from support.playbook import Outcome, ask, play
from support.strategies import pieces_of, thorough

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
SECTIONS = {"structured": {"sections": True}}


def said(pieces: list[str], reason: str = "stop", **request: Any) -> Outcome:
    return play(ask(**request), chunks.answer_of(pieces, reason))


def values(outcome: Outcome) -> list[Any]:
    return [event["value"] for event in outcome.all_of("structured")]


def problems(outcome: Outcome) -> list[str]:
    return [event["detail"] for event in outcome.all_of("warning") if event["code"] == "structured_invalid"]


@pytest.mark.parametrize(
    ("request_fields", "text", "value"),
    [
        ({"response_format": FORM}, '{"age": 5}\n', {"age": 5}),
        ({"response_format": {"type": "json_object"}}, "{}", {}),
        ({"structured_outputs": {"json": PERSON}}, '{"age": 5}', {"age": 5}),
        ({"structured_outputs": {"json": '{"type": "array"}'}}, "[1]", [1]),
        ({"structured_outputs": {"json_object": True}}, '{"a": 1}', {"a": 1}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "no"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123", "123"),
        ({"penstock": {"structured": {"schema": PERSON}}}, '{"age": 5}', {"age": 5}),
    ],
)
def test_what_was_asked_for_is_a_value(request_fields: Any, text: str, value: Any) -> None:
    for pieces in ([text], list(text)):
        outcome = said(pieces, **request_fields)
        assert values(outcome) == [value]
        assert outcome.types()[-6:] == ["delta.text", "text.end", "structured", "finish", "usage", "stream.end"]
        assert outcome.blocks() == [f"text: {text}"]


def test_the_name_of_the_schema_is_told() -> None:
    assert said(['{"age": 5}'], response_format=FORM).one("structured")["schema_name"] == "person"


@pytest.mark.parametrize(
    ("request_fields", "text", "problem"),
    [
        ({"response_format": FORM}, '{"age": "x"}', 'at $.age: it breaks type: "integer"'),
        ({"response_format": FORM}, '{"age": 5', "it is not JSON (at character 9)"),
        ({"response_format": {"type": "json_object"}}, "[]", "it is not a JSON object"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "maybe", "it is none of the choices"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "12", "it does not match the expression"),
        ({"structured_outputs": {"regex": "("}}, "12", "the expression cannot judge it (error)"),
    ],
)
def test_what_is_not_valid_is_no_value(request_fields: Any, text: str, problem: str) -> None:
    outcome = said([text], **request_fields)
    assert values(outcome) == []
    assert problems(outcome) == [f"choice 0 is no valid value: {problem}"]


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_value_that_was_cut_is_none_even_if_it_happens_to_be_whole(reason: str) -> None:
    outcome = said(["{}"], reason, response_format={"type": "json_object"})
    assert values(outcome) == []
    assert problems(outcome) == [f"choice 0 is no valid value: it ended with '{reason}' before it was whole"]


def test_an_answer_of_calls_has_no_value_to_miss() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    outcome = said([call], tools=["f"], response_format=FORM)
    assert (values(outcome), problems(outcome)) == ([], [])


def test_a_grammar_has_no_value() -> None:
    assert values(said(["x"], structured_outputs={"grammar": "root ::= x"})) == []


def test_the_reasoning_is_no_part_of_the_value() -> None:
    outcome = said(["<think>{</think>", '{"age": 1}'], response_format=FORM)
    assert values(outcome) == [{"age": 1}]


def test_the_value_without_its_text() -> None:
    outcome = said(['{"age"', ": 1}"], response_format=FORM, penstock={"structured": {"text": "hide"}})
    assert (values(outcome), outcome.blocks()) == ([{"age": 1}], [])
    assert outcome.usage()["bytes"]["marker"] == len('{"age": 1}')


TEXT = 'One. <<<JSON>>>{"a": 1}<<<END>>> Two.<<<JSON>>> [2] <<<END>>><<<JSON>>>{<<<END>>> <<END'


@thorough(150)
@given(st.data())
def test_sections_however_they_are_cut(data: st.DataObject) -> None:
    outcome = said(data.draw(pieces_of(TEXT)), penstock=SECTIONS)
    assert [(event["value"], event["section"]) for event in outcome.all_of("structured")] == [({"a": 1}, 0), ([2], 1)]
    assert problems(outcome) == ["section 2 of choice 0 is no valid value: it is not JSON (at character 1)"]
    assert outcome.blocks() == [
        "text: One. ",
        'text: {"a": 1}',
        "text:  Two.",
        "text:  [2] ",
        "text: {",
        "text:  <<END",
    ]


def test_sections_without_their_text() -> None:
    options = {"structured": {"sections": {"open": "<j>", "close": "</j>"}, "schema": PERSON, "text": "hide"}}
    outcome = said(["a<j>{", '"age": 1}</j>', "b"], penstock=options)
    assert (values(outcome), outcome.blocks()) == ([{"age": 1}], ["text: a", "text: b"])


def test_a_section_without_its_end() -> None:
    outcome = said(["<<<JSON>>>{}"], penstock=SECTIONS)
    assert (values(outcome), outcome.blocks()) == ([], ["text: {}"])
    assert problems(outcome) == ["section 0 of choice 0 is no valid value: its end mark is missing"]


@thorough(100)
@given(st.data(), st.text(st.sampled_from('<>JSONED{}"a1,: ')), st.booleans(), st.sampled_from(["stop", "length"]))
def test_whatever_is_written_nothing_is_lost(data: st.DataObject, text: str, shows: bool, reason: str) -> None:
    options = {"structured": {"sections": data.draw(st.booleans()), "text": "show" if shows else "hide"}}
    request = {"response_format": FORM, "penstock": options}
    whole, cut = (said(pieces, reason, **request) for pieces in ([text], data.draw(pieces_of(text))))
    assert (values(whole), problems(whole), whole.contents()) == (values(cut), problems(cut), cut.contents())
