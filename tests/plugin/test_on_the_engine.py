"""The plugin in the real vLLM: every id arrives, tagged, and vLLM's own routes go on as before."""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import aiohttp
import pytest
from aiohttp.connector import AddrInfoType
from tokenizers import Tokenizer

from penstock.core.frames import End, EngineFailed, Lost
from support.engine import Engine
from support.http_client import Caller, calling, chat
from support.plugin_client import QWEN, PluginClient, begin, channels, connected, finish, ids
from support.record import EMOJI, THINKING, THINKING_TOOL, WEATHER
from support.scripts import Script
from support.sockets import until

pytestmark = pytest.mark.engine


@pytest.fixture
def script(engine: Engine) -> Script:
    return Script(engine)


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[PluginClient]:
    async with connected(engine.url) as connection:
        yield connection


@pytest.fixture
async def direct(engine: Engine) -> AsyncIterator[Caller]:
    async with calling(engine.url) as caller:
        yield caller


async def running_requests(engine: Engine) -> int:
    return await asyncio.to_thread(engine.running_requests)


async def assert_idle(engine: Engine) -> None:
    async def is_idle() -> bool:
        return await running_requests(engine) == 0 and await asyncio.to_thread(engine.kv_cache_usage) == 0

    await until(is_idle)


async def capabilities(direct: Caller) -> dict[str, Any]:
    answer = await direct.get("/v1/penstock/capabilities")
    assert answer.status == 200
    told: dict[str, Any] = answer.json
    return told


# --- What a stream tells ------------------------------------------------------------------------------


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("text", [THINKING, THINKING_TOOL, EMOJI])
async def test_every_id_arrives_once_as_on_vllms_own_route(
    client: PluginClient, direct: Caller, script: Script, text: str, bytewise: bool
) -> None:
    request = script(text, bytewise=bytewise)
    records = await client.over(await client.open(**chat(**request)))
    said = request["vllm_xargs"]["script"]
    assert ids(records) == said
    stop = finish(records)
    assert (stop.cause, stop.reason, stop.stop) == ("eos", "stop", None)
    assert records[-1] == End(begin(records).stream)

    plain = await direct.chat(stream=True, return_token_ids=True, stream_options={"include_usage": True}, **request)
    choices = [choice for chunk in plain.chunks for choice in chunk["choices"]]
    assert [number for choice in choices for number in choice.get("token_ids") or ()] == said
    assert begin(records).prompt_tokens == plain.chunks[-1]["usage"]["prompt_tokens"]
    assert list(begin(records).prompt_end) == plain.chunks[0]["prompt_token_ids"][-64:]


async def test_channels(client: PluginClient, engine: Engine, script: Script) -> None:
    records = await client.over(await client.open(**chat(**script(THINKING_TOOL), tools=[WEATHER], tool_choice="none")))
    spelled = [(tag, await text_of(engine, run)) for tag, run in channels(records)]
    assert spelled == [
        ("marker", "<think>"),
        ("reasoning", "\nI need the weather.\n"),
        ("marker", "</think>"),
        ("answer", "\n\nOne moment.\n"),
        ("marker", "<tool_call>"),
        ("tool", THINKING_TOOL.split("<tool_call>")[1].split("</tool_call>")[0]),
        ("marker", "</tool_call><|im_end|>"),
    ]


async def text_of(engine: Engine, run: list[int]) -> str:
    async with calling(engine.url) as caller:
        answer = await caller.post("/detokenize", {"model": "tiny", "tokens": run})
        text: str = answer.json["prompt"]
        return text


@pytest.mark.parametrize(
    ("template", "first"),
    [({}, "answer"), ({"open_think": True}, "reasoning"), ({"enable_thinking": False}, "answer")],
)
async def test_the_template_says_in_which_channel_the_model_begins(
    client: PluginClient, script: Script, template: dict[str, bool], first: str
) -> None:
    request = chat(**script("So be it."), chat_template_kwargs=template)
    assert channels(await client.over(await client.open(**request)))[0][0] == first


