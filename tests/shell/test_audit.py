"""The audit: an entry for every intervention, found by stream and by trace, with no text unless it is asked for."""

import json
import os
import secrets
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.moderation_settings import AuditFile
from penstock.settings import SettingsError
from penstock.shell.audit import purge
from penstock.shell.replay import serving
from support import chunks
from support.otlp_receiver import SERVER, receiving
from support.sockets import until
from support.upstreams import engine_app, in_front_of, saying

RULES = [{"id": "codename", "literal": "Project Zephyr", "category": "internal"}]
ANSWER = saying(*chunks.answer_of(list("It is Project Zephyr 7.")))
KEY = "a key of the audit's digests"


async def audited(
    tmp_path: Path,
    *,
    asks: int = 1,
    request: Any = None,
    answer: Any = ANSWER,
    rules: Any = RULES,
    classifiers: Any = (),
    **audit: Any,
) -> Any:
    """The entries of so many streams, and the last stream."""
    path = tmp_path / "audit.jsonl"
    engine, _ = engine_app(answer)
    settings = {"file": {"path": str(path)}, "key": KEY, **audit}
    moderation = {"rules": rules, "classifiers": list(classifiers)}
    async with in_front_of(engine, moderation=moderation, audit=settings) as setup:
        for _ in range(asks):
            stream = await setup.caller.stream(**(request or {}))
    return [json.loads(line) for line in path.read_text().splitlines()], stream


async def test_every_intervention_has_an_entry_without_text(tmp_path: Path) -> None:
    [done, ended], stream = await audited(tmp_path)
    assert (done["kind"], done["rule"], done["action"], done["category"]) == (
        "intervention",
        "codename",
        "redact",
        "internal",
    )
    assert (done["choice"], done["channel"], done["start"], done["length"]) == (0, "answer", 6, 14)
    assert done["stream_id"] == ended["stream_id"] == stream.headers["X-Stream-Id"]
    assert done["principal"] == "anonymous"
    assert done["digest"].startswith("hmac-sha256:")
    assert (ended["kind"], ended["ending"], ended["interventions"]) == ("stream", "completed", 1)
    assert "Zephyr" not in json.dumps([done, ended])


async def test_the_same_text_has_the_same_digest_under_the_same_key_alone(tmp_path: Path) -> None:
    first, _ = await audited(tmp_path, asks=2)
    digests = {entry["digest"] for entry in first if "digest" in entry}
    assert len(digests) == 1
    (tmp_path / "other").mkdir()
    second, _ = await audited(tmp_path / "other", key="another key, just as long")
    assert second[0]["digest"] not in digests
    assert second[0]["key"] != first[0]["key"]


@pytest.mark.parametrize(
    ("text", "told"), [("masked", "xxxxxxx xxxxxx"), ("plain", "Project Zephyr"), ("digest", None)]
)
async def test_text_only_if_the_settings_say_so(tmp_path: Path, text: str, told: str | None) -> None:
    [done, _], _ = await audited(tmp_path, text=text)
    assert done.get("text") == told


async def test_a_caller_may_ask_for_less_text_never_for_more(tmp_path: Path) -> None:
    [done, _], _ = await audited(tmp_path, text="plain", request={"penstock": {"audit": {"mask": True}}})
    assert "text" not in done


async def test_clean_streams_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = saying(*chunks.answer_of(["fine"]))
    assert (await audited(tmp_path, answer=clean, asks=3))[0] == []
    entries, _ = await audited(tmp_path, answer=clean, asks=3, sample=1)
    assert [(entry["kind"], entry["interventions"]) for entry in entries] == [("stream", 0)] * 3
    drawn = iter([0, 249_999, 250_000, 999_999])
    monkeypatch.setattr(secrets, "randbelow", lambda most: next(drawn) if most == 1_000_000 else 0)
    (tmp_path / "quarter").mkdir()
    entries, _ = await audited(tmp_path / "quarter", answer=clean, asks=4, sample=0.25)
    assert len(entries) == 2


@pytest.mark.parametrize("action", ["redact", "halt", "flag"])
async def test_interventions_are_never_sampled(tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda most: most - 1)
    entries, _ = await audited(tmp_path, asks=5, sample=0.5, rules=[{**RULES[0], "action": action}])
    assert [entry["kind"] for entry in entries] == ["intervention", "stream"] * 5
    ending = "halted" if action == "halt" else "completed"
    assert {entry.get("action", entry.get("ending")) for entry in entries} == {action, ending}


async def test_a_verdict_is_an_intervention_too(tmp_path: Path) -> None:
    async def judge(_: web.Request) -> web.Response:
        return web.json_response({"results": [{"flagged": True, "categories": {"violence": True}}]})

    app = web.Application()
    app.add_routes([web.post("/judge", judge)])
    async with serving(app) as url:
        classifier = {"url": f"{url}/judge", "name": "guard", "timeout_ms": 20000}
        [done, ended], _ = await audited(tmp_path, text="plain", classifiers=[classifier], rules=[])
    assert (done["rule"], done["action"], done["category"]) == ("guard", "halt", "violence")
    assert done["text"] == "It is Project Zephyr 7."
    assert (ended["ending"], ended["error"]) == ("halted", "content_filtered")


# --- OTLP ---------------------------------------------------------------------------------------------


