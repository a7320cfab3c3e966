"""Classifiers over real connections: the stand-in of examples/, and ones that are down, slow or talk nonsense."""

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from penstock.settings import SettingsError, load_settings
from penstock.shell.replay import serving
from support import chunks
from support.documents import ROOT
from support.http_client import FOLDED
from support.sockets import until
from support.tools import COUNT, CountingService, Model, call, calling_turn
from support.upstreams import Handler, engine_app, in_front_of, opened, saying, silence

POLITE = "What a lovely day it is, and how kind of you to ask about it."
RUDE = "You are a fucking stupid asshole, go to hell you piece of shit."


@pytest.fixture(scope="module")
def stand_in() -> Any:
    spec = importlib.util.spec_from_file_location("stand_in", ROOT / "examples" / "classifier" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def classifier(stand_in: Any) -> AsyncIterator[str]:
    async with serving(stand_in.make_app()) as url:
        yield f"{url}/v1/moderations"


def answering_in_words(text: str) -> Handler:
    return saying(*chunks.answer_of([text[at : at + 4] for at in range(0, len(text), 4)]))


@pytest.mark.parametrize("mode", ["async", "gate"])
@pytest.mark.parametrize("whole", [False, True])
async def test_the_stand_in_lets_kindness_pass_and_stops_rudeness(classifier: str, mode: str, whole: bool) -> None:
    told = [{"url": classifier, "mode": mode, "name": "stand-in", "timeout_ms": 20000}]
    for text, reason in ((POLITE, "stop"), (RUDE, "content_filter")):
        streamed, _ = engine_app(answering_in_words(text))

        async def answer(_: web.Request, text: str = text) -> web.Response:
            return web.Response(body=chunks.whole({"content": text}), content_type="application/json")

        engine = engine_app(answer)[0] if whole else streamed
        async with in_front_of(engine, moderation__classifiers=told) as setup:
            if whole:
                said = (await setup.caller.chat()).json["choices"][0]
                assert said["finish_reason"] == reason
                continue
            stream = await setup.caller.stream()
            assert stream.finish()["reason"] == reason
            assert (stream.text() == text) is (reason == "stop" or mode == "async")


async def test_a_violation_aborts_the_engine_soon(classifier: str) -> None:
    async def goes_on(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        for piece in (chunks.role(), chunks.content(RUDE)):
            await response.write(piece)
        await silence()
        return response

    engine, seen = engine_app(goes_on)
    told = [{"url": classifier, "timeout_ms": 20000}]
    async with in_front_of(engine, moderation__classifiers=told, moderation__window={"chars": 40}) as setup:
        stream = await setup.caller.stream()
        assert stream.one("error")["code"] == "content_filtered"
        await until(lambda: seen.open == 0)


async def slow(_: web.Request) -> web.Response:
    await asyncio.sleep(5)
    return web.json_response({})


async def nonsense(_: web.Request) -> web.Response:
    return web.Response(text="yes")


async def half(_: web.Request) -> web.Response:
    return web.json_response({"results": [{"flagged": "maybe"}]})


async def failing(_: web.Request) -> web.Response:
    return web.Response(status=500)


async def of_another_shape(_: web.Request) -> web.Response:
    return web.json_response(["fine"])


async def without_results(_: web.Request) -> web.Response:
    return web.json_response({"results": []})


async def in_latin(_: web.Request) -> web.Response:
    return web.Response(body='{"results": [{"flagged": false, "é": 1}]}'.encode("latin-1"))


async def huge(_: web.Request) -> web.Response:
    return web.json_response({"results": [{"flagged": False}], "more": "x" * (1 << 19)})


async def broken_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_length = 1000
    await response.prepare(request)
    await response.write(b'{"results": [{"flagged": false}]}')
    assert request.transport is not None
    request.transport.abort()
    return response


async def elsewhere(_: web.Request) -> web.Response:
    raise web.HTTPTemporaryRedirect("/fine")


async def fine(_: web.Request) -> web.Response:
    return web.json_response({"results": [{"flagged": False}]})


FAULTS = [
    slow, nonsense, half, failing, of_another_shape, without_results, in_latin, huge, broken_off, elsewhere, None
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__ if f else "down")
@pytest.mark.parametrize("policy", ["open", "closed"])
@pytest.mark.parametrize("mode", ["async", "gate"])
async def test_when_a_classifier_fails_its_policy_holds(fault: Any, policy: str, mode: str) -> None:
    app = web.Application()
    app.add_routes([web.post("/judge", fault or failing), web.post("/fine", fine)])
    engine, _ = engine_app(answering_in_words(POLITE))
    async with serving(app) as url:
        told = {"url": f"{url}/judge" if fault else "http://127.0.0.1:9/judge", "mode": mode, "on_failure": policy}
        async with in_front_of(engine, moderation__classifiers=[{**told, "timeout_ms": 200}]) as setup:
            stream = await setup.caller.stream()
    if policy == "open":
        assert stream.text() == POLITE
        assert stream.one("warning")["code"] == "classifier_failed"
        assert stream.finish()["reason"] == "stop"
    else:
        assert stream.one("error")["code"] == "moderation_unavailable"
        assert mode == "async" or stream.text() == ""


@pytest.mark.parametrize("flagged", [True, False])
async def test_a_verdict_may_come_in_pieces(flagged: bool) -> None:
    async def in_pieces(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for byte in json.dumps({"results": [{"flagged": flagged, "categories": {"hate": True}}]}).encode():
            await response.write(bytes([byte]))
        return response

    app = web.Application()
    app.add_routes([web.post("/judge", in_pieces)])
    engine, _ = engine_app(answering_in_words(POLITE))
    async with serving(app) as url:
        told = {"url": f"{url}/judge", "mode": "gate", "on_failure": "closed", "timeout_ms": 20000}
        async with in_front_of(engine, moderation__classifiers=[told]) as setup:
            stream = await setup.caller.stream()
    assert stream.finish()["reason"] == ("content_filter" if flagged else "stop")
    assert (stream.text() == POLITE) is not flagged


@pytest.mark.parametrize("mode", ["async", "gate"])
async def test_the_same_prompts_get_the_same_verdicts_streamed_and_not(classifier: str, mode: str) -> None:
    """Rules and a classifier, in four ways of asking: what ended the answer, by what, and what of it is told."""
    texts = [POLITE, RUDE, f"{POLITE} Call me on +14155552671.", f"Your ticket is TKT-123456. {POLITE}", ""]
    rules = [{"id": "ticket", "regex": "TKT-[0-9]{6}", "action": "halt", "category": "internal"}]

    async def by_prompt(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = texts[int(body["messages"][-1]["content"])]
        if body.get("stream"):
            return await answering_in_words(text)(request)
        return web.Response(body=chunks.whole({"content": text}), content_type="application/json")

    moderation = {
        "packs": ["pii"],
        "rules": rules,
        "classifiers": [{"url": classifier, "mode": mode, "name": "stand-in", "timeout_ms": 20000}],
        "window": {"chars": 4000, "gate_chars": 8000, "ms": 20000},  # a window is a whole answer
    }
    engine, _ = engine_app(by_prompt)
    verdicts = set()
    async with in_front_of(engine, moderation=moderation) as setup:
        for number in range(len(texts)):
            messages = [{"role": "user", "content": str(number)}]
            sse = await setup.caller.stream(messages=messages)
            folded = (await setup.caller.stream(FOLDED, messages=messages)).json
            chat = await setup.caller.chat(stream=True, messages=messages)
            whole = (await setup.caller.chat(messages=messages)).json["choices"][0]
            [choice] = folded["choices"]
            finishes = [c["choices"][0]["finish_reason"] for c in chat.chunks if c["choices"]]
            reasons = {sse.finish()["reason"], choice["finish"]["reason"], finishes[-1], whole["finish_reason"]}
            assert len(reasons) == 1
            by = [(event["action"], event["rule"], event["category"]) for event in sse.of("moderation")]
            assert by == [(event["action"], event["rule"], event["category"]) for event in folded.get("moderation", [])]
            said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chat.chunks if c["choices"])
            assert sse.text() == said
            if mode == "gate" or "content_filter" not in reasons:
                assert choice["text"] == (whole["message"]["content"] or "") == sse.text()
            verdicts.add((number, reasons.pop(), *by))
    assert verdicts == {
        (0, "stop"),
        (1, "content_filter", ("halt", "stand-in", "profanity")),
        (2, "stop", ("redact", "pii.phone", "pii")),
        (3, "content_filter", ("halt", "ticket", "internal")),
        (4, "stop"),
    }


@pytest.mark.parametrize(
    ("said", "category"),
    [
        ("unsafe\nS9", "S9"),
        ("unsafe\nS1,S3", "S1,S3"),
        ("unsafe\nViolent Crimes", "Violent Crimes"),
        (f"unsafe\n{POLITE}", "unsafe"),
        ("unsafe\nkey sk-12345678", "unsafe"),
        ("unsafe", "unsafe"),
    ],
)
async def test_a_guard_cannot_repeat_what_it_judged(said: str, category: str) -> None:
    async def guard(_: web.Request) -> web.Response:
        return web.Response(body=chunks.whole({"content": said}), content_type="application/json")

    app = web.Application()
    app.add_routes([web.post("/chat", guard)])
    engine, _ = engine_app(answering_in_words(POLITE))
    async with serving(app) as url:
        told = {"url": f"{url}/chat", "shape": "guard", "model": "g", "mode": "gate", "timeout_ms": 20000}
        async with in_front_of(engine, moderation__classifiers=[told]) as setup:
            stream = await setup.caller.stream()
    assert stream.one("moderation")["category"] == category


@pytest.mark.parametrize("mode", ["async", "gate"])
@pytest.mark.parametrize("turn", [1, 2])
async def test_a_tool_runs_only_once_its_turn_was_judged(turn: int, mode: str) -> None:
    """A violation in the turn that calls it: it never runs. In the turn behind it: the stream ends all the same."""
    service, model = CountingService(), Model(calling_turn(call(0), before="counting"), chunks.answer_of(["rude"]))
    ran_before_the_verdict: list[bool] = []

    async def judge(request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        ran_before_the_verdict.append(bool(service.requests) and "rude" not in text)
        is_bad = '"by"' in text if turn == 1 else "rude" in text
        return web.json_response({"results": [{"flagged": is_bad, "categories": {}}]})

    app = service.app()
    app.add_routes([web.post("/judge", judge)])
    async with serving(app) as url:
        flags: dict[str, Any] = {
            "tools__bindings": [{"url": f"{url}/tool", "tools": ["count"]}],
            "tools__loop__allow_networks": ["127.0.0.0/8"],
            "moderation__classifiers": [{"url": f"{url}/judge", "mode": mode, "timeout_ms": 20000}],
        }
        async with in_front_of(engine_app(model.answer)[0], **flags) as setup:
            stream = await setup.caller.stream(tools=[COUNT])
    assert ran_before_the_verdict
    assert not any(ran_before_the_verdict)
    assert len(service.requests) == turn - 1
    assert stream.finish()["reason"] == "content_filter"
    assert mode == "async" or b"rude" not in stream.body


@pytest.mark.parametrize(
    ("said", "reason"), [("safe", "stop"), ("unsafe\nS9", "content_filter"), ("I cannot tell", "stop")]
)
async def test_a_guard_model_on_a_chat_route(said: str, reason: str) -> None:
    asked: list[Any] = []

    async def guard(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.Response(body=chunks.whole({"content": said}), content_type="application/json")

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", guard)])
    engine, _ = engine_app(answering_in_words(POLITE))
    async with serving(app) as url:
        told = {"url": f"{url}/v1/chat/completions", "shape": "guard", "model": "llama-guard", "mode": "gate"}
        async with in_front_of(engine, moderation__classifiers=[told]) as setup:
            stream = await setup.caller.stream()
    assert stream.finish()["reason"] == reason
    if reason == "content_filter":
        assert stream.one("moderation")["category"] == "S9"
    assert asked[0]["model"] == "llama-guard"
    assert [m["content"] for m in asked[0]["messages"]] == ["hi", POLITE]


def test_a_guard_needs_a_model() -> None:
    flags = {"upstreams": [{"url": "http://x"}], "moderation.classifiers": [{"url": "http://g/", "shape": "guard"}]}
    with pytest.raises(SettingsError, match="needs `model`"):
        load_settings(environment={}, flags=flags)
