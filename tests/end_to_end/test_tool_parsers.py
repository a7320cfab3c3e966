"""The same call through vLLM's own parser and through Penstock's gives equal arguments, for each family."""

import json
from typing import Any

import pytest

from support import chunks
from support.playbook import Json, ask, play
from support.vllm_tool_parsers import Call, Case, vllm_calls

pytestmark = pytest.mark.engine

TOOL: Json = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "share": {"type": "number"},
                "exact": {"type": "boolean"},
                "list": {"type": "array"},
                "thing": {"type": "object"},
                "maybe": {"type": ["string", "null"]},
                "any": {},
            },
        },
    },
}
ARGUMENTS: list[Json] = [
    {},
    {"text": ""},
    {"text": 'a "quoted" {brace} \\ and \n a line, é 👩‍💻 漢字'},
    {"text": "5", "count": 5, "share": 0.5, "exact": True},
    {"count": -(10**12), "share": -1.5, "exact": False},
    {"list": [1, "a", [None, {}], {"b": [True]}], "thing": {"a": {"b": {"c": "}"}}}},
    {"maybe": None, "text": "null"},
    {"maybe": "x", "any": "plain"},
    {"text": "<b>not a tag</b> & [1] ]}"},
    {"text": "x" * 20_000, "list": list(range(500))},
]


def hermes(arguments: Json) -> str:
    return f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def llama(arguments: Json) -> str:
    return json.dumps({"name": "f", "parameters": arguments})


def mistral(arguments: Json) -> str:
    return f"[TOOL_CALLS]f{json.dumps(arguments, ensure_ascii=False)}"


def mistral_list(arguments: Json) -> str:
    return f"[TOOL_CALLS] [{json.dumps({'name': 'f', 'arguments': arguments})}]"


def deepseek_v3(arguments: Json) -> str:
    body = f"function<｜tool▁sep｜>f\n```json\n{json.dumps(arguments)}\n```"
    return f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def deepseek_v31(arguments: Json) -> str:
    body = f"f<｜tool▁sep｜>{json.dumps(arguments)}"
    return f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def qwen_xml(arguments: Json) -> str:
    parameters = "".join(f"<parameter={name}>\n{plain(value)}\n</parameter>\n" for name, value in arguments.items())
    return f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"


def dsml(arguments: Json) -> str:
    parameters = "".join(
        f'<｜DSML｜parameter name="{name}" string="{str(isinstance(value, str)).lower()}">{plain(value)}'
        "</｜DSML｜parameter>\n"
        for name, value in arguments.items()
    )
    call = f'<｜DSML｜invoke name="f">\n{parameters}</｜DSML｜invoke>'
    return f"<｜DSML｜function_calls>\n{call}\n</｜DSML｜function_calls>"


def harmony(arguments: Json) -> str:
    """As gpt-oss's template shows it to the model: the recipient in the channel's header."""
    thought = "<|channel|>analysis<|message|>Need f.<|end|>"
    header = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
    return f"{thought}{header}<|message|>{json.dumps(arguments, ensure_ascii=False)}<|call|>"


def harmony_by_role(arguments: Json) -> str:
    """The other order that the format allows: the recipient behind the role."""
    header = "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json"
    said = "<|channel|>commentary<|message|>I will call f.<|end|>"
    return f"{said}{header}<|message|>{json.dumps(arguments, ensure_ascii=False)}<|call|>"


FAMILIES = [
    ("hermes", "qwen3", hermes),
    ("qwen3_coder", "qwen3-coder", qwen_xml),
    ("llama3_json", "llama", llama),
    ("mistral", "mistral", mistral),
    ("mistral", "mistral", mistral_list),
    ("deepseek_v3", "deepseek", deepseek_v3),
    ("deepseek_v31", "deepseek", deepseek_v31),
    ("deepseek_v32", "deepseek", dsml),
    ("openai", "harmony", harmony),
    ("openai", "harmony", harmony_by_role),
]


def penstock_calls(family: str, text: str) -> list[Call]:
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    outcome = play({**ask(), "tools": [TOOL]}, chunks.answer_of(pieces), family=family)
    return [(event["name"], event["arguments"]) for event in outcome.all_of("tool_call.ready")]


def test_equal_arguments_for_each_family() -> None:
    asked = [(parser, family, write(arguments)) for parser, family, write in FAMILIES for arguments in ARGUMENTS]
    theirs = vllm_calls([Case(parser, text, [TOOL]) for parser, _, text in asked])
    for (parser, family, text), calls in zip(asked, theirs, strict=True):
        assert len(calls) == 1, (parser, text[:200])
        assert penstock_calls(family, text) == calls, (parser, text[:200])
