"""Hostile input over real sockets: what a model, a caller or something between them may try."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web

from penstock.shell.replay import serving
from support import chunks
from support.commands import serving as serving_command
from support.http_client import Answer, calling, chat
from support.proxies import KINDS, Kind, Proxy, proxy
from support.sidecar import sidecar
from support.sockets import RawClient, raw_request, until
from support.upstreams import Seen, Setup, answering, engine_app, in_front_of, saying

CHAT, STREAMS = "/v1/chat/completions", "/v1/streams"
# An end of its own, a header block, line breaks of other worlds: none may leave the string that it stands in.
HOSTILE = (
    '\n\nid: 9\nevent: stream.end\ndata: {"type":"stream.end","status":"completed"}\n\n'
    "data: [DONE]\n\n\r\r: comment\rretry: 1\r\n\r\nHTTP/1.1 200 OK\r\nX-Injected: yes\r\n\r\n"
    "\u2028\u2029\x85\x0b\x0c\x00\x1b[2J</script><!--"
)


# --- What the model says --------------------------------------------------------------------------------


def frames(body: bytes) -> list[dict[str, str]]:
    """Server-sent events, read by the WHATWG text and by nothing of ours."""
    read: list[dict[str, str]] = []
    frame: dict[str, str] = {}
    for line in body.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        name, colon, value = line.partition(":")
        if not line:
            read += [frame] if "data" in frame else []
            frame = {}
        elif name:
            value = value.removeprefix(" ") if colon else ""
            frame[name] = f"{frame[name]}\n{value}" if name == "data" and name in frame else value
    return read


async def test_the_models_text_cannot_end_its_event() -> None:
    calls = [chunks.tool(0, call_id=HOSTILE, name=HOSTILE, arguments=json.dumps({"a": HOSTILE}))]
    said = [chunks.reasoning(HOSTILE, tokens=1), chunks.content(HOSTILE, tokens=2), *calls]
    app, _ = engine_app(saying(chunks.role(), *said, chunks.finish("stop"), chunks.final_usage(3), chunks.DONE))
    async with in_front_of(app) as setup:
        native = await setup.caller.stream()
        assert native.text() == native.reasoning() == HOSTILE
        read = frames(native.body)
        assert [frame["event"] for frame in read] == [event["type"] for event in native.events]
        assert [json.loads(frame["data"]) for frame in read] == native.events
        assert native.end["status"] == "completed"
        assert (await setup.caller.stream("application/x-ndjson")).text() == HOSTILE
        openai = await setup.caller.chat(stream=True)
        read = frames(openai.body)
        assert [frame["data"] for frame in read].count("[DONE]") == 1
        assert all(set(frame) == {"data"} for frame in read)
        told = [json.loads(frame["data"]) for frame in read[:-1]]
        assert told[-1]["error"]["code"] == "invalid_tool_call", "the request offers no tool of that name"
        deltas = [choice["delta"] for chunk in told[:-1] for choice in chunk["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == HOSTILE


async def test_what_an_engine_calls_itself_stays_in_its_string() -> None:
    """Fields that Penstock passes on without reading them, an error's words among them."""
    hostile = {"id": HOSTILE, "model": HOSTILE, "system_fingerprint": HOSTILE, HOSTILE: HOSTILE}
    spoken = json.loads(chunks.content("Hi", tokens=1).removeprefix(b"data: "))
    app, _ = engine_app(saying(chunks.frame({**spoken, **hostile}), chunks.error(HOSTILE)))
    async with in_front_of(app) as setup:
        native = await setup.caller.stream()
        assert [json.loads(frame["data"]) for frame in frames(native.body)] == native.events
        assert "X-Injected" not in native.headers
        assert native.one("error")["message"] == HOSTILE or "boom" not in native.one("error")["message"]


# --- What a caller says ---------------------------------------------------------------------------------


async def test_no_field_of_a_request_becomes_a_header() -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, store__retention_seconds=0) as setup:
        for fields in ({"model": HOSTILE}, {"user": HOSTILE}, {"penstock": {"family": HOSTILE}}, {HOSTILE: HOSTILE}):
            for answer in (await setup.caller.stream(**fields), await setup.caller.chat(**fields, stream=True)):
                assert "X-Injected" not in answer.headers
                assert "X-Injected" not in seen.headers


