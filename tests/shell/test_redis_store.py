"""Several replicas and a real Redis: any of them takes a stream up, and one that dies is noticed once."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError, web
from redis.asyncio import Redis

from penstock.core.verifier import parse_log, verify
from penstock.shell.stores.redis.carried import RedisLog
from penstock.shell.stores.redis.link import stopped
from penstock.shell.stores.redis.store import RedisStore
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller, Json, chat
from support.redis_server import RedisServer, redis_server
from support.replicas import STREAMS, Word, begun, frames, replicas, resumed
from support.sockets import until
from support.upstreams import engine_app, replay, replayed, saying

CHAT = "/v1/chat/completions"
LINGER: Json = {"penstock": {"on_disconnect": "linger"}}


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path) as server:
        yield server


@pytest.mark.parametrize("form", [SSE, NDJSON], ids=["events", "lines"])
async def test_another_replica_replays_a_finished_stream_byte_for_byte(redis: RedisServer, form: str) -> None:
    async with replicas(replay(), [redis.url] * 2) as both:
        whole = await both.callers[0].stream(form, **replayed("thinking-tool-parsed", tools=[]))
        stream_id = whole.headers["X-Stream-Id"]
        for after in range(0, len(whole.events), 3):
            here, there = [await resumed(caller, stream_id, after, form) for caller in both.callers]
            assert (there.status, there.body) == (200, here.body)
        assert (await resumed(both.callers[1], stream_id, len(whole.events), form)).status == 204
        snapshot = (await both.callers[1].get(f"{STREAMS}/{stream_id}")).json
        assert (snapshot["status"], snapshot["last_seq"]) == ("completed", len(whole.events))


async def test_another_replica_follows_a_running_stream(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, seen):
        stream_id = response.headers["X-Stream-Id"]
        there = asyncio.create_task(resumed(both.callers[1], stream_id, 2))
        await asyncio.sleep(0.2)
        word.may_go_on.set()
        everything = frames(bytes(seen) + await response.read())
        assert verify(parse_log(b"".join(everything))) == []
        assert frames((await there).body) == everything[2:]


async def test_a_stream_whose_log_is_gone_is_not_waited_for(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, _):
        stream_id = response.headers["X-Stream-Id"]
        async with Redis.from_url(redis.url) as client:
            await client.delete(f"penstock:{stream_id}:log")
        assert (await resumed(both.callers[1], stream_id)).status == 404


async def test_a_cursor_is_not_ahead_of_a_replica_that_heard_less(redis: RedisServer) -> None:
    """The stream's own replica sent it; the other one, which follows the stream already, has not read so far."""
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, seen):
        path = f"{STREAMS}/{response.headers['X-Stream-Id']}/events"
        async with both.callers[1].session.get(both.callers[1].url + path) as following:
            await following.content.readany()
            await stopped([both.store(1).tasks["listen"]])
            word.say("More")
            while b"More" not in seen or not seen.endswith(b"\n\n"):
                seen += await response.content.readany()
            after = f"{path}?after={len(frames(bytes(seen)))}"
            async with both.callers[1].session.get(both.callers[1].url + after) as resuming:
                assert resuming.status == 200


async def test_a_reader_elsewhere_keeps_a_stream_going(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2, store__linger_seconds=0.4) as both:
        async with begun(both.callers[0], chat(**LINGER)) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
        there = asyncio.create_task(resumed(both.callers[1], stream_id, len(frames(bytes(seen)))))
        await asyncio.sleep(1.5)
        assert word.seen.open == 1
        word.may_go_on.set()
        log = parse_log(b"".join(frames(bytes(seen)) + frames((await there).body)))
        assert verify(log) == []
        assert log[-1]["status"] == "completed"


async def test_a_delete_at_another_replica_cancels(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, seen):
        assert (await both.callers[1].delete(response.headers["X-Stream-Id"])).status == 204
        log = parse_log(bytes(seen) + await response.read())
        assert log[-1]["status"] == "cancelled"
        await until(lambda: word.seen.left == 1)


async def test_notes_reach_the_stream_from_every_replica_in_their_order(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 3, annotations__notes_per_stream=30) as three:
        async with begun(three.callers[0], chat()) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
            for number in range(30):
                answer = await noted(three.callers[number % 3], stream_id, number=number)
                assert (answer.status, answer.json) == (202, {"status": "accepted"})
            full = [await noted(caller, stream_id) for caller in three.callers]
            assert [(answer.status, answer.error["code"]) for answer in full] == [(429, "too_many_annotations")] * 3
            word.may_go_on.set()
            log = parse_log(bytes(seen) + await response.read())
        assert verify(log) == []
        assert [event["data"] for event in log if event["type"] == "annotation"] == [{"number": n} for n in range(30)]
        for caller in three.callers:
            assert parse_log((await resumed(caller, stream_id)).body) == log
            over = await noted(caller, stream_id)
            assert (over.status, over.error["code"]) == (404, "no_such_stream")
        # Notes are long: the control streams do not keep what was heard.
        lengths = [await _words(redis, three.store(number)) for number in range(3)]
        assert max(lengths) <= 5


