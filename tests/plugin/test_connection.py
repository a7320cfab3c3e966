"""One sidecar's WebSocket: what it may say, what it is told, and that nothing of it is left when it goes."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.core.frames import Begin, End, EngineFailed, Finish, Record, Tokens, read_message
from penstock_vllm.channels import FamilyError, Table, Tables
from penstock_vllm.chat import Chat, ChatDoor, Refusal, refuse_if_text_is_needed, with_own_id
from penstock_vllm.connection import Connection, ContractError, _operation
from penstock_vllm.frames import LARGEST_STREAM
from penstock_vllm.streams import OpenStreams, Stream
from support.reference_tagger import FakeVocabulary
from support.sockets import until
from support.strategies import thorough

FAMILY = {"start": "answer", "states": {"answer": {"channel": "answer", "on": {}}}}
NOT_FOUND = {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}


class Socket:
    """The sidecar's end, as ASGI would have it."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: asyncio.Queue[bytes | str] = asyncio.Queue()
        self.closed: tuple[int, str | None] | None = None
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> dict[str, Any]:
        return await self.incoming.get()

    async def send_text(self, data: str) -> None:
        await self.reads.wait()
        self.sent.put_nowait(data)

    async def send_bytes(self, data: bytes) -> None:
        await self.reads.wait()
        self.sent.put_nowait(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.closed = (code, reason)

    def say(self, message: Any) -> None:
        self.incoming.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})

    def open(self, number: int, **request: Any) -> None:
        self.say({"op": "open", "stream": number, "request": request, "headers": {}, "family": FAMILY})

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def hears(self) -> Any:
        """The next message: records, or the JSON of a text."""
        message = await asyncio.wait_for(self.sent.get(), 5)
        return read_message(message) if isinstance(message, bytes) else json.loads(message)