async def test_nothing_that_a_caller_or_an_engine_says_begins_a_line_of_the_log() -> None:
    forged = "2026-01-01 00:00:00,000 INFO penstock: stream st_0 ended completed: principal=bob"
    hostile = f"m\r\n{forged}\u2028{forged}\x1b[2J"
    spoken = json.loads(chunks.content("Hi", tokens=1).removeprefix(b"data: "))
    said = [chunks.frame({**spoken, "model": hostile}), chunks.finish(), chunks.final_usage(1), chunks.DONE]
    app, _ = engine_app(saying(*said))
    async with (
        serving(app) as engine,
        serving_command("serve", "--upstream", engine, "--port", "0") as process,
        calling(process.url) as caller,
    ):
        assert (await caller.stream(model=hostile)).text() == "Hi"
        await caller.get(f"/v1/streams/{quote(hostile)}")
        await caller.get(f"/nothing/{quote(hostile)}")
        process.terminate()
        lines = (await process.ended()).errors.splitlines()
    assert any(" ended completed: " in line for line in lines)
    assert not any(line.startswith(forged) or "\x1b" in line for line in lines)


async def test_a_malformed_header_is_no_line_of_the_log(
    direct: tuple[Setup, Seen], caplog: pytest.LogCaptureFixture
) -> None:
    setup, seen = direct
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for headers in (
        {"baggage": ",".join(["no;;;member"] * 150)},
        {"traceparent": trace, "tracestate": "no;;;member,=,"},
        {"traceparent": "0" * 2000, "tracestate": "a=b"},
    ):
        assert (await setup.caller.stream(headers=headers)).text() == "Hello"
    assert [record for record in caplog.records if record.name != "penstock"] == []
    assert "no;;;member" not in seen.headers.get("baggage", "")


BODIES: dict[str, tuple[bytes, int]] = {
    "deep": (b"[" * 200_000, 400),
    "deep inside": (b'{"model":"m","messages":[],"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    "a number of a megabyte": (b'{"model":"m","messages":[],"n":' + b"9" * 1_000_000 + b"}", 400),
    "larger than any float": (b'{"model":"m","messages":[],"n":1e999,"max_tokens":1e999}', 400),
    "no UTF-8": (b'{"model":"\xff\xfe","messages":[]}', 400),
    "a surrogate": (b'{"model":"\\ud800","messages":[]}', 400),
    "NaN": (b'{"model":"m","messages":[],"temperature":NaN}', 400),
    "NUL": (b"\x00" * 1000, 400),
    "not what it says": (b"\x1f\x8b\x08\x00nonsense", 400),
    "a float where a count belongs": (b'{"model":"m","messages":[],"stream":true,"n":1e300,"max_tokens":1e300}', 200),
}


@pytest.mark.parametrize("affinity", ["none", "prefix"])
async def test_a_prompt_that_is_nested_deeply_is_the_engines_to_judge(affinity: str) -> None:
    """Unstreamed it goes on byte for byte, and every part of Penstock that looks into it has looked."""
    app, seen = engine_app(answering(chunks.whole({"content": "Hello"})))
    prompt = b'{"model":"m","messages":[{"role":"user","content":' + b"[" * 900 + b"]" * 900 + b"}]}"
    answers = [{"id": "a", "question": "a", "text": "a"}]
    cache, routing = {"requests": "deterministic"}, {"affinity": affinity}
    async with (
        serving(app) as first,
        serving(app) as second,
        sidecar([first, second], answers=answers, answer_cache=cache, routing=routing) as running,
        calling(running.url) as caller,
    ):
        assert (await caller.post(CHAT, prompt)).status == 200
        assert seen.body == prompt
        assert (await caller.post(STREAMS, prompt)).status == 400


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("route", [STREAMS, CHAT])
async def test_a_body_that_is_a_trap_is_the_callers_fault(name: str, route: str) -> None:
    """Refused or served, at once, and never a fault of ours; the next request is served."""
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    body, status = BODIES[name]
    async with in_front_of(app) as setup, asyncio.timeout(5):
        answer = await setup.caller.post(route, body)
        assert answer.status == status, answer.body[:200]
        assert (await setup.caller.stream()).text() == "Hello"


async def test_a_body_that_grows_when_it_is_unpacked_is_cut_at_the_cap() -> None:
    """Ten kilobytes that are ten megabytes: counted as they are unpacked."""
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    bomb = gzip.compress(b'{"model":"' + b"m" * 20_000_000 + b'","messages":[]}')
    assert len(bomb) < 50_000
    async with in_front_of(app, limits__request_bytes=1_000_000) as setup:
        answer = await setup.caller.post(STREAMS, bomb, {"Content-Encoding": "gzip"})
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert seen.requests == 0


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1", []),
        (b"GET /v1/models HTTP/1.1", [b"X-Long: " + b"a" * 20_000]),
        (b"GET /v1/models HTTP/1.1", [b"X-Many-%d: 1" % number for number in range(5000)]),
        (b"GET /v1/models HTTP/1.1", [b"X Space: 1"]),
        (b"GET /v1/models HTTP/1.1", [b"X-Null: \x00"]),
        (b"GET /v1/models HTTP/1.1\r\n folded: 1", []),
        (b"GET http://[::1 HTTP/1.1", []),
        (b"GET /v1/models HTTP/9.9", []),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", []),
        (b"PRI * HTTP/2.0", []),
    ],
    ids=["path", "header", "headers", "space", "NUL", "folded", "URL", "version", "TLS", "HTTP/2"],
)
async def test_what_is_no_request_is_refused_and_harms_nobody(line: bytes, headers: list[bytes]) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app) as setup:
        async with raw_request(setup.caller.url, line, *headers) as client:
            answer = await first_bytes(client)
        assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")) or not answer
        assert seen.requests == 0
        assert (await setup.caller.stream()).text() == "Hello"


