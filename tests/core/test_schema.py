"""The published schema, the code that writes events, the verifier and the reference say the same."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from penstock.core.dialects import NO_EXT, Ext
from penstock.core.dialects.native import SCHEMA_VERSION, NativeNdjson
from penstock.core.events import (
    Annotation,
    BlockEnded,
    BlockStarted,
    Channel,
    ClientEvent,
    Failed,
    Finished,
    Moderated,
    Role,
    StreamEnded,
    StreamStarted,
    Structured,
    Text,
    ToolArguments,
    ToolDenied,
    ToolEnded,
    ToolProgress,
    ToolReady,
    ToolResult,
    ToolStarted,
    Usage,
    Warned,
)
from penstock.core.verifier import CLOSED_SETS, ENVELOPE, FIELDS, parse_log, verify

SCHEMA: dict[str, Any] = json.loads(
    importlib.resources.files("penstock.core").joinpath(f"schema-{SCHEMA_VERSION}.json").read_text("utf-8")
)
DEFINITIONS: dict[str, Any] = SCHEMA["$defs"]
TYPES = [reference["$ref"].rpartition("/")[2] for reference in SCHEMA["oneOf"] if "unknown" not in reference["$ref"]]
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "events.md"

SIZES = dict.fromkeys(("generated", "added", "delivered", "marker", "hidden", "stop", "moderation"), 0)
# Every event that a dialect has to spell, with every optional field and without any.
SPOKEN: list[ClientEvent] = [
    StreamStarted("tiny", 2, "vllm", "4bf92f3577b34da6a3ce929d0e0e4736", "chatcmpl-1", 5, continues="st_1"),
    StreamStarted("tiny", 1, "vllm", None),
    Role(0, "assistant"),
    BlockStarted(0, 0, Channel.REASONING),
    Text(0, Channel.REASONING, "Hm", logprobs=[{"token": "Hm"}], token_ids=[7], refusal=True),
    Text(0, Channel.REASONING, "Hm"),
    BlockEnded(0, 0, Channel.REASONING, 4, 2, "complete"),
    BlockStarted(0, 1, Channel.ANSWER),
    Text(0, Channel.ANSWER, "Hi", logprobs=[{"token": "Hi"}], token_ids=[8], refusal=True),
    Text(0, Channel.ANSWER, "😀"),
    BlockEnded(0, 1, Channel.ANSWER, 6, 2, "incomplete"),
    ToolStarted(0, "call_1", 0, "find", 2),
    ToolStarted(0, "call_1", 0, "find", 2, runs_here=True),
    ToolArguments(0, "call_1", "{}", 1, 2),
    ToolReady(0, "call_1", "find", "{}", 2),
    ToolEnded(0, "call_1", "{}", valid=True, problem=None, status="complete", block=2),
    ToolEnded(0, "call_2", "{", valid=False, problem="cut", status="incomplete", block=3),
    Moderated("redact", "codename", "custom", 0, back=10, length=10, block=1, offset=4),
    Moderated("halt", "codename", "custom", 0, back=0, length=0),
    ToolDenied(0, "call_2", "pay", "no-money", "not here", 3),
    ToolProgress(0, "call_1", "find", "retrying", 2, 2),
    ToolResult(0, "call_1", "find", ok=True, size=2, duration_ms=5, content="ok", block=2),
    ToolResult(0, "call_1", "find", ok=False, size=0, duration_ms=5, problem="gone", block=2),
    Structured(0, '{"a": [1]}', "thing", 0),
    Structured(0, "null"),
    Annotation("citation", {"marker": "[1]"}, 0, {"choice": 0, "block": 1, "offset": 2, "length": 0}),
    Annotation("status", {}),
    Usage(1, 1, 1, 1, 1, 1, 1, 0, estimated=True, sizes=SIZES, final=False),
    Usage(1, 1, 1, 1, 1, 1, 1, 0, estimated=False, sizes=SIZES, final=True, engine_fields={"total_tokens": 2}),
    Finished(0, "stop", "END", 1, [{"token": ""}], [9], "stop", "stop_string"),
    Finished(1, None, 151645, reason="cancelled", cause="abort"),
    Finished(2, None),
    Warned("missing_done", "the engine closed without its end mark"),
    Failed("engine_gone", "gone", retryable=True, origin="upstream", engine_body={"error": {}}),
    StreamEnded("failed", ["stop", "error"], 9, 30, 5),
    StreamEnded("cancelled", ["cancelled"], 9, 30, None),
]


def spell(event: ClientEvent, *, with_ext: bool) -> dict[str, Any]:
    ext = NO_EXT
    if with_ext:
        ext = Ext()
        ext.beside = {"system_fingerprint": "x"}
    decoded: dict[str, Any] = json.loads(NativeNdjson("st_1").render(event, 7, 1000, ext))
    return decoded


WRITTEN = [spell(event, with_ext=with_ext) for event in SPOKEN for with_ext in (False, True)]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == f"urn:penstock:schema:{SCHEMA_VERSION}"


def test_everything_that_can_be_spoken_is_tried() -> None:
    assert {type(event) for event in SPOKEN} == set(get_args(ClientEvent))


@pytest.mark.parametrize("event", WRITTEN, ids=lambda event: event["type"])
def test_what_the_code_writes_is_valid(event: dict[str, Any]) -> None:
    VALIDATOR.validate(event)


def test_the_schema_names_exactly_what_the_code_writes() -> None:
    """Both ways: no field is written that it does not name, and it names none that is never written."""
    assert {event["type"] for event in WRITTEN} == set(TYPES)
    for name in TYPES:
        written = [set(event) for event in WRITTEN if event["type"] == name]
        assert set.union(*written) == set(DEFINITIONS[name]["properties"]), name
        assert set.intersection(*written) == set(DEFINITIONS[name]["required"]), name
    sizes = DEFINITIONS["sizes"]
    assert set(SIZES) == set(sizes["properties"]) == set(sizes["required"])


def test_the_verifier_knows_the_same_fields() -> None:
    assert set(FIELDS) == set(TYPES)
    for name in TYPES:
        known = {**ENVELOPE, **FIELDS[name]}
        assert set(known) == set(DEFINITIONS[name]["properties"]), name
        required = {field for field, kind in known.items() if not kind.endswith("!")}
        assert required == set(DEFINITIONS[name]["required"]), name


def test_the_closed_sets_are_those_of_the_code() -> None:
    for name, words in CLOSED_SETS.items():
        assert DEFINITIONS[name.replace(" ", "_")]["enum"] == list(words)


def test_unknown_fields_and_types_are_allowed() -> None:
    VALIDATOR.validate(WRITTEN[0] | {"mood": "new"})
    VALIDATOR.validate({"type": "pause", "stream_id": "st_1", "seq": 3, "ts": 4, "action": "later"})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("finish", {"reason": "bored"}),
        ("stream.end", {"status": "fine"}),
        ("text.end", {"status": "open"}),
        ("delta.text", {"text": ""}),
        ("delta.text", {"seq": 0}),
        ("delta.text", {"block": True}),
        ("tool_call.start", {"call_id": ""}),
        ("tool_call.ready", {"arguments": []}),
        ("stream.start", {"schema": "2.0"}),
        ("usage", {"bytes": {}}),
        ("warning", {"type": 5}),
    ],
)
def test_what_is_wrong_is_refused_by_schema_and_verifier(name: str, change: dict[str, Any]) -> None:
    event = next(event for event in WRITTEN if event["type"] == name)
    VALIDATOR.validate(event)
    assert not VALIDATOR.is_valid(event | change)
    assert set(verify([event | change])) - set(verify([event]))


@pytest.mark.parametrize("name", TYPES)
def test_the_reference_names_every_type_and_field(name: str) -> None:
    text = REFERENCE.read_text("utf-8")
    words = [name, *FIELDS[name], *ENVELOPE, *SIZES]
    assert [word for word in words if f"`{word}`" not in text] == []


def test_the_reference_names_every_closed_word() -> None:
    text = REFERENCE.read_text("utf-8")
    assert [word for words in CLOSED_SETS.values() for word in words if f"`{word}`" not in text] == []


def test_the_example_of_the_reference_keeps_every_promise() -> None:
    example = re.search(r"```text\n(.*?)```", REFERENCE.read_text("utf-8"), re.DOTALL)
    assert example is not None
    events = parse_log(example[1].encode())
    assert verify(events) == []
    assert len(events) == 12
    for event in events:
        VALIDATOR.validate(event)
