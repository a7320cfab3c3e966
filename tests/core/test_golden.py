"""The event logs of all recordings are what is checked in. `support.golden` says how to write them anew."""

import json
from pathlib import Path

import jsonschema
import pytest

from penstock.core.commands import Close, OpenClient, RecordUsage, Respond
from penstock.core.verifier import FIELDS, parse_log, verify
from support import golden
from support.golden import GOLDEN, RECORDINGS, REFUSED, Case, all_cases, carry_out, make_log, read_recordings

CASES = all_cases()
SCHEMA = json.loads((Path(golden.__file__).parents[2] / "proxy/penstock/core/schema-1.0.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_log_is_byte_for_byte_the_golden_one(case: Case) -> None:
    assert make_log(case).decode() == case.path.read_text("utf-8")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.ndjson")), ids=lambda path: path.stem)
def test_the_golden_log_keeps_every_promise(path: Path) -> None:
    events = parse_log(path.read_bytes())
    assert verify(events) == []
    for event in events:
        VALIDATOR.validate(event)
        assert event["type"] in FIELDS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_stream_ends_once(case: Case) -> None:
    commands = carry_out(case)
    for kind in (OpenClient, RecordUsage, Close):
        assert sum(isinstance(command, kind) for command in commands) == 1, kind
    assert isinstance(commands[-1], Close) or not any(isinstance(c, Close) for c in commands[:-2])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_request_refused_before_its_first_token_is_answered_with_a_status(name: str) -> None:
    commands = carry_out(Case(read_recordings()[name], {}))
    answers = [command for command in commands if isinstance(command, OpenClient | Respond)]
    assert [type(answer) for answer in answers] == [Respond]
    assert isinstance(answers[0], Respond)
    assert 400 <= answers[0].status < 500
    assert json.loads(answers[0].body)["error"]["message"]


def test_no_golden_log_is_without_its_recording() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {case.path.name for case in CASES}
    assert {path.stem for path in RECORDINGS.glob("*.jsonl")} == REFUSED | {case.recording.name for case in CASES}


def test_the_corpus_has_every_event_but_the_rare() -> None:
    """Warnings need an engine that misbehaves, the others a deployment with rules or tools: recordings have neither."""
    told = {event["type"] for case in CASES for event in parse_log(make_log(case))}
    rare = {"warning", "moderation", "annotation", "tool_call.denied", "tool_call.progress", "tool_call.result"}
    assert set(FIELDS) - told == rare


def test_the_client_asked_what_the_recording_says_the_engine_was_asked() -> None:
    """All but the usage with every chunk, which Penstock asks for by itself."""
    for case in CASES:
        sent = json.loads(golden.client_request(case).engine_body)
        asked = dict(case.recording.request)
        for request in (sent, asked):
            request.pop("stream_options", None)
        assert sent == asked, case.name


def test_the_command_tells_of_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "GOLDEN", tmp_path)
    monkeypatch.setattr(golden, "all_cases", lambda: CASES[:1])
    (tmp_path / "old.ndjson").write_bytes(b"{}\n")
    path = tmp_path / f"{CASES[0].name}.ndjson"
    assert golden.main([]) == 1
    assert capsys.readouterr().out == f"{path.name}: differs\nold.ndjson: no longer a case\n"
    assert golden.main(["--write"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert golden.main([]) == 0
    assert golden.main(["--help"]) == 2
