"""The audit: an entry for every intervention, found by stream and by trace, with no text unless it is asked for."""

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from penstock.moderation_settings import AuditFile
from penstock.settings import SettingsError
from penstock.shell.audit import purge
from support import chunks
from support.upstreams import engine_app, in_front_of, saying

RULES = [{"id": "codename", "literal": "Project Zephyr", "category": "internal"}]
ANSWER = saying(*chunks.answer_of(list("It is Project Zephyr 7.")))
KEY = "a key of the audit's digests"


async def audited(tmp_path: Path, *, asks: int = 1, request: Any = None, answer: Any = ANSWER, **audit: Any) -> Any:
    """The entries of so many streams, and the last stream."""
    path = tmp_path / "audit.jsonl"
    engine, _ = engine_app(answer)
    settings = {"file": {"path": str(path)}, "key": KEY, **audit}
    async with in_front_of(engine, moderation__rules=RULES, audit=settings) as setup:
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


async def test_clean_streams_are_sampled_and_interventions_are_not(tmp_path: Path) -> None:
    clean = saying(*chunks.answer_of(["fine"]))
    assert (await audited(tmp_path, answer=clean, asks=3))[0] == []
    entries, _ = await audited(tmp_path, answer=clean, asks=3, sample=1)
    assert [(entry["kind"], entry["interventions"]) for entry in entries] == [("stream", 0)] * 3


async def test_a_timeline_has_times_and_offsets_and_no_text(tmp_path: Path) -> None:
    [_, ended], _ = await audited(tmp_path, request={"penstock": {"audit": {"timeline": True}}})
    timeline = ended["timeline"]
    assert [entry[2] for entry in timeline if entry[3] == timeline[0][3]][:3] == [1, 2, 3]
    assert all(earlier[0] <= later[0] for earlier, later in pairwise(timeline))
    assert timeline[-1][2] == len("It is Project Zephyr 7.")


async def test_a_file_that_cannot_be_written_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"audit\.file\.path"):
        await audited(tmp_path / "nowhere")


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
