"""vLLM takes a partial answer as its last message and goes on inside it, without saying it again."""

import pytest
from blockbuster import BlockBuster

from support.engine import Engine
from support.http_client import calling
from support.scripts import Script
from support.sidecar import sidecar

pytestmark = pytest.mark.engine

WORDS = "The quick brown fox jumps over the lazy dog. " * 20


async def test_vllm_goes_on_with_a_partial_answer(
    engine: Engine, plugin: str, script: Script, no_blocking_calls: BlockBuster
) -> None:
    """The script is said whatever the prompt is; what the engine was given shows in the size of its prompt."""
    request = script(WORDS)
    async with (
        sidecar(engine.url, {"plugin": plugin}, limits__stream_bytes=4096) as running,
        calling(running.url) as caller,
    ):
        first = await caller.stream(**request)
        assert first.one("error")["code"] == "stream_bytes_limit"
        assert WORDS.startswith(first.text())
        second = await caller.stream(penstock={"continue": first.headers["X-Stream-Id"]}, **request)
        assert second.one("stream.start")["continues"] == first.headers["X-Stream-Id"]
        assert second.text()
        assert WORDS.startswith(second.text())
        grown = second.usage["prompt_tokens"] - first.usage["prompt_tokens"]
        assert grown > len(first.text().split()) / 2
