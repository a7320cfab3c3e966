"""Tools that Penstock runs: over real HTTP and real MCP, with everything that can go wrong on the way."""

import asyncio
import gzip
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2
import pytest
from aiohttp import web

from penstock.settings import SettingsError, load_settings
from penstock.shell.mcp_transport import guarded_client
from penstock.shell.reach import may_reach
from penstock.shell.replay import serving
from penstock.shell.tools import HttpTool
from support import chunks
from support.http_client import NDJSON, SSE, Answer, chat, whole
from support.sockets import until
from support.tools import COUNT, CountingService, Model, call, calling_turn
from support.upstreams import Setup, engine_app, in_front_of, opened

LOOPBACK = ["127.0.0.0/8"]
ANSWER = chunks.answer_of(["It ", "is 7."])
ONCE = (calling_turn(call(0), before="Let me count."), ANSWER)


@asynccontextmanager
async def running(service: CountingService, model: Model, **more: Any) -> AsyncIterator[Setup]:
    binding = {"tools": ["count"], **more.pop("binding", {})}
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(service.app()))
        flags = {
            "tools__bindings": [{"url": f"{url}/tool", **binding}],
            "tools__loop__allow_networks": LOOPBACK,
            **more,
        }
        yield await stack.enter_async_context(in_front_of(engine_app(model.answer)[0], **flags))


async def streamed(setup: Setup, **request: Any) -> Answer:
    return await setup.caller.stream(NDJSON, tools=[COUNT], **request)


@pytest.mark.parametrize(("action", "reason"), [("redact", "stop"), ("halt", "content_filter")])
async def test_what_is_shown_of_a_result_is_moderated(action: str, reason: str) -> None:
    rule = {"id": "seven", "literal": '"n": 7', "action": action}
    async with running(
        CountingService(), Model(*ONCE), tools__loop__show_results=True, moderation__rules=[rule]
    ) as setup:
        answer = await streamed(setup)
    assert [event["action"] for event in answer.of("moderation")] == [action]
    assert [event["content"] for event in answer.of("tool_call.result")] == (
        ["{[redacted]}"] if action == "redact" else []
    )
    assert answer.finish()["reason"] == reason
    assert b'n\\": 7' not in answer.body


async def test_a_call_is_run_and_the_answer_goes_on_in_the_same_stream() -> None:
    service, model = CountingService(), Model(*ONCE)
    async with running(service, model, tools__loop__show_results=True) as setup:
        answer = await streamed(setup)
    types = [event["type"] for event in answer.events if event["type"] not in ("delta.text", "usage")]
    assert types == [
        "stream.start", "delta.role", "text.start", "text.end", "tool_call.start", "tool_call.arguments_chunk",
        "tool_call.arguments_chunk", "tool_call.ready", "tool_call.end", "tool_call.progress", "tool_call.result",
        "text.start", "text.end", "finish", "stream.end",
    ]  # fmt: skip
    assert answer.text() == "Let me count.It is 7."
    assert answer.one("tool_call.start")["executor"] == "penstock"
    result = answer.one("tool_call.result")
    assert (result["ok"], result["content"], result["bytes"]) == (True, '{"n": 7}', 8)
    assert answer.finish()["reason"] == "stop"
    assert service.requests == [{"by": 1}]


@pytest.mark.parametrize("name", ["count\r\nX-Injected: yes", "count\n", "count\x00", "zähler", "count"])
async def test_a_tools_name_is_no_header_of_its_own(name: str) -> None:
    """The caller names its tools, and a binding may fit any name."""
    service, model = CountingService(), Model(calling_turn(call(0, name=name)), ANSWER)
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    async with running(service, model, binding={"tools": ["*"]}) as setup:
        answer = await setup.caller.stream(NDJSON, tools=[tool])
    assert (answer.one("tool_call.result")["ok"], answer.text()) == (True, "It is 7.")
    assert unquote(service.headers[0]["X-Tool-Name"]) == name
    assert "X-Injected" not in service.headers[0]


async def test_a_fault_of_ours_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> str:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(HttpTool, "call", broken)
    async with running(CountingService(), Model(*ONCE)) as setup:
        answer = await streamed(setup)
    assert answer.one("tool_call.result")["ok"] is False
    assert answer.end["status"] == "completed"


