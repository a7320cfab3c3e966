"""The connection to the plugin, over a real WebSocket: found, used, lost, found again; and who pays for what."""

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat
from typing import Any

import aiohttp
import pytest
from yarl import URL

from penstock import app
from penstock.core.errors import EngineError
from penstock.core.families import FAMILIES
from penstock.core.frames import Begin, EngineFailed, Finish, Lost, Record, Tag, Tokens
from penstock.core.verifier import parse_log, verify
from penstock.settings import load_settings
from penstock.shell import tagged
from penstock.shell.tagged import PluginConnection
from support.fake_plugin import PLAIN_ANSWER, PROMPT_TOKENS, FakePlugin, OpenedStream, fake_plugin, socket_path
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, calling, chat
from support.sidecar import Sidecar, sidecar
from support.sockets import RawClient, connections, raw_request, settled, until
from support.tokenizers_made import made

pytestmark = pytest.mark.usefixtures("no_blocking_calls", "quick_retries")

CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
OVERLOADED = {"error": {"message": "too busy", "type": "ServiceUnavailable", "param": None, "code": 503}}


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tagged, "RETRY_SECONDS", (0.02,))


@pytest.fixture
def never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lost stays lost for the length of a test."""
    monkeypatch.setattr(tagged, "RETRY_SECONDS", (60.0,))


@dataclass(frozen=True)
class Setup:
    """Penstock with a caller before it and the stand-in behind it."""

    plugin: FakePlugin
    caller: Caller
    sidecar: Sidecar

    @property
    def is_connected(self) -> bool:
        connection = self.sidecar.server.cluster.members[0].engine.plugin
        return connection is not None and connection.vocabulary is not None

    async def asks(
        self, *accept: str, route: str = STREAMS, **request: Any
    ) -> tuple[asyncio.Task[Answer], OpenedStream]:
        """A request on its way to the plugin: its answer to come, and what the plugin has got."""
        before = len(self.plugin.opens)
        headers = {"Accept": accept[0]} if accept else {}
        answer = asyncio.create_task(self.caller.post(route, chat(stream=True, **request), headers))
        return answer, (await self.plugin.opened(before + 1))[before]

    async def loses_and_finds_it(self) -> None:
        before = self.plugin.connected
        self.plugin.drop()
        await until(lambda: self.plugin.connected > before and self.is_connected)

    async def uses_plain_chunks(self, **request: Any) -> bool:
        opens, plain = len(self.plugin.opens), self.plugin.plain_requests()
        answer = await self.caller.chat(**request)
        assert PLAIN_ANSWER.encode() in answer.body
        assert self.plugin.plain_requests() == plain + 1
        return len(self.plugin.opens) == opens


@asynccontextmanager
async def in_front_of(plugin: FakePlugin, upstream: Json | None = None, **flags: Any) -> AsyncIterator[Setup]:
    async with (
        sidecar(plugin.url, {"plugin": "auto", **(upstream or {})}, **flags) as running,
        calling(running.url) as caller,
    ):
        yield Setup(plugin, caller, running)


@pytest.fixture
async def plugin() -> AsyncIterator[FakePlugin]:
    async with fake_plugin() as running:
        yield running


@pytest.fixture
async def setup(plugin: FakePlugin) -> AsyncIterator[Setup]:
    async with in_front_of(plugin) as running:
        yield running


# --- Found ------------------------------------------------------------------------------------------


async def test_a_stream_comes_as_tagged_tokens(setup: Setup) -> None:
    answer, stream = await setup.asks()
    await setup.plugin.send(stream.begin(), *stream.says("Hello"))
    await setup.plugin.send(*stream.says(" you"), *stream.ends())
    told = await answer
    assert told.text() == "Hello you"
    assert (told.usage["prompt_tokens"], told.usage["estimated"]) == (PROMPT_TOKENS, False)
    assert told.finish()["cause"] == "eos"
    assert setup.plugin.plain_requests() == 0


@pytest.mark.parametrize("accept", [SSE, NDJSON, FOLDED])
async def test_every_form_of_an_answer(setup: Setup, accept: str) -> None:
    answer, stream = await setup.asks(accept)
    await setup.plugin.send(*stream.whole("Hello 👧"))
    told = await answer
    assert told.status == 200
    assert (told.json["choices"][0]["text"] if accept == FOLDED else told.text()) == "Hello 👧"


async def test_the_openai_dialect(setup: Setup) -> None:
    answer, stream = await setup.asks(route=CHAT, stream_options={"include_usage": True})
    await setup.plugin.send(*stream.whole("Hello"))
    told = await answer
    said = [choice["delta"].get("content") for chunk in told.chunks for choice in chunk["choices"]]
    assert "".join(text or "" for text in said) == "Hello"
    assert told.chunks[-1]["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert told.body.endswith(b"data: [DONE]\n\n")


async def test_what_the_plugin_is_asked(plugin: FakePlugin) -> None:
    async with in_front_of(plugin, {"api_key": "secret"}) as setup:
        answer, stream = await setup.asks(model="gpt-oss", temperature=0.5)
        await plugin.send(*stream.whole("Hi"))
        told = await answer
    paths = [path for path, _ in plugin.asked]
    assert paths == ["/v1/penstock/capabilities", "/v1/penstock/tokenizer", "/v1/penstock/streams?frames=1"]
    for _, headers in plugin.asked:
        assert headers["Authorization"] == "Bearer secret"
    assert "Sec-WebSocket-Extensions" not in plugin.asked[2][1], "compression is never negotiated"
    assert stream.request["temperature"] == 0.5
    assert stream.request["messages"] == chat()["messages"]
    assert "penstock" not in stream.request
    assert stream.headers["X-Request-Id"] == told.headers["X-Stream-Id"]
    assert stream.family["start"] == "between"
    assert stream.family["states"]["header"]["on"] == {"<|message|>": "answer"}
    assert stream.family["states"]["header"]["headers"][-1] == ["", "answer"]
    assert stream.family["states"]["between"]["otherwise"] == "answer"


async def test_each_stream_has_a_number_of_its_own_also_after_a_lost_connection(setup: Setup) -> None:
    streams = [(await setup.asks())[1] for _ in range(3)]
    await setup.loses_and_finds_it()
    streams.append((await setup.asks())[1])
    assert len({stream.number for stream in streams}) == 4
    assert all(stream.number > 0 for stream in streams)


@pytest.mark.parametrize(("asked", "named"), [("tiny-too", "tiny"), ("tiny", "tiny"), ("adapter", "adapter")])
async def test_a_model_is_called_as_vllm_calls_it(setup: Setup, asked: str, named: str) -> None:
    answer, stream = await setup.asks(model=asked)
    await setup.plugin.send(*stream.whole("Hi"))
    assert (await answer).one("stream.start")["model"] == named


async def test_over_a_unix_socket() -> None:
    with socket_path() as path:
        async with fake_plugin(unix_socket=path) as plugin, in_front_of(plugin, {"socket": str(path)}) as setup:
            answer, stream = await setup.asks()
            await plugin.send(*stream.whole("Hello"))
            assert (await answer).text() == "Hello"


# --- Not found, or of no use ------------------------------------------------------------------------


async def test_an_engine_without_the_plugin_speaks_in_plain_chunks(plugin: FakePlugin) -> None:
    plugin.capabilities = 404
    async with in_front_of(plugin) as setup:
        assert await setup.uses_plain_chunks()


async def test_a_plugin_that_comes_later_is_found(plugin: FakePlugin) -> None:
    found, plugin.capabilities = plugin.capabilities, 404
    async with in_front_of(plugin) as setup:
        assert not setup.is_connected
        plugin.capabilities = found
        await until(lambda: setup.is_connected)
        answer, stream = await setup.asks()
        await plugin.send(*stream.whole("Hello"))
        assert (await answer).text() == "Hello"


async def test_a_plugin_that_is_switched_off_here_is_never_asked(plugin: FakePlugin) -> None:
    async with in_front_of(plugin, {"plugin": "off"}) as setup:
        assert await setup.uses_plain_chunks()
    assert plugin.asked == []


OF_NO_USE: dict[str, tuple[Json, str]] = {
    "other frames": ({"frames": [2]}, r"frames \[2\], this sidecar version 1"),
    "no tap": ({"hooks": {"output_tap": False}, "problems": {"output_tap": "a new signature"}}, "off: a new signature"),
    "no tap, no reason": ({"hooks": {}, "problems": {}}, "off: no reason given"),
    "no fast tokenizer": ({"tokenizer": {"fast": False, "digest": None}}, "no fast form"),
    "another digest": ({"tokenizer": {"fast": True, "digest": "sha256:0"}}, "not have the digest"),
    "no models": ({"models": None}, "not of the contract"),
    "no frames": ({"frames": None}, "not of the contract"),
    "no hooks": ({"hooks": []}, "not of the contract"),
    "no digest": ({"tokenizer": {"fast": True}}, "not of the contract"),
}


@pytest.mark.parametrize("name", OF_NO_USE)
async def test_a_plugin_of_no_use(plugin: FakePlugin, caplog: pytest.LogCaptureFixture, name: str) -> None:
    changes, words = OF_NO_USE[name]
    usable = dict(plugin.capabilities)
    plugin.capabilities |= changes
    with caplog.at_level(logging.INFO, "penstock"):
        async with in_front_of(plugin) as setup:
            assert await setup.uses_plain_chunks()
            await until(lambda: len(plugin.asked) > 3)
            await setup_recovers(setup, usable)
    said = [record.message for record in caplog.records if "plain chunks" in record.message]
    assert len(said) == 1, "it is said once, not at every attempt"
    assert re.search(words, said[0])


async def setup_recovers(setup: Setup, usable: Json) -> None:
    setup.plugin.capabilities = usable
    await until(lambda: setup.is_connected)


@pytest.mark.parametrize("answer", [500, b"<html>", b"[]", b"1", b"\xff"])
async def test_capabilities_that_are_none(plugin: FakePlugin, answer: Any) -> None:
    usable, plugin.capabilities = plugin.capabilities, answer
    async with in_front_of(plugin) as setup:
        assert await setup.uses_plain_chunks()
        await setup_recovers(setup, usable)


@pytest.mark.parametrize("answer", [500, b"<html>", b"[]", {}, {"tokenizer_json": 5}, {"tokenizer_json": "{}"}])
async def test_a_tokenizer_that_is_none(plugin: FakePlugin, answer: Any) -> None:
    usable, plugin.tokenizer_answer = plugin.tokenizer_answer, answer
    async with in_front_of(plugin) as setup:
        assert await setup.uses_plain_chunks()
        plugin.tokenizer_answer = usable
        await until(lambda: setup.is_connected)


async def test_the_tokenizer_is_fetched_once_for_its_digest(setup: Setup) -> None:
    for _ in range(2):
        await setup.loses_and_finds_it()
    paths = [path for path, _ in setup.plugin.asked]
    assert paths.count("/v1/penstock/capabilities") >= 3
    assert paths.count("/v1/penstock/tokenizer") == 1


FALL_BACK: dict[str, Json] = {
    "stop": {"stop": ["END"]},
    "logprobs": {"logprobs": True},
    "prompt logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True},
    "beam search": {"use_beam_search": True},
    "bad words": {"bad_words": ["x"]},
    "continues": {"continue_final_message": True},
    "one call at a time": {"parallel_tool_calls": False},
    "a named tool": {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a required tool": {"tool_choice": "required"},
}


@pytest.mark.parametrize("name", FALL_BACK)
async def test_what_only_the_engines_own_text_can_answer(setup: Setup, name: str) -> None:
    assert setup.is_connected
    assert await setup.uses_plain_chunks(stream=True, **FALL_BACK[name])


async def test_what_only_the_plugin_knows_to_need_the_engines_text(setup: Setup) -> None:
    """The server's own defaults may need it. The client sees nothing of the turn to plain chunks."""
    answer, stream = await setup.asks()
    error = {"message": "this server stops at strings", "type": "penstock_needs_text", "param": "stop", "code": 422}
    await setup.plugin.refuse(stream, 422, {"error": error})
    assert (await answer).text() == PLAIN_ANSWER
    assert (await answer).end["status"] == "completed"
    assert (setup.plugin.plain_requests(), setup.plugin.aborts) == (1, [])


