"""A failed stream's partial answer, continued in a stream of its own."""

import json
from typing import Any

import pytest
from aiohttp import web

from penstock.shell.auth import hash_key
from support import chunks
from support.http_client import Answer, Caller, Json, chat
from support.upstreams import Seen, Setup, engine_app, in_front_of, opened, saying, silence

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

STREAMS = "/v1/streams"
HELLO = [chunks.role(), chunks.content("Hello"), chunks.content(" you"), chunks.error()]
REST = chunks.answer_of([" and", " all"])


def engine(*answers: list[bytes]) -> tuple[web.Application, Seen]:
    """Says these answers, one a request, and the last one for ever."""
    left = list(answers)

    async def answer(request: web.Request) -> web.StreamResponse:
        pieces = left.pop(0) if len(left) > 1 else left[0]
        return await saying(*pieces)(request)

    return engine_app(answer)


async def continued(caller: Caller, stream_id: Any, headers: Json | None = None, **fields: Any) -> Answer:
    return await caller.post(STREAMS, chat(**{"penstock": {"continue": stream_id}, **fields}), headers)


async def failed(setup: Setup, **fields: Any) -> str:
    """The id of a stream that failed."""
    answer = await setup.caller.stream(**fields)
    assert answer.end["status"] == "failed"
    stream_id: str = answer.headers["X-Stream-Id"]
    return stream_id


async def test_the_rest_of_a_broken_answer_comes_in_a_stream_of_its_own() -> None:
    app, seen = engine(HELLO, REST)
    async with in_front_of(app) as setup:
        stream_id = await failed(setup)
        asked = json.loads(seen.body)
        answer = await continued(setup.caller, stream_id)
        assert (answer.end["status"], answer.text()) == ("completed", " and all")
        start = answer.one("stream.start")
        assert (start["continues"], start["stream_id"] != stream_id) == (stream_id, True)
        told = json.loads(seen.body)
        assert told.pop("messages") == [*asked.pop("messages"), {"role": "assistant", "content": "Hello you"}]
        assert (told.pop("continue_final_message"), told.pop("add_generation_prompt")) == (True, False)
        assert told == asked
        snapshot = (await setup.caller.get(f"{STREAMS}/{start['stream_id']}")).json
        assert (snapshot["continues"], snapshot["choices"][0]["text"]) == (stream_id, " and all")


async def test_a_continuation_that_fails_is_continued_too() -> None:
    app, seen = engine(HELLO, [chunks.role(), chunks.content(" and"), chunks.error()], chunks.answer_of([" all"]))
    async with in_front_of(app) as setup:
        first = await failed(setup)
        second = await failed(setup, penstock={"continue": first})
        third = await continued(setup.caller, second)
        assert (third.one("stream.start")["continues"], third.text()) == (second, " all")
        assert json.loads(seen.body)["messages"][-1] == {"role": "assistant", "content": "Hello you and"}


async def test_reasoning_is_not_handed_back_and_the_rest_is_no_reasoning() -> None:
    thought = [chunks.role(), chunks.content("<think>Hm.</think>So"), chunks.error()]
    app, seen = engine(thought, chunks.answer_of([" be it"]))
    async with in_front_of(app) as setup:
        wish = {"family": "deepseek-r1"}  # whose answers begin as reasoning
        stream_id = await failed(setup, penstock=wish)
        answer = await continued(setup.caller, stream_id, penstock={**wish, "continue": stream_id})
        assert (answer.text(), answer.reasoning()) == (" be it", "")
        assert json.loads(seen.body)["messages"][-1]["content"] == "So"


async def test_a_retry_of_a_continuation_joins_it() -> None:
    app, seen = engine(HELLO, REST)
    async with in_front_of(app) as setup:
        stream_id = await failed(setup)
        first, second = [await continued(setup.caller, stream_id, {"Idempotency-Key": "k-1"}) for _ in range(2)]
        assert (first.body, seen.requests) == (second.body, 2)
        assert second.headers["Idempotency-Replayed"] == "true"


async def test_unknown_streams_and_those_of_others_are_not_there() -> None:
    keys = {"alice": hash_key("a-key"), "bob": hash_key("b-key")}
    alice, bob = {"Authorization": "Bearer a-key"}, {"Authorization": "Bearer b-key"}
    app, seen = engine(HELLO)
    async with in_front_of(app, auth__keys=keys) as setup:
        stream_id = await failed(setup, headers=alice)
        for wanted, who in ((stream_id, bob), ("st_unknown", alice)):
            answer = await continued(setup.caller, wanted, who)
            assert (answer.status, answer.error["code"]) == (404, "no_such_stream")
        assert seen.requests == 1


CALL = chunks.tool(name="add", arguments='{"a":', call_id="call_1")


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        (REST, 409, "is completed"),
        (chunks.answer_of(["Hel"], reason="length"), 409, "is incomplete"),
        ([chunks.role(), chunks.reasoning("Hm"), chunks.error()], 409, "said nothing"),
        ([chunks.role(), chunks.content("Hm"), CALL, chunks.error()], 422, "called tools"),
    ],
    ids=["completed", "incomplete", "reasoning", "call"],
)
async def test_streams_that_are_not_continued(said: list[bytes], status: int, why: str) -> None:
    app, seen = engine(said)
    async with in_front_of(app) as setup:
        tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
        stream_id = (await setup.caller.stream(tools=tools)).headers["X-Stream-Id"]
        answer = await continued(setup.caller, stream_id, tools=tools)
        assert (answer.status, seen.requests) == (status, 1)
        assert why in answer.error["message"]


async def test_a_stream_that_runs_is_not_continued() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(b"".join(HELLO[:2]))
        await silence()
        return response

    app, _ = engine_app(answer)
    async with in_front_of(app) as setup, setup.caller.opened(STREAMS, chat()) as response:
        refusal = await continued(setup.caller, response.headers["X-Stream-Id"])
        assert (refusal.status, refusal.error["code"]) == (409, "cannot_continue")
        assert "still runs" in refusal.error["message"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"messages": [{"role": "user", "content": "another"}]}, "another request"),
        ({"temperature": 1}, "another request"),
        ({"n": 2}, "n is more than 1"),
        ({"response_format": {"type": "json_object"}}, "a value"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "a message of its own"),
    ],
)
async def test_requests_that_continue_nothing(fields: Json, why: str) -> None:
    app, seen = engine(HELLO)
    async with in_front_of(app) as setup:
        refusal = await continued(setup.caller, await failed(setup), **fields)
        assert (refusal.status, refusal.error["code"]) == (422, "cannot_continue")
        assert why in refusal.error["message"]
        assert (refusal.error["param"], seen.requests) == ("penstock.continue", 1)


async def test_chat_has_no_events_to_continue_and_no_such_option() -> None:
    app, _ = engine(HELLO)
    async with in_front_of(app) as setup:
        spelled = await setup.caller.chat(stream=True, penstock={"on_disconnect": "linger"})
        answer = await continued(setup.caller, spelled.headers["X-Stream-Id"], stream=True)
        assert (answer.status, answer.error["code"]) == (422, "cannot_continue")
        for wish in (17, ""):
            answer = await continued(setup.caller, wish)
            assert (answer.status, answer.error["param"]) == (400, "penstock.continue")
        answer = await setup.caller.chat(stream=True, penstock={"continue": await failed(setup)})
        assert (answer.status, answer.error["param"]) == (400, "penstock.continue")
