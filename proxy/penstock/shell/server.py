"""The routes: who may use them, what each one does, and errors before the first byte as answers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources

from aiohttp import hdrs, web

from penstock.core.commands import RecordUsage
from penstock.core.dialects import Dialect, Form, Spelling, native, openai_chat
from penstock.core.dialects.tool_release import ReleasedCalls
from penstock.core.errors import CallerError, OurBug, Problem
from penstock.core.notes import read_note
from penstock.core.request import StreamRequest
from penstock.settings import Settings
from penstock.shell.accept import accepted
from penstock.shell.admission import Admission, read_body
from penstock.shell.asking import Asking
from penstock.shell.auth import OPEN_ROUTES, Gatekeeper, caller_of
from penstock.shell.books import Books
from penstock.shell.cluster import Cluster
from penstock.shell.cors import WebPages
from penstock.shell.passthrough import Passthrough
from penstock.shell.police import Police
from penstock.shell.resume import Resume
from penstock.shell.serving import Serving, Surface, TokensOf
from penstock.shell.stores.log import NoteFate, Store, StreamInfo
from penstock.shell.streams import Streams
from penstock.shell.telemetry import Telemetry
from penstock.shell.tools import Toolbox

_log = logging.getLogger("penstock")

_MOST_CURSOR_BYTES = 1024
CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"
MODELS = "/v1/models"
# Whose clients are OpenAI's: they read errors in its shape only.
_OPENAI_ROUTES = {CHAT, MODELS}
# Read while importing, not while serving: reading a file blocks.
_SCHEMA = resources.files("penstock.core").joinpath("schema-1.0.json").read_bytes()


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
        self._books = books
        self._gatekeeper = gatekeeper
        self._pages = WebPages(settings.listen.cors, only_loopback=settings.is_loopback)
        self.cluster = cluster
        self._telemetry = telemetry
        self._admission = Admission(settings.limits)
        self._asking = Asking(settings, gatekeeper, cluster, toolbox)
        self.store = store
        self._streams = Streams()
        self._resume = Resume(settings, self._streams, store)
        self._serving = Serving(
            settings,
            cluster,
            telemetry,
            books,
            police,
            toolbox,
            asking=self._asking,
            admission=self._admission,
            streams=self._streams,
            resume=self._resume,
        )
        self._passthrough = Passthrough(
            settings,
            cluster,
            telemetry,
            books,
            admission=self._admission,
            authorization=self._asking.passed_authorization,
            refuse_if_draining=self._serving.refuse_if_draining,
        )
        self._chat = Surface(CHAT, streams=None, continues=False, kind=_chat_kind, spell=self._spell_chat)
        store.start(self._streams.obey, self._take_note, self._record_lost)

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
        self._serving.is_draining = True
        seconds = self._settings.timing.drain_seconds
        await asyncio.gather(self._streams.drain(seconds), self._passthrough.drain(seconds))

    # -- streams -----------------------------------------------------------------------------------

    async def _native(self, http: web.Request) -> web.StreamResponse:
        kind = accepted(http.headers.get(hdrs.ACCEPT, ""))

        def spell(stream_id: str, _request: StreamRequest, _tokens_of: TokensOf) -> Dialect:
            return kind(stream_id)

        surface = Surface(STREAMS, streams=True, continues=True, kind=lambda _: kind, spell=spell)
        return await self._serving.serve(http, surface)

    async def _openai_chat(self, http: web.Request) -> web.StreamResponse:
        return await self._serving.serve(http, self._chat)

    def _spell_chat(self, _stream_id: str, request: StreamRequest, tokens_of: TokensOf) -> Spelling:
        if not request.streams:
            return ReleasedCalls(openai_chat.ChatWhole(), "ready")  # a whole answer has whole calls
        release = request.tool_release or self._settings.tools.release
        return ReleasedCalls(openai_chat.ChatStream(request, tokens_of), release)

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
        """A note beside the text of a live stream, in its order with the text, whichever replica carries it."""
        limits, stream_id, principal = self._settings.annotations, http.match_info["id"], caller_of(http).name
        with self._admission.entered(caller_of(http)) as place:
            body = await read_body(http, limits.note_bytes, self._settings.timing.request_seconds, place)
            fate = self._annotate_here(stream_id, principal, body)
            if fate is None:
                fate = await self.store.annotate(stream_id, principal, body)
        if fate == "no_such_stream":
            message = f"there is no open stream {stream_id[:80]!a} of yours; annotate while it runs, with its own key"
            raise CallerError("no_such_stream", message, status=404)
        if fate == "too_many_annotations":
            message = f"the stream has {limits.notes_per_stream} annotations, the most (annotations.notes_per_stream)"
            raise CallerError("too_many_annotations", message, status=429)
        return web.json_response({"status": fate}, status=202)

    def _annotate_here(self, stream_id: str, principal: str, body: bytes) -> NoteFate | None:
        note = read_note(body, asyncio.get_running_loop().time())
        return self._streams.annotate(stream_id, principal, note, self._settings.annotations.notes_per_stream)

    def _take_note(self, stream_id: str, principal: str, body: bytes) -> NoteFate:
        """One that came to another replica. It has found the note good, if it is of our version."""
        try:
            return self._annotate_here(stream_id, principal, body) or "no_such_stream"
        except CallerError:
            return "no_such_stream"

    # -- the rest ----------------------------------------------------------------------------------

    async def _models(self, http: web.Request) -> web.Response:
        status, content_type, body = await self.cluster.list_models(partial(self._asking.passed_authorization, http))
        return web.Response(status=status, body=caller_of(http).models_in(body), content_type=content_type)

    async def _show_schema(self, _http: web.Request) -> web.Response:
        return web.Response(body=_SCHEMA, content_type="application/schema+json")

    async def _healthz(self, _http: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _http: web.Request) -> web.Response:
        if self._serving.is_draining:
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


def _chat_kind(request: StreamRequest) -> type[Dialect]:
    return openai_chat.ChatStream if request.streams else openai_chat.ChatWhole


def _resumed_form(http: web.Request) -> Form:
    form = accepted(http.headers.get(hdrs.ACCEPT, "")).form
    if form is Form.WHOLE:
        message = "events are served as text/event-stream or application/x-ndjson; GET the stream itself for one object"
        raise CallerError("not_acceptable", message, status=406)
    return form
