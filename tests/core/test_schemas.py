"""JSON Schemas from outside, on values from outside: what is said, and what never happens."""

import socket
from time import perf_counter
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.schemas import Schema, SchemaError, schema_of
from support.strategies import json_values, thorough

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 7}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"city": "Rome"}, None),
        ({"city": "Rome", "days": 8}, "at $.days: it breaks maximum: 7"),
        ({"city": 5}, 'at $.city: it breaks type: "string"'),
        ({}, 'at $: a required property is missing, required: ["city"]'),
        ({"city": "Rome", "x": 1}, "at $: a property is not known, additionalProperties: false"),
        ([], 'at $: it breaks type: "object"'),
    ],
)
def test_what_is_said(value: Any, problem: str | None) -> None:
    assert Schema(CITY).problem(value) == problem


def test_the_value_is_never_quoted() -> None:
    schema = Schema({"additionalProperties": {"type": "integer"}})
    assert schema.problem({"secret": "hidden"}) == 'at $.*: it breaks type: "integer"'
    assert Schema({"items": {"const": 1}}).problem([1, "hidden"]) == "at $[1]: it breaks const: 1"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"type": "any"}, "at $.type: 'any' is not valid"),
        ({"properties": {"a": {"required": True}}}, "at $.properties.a.required: True is not of type 'array'"),
        ({"properties": 5}, "at $.properties"),
        ({"pattern": "("}, "at $.pattern"),
    ],
)
def test_what_is_no_schema(raw: Any, message: str) -> None:
    with pytest.raises(SchemaError) as error:
        schema_of(raw)
    assert str(error.value).startswith(message)


def test_a_schema_nested_too_deeply_is_no_schema() -> None:
    raw: Any = {}
    for _ in range(2000):
        raw = {"not": raw}
    with pytest.raises(SchemaError):
        schema_of(raw)


def test_equal_schemas_are_made_once() -> None:
    assert schema_of(dict(CITY)) is schema_of(dict(CITY))
    large = {"description": "x" * 40_000}
    assert schema_of(large) is not schema_of(large)


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> Any:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    problem = schema_of({"$ref": "http://127.0.0.1:9/schema.json"}).problem({})
    assert problem == "the schema refers to http://127.0.0.1:9/schema.json, which is not in it"
    assert schema_of({"$ref": "#/$defs/none"}).problem({}) is not None


def test_a_pattern_that_takes_for_ever_is_cut_short() -> None:
    schema = Schema({"patternProperties": {"^(a|a)*$": {}}, "properties": {"x": {"pattern": "^(a|a|aa)*$"}}})
    started = perf_counter()
    assert "takes too long" in (schema.problem({"x": "a" * 60 + "!"}) or "")
    assert "takes too long" in (schema.problem({"a" * 60 + "!": 1}) or "")
    assert perf_counter() - started < 5


def test_a_schema_that_goes_in_circles_has_an_answer() -> None:
    assert Schema({"$ref": "#"}).problem({}) == "the value is nested too deeply for the schema"
    assert Schema({"properties": {"a": {"$ref": "#/properties/a"}}}).types_of("a") == ["string"]


def test_pattern_properties_still_judge() -> None:
    schema = Schema({"patternProperties": {"^n_": {"type": "integer"}}, "pattern": "^a"})
    assert schema.problem({"n_a": 1, "b": "x"}) is None
    assert schema.problem({"n_a": "x"}) == 'at $.*: it breaks type: "integer"'
    assert schema.problem("b") == 'at $: it breaks pattern: "^a"'


_KEYWORDS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string", "integer", "number", "null", ["string", "null"]]),
        "enum": st.lists(json_values, min_size=1, max_size=3),
        "minimum": st.integers(-5, 5),
        "maxLength": st.integers(0, 3),
        "pattern": st.sampled_from(["^a", "\\d", "x?"]),
        "required": st.lists(st.sampled_from(["a", "b"]), unique=True),
        "multipleOf": st.sampled_from([1, 0.1, 3]),
        "uniqueItems": st.booleans(),
    },
)
_SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    _KEYWORDS,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
            "items": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
            "additionalProperties": st.booleans() | inner,
        },
    ),
    max_leaves=5,
)
_VALUES = st.recursive(
    json_values,
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=5,
)


@thorough(150)
@given(_SCHEMAS, _VALUES)
def test_a_value_fits_exactly_where_the_library_says_so(raw: dict[str, Any], value: Any) -> None:
    try:
        fits = jsonschema.Draft202012Validator(raw).is_valid(value)
    except OverflowError:
        fits = False
    assert (Schema(raw).problem(value) is None) is fits
