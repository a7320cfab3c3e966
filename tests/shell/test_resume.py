"""Streams taken up again: by a cursor, by their id, by an idempotency key, and by nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from penstock.core.verifier import parse_log, verify
from penstock.shell.auth import hash_key
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, chat
from support.sockets import until
from support.upstreams import Setup, engine_app, in_front_of, opened, replay, replayed, saying

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

STREAMS = "/v1/streams"
CHAT = "/v1/chat/completions"
LINGER: Json = {"penstock": {"on_disconnect": "linger"}}
HELLO = chunks.answer_of(["Hello", " you", "!"])
forms = pytest.mark.parametrize("accept", [SSE, NDJSON], ids=["events", "lines"])


class Word:
    """An engine that says a word, waits until it may go on, and says the rest."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.app, self.seen = engine_app(self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(b"".join(HELLO[:2]))
        await self.may_go_on.wait()
        for piece in HELLO[2:]:
            await response.write(piece)
        return response


@pytest.fixture
async def word() -> Word:
    return Word()


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    async with in_front_of(replay()) as running:
        yield running


async def resumed(
    caller: Caller, stream_id: str, after: int | None = None, accept: str = SSE, **headers: str
) -> Answer:
    query = "" if after is None else f"?after={after}"
    return await caller.get(f"{STREAMS}/{stream_id}/events{query}", {"Accept": accept, **headers})


@asynccontextmanager
async def begun(caller: Caller, body: Json, **headers: str) -> AsyncIterator[tuple[aiohttp.ClientResponse, bytes]]:
    """A stream whose first word was read. Leaving the block closes the connection."""
    async with caller.opened(STREAMS, body, headers) as response:
        data = b""
        while b"delta.text" not in data or not data.endswith(b"\n"):
            data += await response.content.readany()
        yield response, data


def frames(data: bytes, accept: str = SSE) -> list[bytes]:
    """The events of a stream as they came over the wire, comments and heartbeats left out."""
    if accept == NDJSON:
        return [line for line in data.splitlines(keepends=True) if line.strip()]
    return [frame + b"\n\n" for frame in data.split(b"\n\n")[:-1] if not frame.startswith(b":")]


# --- A cursor into a stream that is over --------------------------------------------------------------


@forms
@pytest.mark.parametrize("form", [SSE, NDJSON], ids=["events", "lines"])
async def test_every_cursor_of_a_finished_stream_gets_the_rest_byte_for_byte(
    setup: Setup, accept: str, form: str
) -> None:
    whole = await setup.caller.stream(form, **replayed("thinking-tool-parsed", tools=[]))
    stream_id = whole.headers["X-Stream-Id"]
    everything = frames((await resumed(setup.caller, stream_id, accept=accept)).body, accept)
    if accept == form:
        assert everything == frames(whole.body, form)
    assert parse_log(b"".join(everything)) == whole.events
    for after in range(1, len(everything)):
        answer = await resumed(setup.caller, stream_id, after, accept)
        assert frames(answer.body, accept) == everything[after:]
    assert (await resumed(setup.caller, stream_id, len(everything), accept)).status == 204


async def test_the_three_ways_to_name_a_cursor(setup: Setup) -> None:
    whole = await setup.caller.stream(**replayed("plain"))
    stream_id = whole.headers["X-Stream-Id"]
    rest = frames(whole.body)[2:]
    by_header = await resumed(setup.caller, stream_id, None, **{"Last-Event-ID": f"{stream_id}:2"})
    # EventSource reconnects to the URL it was given, query and all.
    by_both = await resumed(setup.caller, stream_id, 1, **{"Last-Event-ID": "2"})
    by_body = await setup.caller.post(f"{STREAMS}/{stream_id}/resume", {"after": 2})
    for answer in (by_header, by_both, by_body):
        assert (answer.status, frames(answer.body)) == (200, rest)
    empty = await setup.caller.post(f"{STREAMS}/{stream_id}/resume", b"")
    assert frames(empty.body) == frames(whole.body)


