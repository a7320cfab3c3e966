"""What a caller wants, read from an OpenAI chat request with an optional `penstock` object.

The request passes to the engine unchanged but for what Penstock must add; vLLM judges its own fields. Only
`penstock` is checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import orjson

from penstock.core.channels import ReasoningPolicy
from penstock.core.errors import CallerError
from penstock.core.events import utf8_size
from penstock.core.schemas import Schema
from penstock.core.wishes import (
    StructuredWish,
    ToolRelease,
    citations_of,
    read_schema,
    runs_tools_of,
    structured_of,
    tool_release_of,
)

# vLLM refuses more (VLLM_MAX_N_SEQUENCES).
_MOST_CHOICES = 16384
_ANSWERED_BY_THE_FRONT_END = (
    "stop",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "use_beam_search",
    "bad_words",
    "kv_transfer_params",
    "return_tokens_as_token_ids",
    "continue_final_message",
    "logprob_token_ids",
    "return_token_offsets",
    "return_prompt_text",
    "ec_transfer_params",
    "stream_interval",
)
_CHANGES_WHAT_IS_TOLD = ("parallel_tool_calls", "include_reasoning", "add_generation_prompt")
# A frame has one byte for the choice.
_MOST_TAGGED_CHOICES = 256

OnDisconnect = Literal["cancel", "linger"]

_MOST_USER_TEXT = 4096
_OPTIONS = (
    "annotations",
    "audit",
    "cache",
    "continue",
    "family",
    "include_stop",
    "on_disconnect",
    "reasoning",
    "stop",
    "structured",
    "tools",
)


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """One request as the core needs it. `engine_body` is what the engine gets, byte for byte."""

    model: str
    choices: int
    streams: bool
    engine_body: bytes
    tools: Mapping[str, Schema | None]
    """The offered tools, each with the schema of its arguments where it has one."""
    thinking: bool
    reasoning: ReasoningPolicy | None
    family: str | None
    stop: tuple[str, ...]
    include_stop: bool
    engine_stops: frozenset[str | int]
    """The stop strings and token ids that the engine is to look for."""
    wants_usage: bool
    wants_running_usage: bool
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    wants_token_ids: bool
    shows_stop_token: bool
    """Whether the token that ends a choice is part of its text."""
    on_disconnect: OnDisconnect | None
    continues: str | None
    """The id of the failed stream whose partial answer is to be appended to."""
    text_bytes: int
    """Bytes of text in the messages, from which the length of the prompt can be guessed."""
    cache: bool | None
    """Whether the caller lets the answer be one that was given before, and be kept; None leaves it to the settings."""
    audit_timeline: bool
    audit_masks: bool
    """Whether the caller wants a timeline in the audit, and no text of this stream in it."""
    begun_text: str
    """The beginning of the answer, where the request gives it and the engine goes on inside it."""
    last_user_text: str
    """What a guard model is told that was asked; the first 4096 characters."""
    wants_json: bool
    """The engine is asked for a value."""
    tool_release: ToolRelease | None
    runs_tools: bool
    """Whether Penstock runs the tools that the deployment has bound."""
    structured: StructuredWish | None
    citations: bool
    """Whether citations are looked for, where the deployment has patterns for them."""
    needs_engine_text: str | None
    """Which field of the request only vLLM's own text can answer, so that token ids will not do; None if none."""

    @property
    def json_in_answer(self) -> Literal["none", "all", "parts"]:
        """Whether somebody will read the answer as JSON, or parts of it."""
        wish = self.structured
        if wish is not None and wish.sections:
            return "parts"
        is_value = wish is not None and wish.choices is None and wish.pattern is None
        return "all" if self.wants_json or is_value else "none"

    @property
    def offered_tools(self) -> frozenset[str]:
        return frozenset(self.tools)


