"""Engine bytes -> events: what vLLM says on its OpenAI chat route, streamed or whole.

Written against vLLM 0.26 to 0.33 and lenient towards its neighbours: fields it does not know travel as `Extra`,
what it cannot read is one `Failed`, and nothing that an engine sends makes it raise.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from penstock.core import sse
from penstock.core.characters import WholeCharacters, decode_leniently
from penstock.core.events import (
    Channel,
    EngineDone,
    EngineOpened,
    EngineUsage,
    Event,
    Ext,
    Extra,
    Failed,
    Finished,
    FinishReason,
    Role,
    Text,
    ToolDelta,
    Warned,
)

_CHUNK_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage"})
_CHOICE_FIELDS = frozenset({"index", "delta", "message", "logprobs", "finish_reason", "stop_reason", "token_ids"})
_DELTA_FIELDS = frozenset({"role", "content", "reasoning", "reasoning_content", "tool_calls", "refusal"})

_REASONS: dict[str, tuple[FinishReason, str | None]] = {
    "length": ("length", "max_tokens"),
    "content_filter": ("content_filter", None),
    "abort": ("cancelled", "abort"),
    "error": ("error", "error"),
    "repetition": ("other", "repetition"),
}


class ChatReader:
    """Reads one answer. Feed it every byte in order, then call `close` once; after a `Failed` it says no more.

    Holds at most one unfinished SSE event of `line_limit` bytes and one unfinished character per text field.
    """

    def __init__(self, line_limit: int) -> None:
        self._parser = sse.Parser(line_limit)
        self._opened = False
        self._over = False
        self._choices: dict[int, _ChoiceReader] = {}
        self._usage_was_final = False

    def feed(self, data: bytes) -> list[Event]:
        """Events of the whole chunks in `data`; what is not whole yet waits."""
        out: list[Event] = []
        try:
            frames = self._parser.feed(data) if not self._over else []
        except sse.LineTooLongError as error:
            self._fail(out, "engine_line_too_long", f"{error}; raise limits.line_bytes if this is meant")
            return out
        for frame in frames:
            if self._over:
                break
            if frame.data == b"[DONE]":
                self._done(out)
            else:
                self._chunk(frame.data, out)
        return out

    def read_whole(self, body: bytes) -> list[Event]:
        """Events of an answer that was not streamed."""
        out: list[Event] = []
        self._chunk(body, out)
        if not self._over:
            self._done(out)
        return out

    def close(self) -> list[Event]:
        """The engine's stream ended. What it had not finished is for the exchange to judge."""
        out: list[Event] = []
        if not self._over:
            for choice in self._choices.values():
                choice.flush(out)
        self._over = True
        return out

    def _done(self, out: list[Event]) -> None:
        for choice in self._choices.values():
            choice.flush(out)
        if not self._usage_was_final and self._choices:
            self._sum_up(out)
        self._over = True
        out.append(EngineDone())

    def _sum_up(self, out: list[Event]) -> None:
        """An engine that counts with every chunk but sends no total: the total is the sum at the finishes."""
        counts = [choice.usage_at_finish for choice in self._choices.values()]
        if all(count is not None for count in counts):
            total = dict(counts[0] or {})
            total["completion_tokens"] = sum(_count(count, "completion_tokens") for count in counts if count)
            total["total_tokens"] = _count(total, "prompt_tokens") + total["completion_tokens"]
            out.append(EngineUsage(total, final=True))

    def _chunk(self, data: bytes, out: list[Event]) -> None:
        chunk = _load(data)
        if not isinstance(chunk, dict):
            self._fail(out, "engine_malformed", f"the engine sent a chunk that is no JSON object: {data[:80]!r}")
            return
        # Errors come in band, as an envelope in place of a chunk: look for it before anything else.
        if (error := _error_of(chunk)) is not None:
            self._over = True
            out.append(error)
            return
        try:
            self._read(chunk, out)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as fault:
            self._fail(out, "engine_malformed", f"the engine sent a chunk of another shape ({fault}): {data[:80]!r}")

    def _read(self, chunk: Ext, out: list[Event]) -> None:
        if not self._opened:
            self._open(chunk, out)
        if unknown := chunk.keys() - _CHUNK_FIELDS:
            _extra(None, chunk, unknown, out)
        usage = chunk.get("usage")
        choices = chunk.get("choices") or ()
        for choice in choices:
            index = choice.get("index", 0)
            reader = self._choices.get(index)
            if reader is None:
                reader = self._choices[index] = _ChoiceReader(index)
            reader.read(choice, usage if "message" not in choice else None, out)
        if usage and (not choices or "message" in choices[0]):
            self._usage_was_final = True
            out.append(EngineUsage(usage, final=True))

    def _open(self, chunk: Ext, out: list[Event]) -> None:
        self._opened = True
        whole = chunk if chunk.get("object") == "chat.completion" else None
        out.append(EngineOpened(chunk.get("id"), chunk.get("model"), chunk.get("created"), whole))
        if chunk.get("usage"):
            out.append(EngineUsage(chunk["usage"], final=False))

    def _fail(self, out: list[Event], code: str, message: str) -> None:
        self._over = True
        out.append(Failed(code, message, retryable=True, origin="upstream"))