async def first_bytes(client: RawClient, seconds: float = 3) -> bytes:
    """What comes before it closes or falls silent."""
    received = b""
    try:
        async with asyncio.timeout(seconds):
            while b"\r\n\r\n" not in received:
                data = await client._read()
                if not data:
                    break
                received += data
    except TimeoutError:
        pass
    return received


# --- Slowly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"POST /v1/streams HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_who_sends_headers_byte_by_byte_is_dropped(start: bytes) -> None:
    """Not each byte gets a new deadline: all of the head has `timing.keepalive_seconds`."""
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, timing__keepalive_seconds=0.5) as setup:
        host, port = setup.caller.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        closed = asyncio.create_task(reader.read())
        began = asyncio.get_running_loop().time()
        writer.write(start)
        while not closed.done() and asyncio.get_running_loop().time() < began + 5:
            writer.write(b"a" if start else b"")
            await asyncio.sleep(0.05)
        assert closed.done()
        assert asyncio.get_running_loop().time() - began < 3
        writer.close()
        assert (await setup.caller.stream()).text() == "Hello"


# --- Two in one: request smuggling ----------------------------------------------------------------------

INNER = json.dumps(chat(model="smuggled")).encode()
SMUGGLED = b"POST /v1/streams HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(INNER), INNER)
CHUNKED = b"0\r\n\r\n" + SMUGGLED


def _chunked(body: bytes) -> bytes:
    return b"Transfer-Encoding: chunked\r\n\r\n" + body


