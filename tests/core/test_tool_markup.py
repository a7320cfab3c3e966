"""What the models of each family write for a call, in every cut, and what it comes to."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support import chunks
from support.playbook import Json, Outcome, ask, play

CITY: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
    "required": ["city"],
}
F: Json = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WEATHER: Json = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
PARIS, ROME = {"city": 'Paris {"}é'}, {"city": "Rome", "days": 2, "exact": True}
RAW_PARIS, RAW_ROME = json.dumps(PARIS, ensure_ascii=False), json.dumps(ROME)
Calls = list[tuple[str, Json]]
BOTH: Calls = [("get_weather", PARIS), ("get_weather", ROME)]
XML = (
    "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "<parameter=exact>true</parameter>\n</function>"
)
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="exact" string="false">true</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)

# family, what the model writes, the calls, what is left as answer
VECTORS: list[tuple[str, str, Calls, str]] = [
    ("qwen3", f'<tool_call>{{"name": "get_weather", "arguments": {RAW_PARIS}}}</tool_call>', BOTH[:1], ""),
    ("qwen3-coder", f"<tool_call>\n{XML}\n</tool_call>", BOTH[1:], ""),
    ("qwen3-coder", f"Wait.\n{XML}\n</tool_call>\n<tool_call>\n{XML}\n</tool_call>", [BOTH[1]] * 2, "Wait.\n"),
    ("qwen3", f"<tool_call>{XML}{XML}</tool_call>", [BOTH[1]] * 2, ""),
    ("llama", f'{{"name": "get_weather", "parameters": {RAW_PARIS}}}', BOTH[:1], ""),
    (
        "llama",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {RAW_PARIS}}}; '
        f'{{"name": "get_weather", "parameters": {RAW_ROME}}}',
        BOTH,
        "",
    ),
    ("llama", f'{{"name": "get_weather", "parameters": {RAW_ROME}, "id": 1}} Done.', BOTH[1:], "Done."),
    ("llama", '{"name": "Alice", "age": 5} is all', [], '{"name": "Alice", "age": 5} is all'),
    ("llama", '{"age": 5}', [], '{"age": 5}'),
    ("llama", '<|python_tag|>print("{")', [], 'print("{")'),
    ("llama", '{"name": "get_weather", "para', [], '{"name": "get_weather", "para'),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {RAW_PARIS}, "id": "abcdefghi"}}, '
                f'{{"arguments": {RAW_ROME}, "name": "get_weather"}}]', BOTH, ""),
    ("mistral", f"[TOOL_CALLS]get_weather{RAW_PARIS}[TOOL_CALLS]get_weather[ARGS]{RAW_ROME}", BOTH, ""),
    ("mistral", f"Hi[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{RAW_ROME}", BOTH[1:], "Hi"),
    ("mistral", "[TOOL_CALLS] []", [], ""),
    (
        "deepseek",
        "Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{RAW_PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{RAW_ROME}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        BOTH,
        "Ok.",
    ),
    (
        "deepseek",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{RAW_PARIS}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{RAW_ROME}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        BOTH,
        "",
    ),
    ("deepseek", f"So:\n{DSML}", BOTH[1:], "So:\n"),
    (
        "harmony",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{RAW_PARIS}<|call|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
        f"{RAW_ROME}<|call|>",
        BOTH,
        "",
    ),
]  # fmt: skip


def said(pieces: list[str], family: str, tools: list[Json] | None = None) -> Outcome:
    body = {**ask(), "tools": tools or [WEATHER, F]}
    return play(body, chunks.answer_of(pieces), family=family)


def cuts_of(text: str) -> list[list[str]]:
    """The whole, every cut in two, and pieces of one, two, three and seven characters."""
    two = [[text[:at], text[at:]] for at in range(1, len(text))]
    edges = [[0, *range(size, len(text), size), len(text)] for size in (1, 2, 3, 7)]
    return [[text], *two, *([text[start:end] for start, end in pairwise(edge)] for edge in edges)]


def summary(outcome: Outcome) -> Any:
    calls = [(event["name"], event["arguments"]) for event in outcome.all_of("tool_call.ready")]
    ends = [(event["valid"], event.get("problem"), event["arguments"]) for event in outcome.all_of("tool_call.end")]
    return calls, ends, "".join(event["text"] for event in outcome.all_of("delta.text")), outcome.usage()["bytes"]


@pytest.mark.parametrize(("family", "text", "calls", "answer"), VECTORS, ids=range(len(VECTORS)))
def test_a_call_of_each_family_in_every_cut(family: str, text: str, calls: Calls, answer: str) -> None:
    whole = summary(said([text], family))
    assert (whole[0], whole[2]) == (calls, answer)
    assert all(valid for valid, _, _ in whole[1])
    for pieces in cuts_of(text):
        assert summary(said(pieces, family)) == whole


@pytest.mark.parametrize(("family", "text", "calls", "answer"), VECTORS, ids=range(len(VECTORS)))
def test_a_call_that_breaks_off_is_never_ready_before_its_end(
    family: str, text: str, calls: Calls, answer: str
) -> None:
    for end in range(len(text)):
        outcome = play({**ask(), "tools": [WEATHER]}, chunks.answer_of([text[:end]], "length"), family=family)
        ready = [(event["name"], event["arguments"]) for event in outcome.all_of("tool_call.ready")]
        assert ready == calls[: len(ready)]


@pytest.mark.parametrize(
    ("family", "text", "problem"),
    [
        ("qwen3", "<tool_call><function=f><parameter=a>1</tool_call>", "the call's markup is not closed"),
        ("qwen3", "<tool_call><f></f></tool_call>", "the call is not written as <function=…>…</function>"),
        ("qwen3", "<tool_call>[]</tool_call>", "the call is not a JSON object with a name and arguments"),
        ("mistral", '[TOOL_CALLS]f{"a": 1', "the call is not one closed JSON object"),
        ("mistral", "[TOOL_CALLS]nothing of the kind", "the call is not a JSON object with a name and arguments"),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1} "x"}]', "the call is not one closed JSON object"),
        ("deepseek", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{} x", "the call is not one closed JSON object"),
        ("qwen3", "<tool_call><function=g></function></tool_call>", "the request offers no tool called 'g'"),
        ("qwen3", "<tool_call><function=></function></tool_call>", "the model named no tool"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call(family: str, text: str, problem: str) -> None:
    for pieces in ([text], list(text)):
        outcome = said(pieces, family)
        assert outcome.all_of("tool_call.ready") == []
        assert [event["problem"] for event in outcome.all_of("tool_call.end")] == [problem]


def typed(value: str, schema: Any, syntax: str = "qwen3") -> Any:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    text = f"<tool_call><function=f><parameter=a>{value}</parameter></function></tool_call>"
    if syntax == "deepseek":
        parameter = f'<｜DSML｜parameter name="a" string="false">{value}</｜DSML｜parameter>'
        text = f'<｜DSML｜tool_calls><｜DSML｜invoke name="f">{parameter}</｜DSML｜invoke></｜DSML｜tool_calls>'
    end = said([text], syntax, [tool]).one("tool_call.end")
    return json.loads(end["arguments"])["a"]


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "string"}, "5"),
        ("5", {}, "5"),
        ("5", None, "5"),
        ("5", {"type": ["string", "integer"]}, 5),
        ("5.0", {"type": "number"}, 5),
        ("5.5", {"type": "number"}, 5.5),
        ("inf", {"type": "number"}, "inf"),
        ("TRUE", {"type": "boolean"}, True),
        ("0", {"type": "boolean"}, False),
        ("maybe", {"type": "boolean"}, "maybe"),
        ("null", {"type": ["null", "string"]}, None),
        ("x", {"type": "null"}, "x"),
        ("x", {"type": "integer"}, "x"),
        ("[1, {}]", {"type": "array"}, [1, {}]),
        ("[1e999]", {"type": "array"}, "[1e999]"),
        ("NaN", {"type": "object"}, "NaN"),
        ('{"a": 1}', {"anyOf": [{"type": "object"}, {"type": "null"}]}, {"a": 1}),
        ('{"a": 1}', {"$ref": "#/$defs/thing"}, {"a": 1}),
        ("2", {"enum": [1, 2]}, 2),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("[" * 3000, {"type": "array"}, "[" * 3000),
        ("\n\n two lines\n", {"type": "string"}, "\n two lines"),
    ],
)
def test_a_value_in_xml_takes_the_type_that_the_schema_says(value: str, schema: Any, expected: Any) -> None:
    properties = {} if schema is None else {"a": schema}
    assert typed(value, {"properties": properties, "$defs": {"thing": {"type": "object"}}}) == expected


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "string"}, "5"),
        ("5", None, 5),
        ('"5"', {"type": "integer"}, 5),
        ("five", None, "five"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
    ],
)
def test_a_value_that_deepseek_says_is_no_string(value: str, schema: Any, expected: Any) -> None:
    assert typed(value, {"properties": {} if schema is None else {"a": schema}}, "deepseek") == expected


def test_json_made_of_xml_is_counted_as_added() -> None:
    sizes = said([f"<tool_call>{XML}</tool_call>"], "qwen3").usage()["bytes"]
    assert sizes["generated"] == sizes["marker"] == len(f"<tool_call>{XML}</tool_call>")
    assert sizes["added"] == sizes["delivered"] == len(RAW_ROME)


@pytest.mark.parametrize("piece", [1, 4096, 1 << 19])
def test_arguments_of_a_megabyte(piece: int) -> None:
    size = 20_000 if piece == 1 else 1 << 20
    text = f"<tool_call><function=f><parameter=a>{'>' * size}</parameter></function></tool_call>"
    outcome = said([text[at : at + piece] for at in range(0, len(text), piece)], "qwen3")
    assert outcome.one("tool_call.ready")["arguments"] == {"a": ">" * size}


# --- Calls that the engine has read itself, as it says them -----------------------------------------

OPENAI = (Path(__file__).parent.parent / "vectors" / "openai" / "tool_calls.sse").read_bytes()
LOCATION: Json = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}


def test_openais_own_stream_however_it_is_cut() -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": LOCATION}}
    body = {**ask(), "tools": [tool]}
    first_calls = OPENAI.index(b"Paris") + 400  # the whole of it is some seconds long; what follows is alike
    cuts = [[position] for position in range(OPENAI.index(b"tool_calls"), first_calls, 8)]
    for cut in [*cuts, *(list(range(size, len(OPENAI), size)) for size in (1, 2, 3, 64))]:
        outcome = play(body, [OPENAI], cuts=cut)
        calls = [(event["call_id"], event["arguments"]) for event in outcome.all_of("tool_call.ready")]
        assert calls == [
            ("call_DdmO9pD3xa9XTPNJ32zg2hcA", {"location": "Paris, France"}),
            ("call_62136354", {"location": "Bogotá, Colombia"}),
        ]
        assert outcome.finishes()[0]["reason"] == "tool_calls"