class _ChoiceReader:
    """One choice: its unfinished characters and its running token count."""

    def __init__(self, index: int) -> None:
        if not isinstance(index, int) or index < 0:
            raise ValueError(f"choice index {index!r}")
        self._index = index
        self._tokens = 0
        self._fields: dict[str, WholeCharacters] = {}
        self._last_field = ""
        self.usage_at_finish: Ext | None = None

    def read(self, choice: Ext, usage: Ext | None, out: list[Event]) -> None:
        delta = choice.get("delta") or choice.get("message") or {}
        if unknown := choice.keys() - _CHOICE_FIELDS:
            _extra(self._index, choice, unknown, out)
        if unknown := delta.keys() - _DELTA_FIELDS:
            _extra(self._index, delta, unknown, out, in_delta=True)
        tokens = self._new_tokens(usage)
        logprobs = (choice.get("logprobs") or {}).get("content")
        token_ids = choice.get("token_ids")
        extras = (tokens, logprobs, token_ids)
        if role := delta.get("role"):
            out.append(Role(self._index, role))
        if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
            extras = self._text("reasoning", Channel.REASONING, reasoning, extras, out)
        if content := delta.get("content"):
            extras = self._text("content", Channel.RAW, content, extras, out)
        if refusal := delta.get("refusal"):
            extras = self._text("refusal", Channel.ANSWER, refusal, extras, out)
        if calls := delta.get("tool_calls"):
            extras = self._tools(calls, extras, out)
        if reason := choice.get("finish_reason"):
            self._finish(reason, choice.get("stop_reason"), extras, usage, out)
        elif any(extras):  # tokens without text: half a character, or a marker that the engine cut out
            out.append(Text(self._index, Channel.RAW, "", *extras))

    def flush(self, out: list[Event]) -> None:
        """Lets go of a held joiner or flag letter; halves of characters are dropped and said so."""
        if not self._last_field:
            return
        held = self._fields[self._last_field]
        if text := held.flush():
            channel, refusal = _CHANNEL_OF[self._last_field]
            out.append(Text(self._index, channel, text, refusal=refusal))
        if held.dropped:
            out.append(Warned("invalid_unicode", f"{held.dropped} code units were no characters and were dropped"))
            held.dropped = 0

    def _new_tokens(self, usage: Ext | None) -> int:
        if not usage:
            return 0
        total = _count(usage, "completion_tokens")
        new, self._tokens = total - self._tokens, total
        return max(new, 0)

    def _text(self, field: str, channel: Channel, text: str, extras: "_Extras", out: list[Event]) -> "_Extras":
        if not isinstance(text, str):
            raise TypeError(f"{field} is not a string")
        if field != self._last_field:
            self.flush(out)
            self._last_field = field
        whole = self._fields.get(field)
        if whole is None:
            whole = self._fields[field] = WholeCharacters()
        text = whole.feed(text)
        if not text:
            return extras
        out.append(Text(self._index, channel, text, *extras, refusal=field == "refusal"))
        return _NO_EXTRAS

    def _tools(self, calls: Iterable[Ext], extras: "_Extras", out: list[Event]) -> "_Extras":
        self.flush(out)
        tokens, *rest = extras
        for position, call in enumerate(calls):
            function = call.get("function") or {}
            arguments = function.get("arguments") or ""
            if isinstance(arguments, dict):  # some engines send the whole object instead of its text
                arguments = orjson.dumps(arguments).decode()
            index, call_id, name = call.get("index", position), call.get("id"), function.get("name")
            out.append(ToolDelta(self._index, index, call_id or None, name or None, arguments, tokens))
            tokens = 0
        return (0, *rest)  # type: ignore[return-value]

    def _finish(
        self,
        reason: str,
        stop_reason: str | int | None,
        extras: "_Extras",
        usage: Ext | None,
        out: list[Event],
    ) -> None:
        self.flush(out)
        self.usage_at_finish = usage
        meaning, cause = _meaning(reason, stop_reason)
        out.append(Finished(self._index, reason, stop_reason, *extras, reason=meaning, cause=cause))


