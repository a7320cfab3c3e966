"""From the body of a request to a stream that is carried: who asks, for what, under which bounds, and who pays."""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from penstock.core import continuing
from penstock.core.commands import RecordUsage
from penstock.core.dialects import Dialect, Spelling
from penstock.core.errors import CallerError, Overloaded, Problem
from penstock.core.exchange import Exchange
from penstock.core.families import Family, choose_family
from penstock.core.request import StreamRequest, read_request
from penstock.core.rules import Policy
from penstock.core.setting import Bounds, Setting
from penstock.core.wishes import LoopTerms
from penstock.settings import Settings
from penstock.shell.admission import RETRY, Admission, Place, read_body
from penstock.shell.asking import Asking, Question
from penstock.shell.audit import StreamAudit
from penstock.shell.auth import caller_of
from penstock.shell.books import Account, Books
from penstock.shell.callers import Caller
from penstock.shell.client import ClientConnection
from penstock.shell.cluster import Cluster
from penstock.shell.driver import Driver
from penstock.shell.police import Police
from penstock.shell.resume import Resume, Terms, read_terms
from penstock.shell.stores.log import Claim
from penstock.shell.streams import LiveStream, Streams
from penstock.shell.telemetry import CLIENT_GONE, StreamTrace, Telemetry
from penstock.shell.tools import Toolbox

# What the server answers to an exception that nobody thought of.
_OUR_BUG = ("internal_error", 500)

TokensOf = Callable[[int], tuple[int, int]]
"""Prompt and completion tokens of a choice so far."""


@dataclass(frozen=True, slots=True)
class Surface:
    """One route on which streams are opened: how its bodies are read and its answers are spelled.

    `streams`: True where the route alone decides that the engine is asked for a stream, None where its body does.
    """

    route: str
    streams: bool | None
    continues: bool
    """Whether the partial answer of a failed stream may be gone on with here."""
    kind: Callable[[StreamRequest], type[Dialect]]
    spell: Callable[[str, StreamRequest, TokensOf], Spelling]


