"""Rules before the real engine: a secret cut over many tokens is redacted whole, and a halt frees the engine."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from support.engine import Engine
from support.http_client import FOLDED, SSE, Caller, calling
from support.scripts import Script
from support.sidecar import sidecar
from support.sockets import until

pytestmark = pytest.mark.engine

SECRET = "sk-QZXJVWKQYHZX"
RULES = [
    {"id": "key", "regex": "sk-[A-Z]{4,32}"},
    {"id": "ticket", "literal": "TKT-123456", "action": "halt"},
]
SAID = f"<think>\nThe key is {SECRET}.\n</think>\n\nIt is {SECRET}, yes."
LONG = " and so on" * 200


@pytest.fixture
async def moderated(engine: Engine, plugin: str) -> AsyncIterator[Caller]:
    async with (
        sidecar(engine.url, {"plugin": plugin}, moderation__rules=RULES) as running,
        calling(running.url) as caller,
    ):
        assert (running.server.cluster.members[0].engine.plugin is not None) == (plugin == "auto")
        yield caller


@pytest.mark.parametrize("accept", [SSE, FOLDED], ids=["events", "folded"])
async def test_a_secret_over_many_tokens_is_redacted(moderated: Caller, script: Script, accept: str) -> None:
    request = script(SAID, bytewise=True)
    assert len(request["vllm_xargs"]["script"]) > 2 * len(SECRET)
    answer = await moderated.stream(accept, **request)
    if accept == SSE:
        assert (answer.reasoning(), answer.text()) == ("\nThe key is [redacted].\n", "\n\nIt is [redacted], yes.")
        assert [event["rule"] for event in answer.of("moderation")] == ["key", "key"]
        assert answer.finish()["reason"] == "stop"
    else:
        assert answer.json["choices"][0]["text"] == "\n\nIt is [redacted], yes."
    for part in ("sk-", SECRET[3:7], SECRET[-4:]):
        assert part.encode() not in answer.body


async def test_an_openai_client_gets_no_byte_of_it_either(moderated: Caller, script: Script) -> None:
    answer = await moderated.chat(stream=True, **script(SAID, bytewise=True))
    deltas = [choice["delta"] for chunk in answer.chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "\n\nIt is [redacted], yes."
    assert b"sk-" not in answer.body


async def test_a_halt_ends_the_stream_and_the_generation(moderated: Caller, engine: Engine, script: Script) -> None:
    request = script(f"<think>\nHm.\n</think>\n\nSee TKT-123456!{LONG}", pause_ms=10, bytewise=True)
    answer = await moderated.stream(**request)
    assert answer.text() == "\n\nSee "
    assert answer.finish()["reason"] == "content_filter"
    assert answer.one("moderation")["rule"] == "ticket"
    assert b"TKT" not in answer.body

    async def is_idle() -> bool:
        return await asyncio.to_thread(engine.running_requests) == 0

    # The script has 2000 tokens at 10 ms each: had it not been stopped, it would go on for longer than this waits.
    await until(is_idle)
