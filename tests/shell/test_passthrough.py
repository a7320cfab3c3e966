"""Routes of the engines that are passed on: those that the settings name and no others, whole and bounded."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from penstock.settings import SettingsError, load_settings
from penstock.shell.auth import hash_key
from penstock.shell.replay import serving
from support.http_client import Caller, calling
from support.sidecar import sidecar
from support.sockets import until
from support.upstreams import silence

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

PASSED = ["POST /tokenize", "POST /v1/embeddings", "GET /version"]
ALICE = "alice-has-a-long-key"


class Stand:
    """An engine with other routes than chat; `status` is what they answer."""

    def __init__(self, name: str, status: int = 200) -> None:
        self.name = name
        self.status = status
        self.asked: list[tuple[str, bytes, dict[str, str]]] = []
        self.left = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/embeddings", self._stream)
        app.router.add_post("/slow", self._slow)
        app.router.add_route("*", "/{path:.*}", self._echo)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "common"}, {"id": self.name}]})

    async def _echo(self, request: web.Request) -> web.Response:
        if request.path in ("/health", "/metrics"):
            return web.Response()
        self.asked.append((request.path_qs, await request.read(), dict(request.headers)))
        return web.json_response({"engine": self.name}, status=self.status)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-stream"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"x" * 100)
        return response

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        try:
            await silence()
        finally:
            self.left += 1
        return response


@asynccontextmanager
async def in_front_of(stands: Sequence[Stand], **flags: Any) -> AsyncIterator[Caller]:
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serving(stand.app())) for stand in stands]
        settings = {"passthrough": PASSED, **flags}
        running = await stack.enter_async_context(sidecar(urls, **settings))
        yield await stack.enter_async_context(calling(running.url))


async def test_a_named_route_reaches_the_engine_and_no_other_does() -> None:
    stand = Stand("one")
    async with in_front_of([stand]) as caller:
        answer = await caller.post("/tokenize", {"model": "common", "prompt": "hi"}, {"Accept": "a/b", "X-Other": "no"})
        assert (answer.status, answer.json) == (200, {"engine": "one"})
        [(path, body, headers)] = stand.asked
        assert (path, body) == ("/tokenize", b'{"model": "common", "prompt": "hi"}')
        assert (headers["Accept"], headers["Content-Type"]) == ("a/b", "application/json")
        assert "X-Other" not in headers
        assert (await caller.get("/version?x=1")).status == 200
        assert stand.asked[-1][0] == "/version", "the query is the caller's, so it stays here"
        for path in (
            "/detokenize",
            "/tokenize/",
            "/tokenize/../sleep",
            "/tokenize%2f..%2fsleep",
            "//tokenize",
            "/sleep",
        ):
            async with caller.session.post(URL(caller.url + path, encoded=True), data=b"{}") as refused:
                assert refused.status == 404
        assert (await caller.get("/tokenize")).status == 405
        assert len(stand.asked) == 2


async def test_nothing_is_passed_on_by_default() -> None:
    stand = Stand("one")
    async with in_front_of([stand], passthrough=[]) as caller:
        assert (await caller.post("/tokenize", {})).status == 404
        assert stand.asked == []


async def test_an_engines_refusal_is_passed_on() -> None:
    async with in_front_of([Stand("one", 422)]) as caller:
        assert (await caller.post("/tokenize", {})).status == 422


async def test_a_full_engine_is_passed_over() -> None:
    full, free = Stand("full", 503), Stand("free")
    async with in_front_of([full, free]) as caller:
        for _ in range(6):
            assert (await caller.post("/tokenize", {})).json == {"engine": "free"}
        assert full.asked


async def test_where_all_are_full_their_answer_is_passed_on() -> None:
    async with in_front_of([Stand("a", 429), Stand("b", 429)]) as caller:
        assert (await caller.post("/tokenize", {})).status == 429


async def test_an_engine_that_is_not_there_is_passed_over() -> None:
    stand = Stand("there")
    async with (
        serving(stand.app()) as url,
        sidecar(["http://127.0.0.1:9", url], passthrough=PASSED) as running,
        calling(running.url) as caller,
    ):
        for _ in range(4):
            assert (await caller.post("/tokenize", {})).status == 200


async def test_without_any_engine_it_is_a_502() -> None:
    async with sidecar("http://127.0.0.1:9", passthrough=PASSED) as running, calling(running.url) as caller:
        answer = await caller.post("/tokenize", {})
        assert (answer.status, answer.error["code"]) == (502, "engine_unreachable")


async def test_a_body_over_the_cap_is_refused() -> None:
    stand = Stand("one")
    async with in_front_of([stand], limits__request_bytes=1024) as caller:
        assert (await caller.post("/tokenize", b"x" * 2000)).status == 413
        assert stand.asked == []


async def test_an_answer_over_the_cap_breaks_off_and_is_no_success() -> None:
    async with in_front_of([Stand("one")], limits__stream_bytes=5000) as caller:
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            await caller.post("/v1/embeddings", {"model": "common"})
    async with in_front_of([Stand("one")]) as caller:
        assert len((await caller.post("/v1/embeddings", {"model": "common"})).body) == 10_000


async def test_a_stream_is_passed_on_as_it_comes_and_a_client_that_leaves_stops_it() -> None:
    stand = Stand("one")
    async with in_front_of([stand], passthrough=["POST /slow"]) as caller:
        async with caller.opened("/slow", {}) as response:
            assert await response.content.readexactly(5) == b"first"
        await until(lambda: stand.left == 1)


async def test_a_stream_that_takes_too_long_breaks_off() -> None:
    stand = Stand("one")
    async with in_front_of([stand], passthrough=["POST /slow"], limits__stream_seconds=0.2) as caller:
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            await caller.post("/slow", {})
        await until(lambda: stand.left == 1)


async def test_a_key_is_asked_for_and_holds_for_its_models_only() -> None:
    stand = Stand("one")
    async with in_front_of([stand], auth__keys={"alice": f"{hash_key(ALICE)} models=com*"}) as caller:
        assert (await caller.post("/tokenize", {"model": "common"})).status == 401
        headers = {"Authorization": f"Bearer {ALICE}"}
        assert (await caller.post("/tokenize", {"model": "common"}, headers)).status == 200
        assert "Authorization" not in stand.asked[0][2]
        for body in (b'{"model": "other"}', b'{"prompt": "no model"}', b"[]", b"no JSON"):
            refused = await caller.post("/tokenize", body, headers)
            assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
        assert len(stand.asked) == 1


async def test_a_body_that_is_no_json_to_the_engine_names_no_model_either() -> None:
    """A form can be written so that it is JSON, too, with another model in it."""
    stand = Stand("one")
    both = b'{"model": "common", "x": "&model=other&y="}'
    async with in_front_of([stand], auth__keys={"alice": f"{hash_key(ALICE)} models=com*"}) as caller:
        headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/x-www-form-urlencoded"}
        refused = await caller.post("/tokenize", both, headers)
        assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
        headers["Content-Type"] = "application/json; charset=utf-8"
        assert (await caller.post("/tokenize", both, headers)).status == 200
        assert len(stand.asked) == 1


# --- What it costs --------------------------------------------------------------------------------


USED = {"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
SENTENCE = {"model": "common", "input": "x" * 400}


class Meter:
    """An engine that counts, as `usage` says, and the records that Penstock wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.usage: Any = USED
        self.status = 200
        self.request_id = ""
        self.seen = 0
        self.is_slow = False
        self.go_on = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        for route in ("/v1/embeddings", "/tokenize"):
            app.router.add_post(route, self._embed)
        app.router.add_get("/version", self._embed)
        return app

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        self.seen, self.request_id = self.seen + 1, request.headers["X-Request-Id"]
        told = {"data": [{"embedding": [0.1] * 5000}], **({"usage": self.usage} if self.usage is not None else {})}
        body = json.dumps(told | {"id": "embd", "quoted": '"usage": {"total_tokens": 99}'}).encode()
        response = web.StreamResponse(status=self.status, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for start in range(0, len(body), 997):
            await response.write(body[start : start + 997])
            if self.is_slow:
                await self.go_on.wait()
        return response

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    async def record(self, number: int = 1) -> dict[str, Any]:
        await until(lambda: len(self.records()) == number)
        return self.records()[-1]


@asynccontextmanager
async def metered(tmp_path: Path, words: str = "", **flags: Any) -> AsyncIterator[tuple[Meter, Caller]]:
    meter = Meter(tmp_path / "usage.jsonl")
    settings = {
        "passthrough": PASSED,
        "auth__keys": {"alice": f"{hash_key(ALICE)} {words}"},
        "usage": {"file": {"path": str(meter.path)}},
        **flags,
    }
    async with (
        serving(meter.app()) as url,
        sidecar(url, **settings) as running,
        calling(running.url, Authorization=f"Bearer {ALICE}") as caller,
    ):
        yield meter, caller


async def test_what_is_passed_on_has_its_record(tmp_path: Path) -> None:
    async with metered(tmp_path) as (meter, caller):
        assert (await caller.post("/v1/embeddings", SENTENCE)).json["id"] == "embd"
        record = await meter.record()
        expected = {
            "principal": "alice",
            "route": "/v1/embeddings",
            "upstream": "engine",
            "model": "common",
            "ending": "completed",
            "error": None,
            "billed_tokens": 9,
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "delivered_tokens": 2,
            "estimated": False,
        }
        assert {name: record[name] for name in expected} == expected
        assert meter.request_id == record["stream_id"]
        assert record["stream_id"].startswith("rq_")


@pytest.mark.parametrize(
    ("path", "usage", "status", "billed"),
    [
        ("/v1/embeddings", {"total_tokens": 12}, 200, 12),
        ("/v1/embeddings", {"prompt_tokens": 12, "total_tokens": 12}, 200, 12),
        ("/v1/embeddings", None, 200, "a guess"),
        ("/v1/embeddings", {"seconds": 3}, 200, "a guess"),
        ("/v1/embeddings", {"prompt_tokens": -5}, 200, "a guess"),
        ("/v1/embeddings", None, 400, 0),
        ("/tokenize", None, 200, 0),
    ],
)
async def test_what_is_billed(tmp_path: Path, path: str, usage: Any, status: int, billed: Any) -> None:
    async with metered(tmp_path) as (meter, caller):
        meter.usage, meter.status = usage, status
        assert (await caller.post(path, SENTENCE)).status == status
        record = await meter.record()
        guess = len(json.dumps(SENTENCE)) // 4
        assert (record["billed_tokens"], record["estimated"]) == (
            (guess, True) if billed == "a guess" else (billed, False)
        )
        assert record["ending"] == ("completed" if status == 200 else "refused")


async def test_who_leaves_in_the_middle_pays_what_it_may_have_cost(tmp_path: Path) -> None:
    async with metered(tmp_path) as (meter, caller):
        meter.is_slow = True
        async with caller.opened("/v1/embeddings", SENTENCE) as response:
            await response.content.readexactly(100)
        record = await meter.record()
        assert (record["ending"], record["estimated"]) == ("client_gone", True)
        assert record["billed_tokens"] == len(json.dumps(SENTENCE)) // 4


async def test_every_route_counts_as_a_request_and_says_what_is_left(tmp_path: Path) -> None:
    async with metered(tmp_path, "requests_per_minute=3") as (meter, caller):
        left = [
            (await caller.post("/tokenize", SENTENCE)).headers["x-ratelimit-remaining-requests"],
            (await caller.get("/version")).headers["x-ratelimit-remaining-requests"],
            (await caller.post("/v1/embeddings", SENTENCE)).headers["x-ratelimit-remaining-requests"],
        ]
        assert left == ["2", "1", "0"]
        for path in ("/tokenize", "/v1/embeddings"):
            refused = await caller.post(path, SENTENCE)
            assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["Retry-After"]) > 0
        assert (await caller.stream()).status == 429, "one count for all that a caller sends"
        assert meter.seen == 3


