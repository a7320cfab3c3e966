"""A connection that breaks anywhere loses nothing: what had come whole and what the resume brings are the uncut bytes.

In memory and in Redis, at the same replica and at another one. `make soak` cuts 10,000 times in each.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.core.verifier import parse_log, verify
from penstock.shell.replay import serving
from support import chunks
from support.http_client import NDJSON, SSE, Caller, calling, chat
from support.redis_server import redis_server
from support.sidecar import sidecar
from support.upstreams import engine_app, opened, replay, replayed

STREAMS = "/v1/streams"
PLACES = ["memory", "redis, one replica", "redis, two replicas"]
ENDS = {SSE: b"\n\n", NDJSON: b"\n"}
CUTS = {"ci": 40, "soak": 10_000}[os.environ.get("HYPOTHESIS_PROFILE", "ci")]


@asynccontextmanager
async def replicas(engine: web.Application, place: str, folder: Path) -> AsyncIterator[list[Caller]]:
    async with AsyncExitStack() as stack:
        settings: dict[str, Any] = {}
        if place != "memory":
            settings["store__url"] = (await stack.enter_async_context(redis_server(folder))).url
        engine_url = await stack.enter_async_context(serving(engine))
        count = 2 if "two" in place else 1
        running = [await stack.enter_async_context(sidecar(engine_url, **settings)) for _ in range(count)]
        yield [await stack.enter_async_context(calling(one.url)) for one in running]


def events(data: bytes, form: str) -> list[bytes]:
    """What came whole; the rest has no id yet and is dropped, as are comments."""
    end = ENDS[form]
    pieces = [piece + end for piece in data.split(end)[:-1]]
    return [piece for piece in pieces if piece.strip() and not piece.startswith(b":")]


async def resumed(caller: Caller, stream_id: str, after: int, form: str) -> list[bytes]:
    headers = {"Accept": form, "Last-Event-ID": f"{stream_id}:{after}"} if after else {"Accept": form}
    answer = await caller.get(f"{STREAMS}/{stream_id}/events", headers)
    assert answer.status in (200, 204)
    return events(answer.body, form)


@pytest.mark.parametrize("form", [SSE, NDJSON], ids=["events", "lines"])
@pytest.mark.parametrize("place", PLACES)
async def test_a_recorded_stream_cut_at_every_byte(place: str, form: str, tmp_path: Path) -> None:
    async with replicas(replay(), place, tmp_path) as callers:
        answer = await callers[0].stream(form, **replayed("thinking-tool-parsed", tools=[]))
        uncut, stream_id = b"".join(events(answer.body, form)), answer.headers["X-Stream-Id"]
        tails: dict[int, bytes] = {}
        for cut in range(len(answer.body) + 1):
            had = events(answer.body[:cut], form)
            if len(had) not in tails:
                tails[len(had)] = b"".join(await resumed(callers[-1], stream_id, len(had), form))
            assert b"".join(had) + tails[len(had)] == uncut
        assert len(tails) == len(answer.events) + 1


class Talker:
    """An engine whose writes come in small pieces, with turns of the loop between them."""

    def __init__(self) -> None:
        self.app, self.seen = engine_app(self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await opened(request)
        words = [chunks.role(), *(chunks.content(f"word {n}, ", tokens=n) for n in range(1, 30))]
        for piece in [*words, chunks.finish(tokens=30), chunks.final_usage(30), chunks.DONE]:
            await response.write(piece)
            await asyncio.sleep(0.001)
        return response


@pytest.mark.parametrize("place", PLACES)
async def test_a_running_stream_cut_anywhere_and_more_than_once(place: str, tmp_path: Path) -> None:
    talker, dice = Talker(), random.Random(7)
    cuts = streams = 0
    async with replicas(talker.app, place, tmp_path) as callers:
        while cuts < CUTS:
            some = [_cut_and_resumed(callers, dice.choice(list(ENDS)), random.Random(dice.random())) for _ in range(8)]
            for stream_id, form, had, times in await asyncio.gather(*some):
                log = parse_log(b"".join(had))
                assert (verify(log), log[-1]["status"]) == ([], "completed")
                assert had == await resumed(callers[0], stream_id, 0, form)
                cuts, streams = cuts + times, streams + 1
        assert talker.seen.requests == streams
    print(f"{place}: {cuts} cuts of {streams} streams")


async def _cut_and_resumed(callers: list[Caller], form: str, dice: random.Random) -> tuple[str, str, list[bytes], int]:
    """A stream left in the middle of its bytes, and taken up until it is whole; with the number of cuts."""
    body, cuts = chat(penstock={"on_disconnect": "linger"}), 0
    async with dice.choice(callers).opened(STREAMS, body, {"Accept": form}) as response:
        stream_id = response.headers["X-Stream-Id"]
        had = events(await _some(response.content, dice.randrange(6000)), form)
    while not had or b'"stream.end"' not in had[-1]:
        cuts += 1
        headers = {"Accept": form, "Last-Event-ID": f"{stream_id}:{len(had)}"}
        path = f"{STREAMS}/{stream_id}/events"
        caller = dice.choice(callers)
        async with caller.session.get(caller.url + path, headers=headers) as response:
            assert response.status == 200
            had += events(await _some(response.content, dice.randrange(200, 6000)), form)
    return stream_id, form, had, cuts


async def _some(content: Any, most: int) -> bytes:
    """About the first `most` bytes of an answer, cut where the socket or the number says."""
    data = b""
    while len(data) < most and (more := await content.readany()):
        data += more
    return data[:most]
