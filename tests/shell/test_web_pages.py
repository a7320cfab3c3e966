"""Which web pages may call: CORS where it is set, and no open door where there are no keys."""

from typing import Any

import pytest

from penstock.settings import SettingsError, load_settings
from penstock.shell.auth import hash_key
from support import chunks
from support.http_client import Answer, Caller, whole
from support.upstreams import engine_app, in_front_of, saying

KEY = "alices-key-0123456789"
KEYS: dict[str, Any] = {"auth__keys": {"alice": hash_key(KEY)}}
APP = "https://app.example"


async def preflight(caller: Caller, origin: str, path: str = "/v1/streams") -> Answer:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    async with caller.session.options(caller.url + path, headers=asked) as response:
        return await whole(response)


async def test_a_named_page_may_call_and_read_what_it_needs() -> None:
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, listen__cors={"origins": [APP], "max_age_seconds": 60}, **KEYS) as setup:
        for path in ("/v1/streams", "/v1/streams/st_1", "/v1/chat/completions"):
            allowed = await preflight(setup.caller, APP, path)
            assert allowed.status == 204
            assert allowed.headers["Access-Control-Allow-Origin"] == APP
            assert "DELETE" in allowed.headers["Access-Control-Allow-Methods"]
            assert allowed.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
            assert allowed.headers["Access-Control-Max-Age"] == "60"
            assert "Access-Control-Allow-Credentials" not in allowed.headers
        headers = {"Origin": APP, "Authorization": f"Bearer {KEY}"}
        streamed = await setup.caller.stream(headers=headers)
        assert streamed.text() == "Hello"
        assert streamed.headers["Access-Control-Allow-Origin"] == APP
        assert "X-Stream-Id" in streamed.headers["Access-Control-Expose-Headers"]
        assert "Origin" in streamed.headers["Vary"]
        refused = await setup.caller.stream(headers={"Origin": APP})
        assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, APP)


async def test_any_other_page_is_told_nothing() -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, listen__cors={"origins": [APP]}, **KEYS) as setup:
        for origin in ("https://evil.example", "null", APP + ".evil.example", APP + ":8443"):
            asked = await preflight(setup.caller, origin)
            assert asked.status == 405
            assert "Access-Control-Allow-Origin" not in asked.headers
        answer = await setup.caller.stream(headers={"Origin": "https://evil.example", "Authorization": f"Bearer {KEY}"})
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert seen.requests == 1  # a key is a key: the browser, told nothing, keeps the answer from the page


async def test_without_the_setting_there_are_no_such_headers() -> None:
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, **KEYS) as setup:
        answer = await setup.caller.stream(headers={"Origin": APP, "Authorization": f"Bearer {KEY}"})
        assert not [name for name in answer.headers if name.startswith(("Access-Control", "Vary"))]


async def test_any_page_may_be_named_by_a_star() -> None:
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, listen__cors={"origins": ["*"]}, **KEYS) as setup:
        assert (await preflight(setup.caller, "https://any.example")).status == 204


async def test_without_keys_no_page_of_elsewhere_may_use_the_engine() -> None:
    """A page may POST text to loopback without asking; a name that is rebound makes it the same origin."""
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app) as setup:
        port = setup.caller.url.rpartition(":")[2]
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://evil.example:{port}", "Host": f"evil.example:{port}"},
            {"Origin": "http://127.0.0.1:1", "Host": f"127.0.0.1:{port}"},
            {"Origin": "http://[", "Host": "["},
        ):
            refused = await setup.caller.stream(headers={"Content-Type": "text/plain", **headers})
            assert (refused.status, refused.error["code"]) == (403, "origin_not_allowed"), headers
        assert seen.requests == 0
        for headers in (
            {},
            {"Origin": setup.caller.url},
            {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"},
        ):
            assert (await setup.caller.stream(headers=headers)).text() == "Hello"
    async with in_front_of(app, listen__cors={"origins": [APP]}) as setup:
        assert (await setup.caller.stream(headers={"Origin": APP})).text() == "Hello"


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://app.example/path", "ftp://x"])
def test_what_is_no_origin_is_named(origin: str) -> None:
    flags = {"upstreams": [{"url": "http://vllm:8000"}], "listen.cors.origins": [origin]}
    with pytest.raises(SettingsError, match=r"is no origin; write it like https://app\.example, without a path"):
        load_settings(environment={}, flags=flags)