async def test_tokens_count_against_the_quota_of_streams_too(tmp_path: Path) -> None:
    async with metered(tmp_path, "quota_tokens=150") as (meter, caller):
        meter.usage = {"prompt_tokens": 100, "total_tokens": 100}
        assert (await caller.post("/v1/embeddings", SENTENCE)).status == 200
        await meter.record()
        refused = await caller.post("/v1/embeddings", SENTENCE)
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert (await caller.post("/tokenize", {**SENTENCE, "prompt": "x" * 10_000})).status == 200, "costs no tokens"
        assert (await caller.stream(max_tokens=60)).status == 429


async def test_two_at_once_do_not_both_take_the_last_tokens(tmp_path: Path) -> None:
    async with metered(tmp_path, "quota_tokens=200") as (meter, caller):
        meter.is_slow = True
        asked = [asyncio.create_task(caller.post("/v1/embeddings", SENTENCE)) for _ in range(6)]
        await until(lambda: sum(task.done() for task in asked) == 5)
        meter.go_on.set()
        answers = await asyncio.gather(*asked)
        assert sorted(answer.status for answer in answers) == [200, 429, 429, 429, 429, 429]


async def test_an_open_one_is_an_open_stream(tmp_path: Path) -> None:
    async with metered(tmp_path, "streams=1") as (meter, caller):
        meter.is_slow = True
        async with caller.opened("/v1/embeddings", SENTENCE) as response:
            await response.content.readexactly(100)
            assert (await caller.post("/tokenize", {})).error["code"] == "too_many_streams_of_key"
        await meter.record()
        meter.is_slow = False
        assert (await caller.post("/tokenize", {})).status == 200