async def test_the_model_is_told_what_came_of_it_in_a_request_of_its_own() -> None:
    service, model = CountingService(), Model(*ONCE)
    async with running(service, model) as setup:
        answer = await streamed(setup)
    first, second = model.asked
    made = {"id": "c0", "type": "function", "function": {"name": "count", "arguments": '{"by": 1}'}}
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": "Let me count.", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c0", "content": '{"n": 7}'},
    ]
    stream_id = answer.events[0]["stream_id"]
    assert model.ids == [stream_id, f"{stream_id}-1"]
    assert {event["stream_id"] for event in answer.events} == {stream_id}
    assert "content" not in answer.one("tool_call.result")
    assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (18, 16)


async def test_an_openai_client_sees_one_answer_and_no_call() -> None:
    service, model = CountingService(), Model(*ONCE)
    async with running(service, model) as setup:
        answer = await setup.caller.chat(tools=[COUNT], stream=True, stream_options={"include_usage": True})
    deltas = [choice["delta"] for chunk in answer.chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me count.It is 7."
    assert not any(delta.get("tool_calls") for delta in deltas)
    reasons = [choice["finish_reason"] for chunk in answer.chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert answer.chunks[-1]["usage"]["total_tokens"] == 34


@pytest.mark.parametrize("off", ["request", "not offered", "two choices", "unstreamed"])
async def test_where_nothing_is_run_the_client_gets_the_call(off: str) -> None:
    service, model = CountingService(), Model(calling_turn(call(0)))
    request: dict[str, Any] = {"penstock": {"tools": {"run": False}}} if off == "request" else {}
    other = {"type": "function", "function": {"name": "other"}}
    async with running(service, model) as setup:
        if off == "unstreamed":
            await setup.caller.chat(tools=[COUNT])
        elif off == "not offered":
            answer = await setup.caller.stream(NDJSON, tools=[other])
            assert answer.of("tool_call.ready") == []
        else:
            answer = await streamed(setup, **request, **({"n": 2} if off == "two choices" else {}))
            assert len(answer.of("tool_call.ready")) == 1 or off == "two choices"
    assert (service.requests, len(model.asked)) == ([], 1)


async def test_calls_of_one_turn_run_side_by_side_up_to_the_bound() -> None:
    service = CountingService(delay=0.1)
    model = Model(calling_turn(*(call(n) for n in range(5))), ANSWER)
    async with running(service, model, tools__loop__concurrency=2) as setup:
        answer = await streamed(setup)
    assert len(answer.of("tool_call.result")) == 5
    assert (service.most_running, len(service.executed)) == (2, 5)
    assert [message["tool_call_id"] for message in model.asked[1]["messages"][-5:]] == [f"c{n}" for n in range(5)]


async def test_a_turn_that_also_calls_a_tool_of_the_client_is_the_clients() -> None:
    service = CountingService()
    model = Model(calling_turn(call(0), call(1, "other")))
    other = {"type": "function", "function": {"name": "other"}}
    async with running(service, model) as setup:
        answer = await setup.caller.stream(NDJSON, tools=[COUNT, other])
    assert answer.finish()["reason"] == "tool_calls"
    assert answer.one("tool_call.result")["problem"] == "not run: the same turn calls a tool of the client's"
    assert service.requests == []


async def test_a_call_that_is_not_valid_or_denied_is_answered_with_the_reason() -> None:
    service = CountingService()
    model = Model(calling_turn(call(0), call(1, arguments='{"by": "x"}'), call(2, arguments='{"by": 9}')), ANSWER)
    policy = [{"id": "small", "arguments": {"properties": {"by": {"maximum": 5}}}}]
    async with running(service, model, tools__policy=policy) as setup:
        answer = await streamed(setup)
    told = [message["content"] for message in model.asked[1]["messages"][-3:]]
    assert told[0] == '{"n": 7}'
    assert told[1].startswith("the arguments do not fit the schema of 'count'")
    assert told[2].startswith("denied by policy")
    assert (len(service.requests), answer.end["status"]) == (1, "completed")


async def test_after_the_last_round_the_model_must_answer() -> None:
    service, model = CountingService(), Model(calling_turn(call(0)))
    async with running(service, model, tools__loop__rounds=2) as setup:
        answer = await streamed(setup, tool_choice="required")
    assert [body.get("tool_choice") for body in model.asked] == ["required", "auto", "none"]
    assert [event["code"] for event in answer.of("warning")] == ["tool_rounds_limit"]
    assert len(service.executed) == 2
    assert len({event["call_id"] for event in answer.of("tool_call.start")}) == 3


# --- What stands beside the text, over the turns --------------------------------------------------


async def test_the_value_of_an_answer_is_that_of_its_last_turn() -> None:
    last = chunks.answer_of(['{"n"', ": 7}"])
    service, model = CountingService(), Model(ONCE[0], last)
    async with running(service, model) as setup:
        answer = await streamed(setup, response_format={"type": "json_object"})
    assert answer.one("structured")["value"] == {"n": 7}
    assert answer.of("warning") == []


async def test_a_section_that_a_call_breaks_off_is_no_value_and_the_next_turn_has_its_own() -> None:
    first = calling_turn(call(0), before='So <v>{"half": ')
    service, model = CountingService(), Model(first, chunks.answer_of(["Then <", 'v>{"n": 7}</', "v>."]))
    wish = {"structured": {"sections": {"open": "<v>", "close": "</v>"}}}
    async with running(service, model) as setup:
        answer = await streamed(setup, penstock=wish)
    assert [(event["section"], event["value"]) for event in answer.of("structured")] == [(1, {"n": 7})]
    assert [event["code"] for event in answer.of("warning")] == ["structured_invalid"]
    assert answer.text() == 'So {"half": Then {"n": 7}.'


async def test_citations_of_every_turn_have_their_place_in_the_block_of_that_turn() -> None:
    first, last = calling_turn(call(0), before="See [1], and [2"), chunks.answer_of(["It is 7 [", "3]."])
    service, model = CountingService(), Model(first, last)
    patterns = [{"open": "[", "close": "]", "body": r"\d+"}]
    async with running(service, model, annotations__citations=patterns) as setup:
        answer = await streamed(setup)
        replay = await setup.caller.get(f"/v1/streams/{answer.headers['X-Stream-Id']}/events", {"Accept": NDJSON})
    notes = [(event["data"]["marker"], event["anchor"]["offset"]) for event in answer.of("annotation")]
    assert notes == [("[1]", 4), ("[3]", 8)]
    blocks = [event["anchor"]["block"] for event in answer.of("annotation")]
    assert blocks == [event["block"] for event in answer.of("text.start")]
    assert answer.text() == "See , and [2It is 7 ."
    assert replay.events == answer.events


# --- Tools that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "binding", "problem"),
    [
        (CountingService(status=500), {}, "the tool answered 500"),
        (CountingService(status=302), {}, "the tool answered 302"),
        (CountingService(delay=5), {"timeout_seconds": 0.1}, "the tool did not answer within 0.1 s"),
        (CountingService(body=b"x" * 100), {}, "the tool answered more than 64 bytes (tools.loop.result_bytes)"),
    ],
)
async def test_a_tool_that_fails_is_told_to_the_model_and_the_client(
    service: CountingService, binding: Any, problem: str
) -> None:
    model = Model(*ONCE)
    async with running(service, model, binding=binding, tools__loop__result_bytes=64) as setup:
        answer = await streamed(setup)
    assert (answer.one("tool_call.result")["ok"], answer.one("tool_call.result")["problem"]) == (False, problem)
    assert model.asked[1]["messages"][-1]["content"] == f"error: {problem}"
    assert answer.text().endswith("It is 7.")
    assert len(service.requests) == 1


async def test_a_call_is_tried_again_only_where_the_binding_says_so_and_with_the_same_key() -> None:
    service, model = CountingService(fails_first=2), Model(*ONCE)
    async with running(service, model, binding={"retries": 2}) as setup:
        answer = await streamed(setup)
    progress = [(event["status"], event["attempt"]) for event in answer.of("tool_call.progress")]
    assert progress == [("running", 1), ("retrying", 2), ("retrying", 3)]
    assert answer.one("tool_call.result")["ok"]
    assert len({headers["Idempotency-Key"] for headers in service.headers}) == 1
    assert service.executed.total() == 1


async def test_while_a_tool_runs_there_are_heartbeats() -> None:
    service, model = CountingService(delay=0.8), Model(*ONCE)
    async with running(service, model, timing__heartbeat_seconds=0.1, timing__first_byte_seconds=0.05) as setup:
        answer = await setup.caller.stream(SSE, tools=[COUNT])
    assert answer.body.count(b": heartbeat") >= 3


@pytest.mark.parametrize("how", ["delete", "leave"])
async def test_a_cancel_while_a_tool_runs_stops_both(how: str) -> None:
    service, model = CountingService(delay=30), Model(*ONCE)
    async with running(service, model) as setup:
        async with setup.caller.opened("/v1/streams", chat(tools=[COUNT]), {"Accept": NDJSON}) as response:
            await until(lambda: service.running == 1)
            if how == "delete":
                await setup.caller.delete(response.headers["X-Stream-Id"])
                answer = await whole(response)
                assert answer.end["status"] == "cancelled"
        await until(lambda: service.running == 0)
        await until(lambda: setup.sidecar.server.open_streams == 0)
    assert (service.executed.total(), len(model.asked)) == (0, 1)


# --- Where tools may stand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b::169.254.169.254", False),
        ("64:ff9b:1::1", False),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),
        ("fec0::1", False),
        ("::", False),
        ("255.255.255.255", False),
    ],
)
def test_private_and_link_local_addresses_are_refused(address: str, may: bool) -> None:
    assert may_reach(address, []) is may


