"""vLLM's `--api-key` guards the plugin's routes as it guards vLLM's own."""

from collections.abc import Iterator

import aiohttp
import pytest

from conftest import EngineHolder
from support.engine import Engine, running_engine
from support.http_client import chat
from support.plugin_client import connected

pytestmark = pytest.mark.engine

KEY = {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def guarded(engine_holder: EngineHolder) -> Iterator[Engine]:
    engine_holder.stop()
    with running_engine("--api-key", "the-key", environment={"VLLM_PLUGINS": "penstock"}) as engine:
        yield engine


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}])
async def test_nothing_is_served_without_the_key(guarded: Engine, headers: dict[str, str]) -> None:
    async with aiohttp.ClientSession(headers=headers) as session:
        for route in ("capabilities", "tokenizer"):
            async with session.get(f"{guarded.url}/v1/penstock/{route}") as answer:
                assert answer.status == 401
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{guarded.url}/v1/penstock/streams")
    # An ASGI server has no better word for a handshake that the application turns down.
    assert refused.value.status in (401, 403)


async def test_all_is_served_with_it(guarded: Engine) -> None:
    async with aiohttp.ClientSession(headers=KEY) as session:
        async with session.get(f"{guarded.url}/v1/penstock/capabilities") as answer:
            assert (answer.status, (await answer.json())["hooks"]["output_tap"]) == (200, True)
        async with session.get(f"{guarded.url}/v1/penstock/tokenizer") as answer:
            assert answer.status == 200
    async with connected(guarded.url, headers=KEY) as client:
        await client.over(await client.open(**chat(max_tokens=3)))
