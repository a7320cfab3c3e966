"""Usage records: one for each stream, in every sink, agreeing with the answer and with its trace."""

import asyncio
import errno
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.access_settings import UsageFile, UsageSettings
from penstock.settings import SettingsError
from penstock.shell import sinks
from penstock.shell.auth import hash_key
from penstock.shell.ledgers import connected
from penstock.shell.sinks import FileSink
from penstock.shell.usage_records import UsageRecord, UsageRecords
from support import chunks
from support.http_client import chat
from support.otlp_receiver import SERVER, receiving
from support.redis_server import redis_server
from support.sockets import until
from support.upstreams import answering, engine_app, in_front_of, opened, saying, silence

RECORD = UsageRecord(
    time="2026-11-21T10:00:00.000+00:00",
    stream_id="st_1",
    trace_id="0af7651916cd43dd8448eb211c80319c",
    span_id="b7ad6b7169203331",
    principal="alice",
    route="/v1/streams",
    upstream="engine",
    model="tiny",
    ending="completed",
    error=None,
    bill="generated",
    billed_tokens=30,
    prompt_tokens=10,
    cached_tokens=0,
    completion_tokens=20,
    reasoning_tokens=0,
    answer_tokens=20,
    tool_tokens=0,
    delivered_tokens=20,
    wasted_tokens_after_cancel=0,
    estimated=False,
    ttft_seconds=0.5,
    duration_seconds=1.0,
)


def numbered(*numbers: int) -> list[UsageRecord]:
    return [replace(RECORD, stream_id=f"st_{number}") for number in numbers]


def written(path: Path) -> list[str]:
    return [json.loads(line)["stream_id"] for line in path.read_text().splitlines()] if path.exists() else []


# --- The file -------------------------------------------------------------------------------------------


def sink(path: Path, **settings: Any) -> FileSink:
    return FileSink.checked(UsageFile(path=path, **settings))


async def test_a_file_that_is_full_is_put_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    file = sink(path, rotate_bytes=1, keep=2)
    for number in range(4):
        await file.write(numbered(number))
    assert [written(tmp_path / name) for name in ("usage.jsonl", "usage.jsonl.1", "usage.jsonl.2")] == [
        ["st_3"],
        ["st_2"],
        ["st_1"],
    ]
    assert not (tmp_path / "usage.jsonl.3").exists()


async def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    file = sink(path, rotate_bytes=0)
    await file.write(numbered(1))
    path.rename(tmp_path / "moved")  # as logrotate does
    await file.write(numbered(2, 3))
    assert (written(tmp_path / "moved"), written(path)) == (["st_1"], ["st_2", "st_3"])


async def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "usage.jsonl"
    file = sink(path)
    await file.write(numbered(1))
    write, room = os.write, [40, 0]

    def full(descriptor: int, data: bytes) -> int:
        if not (left := room.pop(0)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:left])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            await file.write(numbered(2))
    await file.write(numbered(2))
    assert written(path) == ["st_1", "st_2"]


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"usage\.file\.path: .*/none/usage\.jsonl: No such file or directory; give"
    ):
        sink(tmp_path / "none" / "usage.jsonl")


# --- A sink that fails ----------------------------------------------------------------------------------


@dataclass
class Flaky:
    is_gone: bool = True
    taken: list[str] = field(default_factory=list)

    async def write(self, records: Sequence[Any]) -> None:
        if self.is_gone:
            raise ConnectionError("gone")
        self.taken += [record.stream_id for record in records]

    async def close(self) -> None: ...


@asynccontextmanager
async def records(*flaky: Flaky) -> AsyncIterator[UsageRecords]:
    kept = UsageRecords(UsageSettings(), flaky)
    keeping = asyncio.create_task(kept.keep_up())
    yield kept
    kept.close()
    await keeping


async def test_a_sink_that_is_gone_gets_everything_when_it_is_back_and_hinders_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "_PAUSE_SECONDS", 0.02)
    gone, well = Flaky(), Flaky(is_gone=False)
    async with records(gone, well) as kept:
        for record in numbered(*range(1200)):
            kept.add(record)
        await until(lambda: len(well.taken) == 1200)
        assert gone.taken == []
        assert "records wait, 1200 of them: ConnectionError: gone" in caplog.text
        gone.is_gone = False
        await until(lambda: len(gone.taken) == 1200)
        assert gone.taken == well.taken == [f"st_{number}" for number in range(1200)]


async def test_what_no_sink_takes_goes_to_the_log_and_not_into_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "_MOST_WAITING", 2)
    monkeypatch.setattr(sinks, "_LAST_PAUSES", (0.0,))
    async with records(Flaky()) as kept:
        for record in numbered(1, 2, 3):
            kept.add(record)
        lost = [r.message for r in caplog.records if "could not be written" in r.message]
        assert len(lost) == 1
        assert '"stream_id":"st_1"' in lost[0]
    assert sum("could not be written" in record.message for record in caplog.records) == 3