@asynccontextmanager
async def counted() -> AsyncIterator[tuple[str, list[str]]]:
    """A tool on a loopback address, and the requests that reach it."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.method)
        return web.Response(text="7")

    app = web.Application()
    app.router.add_route("*", "/tool", answer)
    async with serving(app) as url:
        yield f"{url}/tool", seen


@pytest.mark.parametrize("kind", ["url", "mcp"])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "127。0。0。1", "[::ffff:127.0.0.1]", "0.0.0.0"],
)
async def test_a_tool_at_a_forbidden_address_is_never_reached(host: str, kind: str) -> None:
    """However the address is written, and whoever would connect to it."""
    async with counted() as (url, seen):
        bindings = [{"tools": ["count"], kind: url.replace("127.0.0.1", host), "retries": 3}]
        async with in_front_of(engine_app(Model(*ONCE).answer)[0], tools__bindings=bindings) as setup:
            answer = await streamed(setup)
    problem = answer.one("tool_call.result")["problem"]
    if host in ("127.0.0.1", "localhost"):
        assert problem == (
            f"the tool's host {host} is at an address that tools may not have; see tools.loop.allow_networks"
        )
    assert "may not have" in problem or "InvalidUrl" in problem, problem
    assert seen == []


@pytest.mark.parametrize("kind", ["url", "mcp"])
async def test_a_name_that_leads_elsewhere_the_second_time_is_not_followed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the first answer is one that may be reached; every later one is where the tool really stands."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def lying(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host not in ("tool.test", b"tool.test"):
            return real(host, port, *more, **named)
        looked_up.append("tool.test")
        address = "127.0.0.2" if len(looked_up) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", lying)
    async with counted() as (url, seen):
        bindings = [{"tools": ["count"], kind: url.replace("127.0.0.1", "tool.test"), "timeout_seconds": 5}]
        flags: dict[str, Any] = {"tools__bindings": bindings, "tools__loop__allow_networks": ["127.0.0.2/32"]}
        async with in_front_of(engine_app(Model(*ONCE).answer)[0], **flags) as setup:
            answers = [await streamed(setup) for _ in range(2)]
    assert not any(answer.one("tool_call.result")["ok"] for answer in answers)
    assert looked_up
    assert seen == []


async def test_an_endless_answer_to_a_message_of_ours_is_not_read_to_its_end() -> None:
    """Below an MCP session, whose own stream, a GET, may be as long as it likes."""
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = await opened(request)
        while request.method == "POST" or sent < 3 << 20:
            await response.write(b"x" * 65536)
            sent += 65536
        return response

    app = web.Application()
    app.router.add_route("*", "/mcp", endless)
    networks = [ip_network("127.0.0.0/8")]
    async with serving(app) as url, guarded_client({}, networks, result_bytes=1000) as client:
        with pytest.raises(httpx2.ReadError, match="more than"):
            await client.post(f"{url}/mcp")
        assert sent < 16 << 20
        sent = 0
        assert len((await client.get(f"{url}/mcp")).content) == 3 << 20


async def test_a_compressed_answer_to_a_message_of_ours_is_not_read() -> None:
    """A thousandth of the bound may become more than a bound of it; a server that compresses unasked is not heard."""
    asked_for: list[str | None] = []

    async def packed(request: web.Request) -> web.Response:
        asked_for.append(request.headers.get("Accept-Encoding"))
        return web.Response(body=gzip.compress(bytes(16 << 20)), headers={"Content-Encoding": request.query["as"]})

    app = web.Application()
    app.router.add_post("/mcp", packed)
    networks = [ip_network("127.0.0.0/8")]
    async with serving(app) as url, guarded_client({}, networks, result_bytes=1000) as client:
        with pytest.raises(httpx2.ReadError, match="answered in 'gzip'"):
            await client.post(f"{url}/mcp?as=gzip")
        assert (await client.post(f"{url}/mcp?as=identity")).content[:2] == b"\x1f\x8b"
    assert asked_for == ["identity", "identity"]


# --- MCP ------------------------------------------------------------------------------------------

SERVER = """
import asyncio, sys
from pathlib import Path
from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPError

