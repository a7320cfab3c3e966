"""Opens a chat request as vLLM's own chat route would, and the only file that knows the classes for that.

Rendering, LoRA, priority, admission and the reasoning gate stay vLLM's: a shallow copy of its chat handler does all
of it, with only the stream writer replaced, so that what would have been written as chunks comes back as it is.
"""

import asyncio
import copy
import functools
import inspect
import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from penstock_vllm.frames import MOST_CHOICES

Json = Mapping[str, Any]

# What only an engine that writes the text itself can answer, unless it has a value that asks for nothing.
NEEDS_TEXT: Final = (
    "stop",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "echo",
    "use_beam_search",
    "return_token_offsets",
    "return_prompt_text",
    "kv_transfer_params",
    "ec_transfer_params",
)
NEEDS_TEXT_CODE: Final = "penstock_needs_text"
_AT_REST: Final[tuple[object, ...]] = (None, False, 0, "", [], {})
# `prompt_logprobs: 0` asks for the logprobs of the prompt's own tokens.
_ASKS_BY_ZERO: Final = ("prompt_logprobs",)


class Refusal(Exception):
    """vLLM does not take this request: the status and the body that its chat route would have answered."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class Chat:
    """A request that vLLM took. Nothing runs before `results` is read; closing it aborts it in the engine."""

    request_id: str
    results: AsyncGenerator[Any]
    choices: int
    own_stop_ids: frozenset[int]
    shows_stop_tokens: bool
    skips_special: bool
    shows_prompt: bool


class ChatDoor:
    """`app` is vLLM's FastAPI application, with its chat handler in `app.state`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def open(self, request: Json, headers: Mapping[str, str]) -> Chat:
        """Raises `Refusal`. The request's id is `chatcmpl-<x-request-id>-<random>`.

        The random part keeps two requests apart that carry the same `x-request-id`: vLLM knows requests by it.
        """
        refuse_if_text_is_needed(request)
        raw = _http_request(self._app, with_own_id(headers))
        try:
            body = _validated(request)
            handler = copy.copy(self._app.state.openai_serving_chat)
            handler.chat_completion_stream_generator = _captured
            answer = await handler.create_chat_completion(body, raw)
        except Refusal:
            raise
        except Exception as error:
            raise await self.refusal(error, raw) from error
        if not isinstance(answer, Chat):
            _refuse(answer)
        return answer

    async def refusal(self, error: Exception, raw: Any = None) -> Refusal:
        """What vLLM's own routes would have answered to this exception: they ask the same handlers."""
        raw = raw or _http_request(self._app, {})
        handlers = self._app.exception_handlers
        handler = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
        if handler is None:
            info = {"message": str(error), "type": "InternalServerError", "param": None, "code": 500}
            return Refusal(500, {"error": info})
        response = handler(raw, error)
        if inspect.isawaitable(response):
            response = await response
        return Refusal(response.status_code, json.loads(response.body))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a stream in vLLM's own `/load`, where that is switched on."""
        state = self._app.state
        if not getattr(state, "enable_server_load_tracking", False):
            yield
            return
        state.server_load_metrics = getattr(state, "server_load_metrics", 0) + 1
        try:
            yield
        finally:
            state.server_load_metrics -= 1


def with_own_id(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers by their lower-cased names, with a request id that no other request has."""
    lowered = {name.lower(): value for name, value in headers.items()}
    named = lowered.get("x-request-id") or secrets.token_hex(8)
    return {**lowered, "x-request-id": f"{named}-{secrets.token_hex(8)}"}


def refuse_if_text_is_needed(request: Json) -> None:
    """Raises `Refusal` with 422 and `penstock_needs_text` for what the tagged stream cannot answer."""
    for name in NEEDS_TEXT:
        value = request.get(name)
        asked = value is not None and (value not in _AT_REST or (value == 0 and name in _ASKS_BY_ZERO))
        if asked:
            _refuse_text(name, f"{name} needs the engine's own text; ask on the engine's chat route")
    choices = request.get("n")
    if isinstance(choices, int) and choices > MOST_CHOICES:
        _refuse_text("n", f"a tagged stream has at most {MOST_CHOICES} choices")


def _refuse_text(name: str, message: str) -> NoReturn:
    raise Refusal(422, {"error": {"message": message, "type": NEEDS_TEXT_CODE, "param": name, "code": 422}})


def _refuse(answer: Any) -> NoReturn:
    """An answer that is no stream is vLLM's ErrorResponse."""
    body = answer.model_dump()
    raise Refusal(int(body["error"]["code"]), body)


def _captured(request: Any, results: AsyncGenerator[Any], request_id: str, *_args: Any, **_kwargs: Any) -> Chat:
    """Stands where vLLM's stream writer does; its first parameters are the same from 0.16 to 0.33."""
    return Chat(
        request_id,
        results,
        request.n or 1,
        frozenset(request.stop_token_ids or ()),
        bool(request.include_stop_str_in_output),
        bool(request.skip_special_tokens),
        bool(request.return_token_ids),
    )


def _validated(request: Json) -> Any:
    """The request as vLLM's class. Errors are raised as FastAPI would raise them for a body."""
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

    try:
        return _request_class().model_validate({**request, "stream": True})
    except ValidationError as error:
        located = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
        raise RequestValidationError(located, body=request) from error


@functools.cache
def _request_class() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.sampling_params import RequestOutputKind

    class TaggedRequest(ChatCompletionRequest):  # type: ignore[misc]  # vLLM is not installed where types are checked
        """Its tokens leave by the tap: vLLM writes no text for it and wakes nobody before its end."""

        def to_sampling_params(self, *args: Any, **kwargs: Any) -> Any:
            parameters = super().to_sampling_params(*args, **kwargs)
            if parameters.stop:
                _refuse_text("stop", "this server stops at strings of its own, which a tagged stream cannot do")
            if parameters.logprobs is not None or parameters.prompt_logprobs is not None:
                _refuse_text("logprobs", "this server tells logprobs of its own accord, which a tagged stream cannot")
            parameters.detokenize = False
            parameters.output_kind = RequestOutputKind.FINAL_ONLY
            return parameters

    return TaggedRequest


def _http_request(app: Any, headers: Mapping[str, str]) -> Any:
    """A request to the chat route, for what vLLM reads from one: headers, state and application."""
    from starlette.requests import Request

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        "app": app,
        "state": {},
    }
    return Request(scope, _never)


async def _never() -> Any:
    """Nothing more comes on such a request, and it never disconnects: its stream's own task is cancelled."""
    await asyncio.get_running_loop().create_future()


def final_reasons(final: Any) -> dict[int, str]:
    """The finish reason of each choice in vLLM's final output of a request."""
    return {output.index: str(output.finish_reason) for output in final.outputs if output.finish_reason is not None}
