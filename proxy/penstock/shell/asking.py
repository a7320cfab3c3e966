"""How a stream's request is put to an engine, and who answers where no engine is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from aiohttp import hdrs, web

from penstock.core.families import Family
from penstock.core.kept_answer import KeptAnswer
from penstock.core.request import StreamRequest
from penstock.core.tagged_stream import TaggedReader
from penstock.core.wishes import LoopTerms
from penstock.settings import Settings
from penstock.shell.answer_cache import UPSTREAM as CACHED
from penstock.shell.answer_cache import AnswerCache
from penstock.shell.auth import Gatekeeper
from penstock.shell.cluster import Cluster
from penstock.shell.engine import Engine
from penstock.shell.prepared import ToldAnswer, prepare
from penstock.shell.sources import Answer, ClusterAnswer, PlainAnswer, Source, TaggedAnswer
from penstock.shell.telemetry import StreamTrace
from penstock.shell.tools import LoopedAnswer, Toolbox

# vLLM's own route, whatever dialect the caller speaks.
_ENGINE_ROUTE = "v1/chat/completions"

Keep = Callable[[KeptAnswer], None]


@dataclass(frozen=True, slots=True)
class Question:
    """One caller's request, on its way to whoever answers it."""

    http: web.Request
    trace: StreamTrace
    stream_id: str
    principal: str
    request: StreamRequest
    family: Family


class Asking:
    """Finds the source of each stream's answer."""

    def __init__(self, settings: Settings, gatekeeper: Gatekeeper, cluster: Cluster, toolbox: Toolbox) -> None:
        self._settings = settings
        self._gatekeeper = gatekeeper
        self._cluster = cluster
        self._toolbox = toolbox
        self._prepared = prepare(settings.answers)
        self._cache = AnswerCache(settings.answer_cache)

    def ask(self, question: Question) -> tuple[Source, Keep | None]:
        """The answer to one request, and where it goes once it is whole, if it may be told again."""
        source, key = self._round(question, question.request, 0), self._cache_key(question)
        if key is None or isinstance(source, ToldAnswer):
            return source, None
        if (kept := self._cache.find(key)) is not None:
            pace = self._settings.answer_cache.words_per_second
            return ToldAnswer(CACHED, kept, question.request, question.stream_id, pace), None
        return source, partial(self._cache.keep, key)

    def ask_in_rounds(self, question: Question) -> LoopedAnswer:
        """The same where calls are run here between the model's turns: each round is a request of its own."""
        return LoopedAnswer(
            self._round(question, question.request, 0),
            lambda request, number: self._round(question, request, number),
            self._toolbox,
            question.trace.run_tool,
            self._settings.tools.loop.concurrency,
        )

    def loop_terms(self, question: Question) -> LoopTerms | None:
        """The tools of this request that are run here. A retry of a request gives its calls the same keys."""
        request = question.request
        bound = self._toolbox.runs(request.offered_tools)
        if not bound or not request.streams or not request.runs_tools:
            return None
        given = question.http.headers.get("Idempotency-Key")
        said = sha256(f"{question.principal}\0{given}".encode()).hexdigest()[:32] if given else question.stream_id
        loop = self._settings.tools.loop
        return LoopTerms(bound, loop.rounds, said, loop.show_results)

    def engines_key(self, http: web.Request) -> str:
        """What tells callers apart whom Penstock does not: their keys for the engine. Empty where it asks for keys."""
        return "" if self._gatekeeper.asks_for_keys else http.headers.get(hdrs.AUTHORIZATION, "")

    def passed_authorization(self, http: web.Request, engine: Engine) -> dict[str, str]:
        """Without keys of our own the caller's key is the engine's business, as if we were not there."""
        has_keys = self._gatekeeper.asks_for_keys or engine.upstream.api_key is not None
        if has_keys or hdrs.AUTHORIZATION not in http.headers:
            return {}
        return {"Authorization": http.headers[hdrs.AUTHORIZATION]}

    def _cache_key(self, question: Question) -> bytes | None:
        whose = self.engines_key(question.http)
        return self._cache.key_of(question.request, question.family.name, question.principal, whose)

    def _round(self, question: Question, request: StreamRequest, number: int) -> Source:
        request_id = _request_id(question, number)
        prepared = (one.answer(request, request_id) for one in self._prepared)
        if (told := next((answer for answer in prepared if answer is not None), None)) is not None:
            return told

        def put(engine: Engine) -> tuple[TaggedReader | None, Answer]:
            return self._put(question, request, number, engine)

        wish = self._cluster.wish(question.http.headers, request)
        retries = self._settings.routing.retries
        return ClusterAnswer(self._cluster, wish, put, retries, gave_up=question.trace.give_up_engine)

    def _put(
        self, question: Question, request: StreamRequest, number: int, engine: Engine
    ) -> tuple[TaggedReader | None, Answer]:
        """Tagged tokens where the engine offers them and the request allows, vLLM's own chunks otherwise."""
        request_id = _request_id(question, number)
        headers = {
            **question.trace.call_engine(request, engine.address, engine.port),
            "X-Request-Id": request_id,
            **self.passed_authorization(question.http, engine),
        }
        plugin = engine.plugin
        vocabulary = plugin.vocabulary if plugin is not None else None
        most = self._settings.limits.stream_bytes
        body, streams = request.engine_body, request.streams
        plain = PlainAnswer(engine, _ENGINE_ROUTE, body, headers, streams=streams, most_bytes=most)
        if plugin is None or vocabulary is None or not streams or request.needs_engine_text is not None:
            return None, plain
        told = question.family if request.offered_tools else question.family.without_tools
        engine_id, model = f"chatcmpl-{request_id}", plugin.model_name(request.model)
        reader = TaggedReader(request, vocabulary, engine_id, model, fingerprint=plugin.fingerprint)
        return reader, TaggedAnswer(plugin, body, headers, told, plain, engine.note)


def _request_id(question: Question, number: int) -> str:
    """What the engine calls the request: each round has its own."""
    return f"{question.stream_id}-{number}" if number else question.stream_id
