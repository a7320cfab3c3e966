"""Tool calls of several families from the real engine, and a tool that Penstock runs, on both paths.

Hermes is compared with what vLLM's own parser makes of the same tokens. The other families' calls are the raw text of
the same model, read by their rows; the truth is the script.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web

from penstock.shell.replay import serving
from support.engine import Engine
from support.http_client import NDJSON, Answer, Caller, Json, calling
from support.record import WEATHER
from support.scripts import Script
from support.sidecar import sidecar
from support.tools import COUNT, CountingService

pytestmark = pytest.mark.engine

PARIS = {"city": 'Paris, "France" {é 👩‍💻}', "unit": "celsius"}
TOKYO = {"city": "東京"}
CALLS: list[Json] = [PARIS, TOKYO]


def written(arguments: Json) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def hermes(arguments: Json) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {written(arguments)}}}\n</tool_call>'


def qwen_xml(arguments: Json) -> str:
    lines = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items())
    return f"<tool_call>\n<function=get_weather>\n{lines}</function>\n</tool_call>"


def deepseek(arguments: Json) -> str:
    return f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{written(arguments)}<｜tool▁call▁end｜>"


def llama(arguments: Json) -> str:
    return f'{{"name": "get_weather", "parameters": {written(arguments)}}}'


FAMILIES = {
    "qwen3": "\n".join(map(hermes, CALLS)),
    "qwen3-coder": "\n".join(map(qwen_xml, CALLS)),
    "mistral": "".join(f"[TOOL_CALLS]get_weather{written(arguments)}" for arguments in CALLS),
    "deepseek": f"<｜tool▁calls▁begin｜>{''.join(map(deepseek, CALLS))}<｜tool▁calls▁end｜>",
    "llama": "; ".join(map(llama, CALLS)),
}


async def test_the_calls_of_each_family_become_ready_once(inline_penstock: Caller, script: Script) -> None:
    """All at once, so that the engine takes them in one batch; every word a token, and every byte one."""

    async def ask(family: str, bytewise: bool) -> Answer:
        request = script(FAMILIES[family], bytewise=bytewise, tools=[WEATHER], penstock={"family": family})
        return await inline_penstock.stream(NDJSON, **request)

    cases = [(family, bytewise) for family in FAMILIES for bytewise in (False, True)]
    answers = await asyncio.gather(*(ask(*case) for case in cases))
    for (family, bytewise), answer in zip(cases, answers, strict=True):
        ready = answer.of("tool_call.ready")
        assert [event["arguments"] for event in ready] == CALLS, (family, bytewise)
        ids = [event["call_id"] for event in ready]
        assert len(set(ids)) == 2, (family, bytewise)
        assert [end["call_id"] for end in answer.of("tool_call.end") if end["valid"]] == ids, (family, bytewise)
        assert answer.text().strip() == "", (family, bytewise)
        assert answer.finish()["reason"] == "tool_calls", (family, bytewise)
        assert answer.usage["bytes"]["generated"] == len(FAMILIES[family].encode()), (family, bytewise)


async def test_hermes_is_read_as_vllms_own_parser_reads_it(
    engine: Engine, script: Script, penstock: Caller, inline_penstock: Caller, direct: Caller
) -> None:
    request = script(FAMILIES["qwen3"], tools=[WEATHER])
    whole = await direct.chat(**{**request, "model": engine.parsed_model})
    theirs = [call["function"] for call in whole.json["choices"][0]["message"]["tool_calls"]]
    truth = [(call["name"], json.loads(call["arguments"])) for call in theirs]
    assert truth == [("get_weather", arguments) for arguments in CALLS]
    passed_on = await penstock.stream(NDJSON, **{**request, "model": engine.parsed_model})
    read_here = await inline_penstock.stream(NDJSON, **request)
    for answer in (passed_on, read_here):
        assert [(event["name"], event["arguments"]) for event in answer.of("tool_call.ready")] == truth


# --- Tools that are run ---------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "count", "arguments": {"by": 3}}\n</tool_call>'
TURN = f"<think>\nCount.\n</think>\n\nLet me count.\n{CALL}"


@pytest.fixture
async def service() -> AsyncIterator[tuple[CountingService, str]]:
    counting = CountingService(delay=0.1)
    async with serving(counting.app()) as url:
        yield counting, f"{url}/tool"


class Relay:
    """Passes everything on to the engine, but gives the model its second script once a tool has answered.

    `asked` are the chat requests, by chunks or by the plugin's connection.
    """

    def __init__(self, engine_url: str, session: ClientSession) -> None:
        self._engine = engine_url
        self._session = session
        self.asked: list[Json] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        return app

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        url = self._engine + request.path_qs
        if request.headers.get("Upgrade") == "websocket":
            return await self._pass_on_socket(request, url)
        body = await request.read()
        if request.method == "POST":
            body = json.dumps(self._next_turn(json.loads(body))).encode()
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            return response

    async def _pass_on_socket(self, request: web.Request, url: str) -> web.WebSocketResponse:
        ours = web.WebSocketResponse()
        await ours.prepare(request)

        async def hand_down(engine: ClientWebSocketResponse) -> None:
            async for message in engine:
                if message.type is WSMsgType.BINARY:
                    await ours.send_bytes(message.data)
                else:
                    await ours.send_str(message.data)

        async with self._session.ws_connect(url) as engine:
            handing_down = asyncio.create_task(hand_down(engine))
            try:
                async for message in ours:
                    told = json.loads(message.data)
                    if told["op"] == "open":
                        told["request"] = self._next_turn(told["request"])
                    await engine.send_json(told)
            finally:
                handing_down.cancel()
                await asyncio.wait({handing_down})
        return ours

    def _next_turn(self, asked: Json) -> Json:
        self.asked.append(asked)
        if asked["messages"][-1]["role"] != "tool":
            return asked
        xargs = asked["vllm_xargs"]
        return {**asked, "vllm_xargs": {**xargs, "script": xargs["script_1"]}}


@pytest.fixture
async def relay(engine: Engine) -> AsyncIterator[tuple[Relay, str]]:
    async with ClientSession() as session:
        made = Relay(engine.url, session)
        async with serving(made.app()) as url:
            yield made, url


# Names, times, pieces, and what the engine had in its cache.
OWN = {"stream_id", "call_id", "ts", "resumable_until", "duration_ms", "ttft_ms", "seq", "events", "cached_tokens"}


def essence(answer: Answer) -> list[Json]:
    """The log without `OWN`; deltas that follow each other are one."""
    out: list[Json] = []
    for event in answer.events:
        if event["type"] == "usage" and not event["final"]:
            continue
        kept = {name: value for name, value in event.items() if name not in OWN}
        if out and "text" in kept and (out[-1]["type"], out[-1].get("block")) == (kept["type"], kept["block"]):
            out[-1]["text"] += kept["text"]
        else:
            out.append(kept)
    return out


async def run_with_a_tool(relay_url: str, plugin: str, engine: Engine, script: Script, tool: str) -> Answer:
    flags: dict[str, Any] = {
        "tools__bindings": [{"tools": ["count"], "url": tool}],
        "tools__loop__allow_networks": ["127.0.0.0/8"],
        "tools__loop__show_results": True,
    }
    upstream = {"parses_tools": False, "plugin": plugin}
    async with sidecar(relay_url, upstream, **flags) as running, calling(running.url) as caller:
        connection = running.server.cluster.members[0].engine.plugin
        assert (connection is not None and connection.vocabulary is not None) is (plugin == "auto")
        request = script(TURN, tools=[COUNT])
        request["vllm_xargs"]["script_1"] = engine.script("<think>\nSeven.\n</think>\n\nIt is 7.")
        return await caller.stream(NDJSON, **request)


async def test_a_tool_is_run_and_the_engine_goes_on_in_the_same_stream(
    relay: tuple[Relay, str], engine: Engine, script: Script, service: tuple[CountingService, str]
) -> None:
    """On both paths, with the same events."""
    (relayed, url), (counting, tool) = relay, service
    plain, tagged = [await run_with_a_tool(url, plugin, engine, script, tool) for plugin in ("off", "auto")]
    for answer in (plain, tagged):
        assert answer.one("tool_call.ready")["arguments"] == {"by": 3}
        assert answer.one("tool_call.result")["ok"]
        assert (answer.text(), answer.reasoning()) == ("\n\nLet me count.\n\n\nIt is 7.", "\nCount.\n\nSeven.\n")
        assert (answer.finish()["reason"], answer.end["status"]) == ("stop", "completed")
    assert (counting.requests, counting.executed.total()) == ([{"by": 3}] * 2, 2)
    told = [[(one["role"], one["content"]) for one in asked["messages"]] for asked in relayed.asked]
    assert told[:2] == told[2:]
    assert told[1][1:] == [("assistant", "\n\nLet me count.\n"), ("tool", '{"n": 7}')]
    assert essence(tagged) == essence(plain)