async def test_a_thought_that_vllm_ends_for_its_budget(client: PluginClient, direct: Caller, script: Script) -> None:
    """The end that vLLM forces comes by like any other id."""
    thought = "<think>One thing leads to another, and that to a third, and so on without any end in sight."
    request = chat(**script(thought, eos=False), thinking_token_budget=4, max_tokens=9)
    records = await client.over(await client.open(**request))
    plain = await direct.post("/v1/chat/completions", {**request, "stream": True, "return_token_ids": True})
    told = [choice.get("token_ids") or () for chunk in plain.chunks for choice in chunk["choices"]]
    assert ids(records) == [number for run in told for number in run]
    assert [(tag, len(run)) for tag, run in channels(records)] == [
        ("marker", 1), ("reasoning", 4), ("marker", 1), ("answer", 3)
    ]  # fmt: skip


async def test_two_choices_go_their_own_ways(client: PluginClient, script: Script) -> None:
    request = script("<think>a</think>One.", "Two, and no thought.")
    records = await client.over(await client.open(**chat(**request)))
    assert ids(records, 0) == request["vllm_xargs"]["script"]
    assert ids(records, 1) == request["vllm_xargs"]["script_1"]
    assert [tag for tag, _ in channels(records, 0)] == ["marker", "reasoning", "marker", "answer", "marker"]
    assert [tag for tag, _ in channels(records, 1)] == ["answer", "marker"]
    assert {finish(records, 0).cause, finish(records, 1).cause} == {"eos"}


async def test_sixteen_streams_at_once_share_their_messages(client: PluginClient, script: Script) -> None:
    texts = [f"{THINKING} {number}" for number in range(16)]
    requests = [script(text, pause_ms=5) for text in texts]
    numbers = [await client.open(**chat(**request)) for request in requests]
    for number, request in zip(numbers, requests, strict=True):
        assert ids(await client.over(number)) == request["vllm_xargs"]["script"]
    # One write an engine step: sixteen tokens in each, but for the steps at the start, where requests join one by one.
    tokens = sum(len(request["vllm_xargs"]["script"]) for request in requests)
    assert client.messages < tokens / 4


async def test_causes(client: PluginClient, engine: Engine, script: Script) -> None:
    words = script("one two three four", eos=False)
    third = words["vllm_xargs"]["script"][2]
    second_end = script("Hi<|endoftext|>", eos=False)
    again = {"max_pattern_size": 4, "min_count": 3}
    wanted = {
        "max_tokens": (chat(**words, max_tokens=3), "length", None, "answer"),
        "stop_token": (chat(**words, stop_token_ids=[third]), "stop", third, "marker"),
        "eos": (chat(**second_end), "stop", second_end["vllm_xargs"]["script"][-1], "marker"),
        "repetition": (
            chat(**script("ha", eos=False), repetition_detection=again),
            "repetition",
            "repetition_detected",
            "answer",
        ),
    }
    for cause, (request, reason, stop, last) in wanted.items():
        records = await client.over(await client.open(**request))
        end = finish(records)
        assert (end.cause, end.reason, end.stop, channels(records)[-1][0]) == (cause, reason, stop, last)


async def test_cached_tokens_are_told(client: PluginClient, script: Script) -> None:
    messages = [{"role": "user", "content": "The same long prompt for both. " * 20}]
    cached = []
    for _ in range(2):
        records = await client.over(await client.open(**chat(**script("Hi"), messages=messages)))
        cached.append(begin(records).cached_tokens)
    assert cached[0] == 0
    assert cached[1] > 100


# --- Ends before the end ------------------------------------------------------------------------------


async def test_an_abort_stops_the_engine_at_once(client: PluginClient, engine: Engine, script: Script) -> None:
    number = await client.open(**chat(**script("on and on ", eos=False, pause_ms=20), max_tokens=1000))
    other = await client.open(**chat(**script("short", pause_ms=20)))
    await client.tokens(number, 3)
    assert await running_requests(engine) >= 1
    await client.abort(number)
    await client.over(other)
    await assert_idle(engine)
    heard = len(client.records[number])
    last = await client.open(**chat(**script("later")))
    await client.over(last)
    assert len(client.records[number]) == heard
    assert not isinstance(client.records[number][-1], (End, EngineFailed, Lost))


