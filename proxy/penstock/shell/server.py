"""The routes: each request becomes an exchange with its driver; errors before the first byte become answers."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib import resources

from aiohttp import hdrs, web

from penstock.core import continuing
from penstock.core.commands import RecordUsage
from penstock.core.dialects import Dialect, Form, Spelling, native, openai_chat
from penstock.core.dialects.tool_release import ReleasedCalls
from penstock.core.errors import CallerError, OurBug, Overloaded, Problem
from penstock.core.exchange import Exchange
from penstock.core.families import Family, choose_family
from penstock.core.notes import read_note
from penstock.core.request import StreamRequest, read_request
from penstock.core.rules import Policy
from penstock.core.setting import Bounds, Setting
from penstock.core.tagged_stream import TaggedReader
from penstock.core.wishes import LoopTerms
from penstock.settings import Settings
from penstock.shell.admission import RETRY, Admission, Place, read_body
from penstock.shell.audit import StreamAudit
from penstock.shell.auth import OPEN_ROUTES, Gatekeeper, caller_of
from penstock.shell.books import Account, Books
from penstock.shell.callers import Caller
from penstock.shell.client import ClientConnection
from penstock.shell.cluster import Cluster
from penstock.shell.cors import WebPages
from penstock.shell.driver import Driver
from penstock.shell.engine import Engine
from penstock.shell.passthrough import Passthrough
from penstock.shell.police import Police
from penstock.shell.prepared import prepare
from penstock.shell.resume import Resume, Terms, read_terms
from penstock.shell.sources import Answer, ClusterAnswer, PlainAnswer, Source, TaggedAnswer
from penstock.shell.stores.log import Claim, Store, StreamInfo
from penstock.shell.streams import LiveStream, Streams
from penstock.shell.telemetry import StreamTrace, Telemetry
from penstock.shell.tools import LoopedAnswer, Toolbox

_log = logging.getLogger("penstock")

_MOST_CURSOR_BYTES = 1024
CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
MODELS = "/v1/models"
# Whose clients are OpenAI's: they read errors in its shape only.
_OPENAI_ROUTES = {CHAT, MODELS}
# nginx's status for a client that left before its answer; nobody is there to see it but the trace.
_CLIENT_GONE = 499
# Read while importing, not while serving: reading a file blocks.
_SCHEMA = resources.files("penstock.core").joinpath("schema-1.0.json").read_bytes()

RunningUsage = Callable[[int], tuple[int, int]]


class Server:
    """All routes over the engines. `drain` before closing: it waits for open streams and ends the rest."""

    def __init__(
        self,
        settings: Settings,
        gatekeeper: Gatekeeper,
        cluster: Cluster,
        telemetry: Telemetry,
        store: Store,
        books: Books,
        police: Police,
        toolbox: Toolbox,
    ) -> None:
        self._settings = settings
        self._toolbox = toolbox
        self._books = books
        self._police = police
        self._gatekeeper = gatekeeper
        self._pages = WebPages(settings.listen.cors, only_loopback=settings.is_loopback)
        self.cluster = cluster
        self._telemetry = telemetry
        self._families: tuple[Family, ...] = settings.all_families()
        self._admission = Admission(settings.limits)
        self._prepared = prepare(settings.answers)
        self._passthrough = Passthrough(settings, cluster, self._admission, self._passed_authorization)
        self.store = store
        self._streams = Streams()
        self._resume = Resume(settings, self._streams, store)
        store.start(self._streams.obey, self._record_lost)
        self._draining = False

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._errors, self._gate])
        app.on_response_prepare.append(self._pages.mark)
        app.add_routes(
            [
                web.post(STREAMS, self._native),
                web.get(STREAMS + "/{id}", self._snapshot),
                web.get(STREAMS + "/{id}/events", self._events),
                web.post(STREAMS + "/{id}/resume", self._resumed),
                web.post(STREAMS + "/{id}/annotations", self._annotate),
                web.delete(STREAMS + "/{id}", self._cancel),
                web.post(CHAT, self._openai_chat),
                web.get(MODELS, self._models),
                web.get("/v1/schema", self._show_schema),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                *self._passthrough.routes(),
            ]
        )
        return app

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    async def drain(self) -> None:
        """Refuses new streams, gives open ones `timing.drain_seconds`, then ends the rest with an error event."""
        self._draining = True
        await self._streams.drain(self._settings.timing.drain_seconds)

    # -- streams -----------------------------------------------------------------------------------

    async def _native(self, http: web.Request) -> web.StreamResponse:
        kind = _accepted(http.headers.get(hdrs.ACCEPT, ""))

        def spell(stream_id: str, _request: StreamRequest, _usage: RunningUsage) -> Dialect:
            return kind(stream_id)

        return await self._serve(http, STREAMS, spell, lambda _: kind, streams=True)

    async def _openai_chat(self, http: web.Request) -> web.StreamResponse:
        def spell(_stream_id: str, request: StreamRequest, usage: RunningUsage) -> Spelling:
            if not request.streams:
                return ReleasedCalls(openai_chat.ChatWhole(), "ready")  # a whole answer has whole calls
            release = request.tool_release or self._settings.tools.release
            return ReleasedCalls(openai_chat.ChatStream(request, usage), release)

        def kind(request: StreamRequest) -> type[Dialect]:
            return openai_chat.ChatStream if request.streams else openai_chat.ChatWhole

        return await self._serve(http, CHAT, spell, kind, streams=None)

    async def _serve(
        self,
        http: web.Request,
        route: str,
        spell: Callable[[str, StreamRequest, RunningUsage], Spelling],
        kind: Callable[[StreamRequest], type[Dialect]],
        *,
        streams: bool | None,
    ) -> web.StreamResponse:
        stream_id = "st_" + secrets.token_hex(16)
        trace = self._telemetry.begin(http.headers, route, stream_id)
        with ExitStack() as entered:
            try:
                self._refuse_if_draining()
                place = entered.enter_context(self._admission.entered(caller_of(http)))
                request, terms = await self._read(http, streams, place)
                caller = _allowed(http, request)
                family = self._family(request)
                request = await self._continued(route, caller, request, terms)
                await self.cluster.refuse_too_long(request)
                account = await self._books.open(caller, stream_id, request, trace)
                entered.callback(account.drop)
                log = await self._resume.open_log(caller.name, stream_id, kind(request), terms)
            except Problem as problem:
                trace.refuse(problem.code, problem.status)
                raise
            except asyncio.CancelledError:
                trace.refuse("client_gone", _CLIENT_GONE)
                raise
            if isinstance(log, Claim):
                account.drop()
                trace.fetch(log.stream_id)
                return await self._resume.rejoin(http, log, terms, kind(request).form)
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
            try:
                driver = self._drive(http, stream, trace, place, account, request, family, spell)
            except Exception:
                stream.outlet.end()
                raise
            # What is counted for the stream is counted until it is over, which may be long after its client left.
            await self._streams.carry(stream, driver, entered.pop_all())
        if client.response is None:
            raise ConnectionResetError("the client left before the answer began")
        return client.response

    def _drive(
        self,
        http: web.Request,
        stream: LiveStream,
        trace: StreamTrace,
        place: Place,
        account: Account,
        request: StreamRequest,
        family: Family,
        spell: Callable[[str, StreamRequest, RunningUsage], Spelling],
    ) -> Driver:
        stream_id = stream.stream_id

        def answer_to(asked: StreamRequest, asked_again: int) -> Source:
            request_id = f"{stream_id}-{asked_again}" if asked_again else stream_id

            def ask(engine: Engine) -> tuple[TaggedReader | None, Answer]:
                headers = self._engine_headers(http, trace, asked, request_id, engine)
                return self._ask(engine, request_id, family, asked, headers)

            prepared = next((found for one in self._prepared if (found := one.answer(asked)) is not None), None)
            wish = self.cluster.wish(http.headers, asked)
            return prepared or ClusterAnswer(self.cluster, wish, ask, self._settings.routing.retries)

        loop = self._loop_terms(http, stream, request)
        source, carry_on = answer_to(request, 0), None
        if loop is not None:
            looped = LoopedAnswer(
                source, answer_to, self._toolbox, trace.run_tool, self._settings.tools.loop.concurrency
            )
            source, carry_on = looped, looped.carry_on
        policy = self._police.rules.choose(request.model, stream.principal)
        digest = policy.digest if policy is not None else None
        audited = self._police.audit.begin(stream_id, stream.principal, request, trace, digest)
        setting = replace(self._setting(stream, family, request, trace, policy), loop=loop)
        exchange = Exchange(request, setting, lambda usage: spell(stream_id, request, usage))
        return Driver(
            exchange,
            stream.outlet,
            source,
            stream_id=stream_id,
            closing_seconds=self._settings.timing.closing_seconds,
            record=lambda record: self._record(account, trace, audited, record),
            holds=place.wait,
            note=audited.note,
            judge=lambda question, watch: self._police.moderator.ask(question, watch, request),
            carry_on=carry_on,
        )

    def _loop_terms(self, http: web.Request, stream: LiveStream, request: StreamRequest) -> LoopTerms | None:
        """The tools of this request that are run here. A retry of a request gives its calls the same keys."""
        bound = self._toolbox.runs(request.offered_tools)
        if not bound or not request.streams or not request.runs_tools:
            return None
        given = http.headers.get("Idempotency-Key")
        said = sha256(f"{stream.principal}\0{given}".encode()).hexdigest()[:32] if given else stream.stream_id
        loop = self._settings.tools.loop
        return LoopTerms(bound, loop.rounds, said, loop.show_results)

    def _engine_headers(
        self, http: web.Request, trace: StreamTrace, request: StreamRequest, stream_id: str, engine: Engine
    ) -> dict[str, str]:
        headers = dict(trace.call_engine(request, engine.address, engine.port))
        return {**headers, "X-Request-Id": stream_id, **self._passed_authorization(http, engine)}

    def _passed_authorization(self, http: web.Request, engine: Engine) -> dict[str, str]:
        """Without keys of our own the caller's key is the engine's business, as if we were not there."""
        has_keys = self._gatekeeper.asks_for_keys or engine.upstream.api_key is not None
        if has_keys or hdrs.AUTHORIZATION not in http.headers:
            return {}
        return {"Authorization": http.headers[hdrs.AUTHORIZATION]}

    def _ask(
        self, engine: Engine, stream_id: str, family: Family, request: StreamRequest, headers: dict[str, str]
    ) -> tuple[TaggedReader | None, Answer]:
        """Tagged tokens where the engine offers them and the request allows, vLLM's own chunks otherwise."""
        plugin = engine.plugin
        vocabulary = plugin.vocabulary if plugin is not None else None
        most = self._settings.limits.stream_bytes
        body, streams = request.engine_body, request.streams
        plain = PlainAnswer(engine, CHAT[1:], body, headers, streams=streams, most_bytes=most)
        if plugin is None or vocabulary is None or not streams or request.needs_engine_text is not None:
            return None, plain
        told = family if request.offered_tools else family.without_tools
        engine_id, model = f"chatcmpl-{stream_id}", plugin.model_name(request.model)
        reader = TaggedReader(request, vocabulary, engine_id, model, fingerprint=plugin.fingerprint)
        return reader, TaggedAnswer(plugin, body, headers, told, plain, engine.note)

    def _refuse_if_draining(self) -> None:
        if self._draining:
            message = "this replica is shutting down; send the request again, it reaches another one"
            raise Overloaded("draining", message, headers={**RETRY, "Connection": "close"})

    async def _read(self, http: web.Request, streams: bool | None, place: Place) -> tuple[StreamRequest, Terms]:
        limits, timing = self._settings.limits, self._settings.timing
        upstream = self._settings.upstreams[0]  # the settings see to it that all agree on how they are asked
        body = await read_body(http, limits.request_bytes, timing.request_seconds, place)
        request = read_request(
            body,
            streams=streams,
            running_usage=upstream.running_usage,
            engine_parses_tools=upstream.parses_tools,
        )
        return request, await read_terms(http, body, request)

    async def _continued(self, route: str, caller: Caller, request: StreamRequest, terms: Terms) -> StreamRequest:
        if request.continues is not None and route != STREAMS:
            message = f"penstock.continue is for POST {STREAMS}, whose streams can be continued"
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
        self,
        stream: LiveStream,
        family: Family,
        request: StreamRequest,
        trace: StreamTrace,
        policy: Policy | None,
    ) -> Setting:
        limits, timing = self._settings.limits, self._settings.timing
        return Setting(
            stream_id=stream.stream_id,
            upstream="",
            trace_id=trace.trace_id,
            family=family,
            reasoning=request.reasoning or self._settings.reasoning,
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
        )

    def _resumable_until(self) -> int | None:
        """Each event moves it on; this is what holds from the first."""
        seconds = self._settings.store.retention_seconds
        return int((time.time() + seconds) * 1000) if seconds else None

    def _record(self, account: Account, trace: StreamTrace, audited: StreamAudit, record: RecordUsage) -> None:
        audited.end(record)
        trace.finish(record)
        account.end(record)

    def _record_lost(self, info: StreamInfo, record: RecordUsage) -> None:
        """The bill of a stream whose own replica cannot write it any more."""
        trace = self._telemetry.begin({}, STREAMS, info.stream_id)
        trace.finish(record)
        self._books.note(record, info.stream_id, info.principal, trace)

    async def _cancel(self, http: web.Request) -> web.Response:
        """Idempotent: a stream that is over, or never was, is as cancelled as it will ever be."""
        stream_id, principal = http.match_info["id"], caller_of(http).name
        if not await self._streams.cancel(stream_id, principal):
            await self.store.tell(stream_id, principal, "cancel")
        return web.Response(status=204)

    async def _snapshot(self, http: web.Request) -> web.StreamResponse:
        return await self._resume.snapshot(http, caller_of(http).name)

    async def _events(self, http: web.Request) -> web.StreamResponse:
        with self._admission.entered(caller_of(http)):
            return await self._resume.events(http, caller_of(http).name, _resumed_form(http))

    async def _resumed(self, http: web.Request) -> web.StreamResponse:
        with self._admission.entered(caller_of(http)) as place:
            body = await read_body(http, _MOST_CURSOR_BYTES, self._settings.timing.request_seconds, place)
            return await self._resume.resume(http, caller_of(http).name, _resumed_form(http), body)

    async def _annotate(self, http: web.Request) -> web.Response:
        """A note beside the text of a stream that is carried here, in its order with the text."""
        limits = self._settings.annotations
        with self._admission.entered(caller_of(http)) as place:
            body = await read_body(http, limits.note_bytes, self._settings.timing.request_seconds, place)
        stream = self._streams.get(http.match_info["id"])
        if stream is None or stream.principal != caller_of(http).name:
            message = (
                f"there is no open stream {http.match_info['id'][:80]!a} of yours on this replica; annotate while it "
                "runs, with its own key, where it runs"
            )
            raise CallerError("no_such_stream", message, status=404)
        if stream.notes >= limits.notes_per_stream:
            message = f"the stream has {stream.notes} annotations, the most it may (annotations.notes_per_stream)"
            raise CallerError("too_many_annotations", message, status=429)
        note = read_note(body, asyncio.get_running_loop().time())
        stream.notes += 1
        await stream.tell(note)
        return web.json_response({"status": "accepted"}, status=202)

    # -- the rest ----------------------------------------------------------------------------------

    async def _models(self, http: web.Request) -> web.Response:
        status, content_type, body = await self.cluster.list_models(partial(self._passed_authorization, http))
        return web.Response(status=status, body=caller_of(http).models_in(body), content_type=content_type)

    async def _show_schema(self, _http: web.Request) -> web.Response:
        return web.Response(body=_SCHEMA, content_type="application/schema+json")

    async def _healthz(self, _http: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _http: web.Request) -> web.Response:
        if self._draining:
            return web.Response(status=503, text="draining\n")
        if not await self.cluster.is_ready():
            return web.Response(status=503, text="no engine is healthy\n")
        return web.Response(text="ready\n")

    @web.middleware
    async def _gate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every route asks who calls, but for the few that are open: a new route is closed until it is named there."""
        if (preflight := self._pages.preflight(request)) is not None:
            return preflight
        resource = request.match_info.route.resource  # None where there is no such route
        if resource is not None and resource.canonical not in OPEN_ROUTES:
            try:
                if self._gatekeeper.lets_anybody_in:
                    self._pages.refuse_strangers(request)
                await self._gatekeeper.admit(request)
            except Problem as problem:
                if request.method == hdrs.METH_POST:
                    self._telemetry.begin(request.headers, resource.canonical, "").refuse(problem.code, problem.status)
                raise
        return await handler(request)

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every failure before the first byte, as JSON in the shape that the route's clients know."""
        try:
            return await handler(request)
        except Problem as problem:
            return _refuse(request, problem)
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}"
            headers = {str(name): error.headers[name] for name in (hdrs.ALLOW,) if name in error.headers}
            return _refuse(request, CallerError("no_such_route", message, status=error.status, headers=headers))
        except ConnectionResetError:
            raise
        except Exception:
            _log.exception("%s %s: internal error", request.method, request.path)
            return _refuse(request, OurBug("internal_error", "Penstock failed on this request; its log says more"))


