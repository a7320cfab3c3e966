"""Answers that are told again: to whom, for how long, and at what cost, over real connections."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.core.events import Channel, Text
from penstock.core.kept_answer import KeptAnswer
from penstock.core.request import StreamRequest, read_request
from penstock.settings import AnswerCacheSettings, SettingsError, load_settings
from penstock.shell.answer_cache import AnswerCache
from penstock.shell.auth import hash_key
from support import chunks
from support.fake_plugin import fake_plugin
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, calling, chat
from support.sidecar import sidecar
from support.upstreams import Handler, Seen, Setup, answering, engine_app, in_front_of, saying

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

WORDS = ["We ", "are ", "open ", "from ", "nine ", "to ", "five."]
SAID = "".join(WORDS)
COUNTED = [chunks.content(word, tokens=number + 1) for number, word in enumerate(WORDS)]
STREAMED = saying(*chunks.answer(*COUNTED, completion=8))
KEYS = {name: f"{name}s-key-0123456789abcdef" for name in ("alice", "bob")}


async def either(request: web.Request) -> web.StreamResponse:
    """As a vLLM: streamed or whole, as it is asked."""
    wants = json.loads(await request.read()).get("stream")
    answer = STREAMED if wants else answering(chunks.whole({"content": SAID}))
    return await answer(request)


@asynccontextmanager
async def stage(
    engine: Handler = either, requests: str = "deterministic", **settings: Any
) -> AsyncIterator[tuple[Setup, Seen]]:
    cache = {"requests": requests, "words_per_second": 10_000, **settings.pop("cache", {})}
    app, seen = engine_app(engine)
    async with in_front_of(app, answer_cache=cache, **settings) as setup:
        yield setup, seen


def is_told_again(answer: Answer) -> bool:
    return bool(answer.one("stream.start")["upstream"] == "answers/cache")


@pytest.mark.parametrize("accept", [SSE, NDJSON])
async def test_the_same_question_is_answered_without_an_engine_and_costs_nothing(accept: str) -> None:
    async with stage() as (setup, seen):
        first, again = [await setup.caller.stream(accept) for _ in range(2)]
        assert seen.requests == 1
        assert (is_told_again(first), is_told_again(again)) == (False, True)
        assert first.text() == again.text() == SAID
        assert first.finish()["reason"] == again.finish()["reason"] == "stop"
        assert again.end["status"] == "completed"
        assert (first.usage["completion_tokens"], first.usage["delivered_tokens"]) == (8, 7)
        counts = ("prompt_tokens", "completion_tokens", "delivered_tokens")
        assert [again.usage[name] for name in counts] == [0, 0, 0]
        assert again.usage["estimated"] is False
        assert again.headers["X-Stream-Id"] != first.headers["X-Stream-Id"]
        assert first.headers["X-Stream-Id"] not in again.body.decode()


async def test_every_form_gets_it_from_one_answer_of_the_engine() -> None:
    async with stage() as (setup, seen):
        await setup.caller.stream()
        folded = await setup.caller.stream(FOLDED)
        assert folded.json["choices"][0]["text"] == SAID
        streamed = await setup.caller.chat(stream=True, stream_options={"include_usage": True})
        texts = [choice["delta"].get("content", "") for chunk in streamed.chunks for choice in chunk["choices"]]
        assert "".join(texts) == SAID
        assert streamed.chunks[-1]["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        assert {chunk["id"] for chunk in streamed.chunks} == {f"chatcmpl-{streamed.headers['X-Stream-Id']}"}
        assert seen.requests == 1


async def test_an_unstreamed_answer_has_a_place_of_its_own() -> None:
    async with stage() as (setup, seen):
        answers = [await setup.caller.chat() for _ in range(3)]
        assert seen.requests == 1
        for again in answers[1:]:
            assert again.json["choices"] == answers[0].json["choices"]
            assert again.json["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            assert again.json["id"] == f"chatcmpl-{again.headers['X-Stream-Id']}"
        await setup.caller.stream()
        assert seen.requests == 2


@pytest.mark.parametrize(
    ("requests", "first", "then", "asked"),
    [
        ("none", {"penstock": {"cache": True}}, {"penstock": {"cache": True}}, 2),
        ("asked", {}, {}, 2),
        ("asked", {"penstock": {"cache": True}}, {"penstock": {"cache": True}}, 1),
        ("asked", {"penstock": {"cache": True}}, {}, 2),
        ("asked", {"temperature": 1, "penstock": {"cache": True}}, {"temperature": 1, "penstock": {"cache": True}}, 1),
        ("deterministic", {"temperature": None}, {"temperature": None}, 2),
        ("deterministic", {"temperature": 0.1}, {"temperature": 0.1}, 2),
        ("deterministic", {}, {"penstock": {"cache": False}}, 2),
        ("deterministic", {"penstock": {"cache": False}}, {}, 2),
        ("deterministic", {}, {"penstock": {"reasoning": "hide", "on_disconnect": "linger"}}, 1),
        ("deterministic", {}, {"penstock": {"family": "mistral"}}, 2),
        ("deterministic", {}, {"messages": [{"role": "user", "content": "hi!"}]}, 2),
        ("deterministic", {}, {"max_tokens": 511}, 2),
        ("deterministic", {}, {"seed": 1}, 2),
        ("deterministic", {}, {"cache_salt": "another"}, 2),
        ("deterministic", {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools": None}, 2),
    ],
)
async def test_only_what_may_be_told_again_is(requests: str, first: Json, then: Json, asked: int) -> None:
    async with stage(requests=requests) as (setup, seen):
        answers = [await setup.caller.stream(**fields) for fields in (first, then)]
        assert [answer.text() for answer in answers] == [SAID, SAID]
        assert seen.requests == asked


async def test_a_request_with_tools_always_asks_the_engine() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with stage() as (setup, seen):
        for _ in range(2):
            await setup.caller.stream(tools=tools, penstock={"cache": True})
        assert seen.requests == 2


async def test_what_one_caller_got_is_not_told_to_another() -> None:
    keys = {name: hash_key(key) for name, key in KEYS.items()}
    async with stage(auth__keys=keys) as (setup, seen):
        for name in ("alice", "bob", "alice", "bob"):
            answer = await setup.caller.stream(headers={"Authorization": f"Bearer {KEYS[name]}"})
            assert answer.text() == SAID
        assert seen.requests == 2
    async with stage(auth__keys=keys, cache={"across_callers": True}) as (setup, seen):
        for name in ("alice", "bob"):
            await setup.caller.stream(headers={"Authorization": f"Bearer {KEYS[name]}"})
        assert seen.requests == 1


@pytest.mark.parametrize("across", [False, True])
async def test_where_the_engine_asks_for_keys_nobody_gets_by_it(across: bool) -> None:
    async def guarded(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != "Bearer right":
            return await answering(b'{"error": {"message": "no", "code": 401}}', 401)(request)
        return await STREAMED(request)

    async with stage(guarded, cache={"across_callers": across}) as (setup, seen):
        for _ in range(2):
            right = await setup.caller.stream(headers={"Authorization": "Bearer right"})
            assert right.text() == SAID
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert (await setup.caller.stream(headers=headers)).status == 401
        assert seen.requests == 3


async def test_a_key_that_may_not_ask_for_the_model_is_refused_as_ever() -> None:
    keys = {"alice": hash_key(KEYS["alice"]), "bob": f"{hash_key(KEYS['bob'])} models=other"}
    async with stage(auth__keys=keys, cache={"across_callers": True}) as (setup, _):
        await setup.caller.stream(headers={"Authorization": f"Bearer {KEYS['alice']}"})
        refused = await setup.caller.stream(headers={"Authorization": f"Bearer {KEYS['bob']}"})
        assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")


async def test_the_rules_are_applied_to_what_is_told_again_by_who_asks() -> None:
    """What is kept is what the engine said, so nobody gets what was redacted for another, or the reverse."""
    rule = {"id": "hours", "literal": "nine", "category": "internal", "keys": ["bob"]}
    keys = {name: hash_key(key) for name, key in KEYS.items()}
    moderation = {"rules": [rule]}
    async with stage(auth__keys=keys, moderation=moderation, cache={"across_callers": True}) as (setup, seen):
        told = {}
        for name in ("bob", "alice", "bob"):
            told[name] = (await setup.caller.stream(headers={"Authorization": f"Bearer {KEYS[name]}"})).text()
        assert seen.requests == 1
        assert told["alice"] == SAID
        assert "nine" not in told["bob"]


async def test_an_answer_of_the_settings_is_never_one_that_was_given_before() -> None:
    hours = {"id": "hours", "question": "hi", "text": "From nine to five.", "words_per_second": 10_000}
    async with stage(answers=[hours]) as (setup, seen):
        for _ in range(2):
            assert (await setup.caller.stream()).one("stream.start")["upstream"] == "answers/hours"
        assert seen.requests == 0


async def test_it_is_told_at_its_pace() -> None:
    clock = asyncio.get_running_loop()
    async with stage(cache={"words_per_second": 20}) as (setup, _):
        await setup.caller.stream()
        began = clock.time()
        again = await setup.caller.stream()
        assert clock.time() - began > 0.3  # a role, seven words, an end: eight pauses of 50 ms
        assert len(again.of("delta.text")) >= 7


async def test_one_that_is_cancelled_on_its_way_costs_nothing_either_and_stays_kept() -> None:
    async with stage(cache={"words_per_second": 2}) as (setup, seen):
        await setup.caller.stream()
        async with setup.caller.opened("/v1/streams", chat(), {"Accept": NDJSON}) as response:
            await response.content.readuntil(b"delta.text")
            assert (await setup.caller.delete(response.headers["X-Stream-Id"])).status == 204
            events = [json.loads(line) for line in (await response.content.read()).splitlines()[1:]]
        usage = next(event for event in reversed(events) if event["type"] == "usage")
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["estimated"]) == (0, 0, False)
        async with setup.caller.opened("/v1/streams", chat(), {"Accept": NDJSON}) as response:
            assert b'"upstream":"answers/cache"' in await response.content.readuntil(b"trace_id")
        assert seen.requests == 1


async def test_it_counts_as_a_request_and_its_bill_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    key = f"{hash_key(KEYS['alice'])} requests_per_minute=2 tokens_per_minute=100000"
    async with (
        stage(auth__keys={"alice": key}, usage={"file": {"path": str(path)}}) as (setup, seen),
        calling(setup.sidecar.url, Authorization=f"Bearer {KEYS['alice']}") as alice,
    ):
        first, again, more = [await alice.stream() for _ in range(3)]
        assert (first.status, again.status, more.status) == (200, 200, 429)
        assert seen.requests == 1
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["upstream"] for record in records] == ["engine", "answers/cache"]
    assert [record["billed_tokens"] for record in records] == [17, 0]
    assert records[1]["ending"] == "completed"


async def test_tagged_tokens_are_told_again_as_well() -> None:
    cache = {"requests": "deterministic", "words_per_second": 10_000}
    async with (
        fake_plugin() as plugin,
        sidecar(plugin.url, {"plugin": "auto"}, answer_cache=cache) as running,
        calling(running.url) as caller,
    ):
        asked = asyncio.create_task(caller.stream())
        [stream] = await plugin.opened(1)
        await plugin.send(*stream.whole("Hello you"))
        first, again = await asked, await caller.stream()
        assert first.text() == again.text() == "Hello you"
        assert (is_told_again(first), is_told_again(again)) == (False, True)
        assert len(plugin.opens) == 1


async def test_it_needs_no_engine_at_all() -> None:
    app, _ = engine_app(either)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with (
        sidecar(f"http://{host}:{port}", answer_cache={"requests": "deterministic"}) as running,
        calling(running.url) as caller,
    ):
        await caller.stream()
        await runner.cleanup()
        assert (await caller.stream()).text() == SAID
        assert (await caller.stream(max_tokens=1)).status == 502


async def test_an_answer_told_again_can_be_resumed_like_any(caller_and_id: tuple[Caller, str]) -> None:
    caller, stream_id = caller_and_id
    taken_up = await caller.get(f"/v1/streams/{stream_id}/events?after=2", {"Accept": NDJSON})
    assert b'"type":"stream.end"' in taken_up.body


@pytest.fixture
async def caller_and_id() -> AsyncIterator[tuple[Caller, str]]:
    async with stage() as (setup, _):
        await setup.caller.stream()
        yield setup.caller, (await setup.caller.stream()).headers["X-Stream-Id"]


# --- What is kept, and for how long ---------------------------------------------------------------


def asking(text: str = "hi", **fields: Any) -> StreamRequest:
    return read_request(json.dumps(chat(messages=[{"role": "user", "content": text}], **fields)).encode())


def of_size(size: int) -> KeptAnswer:
    return KeptAnswer("tiny", None, None, (Text(0, Channel.RAW, "x"),), size)


async def test_an_answer_has_its_time_from_when_the_engine_gave_it() -> None:
    now = 0.0
    cache = AnswerCache(AnswerCacheSettings(requests="deterministic", seconds=10), lambda: now)
    cache.keep(b"a", of_size(10))
    now = 9.9
    assert cache.find(b"a") is not None
    now = 10.0
    assert cache.find(b"a") is None
    cache.keep(b"a", of_size(10))
    assert cache.find(b"a") is not None


@pytest.mark.parametrize("bound", [{"answers": 3}, {"bytes": 3072, "answer_bytes": 1024}])
async def test_the_one_not_asked_for_longest_goes_first(bound: Json) -> None:
    cache = AnswerCache(AnswerCacheSettings(requests="deterministic", **bound), lambda: 0.0)
    for key in (b"a", b"b", b"c"):
        cache.keep(key, of_size(1024))
    cache.find(b"a")
    cache.keep(b"d", of_size(1024))
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.find(key)] == [b"a", b"c", b"d"]
    for _ in range(10):
        cache.keep(b"d", of_size(1024))
    assert [key for key in (b"a", b"c", b"d") if cache.find(key)] == [b"a", b"c", b"d"], "kept once, counted once"


async def test_no_two_parts_of_a_key_run_into_each_other() -> None:
    cache = AnswerCache(AnswerCacheSettings(requests="deterministic"), lambda: 0.0)
    told = [
        cache.key_of(asking(), family, principal, authorization)
        for family, principal, authorization in (
            ("f", "ab", "c"), ("f", "a", "bc"), ("fa", "b", "c"), ("f", "ab", "c\ud800"), ("f", "a', 'b", "c")
        )
    ]  # fmt: skip
    assert None not in told
    assert len(set(told)) == len(told)
    assert cache.key_of(asking(), "f", "ab", "c") == told[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"requests": "all"}, r"answer_cache\.requests: 'all' .*should be 'none', 'asked' or 'deterministic'"),
        ({"seconds": 0}, r"answer_cache\.seconds: 0 .* how long an answer is told again"),
        ({"answer": 1}, r"answer_cache\.answer.* is no setting\. The settings here are: requests, seconds, answers"),
        ({"answer_bytes": 2**30}, r"answer_cache\.answer_bytes .* answer_cache\.bytes"),
    ],
)
def test_a_wrong_setting(change: Json, sentence: str) -> None:
    flags = {"upstreams": [{"url": "http://vllm"}], "answer_cache": change}
    with pytest.raises(SettingsError, match=sentence):
        load_settings(environment={}, flags=flags)