async def test_whoever_leaves_takes_its_streams_along(engine: Engine, script: Script, direct: Caller) -> None:
    async with connected(engine.url) as client:
        for _ in range(8):
            number = await client.open(**chat(**script("on and on ", eos=False, pause_ms=20), max_tokens=1000))
        await client.tokens(number, 2)
        assert (await capabilities(direct))["open_streams"] == 8
    await assert_idle(engine)
    assert (await capabilities(direct))["open_streams"] == 0


async def test_a_request_in_the_queue_is_aborted_too(client: PluginClient, engine: Engine, script: Script) -> None:
    slow = script("slow", eos=False, pause_ms=100)
    numbers = [await client.open(**chat(**slow, max_tokens=200)) for _ in range(70)]
    await client.tokens(numbers[0], 1)
    for number in numbers:
        await client.abort(number)
    await assert_idle(engine)
    assert await asyncio.to_thread(engine.waiting_requests) == 0


async def test_an_engine_error_in_the_middle_is_the_one_of_vllms_own_route(
    client: PluginClient, direct: Caller, script: Script
) -> None:
    broken = script('{"a": nonsense', eos=False)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    request = chat(**broken, response_format=schema, chat_template_kwargs={"enable_thinking": False})
    *_, failed = await client.over(await client.open(**request))
    assert isinstance(failed, EngineFailed)
    plain = await direct.chat(**{**request, "stream": True})
    [error] = [chunk for chunk in plain.chunks if "error" in chunk]
    assert (failed.status, json.loads(failed.body)) == (error["error"]["code"], error)


async def test_a_sidecar_that_does_not_read_loses_its_streams_and_no_other(
    client: PluginClient, engine: Engine, script: Script, direct: Caller
) -> None:
    endless = chat(**script("on and on ", eos=False, pause_ms=20), max_tokens=1500)
    async with unread(engine.url) as stalled:
        await stalled.send_json({"op": "open", "stream": 1, "request": endless, "family": QWEN})
        await until(lambda: is_running(engine))
        await fill(stalled, direct)
        await assert_idle(engine)
        told = await capabilities(direct)
        assert told["lost_streams"] > 1
        assert told["outbox_bytes"] <= 4 * 1024 * 1024
        # The other connection never noticed.
        fine = script(THINKING)
        assert ids(await client.over(await client.open(**chat(**fine)))) == fine["vllm_xargs"]["script"]
        late = PluginClient(stalled)
        listening = asyncio.create_task(late.listen())
        assert (await late.over(1))[-1] == Lost(1, 1)
        listening.cancel()


async def fill(connection: aiohttp.ClientWebSocketResponse, direct: Caller) -> None:
    """Lets the plugin say so much that neither it nor the system can hold more: refusals carry the model's name."""
    numbers = count(2)
    async with asyncio.timeout(30):
        while (await capabilities(direct))["open_streams"]:
            for size in (200_000, 200_000, 3000, 50):
                request = chat(model="x" * size)
                refused = {"op": "open", "stream": next(numbers), "request": request, "family": QWEN}
                await connection.send_json(refused)


