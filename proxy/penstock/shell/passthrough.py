"""Routes of the engines that are passed on as they are: only those that the settings name, within the caps.

Path and method are those of the settings, never the caller's, and of the caller's headers two go on; so this is no
open relay. What comes back is not an exchange: no events and no moderation. It is counted and billed like one.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import hdrs, web

from penstock.core.commands import Ending, RecordUsage
from penstock.core.errors import EngineError, LimitReached, Problem
from penstock.core.events import Usage, token_count
from penstock.settings import Settings
from penstock.shell.admission import Admission, Place, read_body
from penstock.shell.auth import caller_of
from penstock.shell.books import Account, Books, guessed_tokens
from penstock.shell.cluster import FULL, Cluster, Member, Wish, cost_nothing, no_engine
from penstock.shell.engine import Engine
from penstock.shell.telemetry import CLIENT_GONE, StreamTrace, Telemetry

_log = logging.getLogger("penstock")

_PASSED_HEADERS = (hdrs.CONTENT_TYPE, hdrs.ACCEPT)
# An answer may be a stream: what keeps proxies off those does no harm to others.
_ANSWER_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
# vLLM's routes whose answer no model computes. They cost no tokens, however long what is sent to them.
_WITHOUT_A_MODEL = {"/tokenize", "/detokenize", "/tokenizer_info", "/version", "/ping", "/load", "/server_info"}


@dataclass(frozen=True, slots=True)
class _Request:
    """What is passed on, and what it is to be counted as."""

    method: str
    path: str
    request_id: str
    body: bytes
    model: str
    size: int
    """Bytes that a model reads, as far as is known."""


class Passthrough:
    """The handlers. `authorization` are the headers that let a caller's request into an engine.

    `refuse_if_draining` is asked before each request; `drain` waits for those that are on their way.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        telemetry: Telemetry,
        books: Books,
        *,
        admission: Admission,
        authorization: Callable[[web.Request, Engine], Mapping[str, str]],
        refuse_if_draining: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._admission = admission
        self._books = books
        self._telemetry = telemetry
        self._authorization = authorization
        self._refuse_if_draining = refuse_if_draining
        self._open: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[web.RouteDef]:
        named = (route.split() for route in self._settings.passthrough)
        return [web.route(method, path, partial(self._pass, method, path)) for method, path in named]

    async def drain(self, seconds: float) -> None:
        if self._open:
            await asyncio.wait(self._open, timeout=seconds)

    async def _pass(self, method: str, path: str, http: web.Request) -> web.StreamResponse:
        request_id = "rq_" + secrets.token_hex(16)
        trace = self._telemetry.begin(http.headers, path, request_id, method)
        with ExitStack() as entered:
            try:
                self._refuse_if_draining()
                entered.enter_context(self._is_open())
                place = entered.enter_context(self._admission.entered(caller_of(http)))
                request = await self._read(http, method, path, request_id, place)
                account = await self._books.open_passed(caller_of(http), request_id, request.size, trace)
            except Problem as problem:
                trace.refuse(problem.code, problem.status)
                raise
            except asyncio.CancelledError:
                trace.refuse("client_gone", CLIENT_GONE)
                raise
            return await self._answer(http, request, account, trace)

    @contextmanager
    def _is_open(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            yield
        finally:
            self._open.discard(task)

    async def _read(self, http: web.Request, method: str, path: str, request_id: str, place: Place) -> _Request:
        limits, timing = self._settings.limits, self._settings.timing
        body = await read_body(http, limits.request_bytes, timing.request_seconds, place)
        given = _json_of(http, body) if method == hdrs.METH_POST else None
        model = _model(http, given) if method == hdrs.METH_POST else ""
        reads = given is not None and path not in _WITHOUT_A_MODEL
        return _Request(method, path, request_id, body, model, len(body) if reads else 0)

    async def _answer(
        self, http: web.Request, request: _Request, account: Account, trace: StreamTrace
    ) -> web.StreamResponse:
        """Whatever comes of it, it has its bill."""
        seconds = self._settings.limits.stream_seconds
        answer = _Answer(http, request, self._settings.limits.stream_bytes, account.headers)
        try:
            try:
                async with asyncio.timeout(seconds):
                    await self._forward(answer, request, trace.pass_on())
            except TimeoutError:
                message = f"the engine took more than {seconds:g} s (limits.stream_seconds)"
                answer.fail(LimitReached("stream_time_limit", message, status=504))
            return answer.response
        except Problem as problem:
            answer.note(problem)
            raise
        except (asyncio.CancelledError, ConnectionError):
            answer.ending = Ending.CLIENT_GONE
            raise
        finally:
            record = answer.record()
            trace.finish(record)
            account.settle(record)
            account.bill(record, is_anothers=False)  # it is in no log that another replica could end

    async def _forward(self, answer: "_Answer", request: _Request, trace: Mapping[str, str]) -> None:
        """To one engine after the other, as for streams, until one has begun to answer."""
        tried: set[Member] = set()
        wish = Wish(request.model)
        retries, problem = self._settings.routing.retries, no_engine()
        while retries >= 0 and (member := self._cluster.choose(wish, tried)) is not None:
            tried.add(member)
            answer.upstream = member.engine.label
            given = answer.http.headers
            passed = {str(name): given[name] for name in _PASSED_HEADERS if name in given}
            own = {"X-Request-Id": request.request_id, **self._authorization(answer.http, member.engine)}
            try:
                with self._cluster.serving(member):
                    headers = {**trace, **passed, **own}
                    async with member.engine.request(request.method, request.path[1:], request.body, headers) as said:
                        is_last = self._cluster.choose(wish, tried) is None
                        if said.status not in FULL or is_last:
                            await answer.take(said)
                            return
            except EngineError as error:
                if answer.has_begun:
                    answer.fail(error)
                    return
                retries -= not cost_nothing(error)
                problem = error
        raise problem


class _Answer:
    """What the caller gets, the engine's status, type and bytes, up to the cap; and what it cost."""

    def __init__(self, http: web.Request, request: _Request, most_bytes: int, headers: Mapping[str, str]) -> None:
        self.http = http
        self.response = web.StreamResponse()
        self.has_begun = False
        self.upstream = ""
        self.ending = Ending.OUR_BUG  # until it is known
        self._request = request
        self._most_bytes = most_bytes
        self._headers = headers
        self._count = EngineCount()
        self._code: str | None = None
        self._works = False  # the engine accepted the request, so it cost something
        self._now = asyncio.get_running_loop().time
        self._started = self._now()

    async def take(self, said: aiohttp.ClientResponse) -> None:
        """Raises `LimitReached` where the engine says at once that it is too much."""
        self._works = said.status < 400
        if (said.content_length or 0) > self._most_bytes:
            raise self._too_much()
        content_type = said.headers.get(hdrs.CONTENT_TYPE, "application/json")
        headers = {**_ANSWER_HEADERS, **self._headers, hdrs.CONTENT_TYPE: content_type}
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
            self._count.look_at(data)
            await self.response.write(data)
        await self.response.write_eof()
        self.ending = Ending.COMPLETED if self._works else Ending.REFUSED
        self._code = None if self._works else "engine_refused"

    def fail(self, problem: Problem) -> None:
        """Before the head it is an answer; after it nothing can be said, so the connection breaks: no false success."""
        if not self.has_begun:
            raise problem
        self.note(problem)
        _log.warning("%s %s broke off: %s", self.http.method, self.http.path, problem)
        if self.http.transport is not None:
            self.http.transport.abort()

    def note(self, problem: Problem) -> None:
        """How it ended."""
        self._code = problem.code
        if isinstance(problem, LimitReached):
            self.ending = Ending.TIME_LIMIT if problem.status == 504 else Ending.CAP_REACHED
        else:
            self.ending = Ending.ENGINE_GONE

    def record(self) -> RecordUsage:
        return RecordUsage(
            ending=self.ending,
            usage=self._usage(),
            finish_reasons=[],
            error_code=self._code,
            model=self._request.model or None,
            engine_id=None,
            ttft_seconds=None,
            duration_seconds=self._now() - self._started,
            upstream=self.upstream,
        )

    def _usage(self) -> Usage:
        """What the engine told; a guess by the length of the request where it worked and did not."""
        told = self._count.told()
        is_guess = told is None and self._works and self._request.size > 0
        prompt, completion = told or (guessed_tokens(self._request.size) if is_guess else 0, 0)
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=0,
            completion_tokens=completion,
            reasoning_tokens=0,
            answer_tokens=completion,
            tool_tokens=0,
            delivered_tokens=completion if self.ending is Ending.COMPLETED else 0,
            wasted_tokens_after_cancel=0,
            estimated=is_guess,
            sizes={},
            final=True,
        )

    def _too_much(self) -> LimitReached:
        return LimitReached(
            "stream_bytes_limit", f"the engine's answer is larger than {self._most_bytes} bytes (limits.stream_bytes)"
        )