_Extras = tuple[int, list[Any] | None, list[int] | None]
_NO_EXTRAS: _Extras = (0, None, None)
_CHANNEL_OF = {
    "reasoning": (Channel.REASONING, False),
    "content": (Channel.RAW, False),
    "refusal": (Channel.ANSWER, True),
}


def refusal_message(status: int, body: bytes) -> tuple[str, Ext | None]:
    """The sentence and, where it has one, the error object of an engine's answer with an error status."""
    loaded = _load(body)
    error = _error_of(loaded) if isinstance(loaded, dict) else None
    if error is not None and isinstance(loaded, dict):
        return error.message, loaded
    return f"the engine answered {status}: {decode_leniently(body[:200])!a}", None


def _meaning(raw: str, stop_reason: str | int | None) -> tuple[FinishReason, str | None]:
    if raw in ("stop", "tool_calls", "function_call"):
        reason: FinishReason = "stop" if raw == "stop" else "tool_calls"
        if stop_reason is None:
            return reason, "eos"
        return reason, "stop_string" if isinstance(stop_reason, str) else "stop_token"
    return _REASONS.get(raw, ("other", None))


def _error_of(chunk: Mapping[str, Any]) -> Failed | None:
    """The error envelope of vLLM (`{"error": {...}}`), of older ones (`{"object": "error", ...}`), or None."""
    error = chunk.get("error")
    if not error and chunk.get("object") != "error":
        return None
    details = error if isinstance(error, dict) else chunk if not error else {"message": str(error)}
    code = details.get("code")
    retryable = not (isinstance(code, int) and 400 <= code < 500 and code not in (408, 429))
    message = str(details.get("message") or "the engine reported an error without a message")
    body = dict(chunk) if isinstance(error, dict) else {"error": dict(details)}
    status = code if isinstance(code, int) and 400 <= code < 600 else 502
    return Failed("engine_error", _encodable(message), retryable, "upstream", body, status)


def _extra(
    choice: int | None, source: Ext, unknown: Iterable[str], out: list[Event], *, in_delta: bool = False
) -> None:
    fields = {name: source[name] for name in sorted(unknown) if source[name] is not None}
    if fields:
        out.append(Extra(choice, fields, in_delta))


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def _load(data: bytes) -> Any:
    """JSON, leniently: lone surrogates and bytes that are no UTF-8 survive for `WholeCharacters` to mend."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return json.loads(decode_leniently(data), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