@pytest.mark.parametrize(
    ("after", "headers", "status", "code"),
    [
        ("99999", {}, 409, "cursor_ahead"),
        ("-1", {}, 400, "invalid_cursor"),
        ("x", {}, 400, "invalid_cursor"),
        ("", {"Last-Event-ID": "st_other:2"}, 400, "invalid_cursor"),
        ("", {"Last-Event-ID": "nonsense"}, 400, "invalid_cursor"),
        ("1", {"Accept": FOLDED}, 406, "not_acceptable"),
    ],
)
async def test_a_cursor_that_leads_nowhere(
    setup: Setup, after: str, headers: dict[str, str], status: int, code: str
) -> None:
    stream_id = (await setup.caller.stream(**replayed("plain"))).headers["X-Stream-Id"]
    query = f"?after={after}" if after else ""
    answer = await setup.caller.get(f"{STREAMS}/{stream_id}/events{query}", headers)
    assert (answer.status, answer.error["code"]) == (status, code)


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"after": "2"}', b'{"after": true}', b'{"before": 2}'])
async def test_a_resume_whose_body_is_wrong(setup: Setup, body: bytes) -> None:
    stream_id = (await setup.caller.stream(**replayed("plain"))).headers["X-Stream-Id"]
    answer = await setup.caller.post(f"{STREAMS}/{stream_id}/resume", body)
    assert (answer.status, answer.error["origin"]) == (400, "client")


async def test_the_contract_is_in_the_headers_and_in_the_start() -> None:
    async with in_front_of(replay(), store__retention_seconds=7) as setup:
        answer = await setup.caller.stream(**replayed("plain"))
        start = answer.one("stream.start")
        assert answer.headers["X-Stream-Resume-Seconds"] == "7"
        assert 6000 <= start["resumable_until"] - start["ts"] <= 8000


async def test_without_retention_nothing_is_kept_nor_promised() -> None:
    async with in_front_of(replay(), store__retention_seconds=0) as setup:
        answer = await setup.caller.stream(**replayed("plain"), **LINGER)
        assert "X-Stream-Resume-Seconds" not in answer.headers
        assert answer.one("stream.start")["resumable_until"] is None
        assert (await resumed(setup.caller, answer.headers["X-Stream-Id"])).status == 404


async def test_a_log_is_forgotten_in_time() -> None:
    async with in_front_of(replay(), store__retention_seconds=0.2) as setup:
        stream_id = (await setup.caller.stream(**replayed("plain"))).headers["X-Stream-Id"]
        assert (await resumed(setup.caller, stream_id)).status == 200

        async def is_gone() -> bool:
            answer = await resumed(setup.caller, stream_id)
            return answer.status == 404 and answer.error["code"] == "no_such_stream"

        await until(is_gone)


async def test_a_stream_belongs_to_who_opened_it() -> None:
    keys = {"alice": hash_key("a-key"), "bob": hash_key("b-key")}
    alice, bob = {"Authorization": "Bearer a-key"}, {"Authorization": "Bearer b-key"}
    async with in_front_of(replay(), auth__keys=keys) as setup:
        answer = await setup.caller.stream(headers=alice, **replayed("plain"))
        stream_id = answer.headers["X-Stream-Id"]
        for path in (f"{STREAMS}/{stream_id}", f"{STREAMS}/{stream_id}/events"):
            assert (await setup.caller.get(path, alice)).status == 200
            assert (await setup.caller.get(path, bob)).error["code"] == "no_such_stream"
            assert (await setup.caller.get(path)).status == 401
        foreign = await setup.caller.post(f"{STREAMS}/{stream_id}/resume", {}, bob)
        assert foreign.status == 404


# --- A snapshot ---------------------------------------------------------------------------------------


@forms
async def test_a_snapshot_is_the_folded_answer(setup: Setup, accept: str) -> None:
    request = replayed("thinking-tool-parsed", tools=[])
    answer = await setup.caller.stream(accept, **request)
    snapshot = (await setup.caller.get(f"{STREAMS}/{answer.headers['X-Stream-Id']}")).json
    folded = (await setup.caller.stream(FOLDED, **request)).json
    changing = ("stream_id", "duration_ms", "ttft_ms")
    assert {k: v for k, v in snapshot.items() if k not in changing} == {
        k: v for k, v in folded.items() if k not in changing
    }
    assert (snapshot["status"], snapshot["last_seq"]) == ("completed", len(answer.events))


