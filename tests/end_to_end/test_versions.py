"""What this vLLM offers is what the window says of its version, and with less of it Penstock serves no less.

The suite runs on the newest version; `make test-versions` runs this file and the plugin's tests on older ones.
"""

import asyncio
import re
from collections.abc import AsyncIterator

import pytest

from support.engine import Engine
from support.http_client import NDJSON, Caller, calling
from support.record import THINKING
from support.scripts import Script
from support.sidecar import Sidecar, sidecar

pytestmark = pytest.mark.engine

FIRST_WITH_GRAMMAR_STOP = (0, 30)


@pytest.fixture
async def penstock(engine: Engine) -> AsyncIterator[Sidecar]:
    async with sidecar(engine.url, {"plugin": "auto", "parses_tools": False}) as running:
        yield running


@pytest.fixture
async def direct(engine: Engine) -> AsyncIterator[Caller]:
    async with calling(engine.url) as caller:
        yield caller


async def version(engine: Engine) -> tuple[int, int]:
    major, minor = (await asyncio.to_thread(engine.version)).split(".")[:2]
    return int(major), int(minor)


async def test_the_hooks_that_are_on_and_one_line_for_each_that_is_not(engine: Engine, direct: Caller) -> None:
    answer = await direct.get("/v1/penstock/capabilities")
    said = re.findall(r"penstock: (.*)", await asyncio.to_thread(engine.log.read_text, errors="replace"))
    has_grammar_stop = await version(engine) >= FIRST_WITH_GRAMMAR_STOP
    assert answer.json["hooks"] == {"output_tap": True, "grammar_stop": has_grammar_stop}
    assert len([line for line in said if line.startswith("grammar_stop is off")]) == (not has_grammar_stop)
    assert bool(answer.json["problems"]) is not has_grammar_stop


async def test_vllms_own_route_answers_as_without_the_plugin(direct: Caller, script: Script) -> None:
    answer = await direct.chat(**script(THINKING))
    assert answer.json["choices"][0]["message"]["content"] == THINKING


async def test_penstock_reads_tagged_tokens(penstock: Sidecar, script: Script) -> None:
    plugin = penstock.server.cluster.members[0].engine.plugin
    assert plugin is not None
    assert plugin.vocabulary is not None
    async with calling(penstock.url) as caller:
        answer = await caller.stream(NDJSON, **script(THINKING))
    assert answer.end["status"] == "completed"
    assert f"<think>{answer.reasoning()}</think>{answer.text()}" == THINKING