class EngineCount:
    """Finds the engine's own count in an answer that goes by. A quote inside a text is escaped, so none is mistaken."""

    _USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
    # A count is shorter; it may lie across the edge of two reads.
    KEPT_BYTES = 1024

    def __init__(self) -> None:
        self._tail = b""
        self._last: bytes | None = None

    def look_at(self, data: bytes) -> None:
        seen = self._tail + data
        for found in self._USAGE.finditer(seen):
            self._last = found[1]
        self._tail = seen[-self.KEPT_BYTES :]

    def told(self) -> tuple[int, int] | None:
        """Tokens of the prompt and of the answer; None where the engine counted nothing."""
        try:
            usage = orjson.loads(self._last or b"null")
        except orjson.JSONDecodeError:
            return None
        if not isinstance(usage, dict):
            return None
        prompt, completion = token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))
        total = token_count(usage.get("total_tokens"))
        if prompt is None:  # some routes tell their total alone
            prompt = total
        return None if prompt is None else (prompt, completion or 0)


def _json_of(http: web.Request, body: bytes) -> Any:
    """The body where the engine will read it as JSON, too: a form can be written so that it is both."""
    if hdrs.CONTENT_TYPE in http.headers and not http.content_type.endswith("json"):
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _model(http: web.Request, request: Any) -> str:
    """The model that the body names, which the caller's key must be for; empty where it names none."""
    named = request.get("model") if isinstance(request, dict) else None
    model = named if isinstance(named, str) else ""
    caller_of(http).check_model(model)
    return model