def read_request(
    body: bytes, *, streams: bool | None = None, running_usage: bool = True, engine_parses_tools: bool = True
) -> StreamRequest:
    """Reads the body of `POST /v1/chat/completions` or `POST /v1/streams`.

    `streams` says whether the engine is asked to stream; None leaves it to the body. `running_usage` asks vLLM
    for its count with every chunk, without which the bill of a cancelled stream is an estimate. A vLLM without
    a tool parser refuses `tool_choice: auto` (400), so where `engine_parses_tools` is False it is told "none"
    and the calls are read from the text. Raises `CallerError` naming the key, what was wrong and what to do.
    """
    request = _load(body)
    offered_tools = _offered_tools(request)
    options = _options(request)
    wants = streams if streams is not None else request.get("stream") is True
    stream_options = request.get("stream_options")
    given = stream_options if isinstance(stream_options, dict) else {}
    if wants and (stream_options is None or given or stream_options == {}):
        request["stream"] = True
        request["stream_options"] = {**given, "include_usage": True}
        if running_usage:
            request["stream_options"]["continuous_usage_stats"] = True
    untouched = not wants and "penstock" not in request
    if offered_tools and not engine_parses_tools and request.get("tool_choice") in (None, "auto"):
        request["tool_choice"], untouched = "none", False
    request.pop("penstock", None)
    return StreamRequest(
        model=request["model"],
        choices=_choices(request.get("n")),
        streams=wants,
        engine_body=body if untouched else _dump(request),
        tools=offered_tools,
        thinking=_thinks(request),
        reasoning=options.get("reasoning"),
        family=options.get("family"),
        stop=tuple(options.get("stop", ())),
        include_stop=options.get("include_stop", False),
        engine_stops=_engine_stops(request),
        wants_usage=given.get("include_usage") is True,
        wants_running_usage=given.get("include_usage") is True and given.get("continuous_usage_stats") is True,
        max_tokens=_number(request.get("max_completion_tokens") or request.get("max_tokens"), int),
        temperature=_number(request.get("temperature"), float),
        top_p=_number(request.get("top_p"), float),
        skip_special_tokens=request.get("skip_special_tokens") is not False,
        spaces_between_special_tokens=request.get("spaces_between_special_tokens") is not False,
        wants_token_ids=request.get("return_token_ids") is True,
        shows_stop_token=request.get("include_stop_str_in_output") is True,
        on_disconnect=options.get("on_disconnect"),
        continues=options.get("continue"),
        text_bytes=_text_bytes(request["messages"]),
        cache=options.get("cache"),
        audit_timeline=options.get("audit", {}).get("timeline", False),
        audit_masks=options.get("audit", {}).get("mask", False),
        begun_text=_begun_text(request),
        last_user_text=_last_user_text(request["messages"]),
        wants_json=_wants_json(request),
        tool_release=tool_release_of(options),
        runs_tools=runs_tools_of(options),
        structured=structured_of(request, options),
        citations=citations_of(options),
        needs_engine_text=_needs_engine_text(request),
    )