@asynccontextmanager
async def unread(url: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A connection that nobody reads yet, and of which the system keeps little."""

    def small(address: AddrInfoType) -> socket.socket:
        made = socket.socket(*address[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return made

    connector = aiohttp.TCPConnector(socket_factory=small)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.ws_connect(f"{url}/v1/penstock/streams", max_msg_size=0) as connection,
    ):
        yield connection


async def is_running(engine: Engine) -> bool:
    return await running_requests(engine) > 0


# --- Refusals -------------------------------------------------------------------------------------------

BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "unknown model": {"model": "nobody"},
    "no messages": {"messages": None},
    "messages that are a number": {"messages": 3},
    "a message without a role": {"messages": [{"content": "hi"}]},
    "too long": {"messages": [{"role": "user", "content": "word " * 5000}]},
    "too many tokens": {"max_tokens": 10_000_000},
    "a temperature below zero": {"temperature": -1},
    "several choices without chance": {"n": 2, "temperature": 0},
    "a script that is none": {"vllm_xargs": {"script": ["a"]}},
    "a regular expression that is none": {"structured_outputs": {"regex": "("}},
    "a grammar that is none": {"structured_outputs": {"grammar": "root ::= ("}},
    "a schema that is none": {"response_format": {"type": "json_schema"}},
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_a_bad_request_is_refused_in_vllms_own_words(client: PluginClient, direct: Caller, case: str) -> None:
    request = {**chat(), **BAD_REQUESTS[case]}
    refused = await client.refusal(await client.open(**request))
    plain = await direct.post("/v1/chat/completions", {**request, "stream": True})
    # What shows only inside the generation is an error frame on vLLM's route; here it is still a refusal.
    error = plain.chunks[0] if plain.status == 200 else plain.json
    assert refused == (error["error"]["code"], error)


async def test_what_needs_text_is_refused_and_the_connection_goes_on(client: PluginClient, script: Script) -> None:
    status, body = await client.refusal(await client.open(**chat(stop=["x"])))
    assert (status, body["error"]["type"], body["error"]["param"]) == (422, "penstock_needs_text", "stop")
    await client.over(await client.open(**chat(**script("Hi"))))


async def test_another_version_of_frames_is_refused_at_the_door(engine: Engine) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{engine.url}/v1/penstock/streams", params={"frames": "2"})
    assert refused.value.status == 403


async def test_a_message_that_the_contract_does_not_know_closes_the_connection(client: PluginClient) -> None:
    await client.socket.send_str('{"op": "dance", "stream": 1}')
    await until(lambda: client.socket.closed)
    assert client.socket.close_code == 1008


# --- Beside vLLM's own routes ---------------------------------------------------------------------------


async def test_requests_of_one_id_are_not_mixed_up(engine: Engine, direct: Caller, script: Script) -> None:
    """The same `X-Request-Id` on two connections and on vLLM's own route, all at once."""
    same = {"X-Request-Id": "the-same"}
    said = [script(text, pause_ms=5) for text in ("The first.", "A second one.", "And a third one here.")]
    async with connected(engine.url) as one, connected(engine.url) as other:
        plain = asyncio.create_task(direct.chat(headers=same, stream=True, return_token_ids=True, **said[2]))
        numbers = [await one.open(same, **chat(**said[0])), await other.open(same, **chat(**said[1]))]
        assert ids(await one.over(numbers[0])) == said[0]["vllm_xargs"]["script"]
        assert ids(await other.over(numbers[1])) == said[1]["vllm_xargs"]["script"]
        answer = await plain
        assert answer.status == 200, answer.body
        choices = [choice for chunk in answer.chunks for choice in chunk["choices"]]
    assert [number for choice in choices for number in choice.get("token_ids") or ()] == said[2]["vllm_xargs"]["script"]


async def test_capabilities(direct: Caller, engine: Engine) -> None:
    told = await capabilities(direct)
    assert told["frames"] == [1]
    assert told["vllm"] == await asyncio.to_thread(engine.version)
    assert told["models"] == ["tiny", "tiny-parsed"]
    assert told["max_model_len"] == 2048
    assert told["hooks"]["output_tap"] is True
    assert "output_tap" not in told["problems"]
    assert told["tokenizer"]["fast"] is True
    assert (await capabilities(direct))["instance"] == told["instance"]


async def test_the_tokenizer_is_the_engines_own(direct: Caller, engine: Engine) -> None:
    answer = await direct.get("/v1/penstock/tokenizer")
    sent = answer.json
    digest = (await capabilities(direct))["tokenizer"]["digest"]
    assert sent["digest"] == digest == "sha256:" + hashlib.sha256(sent["tokenizer_json"].encode()).hexdigest()
    said = engine.script(EMOJI)
    decoded = Tokenizer.from_str(sent["tokenizer_json"]).decode(said)
    assert decoded == EMOJI
    again = await direct.get("/v1/penstock/tokenizer", {"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
