"""The engine vanishes in the middle of its answers: every client is told, and none waits."""

import asyncio

import pytest

from support.engine import Engine
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, chat
from support.scripts import Script
from support.sockets import until

pytestmark = pytest.mark.engine


async def test_a_killed_engine_ends_every_stream_with_an_error(
    penstock: Caller, engine: Engine, script: Script
) -> None:
    body = chat(**script("Hello! ", eos=False, pause_ms=10, max_tokens=2000))
    tasks = {
        accept: asyncio.create_task(penstock.post("/v1/streams", body, {"Accept": accept}))
        for accept in (SSE, NDJSON, FOLDED)
    }
    chunks = asyncio.create_task(penstock.post("/v1/chat/completions", {**body, "stream": True}))
    whole = asyncio.create_task(penstock.post("/v1/chat/completions", body))
    before = engine.metric("vllm:generation_tokens_total")
    await until(lambda: asyncio.to_thread(lambda: engine.running_requests() == 5))
    await until(lambda: asyncio.to_thread(lambda: engine.metric("vllm:generation_tokens_total") > before + 50))
    engine.kill()
    await until(lambda: not engine.is_alive())

    for accept in (SSE, NDJSON):
        assert_told(await tasks[accept])
    folded = await tasks[FOLDED]
    assert (folded.status, folded.json["status"], folded.json["error"]["origin"]) == (502, "failed", "upstream")
    assert folded.json["choices"][0]["text"].startswith("Hello! ")
    error = (await chunks).chunks[-1]["error"]
    assert (error["type"], error["code"]) == ("upstream_error", "engine_gone")
    assert (await chunks).body.endswith(b"data: [DONE]\n\n")
    assert ((await whole).status, (await whole).error["code"]) == (502, "engine_gone")

    assert (await penstock.get("/healthz")).status == 200
    await until(lambda: is_unready(penstock))  # a check counts for a second
    refused = await penstock.post("/v1/streams", body)
    assert (refused.status, refused.error["code"], refused.error["retryable"]) == (502, "engine_unreachable", True)


async def is_unready(penstock: Caller) -> bool:
    return (await penstock.get("/readyz")).status == 503


def assert_told(answer: Answer) -> None:
    error = answer.one("error")
    assert (error["origin"], error["retryable"], error["code"]) == ("upstream", True, "engine_gone")
    assert answer.text().startswith("Hello! ")
    assert answer.one("text.end")["status"] == "incomplete"
    assert (answer.finish()["reason"], answer.finish()["cause"]) == ("error", "error")
    assert answer.end["status"] == "failed"
    usage: Json = answer.usage
    assert usage["estimated"] is True
    assert usage["completion_tokens"] > 5
