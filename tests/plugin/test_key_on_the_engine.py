"""vLLM's `--api-key` guards the plugin's routes as it guards vLLM's own, and all of it works over a Unix socket."""

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from conftest import EngineHolder
from support.engine import Engine, running_engine
from support.fake_plugin import socket_path
from support.http_client import NDJSON, calling, chat
from support.plugin_client import connected
from support.sidecar import sidecar

pytestmark = pytest.mark.engine

KEY = {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def guarded(engine_holder: EngineHolder) -> Iterator[Engine]:
    engine_holder.stop()
    with socket_path() as path:
        arguments = ("--api-key", "the-key", "--uds", str(path))
        with running_engine(*arguments, environment={"VLLM_PLUGINS": "penstock"}) as engine:
            yield engine


@pytest.fixture
async def session(guarded: Engine) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(guarded.unix_socket))) as opened:
        yield opened


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}])
async def test_nothing_is_served_without_the_key(
    session: aiohttp.ClientSession, guarded: Engine, headers: dict[str, str]
) -> None:
    for route in ("capabilities", "tokenizer"):
        async with session.get(f"{guarded.url}/v1/penstock/{route}", headers=headers) as answer:
            assert answer.status == 401
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await session.ws_connect(f"{guarded.url}/v1/penstock/streams", headers=headers)
    # An ASGI server has no better word for a handshake that the application turns down.
    assert refused.value.status in (401, 403)


async def test_all_is_served_with_it(session: aiohttp.ClientSession, guarded: Engine) -> None:
    async with session.get(f"{guarded.url}/v1/penstock/capabilities", headers=KEY) as answer:
        assert (answer.status, (await answer.json())["hooks"]["output_tap"]) == (200, True)
    async with session.get(f"{guarded.url}/v1/penstock/tokenizer", headers=KEY) as answer:
        assert answer.status == 200
    async with connected(guarded.url, unix_socket=guarded.unix_socket, headers=KEY) as client:
        await client.over(await client.open(**chat(max_tokens=3)))


async def test_penstock_has_the_key_and_takes_the_socket(guarded: Engine) -> None:
    upstream = {"plugin": "auto", "socket": str(guarded.unix_socket), "api_key": "the-key", "parses_tools": False}
    async with sidecar("http://vllm", upstream) as running, calling(running.url) as caller:
        plugin = running.server.cluster.members[0].engine.plugin
        assert plugin is not None
        assert plugin.vocabulary is not None
        answer = await caller.stream(NDJSON, max_tokens=3)
    assert answer.finish()["cause"] == "max_tokens"
    assert answer.usage["completion_tokens"] == 3