server = MCPServer("counter")

@server.tool()
def count(by: int) -> str:
    if by < 0:
        raise ValueError("negative")
    return f"counted {by}"

@server.tool()
async def wait(path: str, seconds: float) -> str:
    Path(path).write_text("running")
    try:
        await asyncio.sleep(seconds)
    except BaseException:
        Path(path).write_text("cancelled")
        raise
    return "waited"

@server.tool()
async def refuse(path: str) -> str:
    while not Path(path).exists():
        await asyncio.sleep(0.01)
    raise MCPError(-32602, "not these arguments")

if sys.argv[1] == "stdio":
    server.run("stdio")
else:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.fixture
def mcp_server(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def mcp_binding(kind: str, path: Path) -> AsyncIterator[dict[str, Any]]:
    if kind == "stdio":
        yield {"tools": ["count"], "command": [sys.executable, str(path), "stdio"]}
        return
    port = free_port()
    process = await asyncio.create_subprocess_exec(sys.executable, str(path), "http", str(port))
    try:

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, seconds=20)
        yield {"tools": ["count"], "mcp": f"http://127.0.0.1:{port}/mcp"}
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize("kind", ["stdio", "http"])
async def test_a_tool_of_an_mcp_server(kind: str, mcp_server: Path) -> None:
    turns = [calling_turn(call(0, arguments='{"by": 3}'), call(1, arguments='{"by": -1}')), ANSWER]
    model = Model(*turns)
    async with mcp_binding(kind, mcp_server) as binding:
        flags: dict[str, Any] = {"tools__bindings": [binding], "tools__loop__allow_networks": LOOPBACK}
        async with in_front_of(engine_app(model.answer)[0], None, **flags) as setup:
            answers = [await streamed(setup), await streamed(setup)]
    for answer in answers:
        good, bad = sorted(answer.of("tool_call.result"), key=lambda event: str(event["call_id"]))
        assert (good["ok"], bad["ok"]) == (True, False)
        assert bad["problem"].startswith("the tool reports an error")
    assert [body["messages"][-2]["content"] for body in model.asked if len(body["messages"]) > 1] == ["counted 3"] * 2