def _refuse(http: web.Request, problem: Problem) -> web.Response:
    body = openai_chat.refusal(problem) if http.path in _OPENAI_ROUTES else native.refusal(problem)
    return web.Response(status=problem.status, body=body, content_type="application/json", headers=problem.headers)


def _allowed(http: web.Request, request: StreamRequest) -> Caller:
    caller = caller_of(http)
    if not caller.may_ask(request.model):
        allowed = ", ".join(caller.plan.models)
        message = f"the key of {caller.name} is not for the model {request.model!r}; it may ask for {allowed}"
        raise CallerError("model_not_allowed", message, status=403, param="model")
    return caller


def _resumed_form(http: web.Request) -> Form:
    form = _accepted(http.headers.get(hdrs.ACCEPT, "")).form
    if form is Form.WHOLE:
        message = "events are served as text/event-stream or application/x-ndjson; GET the stream itself for one object"
        raise CallerError("not_acceptable", message, status=406)
    return form


_Kind = type[native.NativeSse] | type[native.NativeNdjson] | type[native.NativeFolded]
_NATIVE_KINDS: dict[str, _Kind] = {
    "text/event-stream": native.NativeSse,
    "application/x-ndjson": native.NativeNdjson,
    "application/json": native.NativeFolded,
}
_ANY = {"*/*": "text/event-stream", "text/*": "text/event-stream", "application/*": "application/json"}


def _accepted(accept: str) -> _Kind:
    """The form that the caller likes best (RFC 9110 quality values); raises `CallerError` (406) if there is none."""
    wishes: list[tuple[float, int, str]] = []
    for position, part in enumerate(accept.split(",") if accept.strip() else ["*/*"]):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        name = _ANY.get(name, name)
        if name in _NATIVE_KINDS and _number(quality) > 0:
            wishes.append((-_number(quality), position, name))
    if not wishes:
        message = f"Accept: {accept!a} is not served here; accept one of {', '.join(_NATIVE_KINDS)}"
        raise CallerError("not_acceptable", message, status=406)
    return _NATIVE_KINDS[min(wishes)[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