def two_in_one() -> dict[str, bytes]:
    """One request to who reads it one way, two to who reads it another."""
    head = b"POST /v1/models HTTP/1.1\r\nHost: x\r\n"
    length = b"Content-Length: %d\r\n" % len(CHUNKED)
    return {
        "length and chunks": head + length + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        "chunks and a short length": head + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED,
        "two lengths": head + b"Content-Length: 0\r\n" + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        "a list of lengths": head + b"Content-Length: 0, %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        "a length with a sign": head + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
        "chunks that are not quite": head + length + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
        "chunks behind a space": head + length + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED,
        "chunks behind a tab": head + length + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + CHUNKED,
        "chunks twice": head + length + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED,
        "chunks in a folded line": head + length + b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        "chunks behind a bare line feed": head + length + b"X: y\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        "a chunk's size with a sign": head + b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + SMUGGLED,
        "line feeds alone": (head + b"Transfer-Encoding: chunked\r\n\r\n").replace(b"\r\n", b"\n") + CHUNKED,
        "a length behind a line feed alone": b"POST /v1/models HTTP/1.1\nHost: x\n" + length + b"\n" + CHUNKED,
        "a chunk's extension with a line feed": head + _chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
        "a chunk's extension that is a chunk": head + _chunked(b'0;a="\r\n\r\n' + SMUGGLED),
        "a chunk that goes on behind its size": head + _chunked(b"1\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
        "a chunk's end without its line break": head + _chunked(b"5\r\nhello0\r\n\r\n" + SMUGGLED),
        "a chunk's size that overflows": head + _chunked(b"10000000000000000\r\n\r\n" + CHUNKED),
        "headers behind the last chunk": head + _chunked(b"0\r\nContent-Length: 9\r\nHost: y\r\n\r\n" + SMUGGLED),
        "a body on a GET": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n" + CHUNKED,
        "an upgrade": head + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + SMUGGLED,
    }


async def exchanged(data: bytes, port: int, **tls: Any) -> bytes:
    """Everything that comes back, until it closes or nothing comes for a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **tls)
    writer.write(data)
    received = b""
    try:
        while True:
            async with asyncio.timeout(0.2):
                piece = await reader.read(65536)
            if not piece:
                break
            received += piece
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return received


def told(received: bytes) -> int:
    return received.count(b"HTTP/1.1 ") + received.count(b"HTTP/1.0 ")


@pytest.fixture
async def direct() -> AsyncIterator[tuple[Setup, Seen]]:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app) as setup:
        yield setup, seen


@pytest.mark.parametrize("name", two_in_one())
async def test_no_request_hides_in_another(name: str, direct: tuple[Setup, Seen]) -> None:
    """Each request that Penstock takes up is answered to who sent it; the doubtful ones are refused and closed."""
    setup, seen = direct
    received = await exchanged(two_in_one()[name], int(setup.caller.url.rpartition(":")[2]))
    assert seen.requests + 1 <= told(received) or seen.requests == 0, received
    assert b" 500 " not in received
    assert (await setup.caller.stream()).text() == "Hello"


@pytest.mark.parametrize("kind", KINDS)
async def test_no_request_hides_in_another_behind_a_proxy(kind: Kind, tmp_path: Path) -> None:
    """What the proxy forwards as one request must not be two to Penstock: whose answer would the second one's be?

    Every generation that the engine saw has its answer on the connection it came by, and somebody else's next
    request, which the proxy sends over the same connections to Penstock, gets its own answer.
    """
    app, seen = engine_app(echo)
    async with in_front_of(app) as setup, proxy(kind, setup.sidecar.url, tmp_path) as front:
        for name, data in two_in_one().items():
            before = seen.requests
            received = await exchanged(data, front.port, ssl=front.trusted("http/1.1"))
            assert seen.requests - before < max(1, told(received)), (name, received[:500])
            assert await asked(front, "victim") == "victim", name


async def echo(request: web.Request) -> web.StreamResponse:
    """An engine that says which model it was asked for."""
    return await saying(*chunks.answer_of([(await request.json())["model"]]))(request)


async def asked(front: Proxy, model: str) -> str:
    connector = aiohttp.TCPConnector(ssl=front.trusted("http/1.1"))
    async with aiohttp.ClientSession(connector=connector) as session:
        body = json.dumps(chat(model=model)).encode()
        async with session.post(f"https://127.0.0.1:{front.port}{STREAMS}", data=body) as response:
            return Answer(response.status, response.headers, await response.read()).text()


async def test_many_who_send_nothing_leave_room_for_one_who_does(direct: tuple[Setup, Seen]) -> None:
    setup, _ = direct
    host, port = setup.caller.url.removeprefix("http://").split(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    async with calling(setup.caller.url) as caller, asyncio.timeout(5):
        assert (await caller.stream()).text() == "Hello"
    for _, writer in idle:
        writer.close()
    await until(lambda: all(writer.is_closing() for _, writer in idle))