def _load(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise CallerError("invalid_json", f"the request body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise CallerError("invalid_json", "the request body must be a JSON object with model and messages")
    if not isinstance(request.get("model"), str):
        raise CallerError("invalid_request", "model must be a string naming the model", param="model")
    if not isinstance(request.get("messages"), list):
        raise CallerError("invalid_request", "messages must be a list of chat messages", param="messages")
    return request


def _dump(request: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(request)
    except TypeError as error:  # orjson reads 1024 levels and writes 254
        raise CallerError("invalid_json", f"the request body is nested too deeply: {error}") from None


def _options(request: dict[str, Any]) -> dict[str, Any]:
    options = request.get("penstock", {})
    if not isinstance(options, dict):
        raise CallerError("invalid_request", "penstock must be an object", param="penstock")
    for name, value in options.items():
        if name not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise _wrong(name, f"is not an option of this version; the options are {known}")
        if name == "reasoning" and value not in get_args(ReasoningPolicy):
            raise _wrong(name, f"is {value!r}; it must be one of {', '.join(get_args(ReasoningPolicy))}")
        if name == "on_disconnect" and value not in get_args(OnDisconnect):
            raise _wrong(name, f"is {value!r}; it must be one of {', '.join(get_args(OnDisconnect))}")
        if name == "continue" and not (isinstance(value, str) and value):
            raise _wrong(name, "must be the id of the failed stream to be continued, as in X-Stream-Id")
        if name == "family" and not isinstance(value, str):
            raise _wrong(name, "must be the name of a model family")
        if name == "audit" and not _is_audit_options(value):
            raise _wrong(name, "must be an object of `timeline` and `mask`, each true or false")
        if name in ("include_stop", "cache") and not isinstance(value, bool):
            raise _wrong(name, "must be true or false")
        if name == "stop" and not _is_stop_list(value):
            raise _wrong(name, "must be a list of 1 to 16 strings that are not empty")
    return options


def _wrong(name: str, what: str) -> CallerError:
    return CallerError("invalid_request", f"penstock.{name} {what}", param=f"penstock.{name}")


def _is_stop_list(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 16 and all(isinstance(s, str) and s for s in value)


def _offered_tools(request: dict[str, Any]) -> dict[str, Schema | None]:
    tools = request.get("tools")
    if not isinstance(tools, list) or request.get("tool_choice") == "none":
        return {}
    offered: dict[str, Schema | None] = {}
    for position, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(name, str):
            offered[name] = read_schema(function.get("parameters"), f"tools[{position}].function.parameters")
    return offered


def _needs_engine_text(request: dict[str, Any]) -> str | None:
    """The list of what falls back to plain chunks, and why, is in docs/explanation/plugin.md."""
    for name in _ANSWERED_BY_THE_FRONT_END:
        if request.get(name):
            return name
    for name in _CHANGES_WHAT_IS_TOLD:
        if request.get(name) is False:
            return name
    if request.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if _choices(request.get("n")) > _MOST_TAGGED_CHOICES:
        return "n"
    return "tool_choice" if request.get("tool_choice") not in (None, "auto", "none") else None


def _text_bytes(messages: list[Any]) -> int:
    size = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, dict))
        size += sum(utf8_size(text) for text in texts if isinstance(text, str))
    return size


def _is_audit_options(value: Any) -> bool:
    known = isinstance(value, dict) and value.keys() <= {"timeline", "mask"}
    return known and all(isinstance(wish, bool) for wish in value.values())


def _last_user_text(messages: list[Any]) -> str:
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return "\n".join(_texts(message))[:_MOST_USER_TEXT]
    return ""


def _begun_text(request: Mapping[str, Any]) -> str:
    last = request["messages"][-1] if request["messages"] else None
    if request.get("continue_final_message") is not True or not isinstance(last, dict):
        return ""
    return "".join(_texts(last)) if last.get("role") == "assistant" else ""


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _wants_json(request: dict[str, Any]) -> bool:
    wanted = request.get("response_format")
    return (isinstance(wanted, dict) and wanted.get("type") != "text") or bool(request.get("structured_outputs"))


def _thinks(request: dict[str, Any]) -> bool:
    template = request.get("chat_template_kwargs")
    if not isinstance(template, dict):
        return True
    return template.get("enable_thinking") is not False and template.get("thinking") is not False


def _choices(n: Any) -> int:
    """How many choices vLLM will make of `n`, which it takes as 2, 2.0 or "2"; what it refuses counts as one."""
    try:
        choices = int(n) if isinstance(n, int | float | str) else 1
    except (ValueError, OverflowError):
        return 1
    return choices if 1 <= choices <= _MOST_CHOICES else 1


def _number(value: Any, kind: type[Any]) -> Any:
    return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _engine_stops(request: Mapping[str, Any]) -> frozenset[str | int]:
    """What is of another shape is for vLLM to refuse."""
    stop, ids = request.get("stop"), request.get("stop_token_ids")
    strings = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else ()
    numbers = ids if isinstance(ids, list) else ()
    return frozenset([*(one for one in strings if isinstance(one, str)), *(one for one in numbers if type(one) is int)])