async def test_a_client_that_leaves_after_the_turn_to_plain_chunks(plugin: FakePlugin) -> None:
    async with in_front_of(plugin) as setup:
        answer, stream = await setup.asks()
        plugin.keeps_silent = True
        await plugin.refuse(stream, 422, {"error": {"type": "penstock_needs_text"}})
        await until(lambda: plugin.plain_requests() == 1)
        answer.cancel()
        await until(lambda: setup.sidecar.server.open_streams == 0)


async def test_an_answer_that_is_not_streamed_is_the_engines_own(setup: Setup) -> None:
    assert setup.is_connected
    assert await setup.uses_plain_chunks()


@pytest.mark.parametrize("extra", [{"stop": []}, {"logprobs": False}, {"tool_choice": "auto"}, {"echo": False}])
async def test_what_asks_for_nothing_special_does_not_fall_back(setup: Setup, extra: Json) -> None:
    answer, stream = await setup.asks(**extra)
    await setup.plugin.send(*stream.whole("Hello"))
    assert (await answer).text() == "Hello"


# --- Refused, failed, lost --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 429, 503])
async def test_a_refusal_has_vllms_own_status_and_words(setup: Setup, status: int) -> None:
    body = {"error": {"message": "no such thing", "type": "BadRequestError", "param": "x", "code": status}}
    native, stream = await setup.asks()
    await setup.plugin.refuse(stream, status, body)
    openai, stream = await setup.asks(route=CHAT)
    await setup.plugin.refuse(stream, status, body)
    assert ((await native).status, (await native).error["message"]) == (status, "no such thing")
    assert ((await openai).status, (await openai).json) == (status, body)
    assert setup.is_connected