# --- Over HTTP ------------------------------------------------------------------------------------------

KEY = "alices-key-0123456789"
ALICE = {"Authorization": f"Bearer {KEY}"}
ANSWER = [chunks.role(), chunks.content("Hello", tokens=20), chunks.finish("stop"), chunks.final_usage(20, 10)]
KEYS: dict[str, Any] = {"auth__keys": {"alice": hash_key(KEY)}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_each_stream_has_one_record_that_agrees_with_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    app, _ = engine_app(saying(*ANSWER, chunks.DONE))
    async with in_front_of(app, usage__file={"path": str(path)}, **KEYS) as setup:
        native = await setup.caller.stream(headers=ALICE)
        await setup.caller.chat(headers=ALICE, stream=True)
        await until(lambda: len(written(path)) == 2)
    record, of_chat = lines(path)
    counted = {name: value for name, value in native.usage.items() if name in record}
    assert len(counted) >= 6
    assert {name: record[name] for name in counted} == counted
    assert record["stream_id"] == native.headers["X-Stream-Id"]
    assert (record["principal"], record["route"], record["ending"]) == ("alice", "/v1/streams", "completed")
    assert (record["billed_tokens"], record["bill"], record["estimated"]) == (30, "generated", False)
    assert of_chat["route"] == "/v1/chat/completions"


async def test_a_stream_that_is_cancelled_left_or_refused_has_its_record_too(tmp_path: Path) -> None:
    async def one_word(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("Hello", tokens=1))
        await silence()
        return response

    path = tmp_path / "usage.jsonl"
    app, _ = engine_app(one_word)
    async with in_front_of(app, usage__file={"path": str(path)}) as setup:
        async with setup.caller.opened("/v1/streams", chat()) as response:
            await response.content.readuntil(b"Hello")
            await setup.caller.delete(response.headers["X-Stream-Id"])
            await response.content.read()
        async with setup.caller.opened("/v1/streams", chat()) as response:
            await response.content.readuntil(b"Hello")
        await until(lambda: len(written(path)) == 2)
    refusing, _ = engine_app(answering(b'{"error": {"message": "No."}}', 400))
    async with in_front_of(refusing, usage__file={"path": str(path)}) as setup:
        assert (await setup.caller.stream()).status == 400
    endings = [(line["ending"], line["error"], line["completion_tokens"]) for line in lines(path)]
    assert endings == [("cancelled", None, 1), ("client_gone", None, 1), ("refused", "engine_refused", 0)]


async def test_records_go_to_a_redis_stream(tmp_path: Path) -> None:
    app, _ = engine_app(saying(*ANSWER, chunks.DONE))
    async with redis_server(tmp_path) as redis:
        async with in_front_of(app, store__url=redis.url, usage__redis_stream="usage", **KEYS) as setup:
            streams = [(await setup.caller.stream(headers=ALICE)).headers["X-Stream-Id"] for _ in range(2)]
        client = connected(redis.url, 5)
        entries = [fields for _, fields in await client.xrange("usage")]
        await client.aclose()
    assert [entry[b"stream_id"].decode() for entry in entries] == streams
    assert [json.loads(entry[b"record"])["billed_tokens"] for entry in entries] == [30, 30]


async def test_records_are_otlp_logs_in_the_trace_of_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconciled: the record and the span have the same ids, the same stream and the same tokens."""
    app, _ = engine_app(saying(*ANSWER, chunks.DONE))
    async with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        async with in_front_of(app, usage__otlp=True, **KEYS) as setup:
            answer = await setup.caller.stream(headers=ALICE)
    [log] = receiver.logs
    told = log.attributes
    span = receiver.of_kind(SERVER)
    assert (log.trace_id, log.span_id, log.event_name) == (span.trace_id, span.span_id, "penstock.usage")
    assert told["penstock.usage.stream_id"] == span.attributes["penstock.stream.id"] == answer.headers["X-Stream-Id"]
    assert told["penstock.usage.principal"] == "alice"
    assert told["penstock.usage.billed_tokens"] == 30
    [client] = [other for other in receiver.spans if other.kind != SERVER]
    assert told["penstock.usage.completion_tokens"] == client.attributes["gen_ai.usage.output_tokens"] == 20
    assert log.nanoseconds > 0


def test_a_redis_stream_needs_a_redis(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    from penstock.settings import load_settings

    flags = {"upstreams": [{"url": "http://vllm:8000"}], "usage.redis_stream": "usage"}
    with pytest.raises(SettingsError, match=r"usage\.redis_stream is set and store\.url is not"):
        load_settings(environment={}, flags=flags)
    wrong = {"upstreams": [{"url": "http://vllm:8000"}], "store.url": "http://:secret@redis"}
    with pytest.raises(
        SettingsError, match=r"store\.url: its value .* must be a URL like redis://redis:6379/0"
    ) as caught:
        load_settings(environment={}, flags=wrong)
    assert "secret" not in str(caught.value)