async def test_entries_are_otlp_logs_found_from_the_trace_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    rules = [*RULES, {"id": "seven", "literal": "7", "action": "flag"}, {"id": "rare", "literal": "never"}]
    async with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        timeline = {"penstock": {"audit": {"timeline": True}}}
        lines, _ = await audited(tmp_path, asks=3, rules=rules, otlp=True, text="plain", request=timeline)
    spans = {span.span_id: span for span in receiver.spans if span.kind == SERVER}
    assert (len(spans), len(receiver.logs)) == (3, 9)
    for log in receiver.logs:  # from an entry to its trace
        span = spans[log.span_id]
        assert (log.event_name, log.trace_id) == ("penstock.audit", span.trace_id)
        assert log.attributes["penstock.audit.stream_id"] == span.attributes["penstock.stream.id"]
    for span in spans.values():  # and back
        own = [log.attributes for log in receiver.logs if log.trace_id == span.trace_id]
        entries = [entry for entry in own if entry["penstock.audit.kind"] == "intervention"]
        events = [attributes for name, attributes in span.events if name == "penstock.moderation"]
        assert [event["penstock.rule"] for event in events] == ["codename", "seven"]
        for event, entry in zip(events, entries, strict=True):
            assert event == {
                f"penstock.{n}": entry[f"penstock.audit.{n}"] for n in ("rule", "action", "category", "choice")
            }
        [ended] = [entry for entry in own if entry["penstock.audit.kind"] == "stream"]
        assert ended["penstock.audit.interventions"] == 2
    # The file has the same entries, and what goes out to others has no text in it.
    assert [line["stream_id"] for line in lines] == [
        log.attributes["penstock.audit.stream_id"] for log in receiver.logs
    ]
    assert all(line["trace_id"] == log.trace_id for line, log in zip(lines, receiver.logs, strict=True))
    assert "Zephyr" in json.dumps(lines)
    assert "Zephyr" not in repr(receiver.logs) + repr(receiver.spans)
    assert not any("timeline" in name for log in receiver.logs for name in log.attributes)


async def test_otlp_alone_is_an_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", f"{receiver.url}/v1/logs")
        engine, _ = engine_app(ANSWER)
        async with in_front_of(engine, moderation__rules=RULES, audit={"otlp": True}) as setup:
            stream = await setup.caller.stream()
    assert [log.attributes["penstock.audit.kind"] for log in receiver.logs] == ["intervention", "stream"]
    assert {log.attributes["penstock.audit.stream_id"] for log in receiver.logs} == {stream.headers["X-Stream-Id"]}
    assert all(abs(log.nanoseconds / 1e9 - time.time()) < 3600 for log in receiver.logs)


async def test_a_timeline_has_times_and_offsets_and_no_text(tmp_path: Path) -> None:
    [_, ended], _ = await audited(tmp_path, request={"penstock": {"audit": {"timeline": True}}})
    timeline = ended["timeline"]
    assert [entry[2] for entry in timeline if entry[3] == timeline[0][3]][:3] == [1, 2, 3]
    assert all(earlier[0] <= later[0] for earlier, later in pairwise(timeline))
    assert timeline[-1][2] == len("It is Project Zephyr 7.")


async def test_a_file_that_cannot_be_written_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"audit\.file\.path"):
        await audited(tmp_path / "nowhere")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


async def test_a_file_that_is_full_is_set_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    one, _ = await audited(tmp_path, asks=1)
    size = sum(len(json.dumps(entry)) for entry in one)
    path.unlink()
    await audited(tmp_path, asks=9, file={"path": str(path), "rotate_bytes": 2 * size, "keep": 2})
    files = contents(tmp_path)
    assert list(files) == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(len(text.encode()) <= 2 * size for text in files.values())
    entries = [json.loads(line) for text in reversed(files.values()) for line in text.splitlines()]
    assert [entry["time"] for entry in entries] == sorted(entry["time"] for entry in entries)
    assert entries[-1]["kind"] == "stream"


async def test_retention_is_looked_after_while_penstock_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.shell.audit._PURGE_SECONDS", 0.01)
    path = tmp_path / "audit.jsonl"
    settings = {"file": {"path": str(path), "days": 30}}
    async with in_front_of(engine_app(ANSWER)[0], moderation__rules=RULES, audit=settings) as setup:
        old = tmp_path / "audit.jsonl.7"
        old.write_text("{}\n")
        os.utime(old, (time.time() - 31 * 86400,) * 2)
        await until(lambda: not old.exists())
        await setup.caller.stream()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["intervention", "stream"]


def test_what_is_young_or_no_audit_stays(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text(json.dumps({"time": datetime.now(UTC).isoformat()}) + "\n")
    for name in ("audit.jsonl.1", "audit.jsonl.bak", "other.1"):
        (tmp_path / name).write_text("half a li")
        if name != "audit.jsonl.1":
            os.utime(tmp_path / name, (time.time() - 90 * 86400,) * 2)
    before = sorted(other.name for other in tmp_path.iterdir())
    purge(AuditFile(path=path, days=30))
    purge(AuditFile(path=path, days=None))
    assert sorted(other.name for other in tmp_path.iterdir()) == before
    path.write_text("half a li")
    purge(AuditFile(path=path, days=30))
    assert path.read_text() == "half a li"


def test_old_files_are_removed_and_yesterdays_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"time": "2020-01-01T00:00:00+00:00"}\n')
    old = tmp_path / "audit.jsonl.1"
    old.write_text("{}\n")
    os.utime(old, (time.time() - 40 * 86400,) * 2)
    purge(AuditFile(path=path, days=30))
    assert not path.exists()
    assert [other.name for other in sorted(tmp_path.iterdir())] == ["audit.jsonl.1"]
    assert "2020" in (tmp_path / "audit.jsonl.1").read_text()
