"""The routes that take a stream up again: its snapshot, its events from a cursor on, a retry that joins it."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import orjson
from aiohttp import hdrs, web

from penstock.core import continuing, resuming
from penstock.core.dialects import Dialect, Form, native
from penstock.core.errors import CallerError, EngineError
from penstock.core.fold import Fold
from penstock.core.request import StreamRequest
from penstock.settings import Settings
from penstock.shell.client import ClientConnection, ClientGone
from penstock.shell.stores.log import Claim, Evicted, Store, StreamInfo, StreamLog
from penstock.shell.streams import Streams

# Of the log, sent in one write.
_CHUNK = 64 * 1024
# A body over this is hashed beside the loop: a megabyte takes about a millisecond.
_HASHED_AT_ONCE = 256 * 1024
_CONTENT_TYPES = {Form.SSE: native.NativeSse.content_type, Form.NDJSON: native.NativeNdjson.content_type}
_HEARTBEATS = {Form.NDJSON: native.NativeNdjson.heartbeat}
_PREAMBLES = {Form.NDJSON: native.NativeNdjson.preamble}


@dataclass(frozen=True, slots=True)
class Terms:
    """What a caller asks for the time after its connection breaks. `digest` tells one request from another.

    `asked` does so too, but for how it is spelled and what `penstock` says in it.
    """

    key: str | None
    digest: str
    lingers: bool
    asked: str


async def read_terms(http: web.Request, body: bytes, request: StreamRequest, engines_key: str) -> Terms:
    """The terms of one request. It goes on without its client where it says so, or where it has a key to come back.

    With another key for the engine it is another request: nobody gets the answer by an engine's key that it refuses.
    """
    key = resuming.read_idempotency_key(http.headers.get("Idempotency-Key"))
    # Without a key nobody compares, and a large body costs milliseconds.
    asked = f"{http.path}\0{engines_key}\0".encode(errors="surrogateescape")
    digest = hashlib.sha256(asked + body).hexdigest() if key else ""
    lingers = key is not None if request.on_disconnect is None else request.on_disconnect == "linger"
    return Terms(key, digest, lingers, await _digest(request.engine_body) if request.streams else "")


async def _digest(body: bytes) -> str:
    if len(body) > _HASHED_AT_ONCE:
        return (await asyncio.to_thread(hashlib.sha256, body)).hexdigest()
    return hashlib.sha256(body).hexdigest()


class Resume:
    """Answers from logs. A stream belongs to its principal: for anybody else it does not exist."""

    def __init__(self, settings: Settings, streams: Streams, store: Store) -> None:
        self._settings = settings
        self._streams = streams
        self._store = store

    async def snapshot(self, http: web.Request, principal: str) -> web.Response:
        """`GET /v1/streams/{id}`: everything so far, folded."""
        log = await self._find(http.match_info["id"], principal)
        if log.whole is not None:
            return _whole(log)
        return web.json_response(body=await asyncio.to_thread(_fold, log), headers=self._headers(log))

    async def events(self, http: web.Request, principal: str, form: Form) -> web.StreamResponse:
        """`GET /v1/streams/{id}/events`: what came after the cursor, then live."""
        log = await self._find(http.match_info["id"], principal)
        after = resuming.read_cursor(log.info.stream_id, http.headers.get("Last-Event-ID"), http.query.get("after"))
        return await self._resume(http, log, after, form)

    async def resume(self, http: web.Request, principal: str, form: Form, body: bytes) -> web.StreamResponse:
        """`POST /v1/streams/{id}/resume`: the same for clients that cannot send the header."""
        log = await self._find(http.match_info["id"], principal)
        return await self._resume(http, log, resuming.read_after(body), form)

    async def open_log(
        self, principal: str, stream_id: str, kind: type[Dialect], terms: Terms
    ) -> StreamLog | Claim | None:
        """Where the new stream can be taken up again; or whose stream answers the caller's key already.

        Only native events have a cursor, so other forms are logged where somebody may ask for all of them again.
        """
        by_events = kind.form in _CONTENT_TYPES
        if not self._settings.store.retention_seconds or not (by_events or terms.key or terms.lingers):
            return None
        claim = Claim(principal, terms.key, terms.digest, stream_id) if terms.key else None
        now = int(time.time() * 1000)
        info = StreamInfo(stream_id, principal, kind.form, kind.__name__, kind.content_type, now, terms.asked)
        return await self._store.create(info, claim)

    async def carry_on(self, principal: str, request: StreamRequest, terms: Terms) -> StreamRequest:
        """The request with the partial answer of the stream that it continues; any other as it is.

        A continuation that failed is continued too: then the text of the streams before it comes first.
        """
        if request.continues is None:
            return request
        continuing.refuse_unfit(request)
        text, before = "", request.continues
        while before:
            log = await self._find(before, principal)
            if not log.info.has_cursors:
                raise continuing.not_of_events(before)
            if log.info.asked != terms.asked:
                raise continuing.other_request(before)
            if log.earliest > 1:
                raise _evicted(log)
            if not log.is_over:
                raise continuing.still_runs(before)
            if log.whole is not None or not log.last:
                raise continuing.said_nothing()
            snapshot = orjson.loads(await asyncio.to_thread(_fold, log))
            text = continuing.partial_text(snapshot) + text
            before = snapshot.get("continues")
        return continuing.carry_on(request, text)

    def lingering(self, terms: Terms) -> float:
        """Seconds that the stream goes on while nobody reads it."""
        return self._settings.store.linger_seconds if terms.lingers else 0.0

    async def rejoin(self, http: web.Request, claim: Claim, terms: Terms, form: Form) -> web.StreamResponse:
        """The whole of a stream to a caller that asked the same before under the same key, running or over."""
        if claim.digest != terms.digest:
            message = (
                "this Idempotency-Key came with another request before; use a new key for each request, the same only "
                "to repeat one byte for byte"
            )
            raise CallerError("idempotency_key_reused", message, status=422, param="Idempotency-Key")
        log = await self._find(claim.stream_id, claim.principal)
        if (log.info.form is Form.WHOLE) != (form is Form.WHOLE):
            message = "the request with this Idempotency-Key asked for another form of answer; repeat its Accept header"
            raise CallerError("idempotency_key_reused", message, status=422, param="Idempotency-Key")
        return await self._send(http, log, 0, form, {"Idempotency-Replayed": "true"})

    def headers(self, stream_id: str, log: StreamLog | None) -> dict[str, str]:
        """The contract of a stream, on every answer that is one or tells of one."""
        headers = {"X-Stream-Id": stream_id, "X-Stream-Schema": native.SCHEMA_VERSION}
        if log is None:
            return headers
        return {**headers, "X-Stream-Resume-Seconds": f"{self._settings.store.retention_seconds:g}"}

    def _headers(self, log: StreamLog) -> dict[str, str]:
        return self.headers(log.info.stream_id, log)

    async def _find(self, stream_id: str, principal: str) -> StreamLog:
        log = await self._store.find(stream_id)
        if log is None or log.info.principal != principal:
            message = (
                f"there is no stream {stream_id[:80]!a} that you may read; it was never yours, it was opened "
                f"without a log, or it ended more than {self._settings.store.retention_seconds:g} s ago "
                "(store.retention_seconds)"
            )
            raise CallerError("no_such_stream", message, status=404)
        return log

    async def _resume(self, http: web.Request, log: StreamLog, after: int, form: Form) -> web.StreamResponse:
        if log.info.form is Form.FOREIGN and after:
            message = "this stream is not one of events, so it is replayed from its start; resume it without a cursor"
            raise CallerError("cursor_ahead", message, status=409)
        await log.reach(after)
        if after > log.last:
            raise CallerError(
                "cursor_ahead",
                f"event {after} is ahead of the stream, whose last event is {log.last}; resume after that or before",
                status=409,
            )
        if after + 1 < log.earliest:
            raise _evicted(log)
        if after and log.is_over and after == log.last:
            # An EventSource reconnects after every clean close; only 204 stops it.
            return web.Response(status=204, headers=self._headers(log))
        return await self._send(http, log, after, form, {})

    async def _send(
        self, http: web.Request, log: StreamLog, after: int, form: Form, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        live = self._streams.get(log.info.stream_id)
        merged = {**self._headers(log), **headers}
        log.readers += 1
        try:
            with live.read() if live is not None else nullcontext():
                return await _Reader(self._settings, http, log, after, form, merged).run()
        finally:
            log.readers -= 1


class _Reader:
    """One reader of one log."""

    def __init__(
        self,
        settings: Settings,
        http: web.Request,
        log: StreamLog,
        after: int,
        form: Form,
        headers: Mapping[str, str],
    ) -> None:
        self._timing = settings.timing
        self._log = log
        self._after = after
        self._form = form if log.info.form in _CONTENT_TYPES else log.info.form
        self._headers = headers
        self._connection = ClientConnection(http, headers, settings.pacing)

    async def run(self) -> web.StreamResponse:
        try:
            while not self._log.is_open:
                self._log.read(self._after, 0)  # raises where it was broken off
                await self._log.changed(self._timing.heartbeat_seconds)
            if self._log.whole is not None:
                return _whole(self._log, self._headers)
            preamble = _PREAMBLES.get(self._form, native.NativeSse.preamble)
            await self._connection.open(_CONTENT_TYPES.get(self._form, self._log.info.content_type), preamble)
            await self._follow()
            async with asyncio.timeout(self._timing.closing_seconds):
                await self._connection.finish()
        except (ClientGone, Evicted, TimeoutError):
            # It left, or it reads so slowly that the log is gone or the time for a write is over: it may resume.
            self._connection.abort()
        if self._connection.response is None:
            raise ConnectionResetError("the client left before the answer began")
        return self._connection.response

    async def _follow(self) -> None:
        while True:
            data = self._read()
            if data:
                await self._write(data)
            elif self._log.is_over:
                return
            elif not await self._log.changed(self._timing.heartbeat_seconds):
                await self._write(_HEARTBEATS.get(self._form, native.NativeSse.heartbeat))

    def _read(self) -> bytes:
        """What comes next in the reader's spelling, and the cursor is moved behind it."""
        entries, first = self._log.read(self._after, _CHUNK)
        if not entries:
            return b""
        data, have = b"".join(entry.data for entry in entries), self._log.info.form
        known = self._after + 1 - first
        if known > 0:
            data = b"".join(resuming.split(data, have)[known:])
        self._after = entries[-1].last
        return resuming.respell(data, have, self._form)

    async def _write(self, data: bytes) -> None:
        if not self._connection.send(data):
            async with asyncio.timeout(self._timing.closing_seconds):
                await self._connection.room()


def _evicted(log: StreamLog) -> CallerError:
    message = (
        f"the log of this stream goes back to event {log.earliest} only (its last is {log.last}): it outgrew "
        "store.memory_bytes; GET the stream without /events, or send the request again"
    )
    return CallerError("cursor_evicted", message, status=410)


def _whole(log: StreamLog, headers: Mapping[str, str] | None = None) -> web.Response:
    if log.whole is None:
        raise EngineError("engine_gone", "the stream ended before it was answered")
    merged = {**(headers or {}), **log.whole.headers, hdrs.CONTENT_TYPE: "application/json"}
    return web.Response(status=log.whole.status, body=log.whole.body, headers=merged)


def _fold(log: StreamLog) -> bytes:
    fold = Fold()
    for entry in list(log):
        for body in resuming.bodies(entry.data, log.info.form):
            fold.feed(orjson.loads(body))
    return orjson.dumps(fold.result())
