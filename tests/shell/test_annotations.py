"""Notes beside a live stream, and tools by key, over real connections."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from support import chunks
from support.http_client import SSE, Answer, chat, whole
from support.upstreams import Setup, engine_app, in_front_of, opened, saying

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

NOTE = {"kind": "evidence", "data": {"url": "u"}, "anchor": {"block": 0, "offset": 1}}


class Paused:
    """An engine that says one word and waits to be told to go on."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("a"))
        await self.go_on.wait()
        await response.write(b"".join(chunks.answer_of(["b"])[1:]))
        return response


@pytest.fixture
async def paused() -> AsyncIterator[tuple[Setup, Paused]]:
    engine = Paused()
    async with in_front_of(engine_app(engine.answer)[0], annotations__notes_per_stream=2) as setup:
        yield setup, engine


async def post(setup: Setup, stream_id: str, note: Any) -> Answer:
    return await setup.caller.post(f"/v1/streams/{stream_id}/annotations", note)


async def test_a_note_is_in_the_stream_and_in_the_log_of_it(paused: tuple[Setup, Paused]) -> None:
    setup, engine = paused
    async with setup.caller.opened("/v1/streams", chat(), {"Accept": SSE}) as response:
        stream_id = response.headers["X-Stream-Id"]
        taken = await post(setup, stream_id, NOTE)
        assert (taken.status, taken.json) == (202, {"status": "accepted"})
        engine.go_on.set()
        answer = await whole(response)
    note = answer.one("annotation")
    assert (note["kind"], note["data"], note["anchor"]) == tuple(NOTE.values())
    replay = await setup.caller.get(f"/v1/streams/{stream_id}/events", {"Accept": SSE})
    assert [event["seq"] for event in replay.of("annotation")] == [note["seq"]]
    assert (await post(setup, stream_id, NOTE)).error["code"] == "no_such_stream"


@pytest.mark.parametrize(
    ("note", "param"),
    [
        ([], None),
        (b"{", None),
        ({"kind": "Loud"}, "kind"),
        ({"kind": "status", "data": []}, "data"),
        ({"kind": "status", "color": 1}, "color"),
        ({"kind": "text", "data": {}}, "data.text"),
        ({"kind": "retraction", "data": {}}, "anchor"),
        ({"kind": "retraction", "anchor": {"block": 0, "offset": 1}}, "anchor.length"),
        ({"kind": "status", "anchor": {"block": -1}}, "anchor.block"),
        ({"kind": "status", "anchor": {"page": 1}}, "anchor.page"),
        ({"kind": "status", "anchor": []}, "anchor"),
    ],
)
async def test_a_note_that_is_wrong_is_refused_by_name(paused: tuple[Setup, Paused], note: Any, param: Any) -> None:
    setup, engine = paused
    async with setup.caller.opened("/v1/streams", chat(), {"Accept": SSE}) as response:
        answer = await post(setup, response.headers["X-Stream-Id"], note)
        assert (answer.status, answer.error["param"]) == (400, param)
        engine.go_on.set()
        assert (await whole(response)).of("annotation") == []


async def test_a_stream_takes_only_so_many_notes(paused: tuple[Setup, Paused]) -> None:
    setup, engine = paused
    async with setup.caller.opened("/v1/streams", chat(), {"Accept": SSE}) as response:
        stream_id = response.headers["X-Stream-Id"]
        answers = [await post(setup, stream_id, NOTE) for _ in range(3)]
        engine.go_on.set()
        assert len((await whole(response)).of("annotation")) == 2
    assert [answer.status for answer in answers] == [202, 202, 429]
    assert answers[2].error["code"] == "too_many_annotations"


async def test_nobody_annotates_what_is_not_there(paused: tuple[Setup, Paused]) -> None:
    answer = await post(paused[0], "st_none", NOTE)
    assert (answer.status, answer.error["code"]) == (404, "no_such_stream")


CALL = chunks.answer(
    chunks.tool(call_id="c", name="pay", arguments=""), chunks.tool(arguments='{"sum": 5}'), reason="tool_calls"
)
PAY = [{"type": "function", "function": {"name": "pay"}}]


@pytest.mark.parametrize(("keys", "codes"), [("anonymous", ["tool_call_denied"]), ("other", [])])
async def test_a_policy_by_key_and_tool(keys: str, codes: list[str]) -> None:
    policy = [{"id": "no-money", "tools": ["pay"], "keys": [keys], "action": "deny"}]
    async with in_front_of(engine_app(saying(*CALL))[0], tools__policy=policy) as setup:
        native = await setup.caller.stream(tools=PAY)
        openai = await setup.caller.chat(tools=PAY, stream=True)
    assert len(native.of("tool_call.denied")) == len(codes)
    assert [chunk["error"]["code"] for chunk in openai.chunks if "error" in chunk] == codes


@pytest.mark.parametrize("by_request", [True, False])
async def test_calls_are_released_as_the_request_or_the_deployment_says(by_request: bool) -> None:
    broken = chunks.answer(chunks.tool(call_id="c", name="pay", arguments="{"), reason="tool_calls")
    option: dict[str, Any] = {"penstock": {"tools": {"release": "ready"}}} if by_request else {}
    release = "stream" if by_request else "ready"
    async with in_front_of(engine_app(saying(*broken))[0], tools__release=release) as setup:
        answer = await setup.caller.chat(tools=PAY, stream=True, **option)
        whole_answer = await setup.caller.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": 1}}])
    assert not any(choice["delta"].get("tool_calls") for c in answer.chunks for choice in c.get("choices", ()))
    assert answer.chunks[-1]["error"]["code"] == "invalid_tool_call"
    assert whole_answer.status != 500


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": {"release": "soon"}}, "penstock.tools.release"),
        ({"tools": {"speed": 1}}, "penstock.tools"),
        ({"tools": []}, "penstock.tools"),
        ({"annotations": {"citations": 1}}, "penstock.annotations.citations"),
        ({"structured": {"text": "loud"}}, "penstock.structured.text"),
        ({"structured": {"name": 1}}, "penstock.structured.name"),
        ({"structured": {"schema": []}}, "penstock.structured.schema"),
        ({"structured": {"sections": {"open": "x"}}}, "penstock.structured.sections"),
        ({"structured": {"sections": {"open": "", "close": "y"}}}, "penstock.structured.sections"),
        ({"structured": {"schema": {"type": "any"}}}, "penstock.structured.schema"),
    ],
)
async def test_an_option_that_is_wrong_is_refused_by_name(options: Any, param: str) -> None:
    async with in_front_of(engine_app(saying(*CALL))[0]) as setup:
        answer = await setup.caller.stream(penstock=options)
    assert (answer.status, answer.error["param"]) == (400, param)


async def test_a_tool_with_a_broken_schema_is_refused_before_the_engine_is_asked() -> None:
    app, seen = engine_app(saying(*CALL))
    tools = [{"type": "function", "function": {"name": "pay", "parameters": {"type": "money"}}}]
    async with in_front_of(app) as setup:
        answer = await setup.caller.stream(tools=tools)
    assert (answer.status, answer.error["code"], seen.requests) == (400, "invalid_schema", 0)
    assert answer.error["param"] == "tools[0].function.parameters"