async def test_the_notes_of_one_backend_that_does_not_wait_are_all_there(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, seen):
        stream_id = response.headers["X-Stream-Id"]
        answers = await asyncio.gather(*(noted(both.callers[n % 2], stream_id, number=n) for n in range(40)))
        assert {answer.status for answer in answers} == {202}
        word.may_go_on.set()
        log = parse_log(bytes(seen) + await response.read())
        assert verify(log) == []
        assert sorted(e["data"]["number"] for e in log if e["type"] == "annotation") == list(range(40))


async def test_a_note_for_a_replica_that_died_is_not_said_to_be_taken(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, _):
        stream_id = response.headers["X-Stream-Id"]
        await both.kill(0)
        silent = await noted(both.callers[1], stream_id)
        assert (silent.status, silent.error["code"]) == (503, "replica_silent")

        async def is_gone() -> bool:
            return (await noted(both.callers[1], stream_id)).status == 404

        await until(is_gone)


async def noted(caller: Caller, stream_id: str, **data: int) -> Answer:
    return await caller.post(f"{STREAMS}/{stream_id}/annotations", {"kind": "evidence", "data": data})


async def _words(redis: RedisServer, store: RedisStore) -> int:
    """How many words Redis keeps for this replica."""
    async with Redis.from_url(redis.url) as client:
        length: int = await client.xlen(f"penstock:at:{store.replica}:control")
        return length


@pytest.mark.parametrize(
    ("route", "accept", "body"),
    [(STREAMS, SSE, {}), (STREAMS, FOLDED, {}), (CHAT, "*/*", {"stream": True})],
    ids=["events", "folded", "chunks"],
)
async def test_a_retry_at_another_replica_gets_the_same_answer(
    redis: RedisServer, route: str, accept: str, body: Json
) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello", " you"])))
    headers = {"Accept": accept, "Idempotency-Key": "k-1"}
    async with replicas(app, [redis.url] * 2) as both:
        first, again = [await caller.post(route, chat(**body), headers) for caller in both.callers]
        assert (first.status, again.status, again.body, seen.requests) == (200, 200, first.body, 1)
        assert again.headers["Idempotency-Replayed"] == "true"
        other = await both.callers[1].post(route, chat(**body, max_tokens=7), headers)
        assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")