async def test_a_snapshot_of_a_running_stream(word: Word) -> None:
    async with in_front_of(word.app) as setup, begun(setup.caller, chat()) as (response, data):
        snapshot = (await setup.caller.get(f"{STREAMS}/{response.headers['X-Stream-Id']}")).json
        assert (snapshot["status"], snapshot["last_seq"]) == ("running", len(frames(data)))
        assert snapshot["choices"][0]["text"] == "Hello"
        word.may_go_on.set()


# --- A stream that runs -------------------------------------------------------------------------------


async def test_a_stream_that_lingers_is_taken_up_where_it_was_left(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        async with begun(setup.caller, chat(**LINGER)) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
        await asyncio.sleep(0.05)
        assert word.seen.open == 1
        asyncio.get_running_loop().call_later(0.05, word.may_go_on.set)
        rest = await resumed(setup.caller, stream_id, len(frames(seen)))
        log = parse_log(b"".join(frames(seen) + frames(rest.body)))
        assert verify(log) == []
        assert (log[-1]["status"], word.seen.left) == ("completed", 0)
        assert "".join(event["text"] for event in log if event["type"] == "delta.text") == "Hello you!"
        await until(lambda: setup.sidecar.server.open_streams == 0)


async def test_nobody_comes_back_in_time(word: Word) -> None:
    async with in_front_of(word.app, store__linger_seconds=0.15) as setup:
        async with begun(setup.caller, chat(**LINGER)) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
        await until(lambda: word.seen.left == 1)
        await until(lambda: setup.sidecar.server.open_streams == 0)
        rest = await resumed(setup.caller, stream_id, len(frames(seen)))
        log = parse_log(b"".join(frames(seen) + frames(rest.body)))
        assert verify(log) == []
        assert [event["reason"] for event in log if event["type"] == "finish"] == ["cancelled"]
        assert log[-1]["status"] == "cancelled"


async def test_a_client_that_leaves_cancels_and_finds_that_out(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        async with begun(setup.caller, chat()) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
        await until(lambda: word.seen.left == 1)
        rest = await resumed(setup.caller, stream_id, len(frames(seen)))
        log = parse_log(b"".join(frames(seen) + frames(rest.body)))
        assert verify(log) == []
        assert log[-1]["status"] == "cancelled"


async def test_a_stream_goes_on_while_anybody_reads_it(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        async with begun(setup.caller, chat()) as (response, _):
            stream_id = response.headers["X-Stream-Id"]
            second = asyncio.create_task(resumed(setup.caller, stream_id))
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        assert word.seen.open == 1
        word.may_go_on.set()
        answer = await second
        assert (answer.end["status"], answer.text()) == ("completed", "Hello you!")


async def test_the_last_reader_to_leave_cancels(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        async with begun(setup.caller, chat()) as (response, _):
            path = f"{setup.caller.url}{STREAMS}/{response.headers['X-Stream-Id']}/events"
            second = await setup.caller.session.get(path)
            assert b"delta.text" in await second.content.readany() + await second.content.readany()
        await asyncio.sleep(0.1)
        assert word.seen.open == 1
        second.close()
        await until(lambda: word.seen.left == 1)


async def test_readers_of_a_running_stream_get_the_same_bytes(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        async with begun(setup.caller, chat()) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
            readers = [asyncio.create_task(resumed(setup.caller, stream_id, after)) for after in (None, 2, 3, 4)]
            await asyncio.sleep(0.1)
            word.may_go_on.set()
            everything = frames(seen + await response.read())
        for after, reader in zip((0, 2, 3, 4), readers, strict=True):
            assert frames((await reader).body) == everything[after:]


async def test_a_reader_gets_heartbeats_too(word: Word) -> None:
    async with (
        in_front_of(word.app, timing__heartbeat_seconds=0.1) as setup,
        begun(setup.caller, chat()) as (response, _),
    ):
        path = f"{setup.caller.url}{STREAMS}/{response.headers['X-Stream-Id']}/events"
        async with setup.caller.session.get(path) as second:
            data = b""
            while data.count(b": heartbeat\n\n") < 2:
                data += await second.content.readany()


async def test_a_delete_ends_a_stream_that_lingers(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        async with begun(setup.caller, chat(**LINGER)) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
        await setup.caller.delete(stream_id)
        await until(lambda: word.seen.left == 1)
        rest = await resumed(setup.caller, stream_id, len(frames(seen)))
        assert rest.body.count(b'"status":"cancelled"') == 1


# --- Bounds -------------------------------------------------------------------------------------------


async def test_the_log_that_finished_first_is_forgotten_first() -> None:
    app, _ = engine_app(saying(chunks.role(), chunks.content("x" * 30_000), *HELLO[2:]))
    async with in_front_of(app, store__memory_bytes=2**17) as setup:
        ids = [(await setup.caller.stream()).headers["X-Stream-Id"] for _ in range(6)]
        statuses = [(await resumed(setup.caller, stream_id)).status for stream_id in ids]
        assert statuses == [404, 404, 200, 200, 200, 200]


async def test_a_running_stream_that_outgrows_the_store_loses_its_start() -> None:
    release = asyncio.Event()

    async def long(request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        await response.write(chunks.role())
        for _ in range(40):
            await response.write(chunks.content("x" * 5_000))
            await asyncio.sleep(0)
        await release.wait()
        await response.write(b"".join(HELLO[2:]))
        return response

    app, _ = engine_app(long)
    async with in_front_of(app, store__memory_bytes=2**16) as setup, setup.caller.opened(STREAMS, chat()) as response:
        stream_id = response.headers["X-Stream-Id"]
        data = b""
        while data.count(b"x") < 40 * 5_000:
            data += await response.content.readany()
        gone = await resumed(setup.caller, stream_id, 3)
        assert (gone.status, gone.error["code"]) == (410, "cursor_evicted")
        release.set()
        everything = frames(data + await response.read())
        rest = await resumed(setup.caller, stream_id, len(everything) - 5)
        assert frames(rest.body) == everything[-5:]


# --- Idempotency keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "accept", "body"),
    [
        (STREAMS, SSE, {}),
        (STREAMS, NDJSON, {}),
        (STREAMS, FOLDED, {}),
        (CHAT, "*/*", {"stream": True}),
        (CHAT, "*/*", {"stream": False}),
    ],
    ids=["events", "lines", "folded", "chunks", "whole"],
)
async def test_a_retry_gets_the_finished_answer_again(route: str, accept: str, body: Json) -> None:
    app, seen = engine_app(_either)
    async with in_front_of(app) as setup:
        headers = {"Accept": accept, "Idempotency-Key": "k-1"}
        first = await setup.caller.post(route, chat(**body), headers)
        again = await setup.caller.post(route, chat(**body), headers)
        assert (first.status, again.status, seen.requests) == (200, 200, 1)
        assert again.body == first.body
        assert again.headers["Content-Type"] == first.headers["Content-Type"]
        assert again.headers["X-Stream-Id"] == first.headers["X-Stream-Id"]
        assert "Idempotency-Replayed" not in first.headers
        assert again.headers["Idempotency-Replayed"] == "true"
        other = await setup.caller.post(route, chat(**body), {**headers, "Idempotency-Key": "k-2"})
        assert (other.status, seen.requests) == (200, 2)


async def _either(request: web.Request) -> web.StreamResponse:
    """Streams if it is asked to."""
    if (await request.json()).get("stream"):
        return await saying(*HELLO)(request)
    return web.Response(body=chunks.whole({"content": "Hello you!"}), content_type="application/json")


@pytest.mark.parametrize(("route", "body"), [(STREAMS, {}), (CHAT, {"stream": True})], ids=["events", "chunks"])
async def test_a_retry_joins_the_running_stream(word: Word, route: str, body: Json) -> None:
    async with in_front_of(word.app) as setup:
        headers = {"Idempotency-Key": "k-1"}
        async with setup.caller.opened(route, chat(**body), headers) as response:
            await response.content.readany()
        again = asyncio.create_task(setup.caller.post(route, chat(**body), headers))
        await asyncio.sleep(0.1)
        word.may_go_on.set()
        answer = await again
        assert (answer.status, word.seen.requests, word.seen.left) == (200, 1, 0)
        if route == STREAMS:
            assert answer.text() == "Hello you!"
        else:
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in answer.chunks if c["choices"]) == (
                "Hello you!"
            )
            assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_without_keys_of_our_own_a_retry_comes_with_the_key_for_the_engine(setup: Setup) -> None:
    """Whom the engine would refuse gets no answer that it gave to another."""
    request, key = replayed("plain"), {"Idempotency-Key": "k-1"}
    first = await setup.caller.stream(headers={**key, "Authorization": "Bearer right"}, **request)
    assert first.status == 200
    for more in ({}, {"Authorization": "Bearer wrong"}):
        refused = await setup.caller.stream(headers={**key, **more}, **request)
        assert (refused.status, refused.error["code"]) == (422, "idempotency_key_reused")
    again = await setup.caller.stream(headers={**key, "Authorization": "Bearer right"}, **request)
    assert again.body == first.body


async def test_a_key_with_another_request_is_an_error(setup: Setup) -> None:
    headers = {"Idempotency-Key": "k-1"}
    assert (await setup.caller.stream(headers=headers, **replayed("plain"))).status == 200
    other = await setup.caller.stream(headers=headers, **replayed("plain", max_tokens=7))
    assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
    form = await setup.caller.stream(FOLDED, headers=headers, **replayed("plain"))
    assert (form.status, form.error["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("key", ["", '""', "k" * 256, "schlüssel"])
async def test_a_key_that_is_none_is_refused(setup: Setup, key: str) -> None:
    answer = await setup.caller.stream(headers={"Idempotency-Key": key}, **replayed("plain"))
    assert (answer.status, answer.error["param"]) == (400, "Idempotency-Key")


async def test_an_attempt_that_was_refused_may_be_made_again() -> None:
    refusals = [503, 200]

    async def answer(request: web.Request) -> web.StreamResponse:
        if refusals.pop(0) == 503:
            return web.json_response({"error": {"message": "busy"}}, status=503)
        return await saying(*HELLO)(request)

    app, seen = engine_app(answer)
    async with in_front_of(app) as setup:
        headers = {"Idempotency-Key": "k-1"}
        assert (await setup.caller.stream(headers=headers)).status == 503
        assert (await setup.caller.stream(headers=headers)).text() == "Hello you!"
        assert seen.requests == 2


async def test_a_retry_that_waits_hears_the_refusal_too() -> None:
    refuse = asyncio.Event()

    async def answer(_: web.Request) -> web.StreamResponse:
        await refuse.wait()
        return web.json_response({"error": {"message": "busy"}}, status=503)

    app, seen = engine_app(answer)
    async with in_front_of(app) as setup:
        both = [asyncio.create_task(setup.caller.stream(headers={"Idempotency-Key": "k-1"})) for _ in range(2)]
        await asyncio.sleep(0.1)
        refuse.set()
        assert [(await task).status for task in both] == [503, 503]
        assert seen.requests == 1


async def test_two_callers_may_choose_the_same_key() -> None:
    keys = {"alice": hash_key("a-key"), "bob": hash_key("b-key")}
    app, seen = engine_app(saying(*HELLO))
    async with in_front_of(app, auth__keys=keys) as setup:
        for who in ("a-key", "b-key"):
            headers = {"Authorization": f"Bearer {who}", "Idempotency-Key": "k-1"}
            assert (await setup.caller.stream(headers=headers)).status == 200
        assert seen.requests == 2


async def test_a_key_alone_does_not_make_it_linger_where_the_client_says_cancel(word: Word) -> None:
    async with in_front_of(word.app) as setup:
        body = chat(penstock={"on_disconnect": "cancel"})
        async with begun(setup.caller, body, **{"Idempotency-Key": "k-1"}):
            pass
        await until(lambda: word.seen.left == 1)
        again = await setup.caller.post(STREAMS, body, {"Idempotency-Key": "k-1"})
        assert again.end["status"] == "cancelled"