async def test_a_refusal_after_the_head_is_an_error_in_the_stream(plugin: FakePlugin) -> None:
    async with (
        in_front_of(plugin, timing__first_byte_seconds=0.05) as setup,
        setup.caller.opened(STREAMS, chat()) as response,
    ):
        [stream] = await plugin.opened(1)
        await plugin.refuse(stream, 503, OVERLOADED)
        events = parse_log(await response.read())
    [error] = [event for event in events if event["type"] == "error"]
    assert (error["code"], error["message"]) == ("engine_refused", "too busy")


async def test_an_error_before_and_after_the_first_token(setup: Setup) -> None:
    def failed(stream: OpenedStream) -> EngineFailed:
        return EngineFailed(stream.number, 503, json.dumps(OVERLOADED).encode())

    early, stream = await setup.asks(route=CHAT)
    await setup.plugin.send(failed(stream))
    late, stream = await setup.asks()
    await setup.plugin.send(stream.begin(), *stream.says("Hel"))
    await setup.plugin.send(failed(stream))
    assert ((await early).status, (await early).json) == (503, OVERLOADED)
    assert ((await late).status, (await late).one("error")["message"]) == (200, "too busy")
    assert (await late).text() == "Hel"
    assert setup.plugin.aborts == [], "the engine ended them itself"