async def test_many_retries_at_once_run_one_attempt(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both:
        headers = {"Idempotency-Key": "k-1"}
        tasks = [asyncio.create_task(both.callers[n % 2].post(STREAMS, chat(), headers)) for n in range(10)]
        await asyncio.sleep(0.4)
        word.may_go_on.set()
        bodies = {b"".join(frames((await task).body)) for task in tasks}
        assert (len(bodies), word.seen.requests) == (1, 1)


async def test_an_attempt_that_was_refused_may_be_made_again_elsewhere(redis: RedisServer) -> None:
    refusals = [400, 200]

    async def answer(request: web.Request) -> web.StreamResponse:
        if refusals.pop(0) == 400:
            return web.json_response({"error": {"message": "no"}}, status=400)
        return await saying(*chunks.answer_of(["Hello"]))(request)

    app, _ = engine_app(answer)
    async with replicas(app, [redis.url] * 2) as both:
        headers = {"Idempotency-Key": "k-1"}
        assert (await both.callers[0].stream(headers=headers)).status == 400
        await asyncio.sleep(1.1)
        assert (await both.callers[1].stream(headers=headers)).text() == "Hello"


# --- A replica dies -------------------------------------------------------------------------------------


async def test_a_stream_whose_replica_died_gets_its_one_ending(redis: RedisServer) -> None:
    word = Word()
    async with (
        replicas(word.app, [redis.url] * 3) as three,
        begun(three.callers[0], chat(**LINGER)) as (response, seen),
    ):
        stream_id = response.headers["X-Stream-Id"]
        had = frames(bytes(seen))
        waiting = asyncio.create_task(resumed(three.callers[1], stream_id, len(had)))
        await three.kill(0)
        rest = await waiting
        log = parse_log(b"".join(had) + b"".join(frames(rest.body)))
        assert verify(log) == []
        [error] = [event for event in log if event["type"] == "error"]
        assert (error["code"], error["retryable"], error["origin"]) == ("replica_lost", True, "proxy")
        assert log[-1]["status"] == "failed"
        assert [event["estimated"] for event in log if event["type"] == "usage"] == [True]
        again = await resumed(three.callers[2], stream_id, len(had))
        assert frames(again.body) == frames(rest.body)


async def test_a_stream_that_had_said_all_is_over_when_its_replica_dies(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died between the last event and the mark that nothing follows, for which readers elsewhere wait."""
    async with replicas(replay(), [redis.url] * 2) as both:
        with monkeypatch.context() as patch:
            patch.setattr(RedisLog, "end", lambda log: None)
            whole = await both.callers[0].stream(SSE, **replayed("thinking-tool-parsed", tools=[]))
        await both.kill(0)
        elsewhere = await resumed(both.callers[1], whole.headers["X-Stream-Id"])
        assert frames(elsewhere.body) == frames(whole.body)


async def test_the_answer_of_a_lost_stream_is_continued_at_another_replica(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both:
        async with begun(both.callers[0], chat(**LINGER)) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
            had = frames(bytes(seen))
            await both.kill(0)
            rest = await resumed(both.callers[1], stream_id, len(had))
            assert b"replica_lost" in rest.body
        word.may_go_on.set()
        refused = await both.callers[1].stream(temperature=1, penstock={"continue": stream_id})
        assert (refused.status, refused.error["code"]) == (422, "cannot_continue")
        answer = await both.callers[1].stream(penstock={"continue": stream_id})
        assert (answer.one("stream.start")["continues"], answer.end["status"]) == (stream_id, "completed")
        told = json.loads(word.seen.body)
        assert (told["messages"][-1], told["continue_final_message"]) == (
            {"role": "assistant", "content": "Hello you"},
            True,
        )


async def test_the_dead_replica_that_lives_is_cut_off(redis: RedisServer) -> None:
    """A process that was stopped for longer than its lease: what it says then is not said to anybody."""
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both:
        async with begun(both.callers[0], chat(**LINGER)) as (response, seen):
            stream_id = response.headers["X-Stream-Id"]
            await stopped([both.store(0).tasks["beat"]])
            rest = await resumed(both.callers[1], stream_id, len(frames(bytes(seen))))
            word.may_go_on.set()
            with pytest.raises(ClientPayloadError):
                await asyncio.wait_for(response.content.read(), 5)
        await until(lambda: both.sidecars[0].server.open_streams == 0)
        log = parse_log(b"".join(frames(bytes(seen)) + frames(rest.body)))
        assert verify(log) == []
        assert (await resumed(both.callers[0], stream_id, len(frames(bytes(seen))))).body.count(b"replica_lost") == 1


async def test_a_waiting_retry_is_refused_when_the_replica_dies_before_its_first_byte(redis: RedisServer) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.get_running_loop().create_future()
        return web.Response()

    app, seen = engine_app(silent)
    async with replicas(app, [redis.url] * 2) as both:
        headers = {"Accept": FOLDED, "Idempotency-Key": "k-1"}
        first = asyncio.create_task(both.callers[0].post(STREAMS, chat(), headers))
        await until(lambda: seen.open == 1)
        again = asyncio.create_task(both.callers[1].post(STREAMS, chat(), headers))
        await asyncio.sleep(0.2)
        await both.kill(0)
        answer = await again
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        first.cancel()


# --- Redis dies -----------------------------------------------------------------------------------------


async def test_without_redis_a_stream_goes_on_and_says_what_it_lost(redis: RedisServer) -> None:
    word = Word()
    async with replicas(word.app, [redis.url] * 2) as both, begun(both.callers[0], chat()) as (response, seen):
        await redis.kill()
        word.may_go_on.set()
        log = parse_log(bytes(seen) + await response.read())
        assert verify(log) == []
        assert log[-1]["status"] == "completed"
        assert [event["code"] for event in log if event["type"] == "warning"] == ["resume_lost"]
        stream_id = response.headers["X-Stream-Id"]
        here, there = [await resumed(caller, stream_id) for caller in both.callers]
        assert (here.status, parse_log(here.body)) == (200, log)
        assert (there.status, there.error["code"]) == (503, "store_lost")
        note = await noted(both.callers[1], stream_id)
        assert (note.status, note.error["code"]) == (503, "store_lost")
        alone = await both.callers[0].stream()
        assert [event["code"] for event in alone.events if event["type"] == "warning"] == ["resume_lost"]
        await redis.start()


async def test_without_redis_a_stream_ends_where_it_must_be_resumable(redis: RedisServer) -> None:
    word = Word()
    async with (
        replicas(word.app, [redis.url] * 2, store__on_failure="end") as both,
        begun(both.callers[0], chat()) as (response, seen),
    ):
        await redis.kill()
        word.may_go_on.set()
        log = parse_log(bytes(seen) + await response.read())
        assert verify(log) == []
        assert [event["code"] for event in log if event["type"] == "error"] == ["store_lost"]
        await until(lambda: word.seen.open == 0)
        refused = await both.callers[0].stream()
        assert (refused.status, refused.error["code"], refused.headers["Retry-After"]) == (503, "store_lost", "1")
        await redis.start()

        async def serves_again() -> bool:
            return (await both.callers[0].stream()).status == 200

        await until(serves_again)