class Serving:
    """Opens streams. What is counted for one is counted until it is over, which may be long after its client left."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        telemetry: Telemetry,
        books: Books,
        police: Police,
        toolbox: Toolbox,
        *,
        asking: Asking,
        admission: Admission,
        streams: Streams,
        resume: Resume,
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._telemetry = telemetry
        self._books = books
        self._police = police
        self._toolbox = toolbox
        self._asking = asking
        self._admission = admission
        self._streams = streams
        self._resume = resume
        self._families: tuple[Family, ...] = settings.all_families()
        self.is_draining = False

    async def serve(self, http: web.Request, surface: Surface) -> web.StreamResponse:
        """Until the answer is over. Raises `Problem` where the request is refused before there is a stream."""
        stream_id = "st_" + secrets.token_hex(16)
        trace = self._telemetry.begin(http.headers, surface.route, stream_id)
        with ExitStack() as entered:
            try:
                self.refuse_if_draining()
                place = entered.enter_context(self._admission.entered(caller_of(http)))
                request, terms = await self._read(http, surface, place)
                caller = caller_of(http)
                caller.check_model(request.model)
                family = self._family(request)
                request = await self._continued(surface, caller, request, terms)
                await self._cluster.refuse_too_long(request)
                account = await self._books.open(caller, stream_id, request, trace)
                entered.callback(account.drop)
                kind = surface.kind(request)
                log = await self._resume.open_log(caller.name, stream_id, kind, terms)
            except Problem as problem:
                trace.refuse(problem.code, problem.status)
                raise
            except (asyncio.CancelledError, ConnectionResetError):
                trace.refuse("client_gone", CLIENT_GONE)
                raise
            except Exception:
                trace.refuse(*_OUR_BUG)
                raise
            if isinstance(log, Claim):
                account.drop()
                trace.fetch(log.stream_id)
                return await self._resume.rejoin(http, log, terms, kind.form)
            headers = {**self._resume.headers(stream_id, log), **account.headers}
            client = ClientConnection(http, headers, self._settings.pacing)
            stream = LiveStream(
                stream_id,
                caller.name,
                client,
                log,
                linger_seconds=self._resume.lingering(terms),
                cut_linger_seconds=self._settings.store.linger_seconds,
            )
            question = Question(http, trace, stream_id, caller.name, request, family)
            try:
                driver = self._drive(question, stream, surface, account, place)
            except Exception:
                stream.outlet.end()
                trace.refuse(*_OUR_BUG)
                raise
            await self._streams.carry(stream, driver, entered.pop_all())
        if client.response is None:
            raise ConnectionResetError("the client left before the answer began")
        return client.response

    def _drive(
        self, question: Question, stream: LiveStream, surface: Surface, account: Account, place: Place
    ) -> Driver:
        stream_id, request, trace = question.stream_id, question.request, question.trace
        loop = self._asking.loop_terms(question)
        looped = self._asking.ask_in_rounds(question) if loop is not None else None
        source, keep = (looped, None) if looped is not None else self._asking.ask(question)
        policy = self._police.rules.choose(request.model, stream.principal)
        digest = policy.digest if policy is not None else None
        audited = self._police.audit.begin(stream_id, stream.principal, request, trace, digest)
        setting = self._setting(question, stream, policy, loop, is_kept=keep is not None)
        return Driver(
            Exchange(request, setting, lambda tokens_of: surface.spell(stream_id, request, tokens_of)),
            stream.outlet,
            source,
            stream_id=stream_id,
            closing_seconds=self._settings.timing.closing_seconds,
            record=lambda record: _record(stream, account, trace, audited, record),
            holds=place.wait,
            note=audited.note,
            judge=lambda asked, watch: self._police.moderator.ask(asked, watch, request),
            carry_on=looped.carry_on if looped is not None else None,
            keep=keep,
        )

    def refuse_if_draining(self) -> None:
        """Raises `Overloaded` where this replica shuts down."""
        if self.is_draining:
            message = "this replica is shutting down; send the request again, it reaches another one"
            raise Overloaded("draining", message, headers={**RETRY, "Connection": "close"})

    async def _read(self, http: web.Request, surface: Surface, place: Place) -> tuple[StreamRequest, Terms]:
        limits, timing = self._settings.limits, self._settings.timing
        upstream = self._settings.upstreams[0]  # the settings see to it that all agree on how they are asked
        body = await read_body(http, limits.request_bytes, timing.request_seconds, place)
        request = read_request(
            body,
            streams=surface.streams,
            running_usage=upstream.running_usage,
            engine_parses_tools=upstream.parses_tools,
        )
        return request, await read_terms(http, body, request, self._asking.engines_key(http))

    async def _continued(self, surface: Surface, caller: Caller, request: StreamRequest, terms: Terms) -> StreamRequest:
        if request.continues is not None and not surface.continues:
            message = "penstock.continue is for POST /v1/streams, whose streams can be continued"
            raise CallerError("invalid_request", message, param=continuing.PARAM)
        if request.continues is not None and request.runs_tools and self._toolbox.runs(request.offered_tools):
            raise continuing.tools_run_here()
        return await self._resume.carry_on(caller.name, request, terms)

    def _family(self, request: StreamRequest) -> Family:
        family = choose_family(self._families, request.model, request.family)
        if family is None:
            known = ", ".join(sorted({family.name for family in self._families}))
            message = f"penstock.family {request.family!r} is not known; the families are {known}"
            raise CallerError("invalid_request", message, param="penstock.family")
        return family

    def _setting(
        self, question: Question, stream: LiveStream, policy: Policy | None, loop: LoopTerms | None, *, is_kept: bool
    ) -> Setting:
        limits, timing = self._settings.limits, self._settings.timing
        return Setting(
            stream_id=stream.stream_id,
            upstream="",
            trace_id=question.trace.trace_id,
            family=question.family,
            reasoning=question.request.reasoning or self._settings.reasoning,
            bounds=Bounds(
                line_bytes=limits.line_bytes,
                tool_call_bytes=limits.tool_call_bytes,
                stream_bytes=limits.stream_bytes,
                slow_client=self._settings.pacing,
                stream_seconds=limits.stream_seconds,
                first_byte_seconds=timing.first_byte_seconds,
                heartbeat_seconds=timing.heartbeat_seconds,
                engine_silence_seconds=timing.engine_silence_seconds,
                hold_chars=self._settings.moderation.hold_chars,
            ),
            started=asyncio.get_running_loop().time(),
            epoch_ms=int(time.time() * 1000),
            is_logged=stream.log is not None,
            outlives_client=stream.outlives_client(),
            resumable_until=self._resumable_until() if stream.log is not None else None,
            policy=policy,
            tool_rules=self._settings.tools.rules_for(stream.principal),
            citations=self._settings.annotations.patterns,
            watching=self._police.moderator.watching,
            loop=loop,
            keep_bytes=self._settings.answer_cache.answer_bytes if is_kept else 0,
        )

    def _resumable_until(self) -> int | None:
        """Each event moves it on; this is what holds from the first."""
        seconds = self._settings.store.retention_seconds
        return int((time.time() + seconds) * 1000) if seconds else None


def _record(
    stream: LiveStream, account: Account, trace: StreamTrace, audited: StreamAudit, record: RecordUsage
) -> None:
    audited.end(record)
    trace.finish(record)
    account.settle(record)
    stream.when_decided(partial(account.bill, record))