async def test_a_stream_that_the_plugin_lost(setup: Setup) -> None:
    answer, stream = await setup.asks()
    other, others_stream = await setup.asks()
    await setup.plugin.send(stream.begin(), *stream.says("Hel"), others_stream.begin())
    await setup.plugin.send(Lost(stream.number, 1), *others_stream.says("Hello"), *others_stream.ends())
    assert (await answer).one("error")["code"] == "engine_outbox_full"
    assert (await other).text() == "Hello"


async def test_a_lost_connection_ends_its_streams_and_is_found_again(setup: Setup) -> None:
    begun, stream = await setup.asks()
    waiting, _ = await setup.asks(route=CHAT)
    await setup.plugin.send(stream.begin(), *stream.says("Hel"))
    await setup.loses_and_finds_it()
    error = (await begun).one("error")
    assert (error["code"], error["retryable"], error["origin"]) == ("engine_gone", True, "upstream")
    assert (await begun).text() in ("", "Hel")
    assert ((await waiting).status, (await waiting).error["code"]) == (502, "engine_gone")
    again, stream = await setup.asks()
    await setup.plugin.send(*stream.whole("Hello"))
    assert (await again).text() == "Hello"


async def test_what_cannot_be_sent_any_more_is_nobodys_fault(
    early_head: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that breaks ends its streams by itself, so that an abort may fail to be sent."""
    tried = asyncio.Event()

    async def broken(*_: object) -> None:
        tried.set()
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    async with early_head.caller.opened(STREAMS, chat()):
        await early_head.plugin.opened(1)
        monkeypatch.setattr(aiohttp.ClientWebSocketResponse, "send_str", broken)
    await asyncio.wait_for(tried.wait(), 5)
    await until(lambda: early_head.sidecar.server.open_streams == 0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_connection_that_is_not_there_opens_nothing() -> None:
    async with aiohttp.ClientSession() as session:
        connection = PluginConnection(session, URL("http://127.0.0.1:1"), {}, "engine")
        assert connection.vocabulary is None
        told: list[EngineError] = []
        with pytest.raises(EngineError, match="has gone") as gone:
            connection.open(b"{}", {}, FAMILIES[0], Deaf(told))
    assert (gone.value.code, told) == ("engine_gone", [])


class Deaf:
    """A listener that keeps what it was told of a broken connection."""

    def __init__(self, told: list[EngineError]) -> None:
        self._told = told

    def records(self, records: list[Record], now: float) -> None:
        raise AssertionError

    def refused(self, status: int, body: bytes) -> None:
        raise AssertionError

    def broke(self, problem: EngineError) -> None:
        self._told.append(problem)


async def test_a_fault_of_our_own_is_logged_and_does_not_end_the_search(
    plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(tagged, "RETRY_SECONDS", (0.02,))
        raise ZeroDivisionError

    monkeypatch.setattr(tagged, "_checked", broken)
    async with in_front_of(plugin) as setup:
        await until(lambda: setup.is_connected)
    assert "internal error in the connection to the plugin" in caplog.text


@pytest.mark.usefixtures("never_again")
async def test_without_a_connection_requests_are_served_in_plain_chunks(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tagged, "RETRY_SECONDS", (60.0,))
    setup.plugin.drop()
    await until(lambda: not setup.is_connected)
    assert await setup.uses_plain_chunks()
    assert PLAIN_ANSWER in (await setup.caller.stream()).text()


# --- What is not of the contract --------------------------------------------------------------------

AGAINST_THE_CONTRACT: dict[str, bytes | str] = {
    "another version": b"\x02",
    "another kind": b"\x01\x09\x01\0\0\0",
    "no bytes": b"",
    "cut": b"\x01\x04\x01",
    "too large": bytes(17 * 2**20),
    "no JSON": "{",
    "no refusal": "{}",
    "a list": "[]",
    "no number": '{"op": "refused", "stream": [], "status": 400, "body": {}}',
    "no status": '{"op": "refused", "stream": 1, "status": null, "body": {}}',
}


@pytest.mark.parametrize("name", AGAINST_THE_CONTRACT)
async def test_a_plugin_that_breaks_the_contract_is_not_used_any_more(
    setup: Setup, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    begun, stream = await setup.asks()
    await setup.plugin.send(stream.begin(), *stream.says("Hel"))
    with suppress(ConnectionError):  # who reads no further closes while a large message is on its way
        await setup.plugin.send_raw(AGAINST_THE_CONTRACT[name])
    assert (await begun).one("error")["code"] == "engine_gone"
    await until(lambda: setup.plugin.connections == 0)
    asked = len(setup.plugin.asked)
    await until(lambda: len(setup.plugin.asked) > asked + 3)
    assert await setup.uses_plain_chunks()
    assert setup.plugin.connections == 0
    assert [record.message for record in caplog.records if record.levelno > logging.WARNING] == []
    assert "plugin 0.1.0 broke the contract" in caplog.text
    setup.plugin.capabilities["plugin"] = "0.1.1"
    await until(lambda: setup.is_connected)


async def test_records_against_the_order_end_their_stream_only(setup: Setup) -> None:
    wrong, stream = await setup.asks()
    right, others_stream = await setup.asks()
    await setup.plugin.send(*stream.says("before it began"), *others_stream.whole("Hello"))
    assert (await wrong).error["code"] == "engine_malformed"
    assert (await right).text() == "Hello"
    await until(lambda: setup.plugin.aborts == [stream.number])


async def test_records_of_streams_that_nobody_opened_are_nothing(setup: Setup) -> None:
    answer, stream = await setup.asks()
    unknown: list[Record] = [Begin(4_000_000, 1, 0, ()), Tokens(4_000_000, 0, Tag.ANSWER, (1,)), Lost(0, 1)]
    await setup.plugin.refuse(OpenedStream(4_000_000, {}, {}, {}), 400, {})
    await setup.plugin.send(*unknown, *stream.whole("Hello"), *unknown)
    assert (await answer).text() == "Hello"
    assert setup.is_connected


async def test_what_a_client_sends_does_not_break_the_connection_of_all(setup: Setup) -> None:
    """The plugin closes the connection over a header that is not ASCII."""
    task = asyncio.create_task(setup.caller.post(STREAMS, chat(), {"Authorization": "Bearer ü"}))
    [stream] = await setup.plugin.opened(1)
    await setup.plugin.send(*stream.whole("Hello"))
    assert (await task).text() == "Hello"
    assert "Authorization" not in stream.headers


async def test_a_request_that_is_too_large_for_a_message_is_refused_alone(
    plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's server would close the connection over it."""
    monkeypatch.setattr(tagged, "_MOST_REQUEST_BYTES", 1000)
    async with in_front_of(plugin) as setup:
        answer = await setup.caller.stream(messages=[{"role": "user", "content": "x" * 1000}])
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert setup.is_connected
        assert plugin.opens == []


# --- Stopped ----------------------------------------------------------------------------------------


@pytest.fixture
async def early_head(plugin: FakePlugin) -> AsyncIterator[Setup]:
    """Penstock that sends its head at once."""
    async with in_front_of(plugin, timing__first_byte_seconds=0.01) as running:
        yield running


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_stops_its_stream_in_the_engine(early_head: Setup, begun: bool) -> None:
    setup = early_head
    async with setup.caller.opened(STREAMS, chat()) as response:
        [stream] = await setup.plugin.opened(1)
        if begun:
            await setup.plugin.send(stream.begin(), *stream.says("Hel"))
            await response.content.readany()
    await until(lambda: setup.plugin.aborts == [stream.number])
    await setup.plugin.send(*stream.says("lo"), *stream.ends())
    await until(lambda: setup.sidecar.server.open_streams == 0)
    assert setup.is_connected


async def test_a_client_that_leaves_before_the_head_stops_its_stream_too(setup: Setup) -> None:
    task = asyncio.create_task(setup.caller.stream())
    [stream] = await setup.plugin.opened(1)
    task.cancel()
    await until(lambda: setup.plugin.aborts == [stream.number])


async def test_a_stream_that_is_cancelled_stops_in_the_engine(early_head: Setup) -> None:
    setup = early_head
    async with setup.caller.opened(STREAMS, chat(), {"Accept": NDJSON}) as response:
        [stream] = await setup.plugin.opened(1)
        await setup.plugin.send(stream.begin(), *stream.says("Hel"))
        first = await response.content.readany()
        assert (await setup.caller.delete(response.headers["X-Stream-Id"])).status == 204
        events = parse_log(first + await response.read())
    assert verify(events) == []
    assert events[-1]["status"] == "cancelled"
    await until(lambda: setup.plugin.aborts == [stream.number])


async def test_penstocks_own_stop_string_stops_the_engine(setup: Setup) -> None:
    answer, stream = await setup.asks(penstock={"stop": ["END"]})
    await setup.plugin.send(stream.begin(), *stream.says("One END two"))
    assert (await answer).text() == "One "
    await until(lambda: setup.plugin.aborts == [stream.number])


async def test_a_stream_that_ended_by_itself_is_not_aborted(setup: Setup) -> None:
    answer, stream = await setup.asks()
    await setup.plugin.send(*stream.whole("Hello"))
    await answer
    later, stream = await setup.asks()
    await setup.plugin.send(*stream.whole("Hello"))
    await later
    assert setup.plugin.aborts == []


async def test_a_plugin_that_is_frozen_does_not_hold_up_the_end_of_penstock(plugin: FakePlugin) -> None:
    plugin.is_deaf = True
    clock = asyncio.get_running_loop()
    async with in_front_of(plugin) as setup:
        assert setup.is_connected
        ending = clock.time()
    assert clock.time() - ending < 3


async def test_a_plugin_that_does_not_answer_does_not_hold_up_plain_chunks(plugin: FakePlugin) -> None:
    plugin.capabilities = None
    flags = {"upstreams": [{"url": plugin.url}], "listen.port": 0, "timing.drain_seconds": 0}
    async with app.running(load_settings(environment={}, flags=flags)) as (server, url), calling(url) as caller:
        await until(lambda: len(plugin.asked) == 1)
        assert PLAIN_ANSWER in (await caller.stream()).text()
        assert server.cluster.members[0].engine.plugin is not None
        assert server.cluster.members[0].engine.plugin.vocabulary is None


async def test_a_plugin_that_does_not_open_its_socket_is_asked_again(
    plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tagged, "_ANSWER_SECONDS", 0.1)
    plugin.is_mute = True
    async with in_front_of(plugin) as setup:
        assert await setup.uses_plain_chunks()
        plugin.is_mute = False
        await until(lambda: setup.is_connected)


# --- Many, and slow ---------------------------------------------------------------------------------


async def test_hundreds_of_streams_in_one_message(setup: Setup) -> None:
    count = 300
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        caller = Caller(setup.caller.url, session)
        answers = [asyncio.create_task(caller.stream(NDJSON, user=f"{number}")) for number in range(count)]
        streams = await setup.plugin.opened(count)
        assert len(streams) == count
        for word in ("Hello", " you", " number"):
            begins = [stream.begin() for stream in streams] if word == "Hello" else []
            await setup.plugin.send(*begins, *(record for stream in streams for record in stream.says(word)))
        lasts = [[*stream.says(f" {stream.request['user']}"), *stream.ends()] for stream in streams]
        await setup.plugin.send(*(record for last in lasts for record in last))
        logs = [parse_log((await answer).body) for answer in answers]
    assert [text_of(log) for log in logs] == [f"Hello you number {number}" for number in range(count)]
    assert [verify(log) for log in logs] == [[]] * count


LINE = "All work and no play makes Jack a dull boy, and that is that. " * 40


def big_steps(stream: OpenedStream) -> Iterator[list[Record]]:
    """Numbered steps of some 2.5 kB of text each, without end."""
    line = stream.says(LINE)
    number = 0
    while True:
        yield [*stream.says(f"<{number}>"), *line]
        number += 1


async def test_steps_that_wait_are_walked_through_at_once(setup: Setup) -> None:
    """A sidecar that is behind catches up: what has come already costs one walk and one write."""
    answer, stream = await setup.asks()
    await setup.plugin.send(stream.begin())
    for _ in range(100):
        await setup.plugin.send(*stream.says("Hello "))
    await setup.plugin.send(*stream.ends())
    assert (await answer).text() == "Hello " * 100
    assert len((await answer).of("delta.text")) < 50


async def test_a_client_that_stalls_is_cut_off_and_the_others_go_on(
    plugin: FakePlugin, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing lingers its stream ends with it, long before the cap on its bytes."""
    caplog.set_level("INFO", "penstock")
    bounds: dict[str, Any] = {"limits__buffer_bytes": 65536, "timing__closing_seconds": 0.3, "store__linger_seconds": 0}
    async with in_front_of(plugin, **bounds) as setup:
        async with not_reading(setup):
            [stalled] = await plugin.opened(1)
            other, stream = await setup.asks()
            await plugin.send(stalled.begin(), stream.begin())
            steps = big_steps(stalled)
            clock = asyncio.get_running_loop()
            deadline = clock.time() + 20
            while not plugin.aborts and clock.time() < deadline:
                await plugin.send(*next(steps), *stream.says("Hello "))
                await asyncio.sleep(0)
            assert plugin.aborts == [stalled.number]
            assert "ended client_too_slow" in caplog.text
            await plugin.send(*stream.ends())
            told = await other
            assert set(told.text().split()) == {"Hello"}
            assert told.end["status"] == "completed"
        await until(lambda: setup.sidecar.server.open_streams == 0)


async def test_a_client_that_was_cut_off_can_read_why(plugin: FakePlugin) -> None:
    """Where nothing is kept, the stream ends with its client, whose last bytes say so."""
    unkept = in_front_of(plugin, limits__buffer_bytes=65536, store__retention_seconds=0)
    async with unkept as setup, not_reading(setup) as client:
        [stalled] = await plugin.opened(1)
        await plugin.send(stalled.begin())
        steps = big_steps(stalled)
        while not plugin.aborts:
            await plugin.send(*next(steps))
            await asyncio.sleep(0)
        events = events_of(await client.read_until(b"0\r\n\r\n"))
    assert verify(events) == []
    [error] = [event for event in events if event["type"] == "error"]
    assert (error["code"], error["retryable"]) == ("client_too_slow", True)
    assert_in_order(events)


async def test_a_client_that_reads_late_gets_every_byte_in_order(plugin: FakePlugin) -> None:
    async with in_front_of(plugin, limits__buffer_bytes=2**21) as setup, not_reading(setup) as client:
        [stream] = await plugin.opened(1)
        await plugin.send(stream.begin())
        for step in islice(big_steps(stream), 200):
            await plugin.send(*step)
        await plugin.send(*stream.ends())
        assert await settled(lambda: setup.sidecar.server.open_streams, seconds=0.2) == 1, "it waits for its client"
        events = events_of(await client.read_until(b"0\r\n\r\n"))
    assert verify(events) == []
    assert events[-1]["status"] == "completed"
    assert_in_order(events)
    assert plugin.aborts == []


@asynccontextmanager
async def not_reading(setup: Setup) -> AsyncIterator[RawClient]:
    """A client that does not read now; the kernel keeps little of what is sent to it."""
    body = json.dumps(chat()).encode()
    line = b"POST /v1/streams HTTP/1.1"
    async with raw_request(setup.caller.url, line, body=body, receive_bytes=2**14) as client:
        await setup.plugin.opened(1)
        for connection in connections(local_port=int(setup.caller.url.rpartition(":")[2])):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
            connection.close()
        yield client


def events_of(answer: bytes) -> list[Json]:
    """The log in a chunked answer, head and chunk sizes taken off."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            return parse_log(body)
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


def text_of(events: list[Json]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "delta.text")


def assert_in_order(events: list[Json]) -> None:
    """The steps that `big_steps` numbered, each once and all of them."""
    numbers = [int(piece.partition(">")[0]) for piece in text_of(events).split("<")[1:]]
    assert numbers == list(range(len(numbers)))
    assert all(later - earlier == 1 for earlier, later in pairwise(event["seq"] for event in events))


async def test_a_slow_client_of_many_bursts(plugin: FakePlugin) -> None:
    """What waits for a client goes out in order, and later steps never overtake it."""
    async with in_front_of(plugin, limits__buffer_bytes=2**21) as setup, not_reading(setup) as client:
        [stream] = await plugin.opened(1)
        await plugin.send(stream.begin())
        reading = asyncio.create_task(client.read_until(b"0\r\n\r\n"))
        for number, step in enumerate(islice(big_steps(stream), 150)):
            await plugin.send(*step)
            if number % 20 == 0:
                await asyncio.sleep(0.01)
        await plugin.send(*stream.ends())
        events = events_of(await reading)
    assert verify(events) == []
    assert_in_order(events)


# --- Time -------------------------------------------------------------------------------------------


async def test_silence_of_the_plugin_is_filled(plugin: FakePlugin) -> None:
    async with (
        in_front_of(plugin, timing__first_byte_seconds=0.05, timing__heartbeat_seconds=0.05) as setup,
        setup.caller.opened(STREAMS, chat()) as response,
    ):
        [stream] = await plugin.opened(1)
        wanted = b": ok\n\n" + 2 * b": heartbeat\n\n"
        assert await response.content.readexactly(len(wanted)) == wanted
        await plugin.send(*stream.whole("Hello"))
        assert verify(parse_log(await response.read())) == []


async def test_two_choices_of_which_one_is_cut(setup: Setup) -> None:
    answer, stream = await setup.asks(n=2)
    ids = tuple(made("qwen").bytewise("👧")[:2])
    await setup.plugin.send(stream.begin(), *stream.says("a"), *stream.says("b", 1))
    cut = Finish(stream.number, 1, "max_tokens", "length", None)
    await setup.plugin.send(Tokens(stream.number, 1, Tag.ANSWER, ids), cut, *stream.ends())
    told = await answer
    assert (told.text(0), told.text(1)) == ("a", "b")
    assert told.end["finish_reasons"] == ["stop", "length"]


# --- Several API server processes -------------------------------------------------------------------


@asynccontextmanager
async def with_processes(count: int, *takes: str) -> AsyncIterator[Setup]:
    """An engine of `count` API server processes, which take the connections in this order, the last one all others."""
    async with fake_plugin() as plugin:
        plugin.capabilities["processes"] = count
        plugin.instances = chain(takes, repeat(takes[-1]))
        async with in_front_of(plugin) as setup:
            yield setup


def loads(setup: Setup) -> Json:
    connection = setup.sidecar.server.cluster.members[0].engine.plugin
    assert connection is not None
    return connection.loads


async def test_streams_are_dealt_out_over_the_processes_of_an_engine() -> None:
    async with with_processes(2, "a", "b") as setup:
        await until(lambda: len(loads(setup)) == 2)
        answers, streams = zip(*[await setup.asks() for _ in range(6)], strict=True)
        assert loads(setup) == {"a": 3, "b": 3}
        assert len({stream.number for stream in streams}) == 6
        for stream in streams[:3]:
            await setup.plugin.send(*stream.whole("Hello"), to=stream.connection)
        await asyncio.gather(*answers[:3])
        answers += ((await setup.asks())[0],)
        for stream in setup.plugin.opens[3:]:
            await setup.plugin.send(*stream.whole("Hello"), to=stream.connection)
        assert [(await answer).text() for answer in answers] == ["Hello"] * 7
        assert loads(setup) == {"a": 0, "b": 0}


async def test_a_stream_is_aborted_where_it_was_opened() -> None:
    async with with_processes(2, "a", "b") as setup:
        await until(lambda: len(loads(setup)) == 2)
        first, stream = await setup.asks()
        second, _ = await setup.asks()
        first.cancel()
        await until(lambda: setup.plugin.aborts == [stream.number])
        assert sum(loads(setup).values()) == 1
        second.cancel()
        await until(lambda: len(setup.plugin.aborts) == 2)


async def test_connections_that_one_process_took_twice_are_given_back() -> None:
    async with with_processes(3, "a", "a", "b", "a", "c") as setup:
        await until(lambda: len(loads(setup)) == 3)
        await until(lambda: setup.plugin.connections == 3)
        assert setup.plugin.connected == 5


async def test_a_process_that_takes_no_connection_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "penstock"):
        async with with_processes(2, "a") as setup:
            await until(lambda: "connected to 1 of 2 API server processes" in caplog.text)
            answer, stream = await setup.asks()
            await setup.plugin.send(*stream.whole("Hello"), to=0)
            assert (await answer).text() == "Hello"
            setup.plugin.instances = repeat("b")
            await until(lambda: set(loads(setup)) == {"a", "b"})
            await until(lambda: setup.plugin.connections == 2)


async def test_a_process_that_dies_takes_its_own_streams_along_and_is_found_again() -> None:
    async with with_processes(2, "a", "b", "a") as setup:
        await until(lambda: len(loads(setup)) == 2)
        answers, streams = zip(*[await setup.asks() for _ in range(4)], strict=True)
        for stream in streams:
            await setup.plugin.send(stream.begin(), *stream.says("Hel"), to=stream.connection)
        setup.plugin.drop(streams[0].connection)
        gone = [stream.connection == streams[0].connection for stream in streams]
        assert sum(gone) == 2
        await until(lambda: len(loads(setup)) == 2 and setup.plugin.connected == 3)
        for stream, is_gone in zip(streams, gone, strict=True):
            if not is_gone:
                await setup.plugin.send(*stream.says("lo"), *stream.ends(), to=stream.connection)
        for answer, is_gone in zip(answers, gone, strict=True):
            told = await answer
            assert told.text() == ("Hel" if is_gone else "Hello")
            assert [error["code"] for error in told.of("error")] == (["engine_gone"] if is_gone else [])
        answer, stream = await setup.asks()
        await setup.plugin.send(*stream.whole("Hello"), to=stream.connection)
        assert (await answer).text() == "Hello"


async def test_one_process_against_the_contract_is_the_end_of_all_connections() -> None:
    async with with_processes(2, "a", "b") as setup:
        await until(lambda: len(loads(setup)) == 2)
        begun, _ = await setup.asks()
        await setup.plugin.send_raw(b"\x02", to=0)
        assert (await begun).error["code"] == "engine_gone"
        await until(lambda: setup.plugin.connections == 0)
        assert await setup.uses_plain_chunks()


async def test_after_all_processes_died_both_are_found_again() -> None:
    async with with_processes(2, "a", "b", "b", "b", "a") as setup:
        await until(lambda: len(loads(setup)) == 2)
        setup.plugin.drop()
        await until(lambda: setup.plugin.connected == 5)
        await until(lambda: len(loads(setup)) == 2)


@pytest.mark.parametrize("processes", [0, -1, "2", 1.5, True, 10_000])
async def test_a_number_of_processes_that_is_none(plugin: FakePlugin, processes: object) -> None:
    plugin.capabilities["processes"] = processes
    async with in_front_of(plugin) as setup:
        assert await setup.uses_plain_chunks()


@pytest.mark.parametrize("greeting", ["{", "[]", "{}", '{"op": "hello"}', b"\x01"])
async def test_a_greeting_that_is_none(plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch, greeting: Any) -> None:
    plugin.capabilities["processes"] = 2
    monkeypatch.setattr(plugin, "greeting", lambda _instance: greeting)
    async with in_front_of(plugin) as setup:
        assert await setup.uses_plain_chunks()
        await until(lambda: plugin.connections == 0)


async def test_of_an_engine_with_one_process_nothing_more_is_asked(setup: Setup) -> None:
    assert setup.plugin.asked[-1][0] == "/v1/penstock/streams?frames=1"
    assert setup.plugin.connected == 1