async def test_a_stop_lets_what_is_on_its_way_arrive(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "usage.jsonl")
    meter.is_slow = True
    async with serving(meter.app()) as url, AsyncExitStack() as stack:
        running = await stack.enter_async_context(sidecar(url, passthrough=PASSED, timing__drain_seconds=30))
        caller = await stack.enter_async_context(calling(running.url))
        asked = asyncio.create_task(caller.post("/v1/embeddings", SENTENCE))
        await until(lambda: meter.seen == 1)
        stopping = asyncio.create_task(running.server.drain())

        async def is_refused() -> bool:
            answer = await caller.post("/tokenize", {})
            return answer.status == 503 and bool(answer.error["code"] == "draining")

        await until(is_refused)
        assert not stopping.done()
        meter.go_on.set()
        assert (await asked).json["id"] == "embd"
        await stopping


async def test_the_models_of_all_engines_are_listed_once() -> None:
    async with in_front_of([Stand("one"), Stand("two")]) as caller:
        listed = [card["id"] for card in (await caller.get("/v1/models")).json["data"]]
        assert sorted(listed) == ["common", "one", "two"]


async def test_models_are_listed_though_an_engine_is_gone() -> None:
    async with (
        serving(Stand("one").app()) as url,
        sidecar(["http://127.0.0.1:9", url]) as running,
        calling(running.url) as caller,
    ):
        assert [card["id"] for card in (await caller.get("/v1/models")).json["data"]] == ["common", "one"]


@pytest.mark.parametrize(
    "route",
    [
        "/tokenize",
        "PUT /tokenize",
        "POST tokenize",
        "POST /../sleep",
        "POST /a//b",
        "POST /{x}",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "GET /v1/penstock/streams",
        "GET /metrics",
        "POST /inference/v1/generate",
        "POST /invocations",
    ],
)
def test_a_route_that_is_wrong_or_would_go_by_the_rules_is_no_setting(route: str) -> None:
    with pytest.raises(SettingsError, match=r"passthrough\.0: .* (must be a method and a path|a route of Penstock)"):
        load_settings(environment={}, flags={"upstreams": [{"url": "http://vllm"}], "passthrough": [route]})
