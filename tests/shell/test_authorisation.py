"""The authorisation matrix: every route of the table, every credential. A new route is in it by being a route.

Nothing here names a route but the open ones: what is true of a route follows from its path. `{id}` is a stream,
and a stream that is another's must look, in every word, like one that never was.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientTimeout, web
from cryptography.hazmat.primitives.asymmetric import rsa

from penstock.shell.auth import OPEN_ROUTES, hash_key
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Answer, calling, chat, whole
from support.issuer import Issuer, issuing
from support.redis_server import redis_server
from support.sidecar import sidecar
from support.sockets import until
from support.upstreams import Seen, Setup, engine_app, in_front_of, opened, silence

KEYS = {name: f"{name}s-key-0123456789abcdef" for name in ("alice", "bob", "late", "gone")}
UNKNOWN_STREAM = "st_" + "0" * 32


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# What a token says that must not be let in; the issuer makes them when the test runs.
BAD_TOKENS: dict[str, dict[str, Any]] = {
    "a token that has expired": {"exp": 1},
    "a token for another audience": {"aud": "another"},
    "a token of another issuer": {"iss": "https://evil.example/"},
    "a token with a wrong signature": {"key": rsa.generate_private_key(65537, 2048)},
    "a token signed by a shared secret": {"algorithm": "HS256", "key": "s" * 64},
    "a token without a subject": {"subject": None},
}
# The body of a route whose body is no chat request, by the end of its path. That it fits is what the last test sees.
BODIES: dict[str, Any] = {"resume": {"after": 0}, "annotations": {"kind": "status", "data": {"text": "read"}}}
BAD: dict[str, Mapping[str, str]] = {
    "none": {},
    "empty": bearer(""),
    "unknown": bearer("no-such-key-0123456789"),
    "expired": bearer(KEYS["late"]),
    "expired, the other header": {"X-Api-Key": KEYS["late"]},
    "revoked": bearer(KEYS["gone"]),
    "another scheme": {"Authorization": f"Basic {KEYS['alice']}"},
    "the stored form": bearer(hash_key(KEYS["alice"])),
}


@dataclass(frozen=True)
class Route:
    method: str
    path: str

    @property
    def is_open(self) -> bool:
        return self.path in OPEN_ROUTES

    @property
    def of_a_stream(self) -> bool:
        return "{id}" in self.path

    def at(self, stream_id: str) -> str:
        return re.sub(r"\{[^}]*\}", "x", self.path.replace("{id}", stream_id))


@dataclass(frozen=True)
class Deployment:
    setup: Setup
    seen: Seen
    issuer: Issuer

    def bad(self, credential: str) -> Mapping[str, str]:
        if credential in BAD:
            return BAD[credential]
        return bearer(self.issuer.token(**BAD_TOKENS[credential]))

    def good(self) -> dict[str, Mapping[str, str]]:
        """Three callers: two with keys, one with a token whose subject is the name of one of them."""
        token = bearer(self.issuer.token("alice"))
        return {"alice": bearer(KEYS["alice"]), "bob": bearer(KEYS["bob"]), "jwt:alice": token}

    def routes(self) -> Iterator[Route]:
        for resource in self.setup.sidecar.server.application().router.resources():
            for route in resource:
                if route.method != "HEAD":  # aiohttp adds it to every GET
                    yield Route("GET" if route.method == "*" else route.method, resource.canonical)

    async def ask(self, route: Route, stream_id: str, headers: Mapping[str, str], accept: str = SSE) -> Answer:
        """The head and, of anything but a stream, the body."""
        body = json.dumps(BODIES.get(route.path.rpartition("/")[2], chat(stream=True)))
        url = self.setup.caller.url + route.at(stream_id)
        sent = {"Accept": accept, "Content-Type": "application/json", **headers}
        data = body if route.method in ("POST", "PUT", "PATCH") else None
        timeout = ClientTimeout(total=10)
        async with self.setup.caller.session.request(
            route.method, url, data=data, headers=sent, timeout=timeout
        ) as response:
            if response.status == 200 and response.content_type in (SSE, NDJSON):
                return Answer(response.status, response.headers.copy(), b"")
            return await whole(response)


async def one_word(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await response.write(chunks.role() + chunks.content("Hello", tokens=1))
    await silence()
    return response


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    """Two callers, a key that has expired, and one that was taken out of the file since the start."""
    good = [f"{name}={hash_key(KEYS[name])}" for name in ("alice", "bob")]
    late = f"late={hash_key(KEYS['late'])} expires=2020-01-01T00:00:00Z"
    file = tmp_path / "keys.txt"
    file.write_text("\n".join([*good, late, f"gone={hash_key(KEYS['gone'])}"]))
    app, seen = engine_app(one_word)
    async with (
        issuing() as issuer,
        in_front_of(
            app,
            auth__keys_file=str(file),
            auth__jwt=issuer.settings(),
            auth__reload_seconds=0.02,
            passthrough=["POST /tokenize", "GET /version"],
        ) as setup,
    ):
        assert (await setup.caller.get("/v1/models", bearer(KEYS["gone"]))).status == 200
        file.write_text("\n".join([*good, late]))

        async def is_revoked() -> bool:
            return (await setup.caller.get("/v1/models", bearer(KEYS["gone"]))).status == 401

        await until(is_revoked)
        yield Deployment(setup, seen, issuer)


async def test_the_open_routes_are_these_and_no_other(deployment: Deployment) -> None:
    assert {route.path for route in deployment.routes() if route.is_open} == OPEN_ROUTES
    for route in deployment.routes():
        if route.is_open:
            assert (await deployment.ask(route, UNKNOWN_STREAM, {})).status == 200, route


@pytest.mark.parametrize("credential", [*BAD, *BAD_TOKENS])
async def test_every_other_route_refuses_who_has_no_good_key(deployment: Deployment, credential: str) -> None:
    checked = 0
    for route in deployment.routes():
        if route.is_open:
            continue
        for accept in (SSE, NDJSON, FOLDED) if route.method == "POST" else (SSE,):
            answer = await deployment.ask(route, UNKNOWN_STREAM, deployment.bad(credential), accept)
            code = "invalid_api_key" if credential in BAD else "invalid_token"
            assert (answer.status, answer.error["code"]) == (401, code), (route, accept)
            assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="penstock"'), route
            assert "X-Stream-Id" not in answer.headers
            checked += 1
    assert checked >= 10
    assert deployment.seen.requests == 0


async def test_every_route_lets_a_good_key_in(deployment: Deployment) -> None:
    for route in deployment.routes():
        for name, credential in deployment.good().items():
            for accept in (SSE, NDJSON) if route.method == "POST" else (SSE,):
                answer = await deployment.ask(route, UNKNOWN_STREAM, credential, accept)
                assert answer.status not in (401, 403, 405, 500), (name, route, accept, answer.body)


async def test_a_stream_of_another_looks_like_one_that_never_was(deployment: Deployment) -> None:
    """On every route that names a stream, while it runs and when it is over; and nothing happens to it."""
    caller, checked = deployment.setup.caller, 0
    async with caller.opened("/v1/streams", chat(), bearer(KEYS["alice"])) as response:
        await response.content.readuntil(b"Hello")
        stream_id = response.headers["X-Stream-Id"]
        for route in deployment.routes():
            if route.of_a_stream:
                checked += 1
                await _looks_unknown(deployment, route, stream_id)
                assert deployment.seen.open == deployment.setup.sidecar.server.open_streams == 1, route
        assert (await caller.delete(stream_id, bearer(KEYS["alice"]))).status == 204
        rest = await response.content.read()
        assert b'"status":"cancelled"' in rest
        assert b"annotation" not in rest
    for route in deployment.routes():
        if route.of_a_stream:
            await _looks_unknown(deployment, route, stream_id)
    assert checked >= 1


async def _looks_unknown(deployment: Deployment, route: Route, stream_id: str) -> None:
    """To everybody but alice: to bob, and to a token whose subject is called alice too."""
    strangers = [name for name in deployment.good() if name != "alice"]
    for name, accept in product(strangers, (SSE, NDJSON, FOLDED)):
        credential = deployment.good()[name]
        others = await deployment.ask(route, stream_id, credential, accept)
        unknown = await deployment.ask(route, UNKNOWN_STREAM, credential, accept)
        assert others.status == unknown.status, (route, accept)
        assert others.body.replace(stream_id.encode(), UNKNOWN_STREAM.encode()) == unknown.body, (route, accept)
        assert set(others.headers) == set(unknown.headers), (route, accept)


async def test_who_owns_a_stream_reaches_it_by_every_route(deployment: Deployment) -> None:
    """The other half of the test above: what is refused to others is there for its owner."""
    caller, alice = deployment.setup.caller, deployment.good()["alice"]
    async with caller.opened("/v1/streams", chat(), alice) as response:
        await response.content.readuntil(b"Hello")
        stream_id = response.headers["X-Stream-Id"]
        for route in deployment.routes():
            if route.of_a_stream and route.method != "DELETE":
                own = await deployment.ask(route, stream_id, alice)
                unknown = await deployment.ask(route, UNKNOWN_STREAM, alice)
                assert own.status < 300, (route, own.body)
                assert unknown.status == 404, (route, unknown.body)
        assert (await caller.delete(stream_id, alice)).status == 204
        assert b'"status":"cancelled"' in await response.content.read()


async def test_on_every_other_replica_it_is_the_same(tmp_path: Path) -> None:
    """Two replicas over one Redis: the owner finds its stream at the other one, and nobody else does."""
    keys = {name: hash_key(KEYS[name]) for name in ("alice", "bob")}
    app, seen = engine_app(one_word)
    async with (
        issuing() as issuer,
        redis_server(tmp_path) as redis,
        in_front_of(app, auth__keys=keys, auth__jwt=issuer.settings(), store__url=redis.url) as here,
        sidecar(here.engine_url, auth__keys=keys, auth__jwt=issuer.settings(), store__url=redis.url) as elsewhere,
        calling(elsewhere.url) as caller,
        here.caller.opened("/v1/streams", chat(), bearer(KEYS["alice"])) as response,
    ):
        await response.content.readuntil(b"Hello")
        stream_id = response.headers["X-Stream-Id"]
        other = Deployment(Setup(caller, elsewhere, here.engine_url), seen, issuer)
        for route in other.routes():
            if route.of_a_stream:
                await _looks_unknown(other, route, stream_id)
                owners = await other.ask(route, stream_id, bearer(KEYS["alice"])) if route.method != "DELETE" else None
                assert owners is None or owners.status < 300, route
        assert seen.open == 1
        assert (await caller.delete(stream_id, bearer(KEYS["alice"]))).status == 204
        assert b'"status":"cancelled"' in await response.content.read()
