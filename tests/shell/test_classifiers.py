"""Classifiers over real connections: the stand-in of examples/, and ones that are down, slow or talk nonsense."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from penstock.settings import SettingsError, load_settings
from penstock.shell.replay import serving
from support import chunks
from support.documents import ROOT
from support.sockets import until
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


@pytest.mark.parametrize("fault", [slow, nonsense, half, failing, None], ids=lambda f: f.__name__ if f else "down")
@pytest.mark.parametrize("policy", ["open", "closed"])
@pytest.mark.parametrize("mode", ["async", "gate"])
async def test_when_a_classifier_fails_its_policy_holds(fault: Any, policy: str, mode: str) -> None:
    app = web.Application()
    app.add_routes([web.post("/judge", fault or failing)])
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
