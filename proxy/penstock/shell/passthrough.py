"""Routes of the engines that are passed on as they are: only those that the settings name, within the caps.

Path and method are those of the settings, never the caller's, and of the caller's headers two go on; so this is no
open relay. What comes back is not an exchange: no events, no moderation, no usage.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial

import aiohttp
import orjson
from aiohttp import hdrs, web

from penstock.core.errors import CallerError, EngineError, LimitReached, Problem
from penstock.settings import Settings
from penstock.shell.admission import Admission, read_body
from penstock.shell.auth import caller_of
from penstock.shell.cluster import Cluster, Member, Wish, no_engine
from penstock.shell.engine import Engine

_log = logging.getLogger("penstock")

_PASSED_HEADERS = (hdrs.CONTENT_TYPE, hdrs.ACCEPT)
# An answer may be a stream: what keeps proxies off those does no harm to others.
_ANSWER_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
_FULL = (429, 503)


class Passthrough:
    """The handlers. `authorization` are the headers that let a caller's request into an engine."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        admission: Admission,
        authorization: Callable[[web.Request, Engine], Mapping[str, str]],
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._admission = admission
        self._authorization = authorization

    def routes(self) -> list[web.RouteDef]:
        named = (route.split() for route in self._settings.passthrough)
        return [web.route(method, path, partial(self._pass, method, path)) for method, path in named]

    async def _pass(self, method: str, path: str, http: web.Request) -> web.StreamResponse:
        limits, timing = self._settings.limits, self._settings.timing
        with self._admission.entered(caller_of(http)) as place:
            body = await read_body(http, limits.request_bytes, timing.request_seconds, place)
            wish = Wish(_model(http, body) if method == hdrs.METH_POST else "")
            answer = _Answer(http, limits.stream_bytes)
            try:
                async with asyncio.timeout(limits.stream_seconds):
                    await self._forward(answer, method, path, body, wish)
            except TimeoutError:
                message = f"the engine took more than {limits.stream_seconds:g} s (limits.stream_seconds)"
                answer.fail(LimitReached("stream_time_limit", message, status=504))
            return answer.response

    async def _forward(self, answer: "_Answer", method: str, path: str, body: bytes, wish: Wish) -> None:
        """To one engine after the other, as for streams, until one has begun to answer."""
        tried: set[Member] = set()
        retries, problem = self._settings.routing.retries, no_engine()
        while retries >= 0 and (member := self._cluster.choose(wish, tried)) is not None:
            tried.add(member)
            given = answer.http.headers
            passed = {str(name): given[name] for name in _PASSED_HEADERS if name in given}
            headers = {**passed, **self._authorization(answer.http, member.engine)}
            try:
                with self._cluster.serving(member):
                    async with member.engine.request(method, path[1:], body, headers) as said:
                        is_last = self._cluster.choose(wish, tried) is None
                        if said.status not in _FULL or is_last:
                            await answer.take(said)
                            return
            except EngineError as error:
                if answer.has_begun:
                    answer.fail(error)
                    return
                retries -= error.code != "engine_unreachable"
                problem = error
        raise problem


class _Answer:
    """What the caller gets: the engine's status, type and bytes, up to the cap."""

    def __init__(self, http: web.Request, most_bytes: int) -> None:
        self.http = http
        self.response = web.StreamResponse()
        self.has_begun = False
        self._most_bytes = most_bytes

    async def take(self, said: aiohttp.ClientResponse) -> None:
        """Raises `LimitReached` where the engine says at once that it is too much."""
        if (said.content_length or 0) > self._most_bytes:
            raise self._too_much()
        headers = {**_ANSWER_HEADERS, hdrs.CONTENT_TYPE: said.headers.get(hdrs.CONTENT_TYPE, "application/json")}
        self.response = web.StreamResponse(status=said.status, headers=headers)
        self.response.content_length = said.content_length
        await self.response.prepare(self.http)
        self.has_begun = True
        size = 0
        async for data in said.content.iter_any():
            size += len(data)
            if size > self._most_bytes:
                self.fail(self._too_much())
                return
            await self.response.write(data)
        await self.response.write_eof()

    def fail(self, problem: Problem) -> None:
        """Before the head it is an answer; after it nothing can be said, so the connection breaks: no false success."""
        if not self.has_begun:
            raise problem
        _log.warning("%s %s broke off: %s", self.http.method, self.http.path, problem)
        if self.http.transport is not None:
            self.http.transport.abort()

    def _too_much(self) -> LimitReached:
        return LimitReached(
            "stream_bytes_limit", f"the engine's answer is larger than {self._most_bytes} bytes (limits.stream_bytes)"
        )


def _model(http: web.Request, body: bytes) -> str:
    """The model that the body names, which the caller's key must be for; empty where it names none."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        request = None
    named = request.get("model") if isinstance(request, dict) else None
    model = named if isinstance(named, str) else ""
    caller = caller_of(http)
    if not caller.may_ask(model):
        allowed = ", ".join(caller.plan.models)
        message = f"the key of {caller.name} is not for the model {model!r}; it may ask for {allowed}"
        raise CallerError("model_not_allowed", message, status=403, param="model")
    return model