class Door:
    """Stands for vLLM's chat handler; `ask` names what becomes of a request."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Future[Any]] = {}
        self.aborted: list[str] = []
        self.headers: Mapping[str, str] = {}
        self.load = 0

    async def open(self, request: Mapping[str, Any], headers: Mapping[str, str]) -> Chat:
        self.headers = headers
        match request.get("ask"):
            case "refuse":
                raise Refusal(404, NOT_FOUND)
            case "bug":
                raise RuntimeError("a bug")
            case "wait":
                await asyncio.get_running_loop().create_future()
        name = str(request.get("name", "a"))
        ended = self.running[name] = asyncio.get_running_loop().create_future()
        return Chat(name, self._results(name, ended), request.get("n", 1), frozenset(), False, True, False)

    async def _results(self, name: str, ended: asyncio.Future[Any]) -> AsyncGenerator[Any]:
        try:
            yield await ended
        except asyncio.CancelledError:
            self.aborted.append(name)
            raise

    async def refusal(self, error: Exception) -> Refusal:
        return Refusal(503, {"error": {"message": str(error), "type": "gone", "param": None, "code": 503}})

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.load += 1
        try:
            yield
        finally:
            self.load -= 1


class Plugin:
    """A connection with all that stands around it."""

    def __init__(self, most_bytes: int = 100_000) -> None:
        self.socket = Socket()
        self.door = Door()
        self.streams = OpenStreams()
        tables = Tables(FakeVocabulary([b"x"] * 100))
        door: Any = self.door
        self.connection = Connection(self.socket, door, self.streams, tables, most_bytes)

    async def stream(self, name: str = "a") -> Stream:
        """The stream of a request that the engine has taken."""
        await until(lambda: self.streams.of_request(name) is not None)
        stream = self.streams.of_request(name)
        assert stream is not None
        return stream

    async def step(self, name: str, *ids: int) -> None:
        stream = await self.stream(name)
        if not stream.has_begun:
            stream.begin((1, 2), 2, 0)
            self.streams.join(f"{name}-1", stream, 0)
        self.streams.choices[f"{name}-1"].tokens(ids)
        self.streams.commit()


@asynccontextmanager
async def running(plugin: Plugin) -> AsyncIterator[Plugin]:
    task = asyncio.create_task(plugin.connection.run())
    try:
        yield plugin
    finally:
        plugin.socket.leave()
        plugin.socket.reads.set()
        await asyncio.wait_for(task, 5)
        assert len(plugin.streams) == 0
        assert plugin.door.load == 0


@pytest.fixture
async def plugin() -> AsyncIterator[Plugin]:
    async with running(Plugin()) as started:
        yield started


def final(*reasons: str) -> SimpleNamespace:
    outputs = [SimpleNamespace(index=index, finish_reason=reason) for index, reason in enumerate(reasons)]
    return SimpleNamespace(outputs=outputs)


async def test_what_a_stream_generates_is_heard(plugin: Plugin) -> None:
    plugin.socket.open(7, name="a")
    await plugin.step("a", 5)
    heard: list[Record] = await plugin.socket.hears()
    assert [type(record) for record in heard] == [Begin, Tokens]
    assert plugin.door.load == 1


async def test_who_asks_is_told_first_which_process_answers() -> None:
    plugin = Plugin()
    plugin.connection.greet("this-one")
    plugin.socket.open(8, ask="refuse")
    async with running(plugin):
        assert await plugin.socket.hears() == {"op": "hello", "instance": "this-one"}
        assert (await plugin.socket.hears())["op"] == "refused"


async def test_an_abort_stops_the_engine_and_nothing_more_is_heard(plugin: Plugin) -> None:
    plugin.socket.open(7, name="a")
    await plugin.step("a", 5)
    await plugin.socket.hears()
    plugin.socket.say({"op": "abort", "stream": 7})
    await until(lambda: plugin.door.aborted == ["a"])
    await until(lambda: len(plugin.streams) == 0)
    plugin.socket.open(8, name="b")
    await plugin.step("b", 5)
    assert {record.stream for record in await plugin.socket.hears()} == {8}


async def test_an_abort_before_the_engine_took_the_request(plugin: Plugin) -> None:
    plugin.socket.open(7, ask="wait")
    plugin.socket.say({"op": "abort", "stream": 7})
    plugin.socket.open(8, ask="refuse")
    assert (await plugin.socket.hears())["stream"] == 8


async def test_an_abort_of_an_unknown_stream_is_nothing(plugin: Plugin) -> None:
    plugin.socket.say({"op": "abort", "stream": 99})
    plugin.socket.open(8, ask="refuse")
    assert (await plugin.socket.hears())["stream"] == 8


async def test_a_refusal_is_passed_on_as_it_is(plugin: Plugin) -> None:
    plugin.socket.open(7, ask="refuse")
    assert await plugin.socket.hears() == {"op": "refused", "stream": 7, "status": 404, "body": NOT_FOUND}


async def test_a_family_that_makes_no_sense_is_refused(plugin: Plugin) -> None:
    plugin.socket.say({"op": "open", "stream": 7, "request": {}, "family": {"start": "x", "states": {}}})
    refusal = await plugin.socket.hears()
    assert (refusal["status"], refusal["body"]["error"]["param"]) == (422, "family")


async def test_a_bug_of_ours_refuses_that_stream(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    plugin.socket.open(7, ask="bug")
    assert (await plugin.socket.hears())["status"] == 500
    assert "stream 7 failed" in caplog.text


async def test_an_error_of_the_engine_before_and_after_the_first_token(plugin: Plugin) -> None:
    plugin.socket.open(7, name="a")
    plugin.socket.open(8, name="b")
    await plugin.step("b", 5)
    await plugin.socket.hears()
    await plugin.stream("a")
    for name in "ab":
        plugin.door.running[name].set_exception(RuntimeError("the engine is gone"))
    refusal, [error] = await plugin.socket.hears(), await plugin.socket.hears()
    assert (refusal["stream"], refusal["status"]) == (7, 503)
    assert isinstance(error, EngineFailed)
    assert (error.stream, error.status) == (8, 503)
    assert json.loads(error.body)["error"]["message"] == "the engine is gone"


async def test_a_request_that_somebody_else_aborts_is_ended(plugin: Plugin) -> None:
    plugin.socket.open(7, name="a", n=2)
    await plugin.step("a", 5)
    await plugin.socket.hears()
    plugin.door.running["a"].set_result(final("abort", "abort"))
    assert await plugin.socket.hears() == [
        Finish(7, 0, "abort", "abort", None),
        Finish(7, 1, "abort", "abort", None),
        End(7),
    ]


async def test_who_leaves_aborts_all_that_is_open() -> None:
    async with running(Plugin()) as plugin:
        for number, name in enumerate("abc", 1):
            plugin.socket.open(number, name=name)
            await plugin.step(name, 5)
        plugin.socket.open(4, ask="wait")
    assert sorted(plugin.door.aborted) == ["a", "b", "c"]


async def test_a_sidecar_that_does_not_read_loses_its_streams_and_is_told_later() -> None:
    async with running(Plugin(most_bytes=200)) as plugin:
        plugin.socket.reads.clear()
        plugin.socket.open(7, name="a")
        for _ in range(20):
            if plugin.streams.lost:
                break
            await plugin.step("a", 5)
        assert plugin.streams.lost == 1
        await until(lambda: plugin.door.aborted == ["a"])
        plugin.socket.reads.set()
        heard: list[Record] = []
        async with asyncio.timeout(5):
            while not heard or type(heard[-1]).__name__ != "Lost":
                heard += await plugin.socket.hears()
        assert all(record.stream == 7 for record in heard)


async def test_a_number_is_free_again_when_its_stream_is_over(plugin: Plugin) -> None:
    for _ in range(2):
        plugin.socket.open(7, ask="refuse")
        assert (await plugin.socket.hears())["stream"] == 7


@pytest.mark.parametrize(
    "message",
    [
        "no json",
        None,
        "[]",
        '{"op": "resume", "stream": 1}',
        '{"op": "abort"}',
        '{"op": "abort", "stream": 0}',
        '{"op": "abort", "stream": true}',
        '{"op": "abort", "stream": 4294967296}',
        '{"op": "open", "stream": 1}',
        '{"op": "open", "stream": 1, "request": [], "headers": {}, "family": {}}',
        '{"op": "open", "stream": 1, "request": {}, "headers": {"a": 1}, "family": {}}',
        '{"op": "open", "stream": 1, "request": {}, "headers": {"a": "\\u20ac"}, "family": {}}',
    ],
)
async def test_what_the_contract_does_not_know_closes_the_connection(message: str | None) -> None:
    plugin = Plugin()
    plugin.socket.open(9, name="a")
    plugin.socket.incoming.put_nowait({"type": "websocket.receive", "text": message})
    await asyncio.wait_for(plugin.connection.run(), 5)
    assert plugin.socket.closed is not None
    assert plugin.socket.closed[0] == 1008
    assert len(plugin.streams) == 0


async def test_a_number_in_use_closes_the_connection() -> None:
    plugin = Plugin()
    plugin.socket.open(9, name="a")
    plugin.socket.open(9, name="b")
    await asyncio.wait_for(plugin.connection.run(), 5)
    assert plugin.socket.closed == (1008, "stream 9 is open already")


async def test_a_connection_that_breaks_while_sending_ends() -> None:
    class Broken(Socket):
        async def send_text(self, data: str) -> None:
            raise ConnectionResetError

    plugin = Plugin()
    plugin.connection._socket = Broken()
    plugin.connection._socket.open(7, ask="refuse")
    await asyncio.wait_for(plugin.connection.run(), 5)


# --- What only an engine with text can answer -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["x"]),
        ("stop", "x"),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("prompt_logprobs", 0),
        ("echo", True),
        ("use_beam_search", True),
        ("return_prompt_text", True),
        ("kv_transfer_params", {"do_remote_decode": True}),
        ("n", 257),
    ],
)
def test_needs_text(name: str, value: object) -> None:
    with pytest.raises(Refusal) as refusal:
        refuse_if_text_is_needed({"messages": [], name: value})
    assert refusal.value.status == 422
    assert refusal.value.body["error"]["type"] == "penstock_needs_text"
    assert refusal.value.body["error"]["param"] == name


def test_needs_no_text() -> None:
    at_rest = {"stop": [], "logprobs": False, "top_logprobs": 0, "prompt_logprobs": None, "echo": False, "n": 256}
    refuse_if_text_is_needed({"messages": [], "stop_token_ids": [1], "return_token_ids": True, **at_rest})


@pytest.mark.parametrize("headers", [{"X-Request-ID": "abc"}, {"x-request-id": "abc"}])
def test_a_request_id_is_kept_and_made_unlike_any_other(headers: dict[str, str]) -> None:
    one, other = with_own_id(headers), with_own_id(headers)
    assert one["x-request-id"].startswith("abc-")
    assert one != other
    assert list(one) == ["x-request-id"]


def test_a_request_without_an_id_gets_one() -> None:
    given = with_own_id({"Traceparent": "00-1-2-3"})
    assert given["traceparent"] == "00-1-2-3"
    assert len(given["x-request-id"]) > 16


# --- vLLM's own words for an error ------------------------------------------------------------------------


class Taken(ValueError):
    pass


async def test_an_error_is_worded_by_the_nearest_handler_that_vllm_has() -> None:
    async def worded(raw: str, error: Exception) -> Any:
        return SimpleNamespace(status_code=409, body=json.dumps({"raw": raw, "error": str(error)}))

    app = SimpleNamespace(exception_handlers={ValueError: worded, Exception: None})
    refusal = await ChatDoor(app).refusal(Taken("taken"), "raw")
    assert (refusal.status, refusal.body) == (409, {"raw": "raw", "error": "taken"})


async def test_an_error_without_a_handler_is_an_internal_one() -> None:
    refusal = await ChatDoor(SimpleNamespace(exception_handlers={})).refusal(Taken("taken"), "raw")
    assert refusal.status == 500
    assert refusal.body["error"]["message"] == "taken"


def test_vllms_own_load_counts_a_stream_while_it_runs() -> None:
    state = SimpleNamespace(enable_server_load_tracking=True)
    with ChatDoor(SimpleNamespace(state=state)).counted():
        assert state.server_load_metrics == 1
    assert state.server_load_metrics == 0
    with ChatDoor(SimpleNamespace(state=SimpleNamespace())).counted():
        pass


# --- Whatever a sidecar may send --------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["start", "states", "a", "b", "channel", "on", "otherwise", "headers", "answer", "markup", "("])
family_parts = st.recursive(
    names | json_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5),
    max_leaves=20,
)


@st.composite
def operations(draw: st.DrawFn) -> str:
    """Something like an operation, as a text."""
    parts = {
        "op": st.sampled_from(["open", "abort", "dance"]),
        "stream": st.integers(-1, 2**32) | json_values,
        "request": json_values,
        "headers": json_values,
        "family": family_parts,
    }
    return json.dumps({name: draw(part) for name, part in parts.items() if draw(st.booleans())})


@thorough(300)
@given(operations() | json_values.map(json.dumps) | st.text(max_size=40))
@example("[" * 100_000)
@example('{"op": "open", "stream": 1, "request": ' + '{"a": ' * 5_000 + "1" + "}" * 5_000 + "}")
def test_a_message_is_an_operation_or_breaks_the_contract(text: str) -> None:
    try:
        operation = _operation(text)
    except ContractError:
        return
    assert operation["op"] in ("open", "abort")
    assert 1 <= operation["stream"] <= LARGEST_STREAM


@thorough(300)
@given(st.dictionaries(names, family_parts, max_size=3) | family_parts.filter(lambda part: isinstance(part, dict)))
def test_a_family_is_compiled_or_refused(family: Any) -> None:
    try:
        table = Table(family, FakeVocabulary([b"a", b"<"]))
    except FamilyError:
        return
    assert [number for _, run in table.tagger((0, 1)).feed([0, 1, 0]) for number in run][:1] in ([0], [])