def offered(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("kind", ["stdio", "http"])
async def test_a_cancel_reaches_the_tool_of_an_mcp_server(kind: str, mcp_server: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    arguments = json.dumps({"path": str(state), "seconds": 60})
    model = Model(calling_turn(call(0, "wait", arguments)), ANSWER)
    async with mcp_binding(kind, mcp_server) as binding:
        flags: dict[str, Any] = {"tools__bindings": [{**binding, "tools": ["wait"]}]}
        flags["tools__loop__allow_networks"] = LOOPBACK
        async with in_front_of(engine_app(model.answer)[0], None, **flags) as setup:
            request = chat(tools=[offered("wait")])
            async with setup.caller.opened("/v1/streams", request, {"Accept": NDJSON}) as response:
                await until(lambda: state.exists() and state.read_text() == "running")
                await setup.caller.delete(response.headers["X-Stream-Id"])
                assert (await whole(response)).end["status"] == "cancelled"
            await until(lambda: state.read_text() == "cancelled")
    assert len(model.asked) == 1


@pytest.mark.parametrize("kind", ["stdio", "http"])
async def test_a_call_that_fails_leaves_the_others_of_its_session_alone(
    kind: str, mcp_server: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    slow = call(0, "wait", json.dumps({"path": str(state), "seconds": 0.5}))
    turn = calling_turn(slow, call(1, "refuse", json.dumps({"path": str(state)})))
    model = Model(turn, calling_turn(call(2, arguments='{"by": 3}')), ANSWER)
    async with mcp_binding(kind, mcp_server) as binding:
        flags: dict[str, Any] = {"tools__bindings": [{**binding, "tools": ["*"]}]}
        flags["tools__loop__allow_networks"] = LOOPBACK
        async with in_front_of(engine_app(model.answer)[0], None, **flags) as setup:
            tools = [COUNT, offered("wait"), offered("refuse")]
            answer = await setup.caller.stream(NDJSON, tools=tools)
    results = {event["call_id"]: event for event in answer.of("tool_call.result")}
    assert [results[call_id]["ok"] for call_id in ("c0", "c1", "c2")] == [True, False, True]
    assert "not these arguments" in results["c1"]["problem"]


async def test_an_mcp_server_that_is_not_there() -> None:
    model = Model(*ONCE)
    bindings = [{"tools": ["count"], "command": ["/nonexistent/server"]}]
    async with in_front_of(engine_app(model.answer)[0], tools__bindings=bindings) as setup:
        answer = await streamed(setup)
    assert answer.one("tool_call.result")["problem"].startswith("the MCP server /nonexistent/server cannot be reached")
    assert answer.end["status"] == "completed"


async def test_an_mcp_server_that_never_opens_a_session_is_not_waited_for_again(tmp_path: Path) -> None:
    """The first process hangs until it is left, which it tells; the next one goes away at once."""
    started, again, left = (tmp_path / name for name in ("started", "again", "left"))
    script = (
        f"if [ -e {started} ]; then touch {again}; exit 1; fi; touch {started}; cat > {tmp_path}/said; touch {left}"
    )
    bindings = [{"tools": ["count"], "command": ["sh", "-c", script], "timeout_seconds": 1, "retries": 1}]
    async with in_front_of(engine_app(Model(*ONCE).answer)[0], tools__bindings=bindings) as setup:
        answer = await streamed(setup)
        await until(left.exists)
    assert not answer.one("tool_call.result")["ok"]
    assert again.exists()


@pytest.mark.parametrize(
    "binding",
    [{"tools": ["a"]}, {"tools": ["a"], "url": "http://x", "mcp": "http://y"}, {"tools": ["a"], "url": "ftp://x"}],
)
def test_a_binding_that_cannot_work_is_refused_at_the_start(binding: Any) -> None:
    flags = {"upstreams": [{"url": "http://vllm:8000"}], "tools.bindings": [binding]}
    with pytest.raises(SettingsError, match=r"tools\.bindings"):
        load_settings(environment={}, flags=flags)


async def test_an_answer_with_tools_that_are_run_here_is_not_continued() -> None:
    """The loop asks the model again with messages behind the last one, which could then not be gone on with."""
    broken = [chunks.role(), chunks.content("So "), chunks.error()]
    model = Model(broken, ANSWER)
    async with running(CountingService(), model) as setup:
        failed = await streamed(setup)
        stream_id = failed.headers["X-Stream-Id"]
        refused = await streamed(setup, penstock={"continue": stream_id})
        assert (refused.status, refused.error["code"]) == (422, "cannot_continue")
        answer = await streamed(setup, penstock={"continue": stream_id, "tools": {"run": False}})
        assert (answer.text(), answer.end["status"]) == ("It is 7.", "completed")
