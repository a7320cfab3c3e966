"""Engine bytes -> events: what vLLM says on its OpenAI chat route, streamed or whole.

Written against vLLM 0.26 to 0.33 and lenient towards its neighbours: fields it does not know travel as `Extra`,
what it cannot read is one `Failed`, and nothing that an engine sends makes it raise.
"""

import json
from collections.abc import Collection, Iterable, Mapping
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
    token_count,
)
from penstock.core.mould import Mould, mould_of

_MOST_DEPTH = 200
# So often a mould is taken of a choice's chunks: once for each field, and for engines that add one on the way.
_MOST_MOULDS = 8
_CHUNK_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage"})
_CHOICE_FIELDS = frozenset({"index", "delta", "message", "logprobs", "finish_reason", "stop_reason", "token_ids"})
_DELTA_FIELDS = frozenset({"role", "content", "reasoning", "reasoning_content", "tool_calls", "refusal"})
_TEXT_FIELDS = frozenset(
    ("choices", parent, *field)
    for parent in ("delta", "message")
    for field in (
        ("content",),
        ("reasoning",),
        ("reasoning_content",),
        ("refusal",),
        ("tool_calls", "function", "arguments"),
    )
)

# How a request is told that the engine itself gave it up: no end of an answer, but a failure.
_FAULTS = ("abort", "error")

_REASONS: dict[str, tuple[FinishReason, str | None]] = {
    "length": ("length", "max_tokens"),
    "content_filter": ("content_filter", None),
    "repetition": ("other", "repetition"),
}


class ChatReader:
    """Reads one answer. Feed it every byte in order, then call `close` once; after a `Failed` it says no more.

    Holds at most one unfinished SSE event of `line_limit` bytes and one unfinished character per text field.
    `choices` is how many the request asked for, `own_stops` the stop strings and token ids that it named to the engine.
    """

    def __init__(self, line_limit: int, choices: int, own_stops: Collection[str | int] = ()) -> None:
        self._line_limit = line_limit
        self._own_stops = own_stops
        self._parser = sse.Parser(line_limit)
        self._most_choices = choices
        self._is_whole = False
        self._opened = False
        self._over = False
        self._choices: dict[int, _ChoiceReader] = {}
        self._usage_was_final = False
        self._moulds: dict[int, Mould] = {}
        self._moulds_left = _MOST_MOULDS * choices

    def feed(self, data: bytes) -> list[Event]:
        """Events of the whole chunks in `data`; what is not whole yet waits."""
        out: list[Event] = []
        is_piece = data.startswith(b"data: ") and data.endswith(b"\n\n") and len(data) <= self._line_limit
        if is_piece and not self._over and self._parser.is_between_frames and self._fits(data[6:-2], out):
            return out
        for frame in self._parser.feed(data) if not self._over else ():
            if self._over:
                break
            data = frame.data.strip()
            if data == b"[DONE]":
                self._done(out)
            elif data and not self._fits(data, out):
                self._chunk(data, out)
        if self._parser.has_overflowed and not self._over:
            limit = f"a line of the engine's stream is longer than {self._line_limit} bytes"
            self._fail(out, "engine_line_too_long", f"{limit}; raise limits.line_bytes if this is meant")
        return out

    def read_whole(self, body: bytes) -> list[Event]:
        """Events of an answer that was not streamed."""
        out: list[Event] = []
        self._is_whole = True
        self._chunk(body, out)
        if not self._over:
            self._done(out)
        return out

    def close(self) -> list[Event]:
        """The engine's stream ended. What it had not finished is for the exchange to judge."""
        out: list[Event] = []
        if not self._over:
            self._end(out)
        return out

    def _done(self, out: list[Event]) -> None:
        self._end(out)
        out.append(EngineDone())

    def _end(self, out: list[Event]) -> None:
        self._over = True
        for choice in self._choices.values():
            choice.flush(out)
        if not self._usage_was_final and self._choices:
            self._sum_up(out)

    def _sum_up(self, out: list[Event]) -> None:
        """An engine that counts with every chunk but sends no total: the total is the sum at the finishes."""
        counts = [choice.usage_at_finish for choice in self._choices.values()]
        if all(count is not None for count in counts):
            total = dict(counts[0] or {})
            total["completion_tokens"] = sum(_count(count, "completion_tokens") for count in counts if count)
            total["total_tokens"] = _count(total, "prompt_tokens") + total["completion_tokens"]
            out.append(EngineUsage(total, final=True))

    def _fits(self, data: bytes, out: list[Event]) -> bool:
        """Whether it is a chunk like one before it, which then was read: a quarter of the time that JSON takes."""
        for mould in self._moulds.values():
            if (found := mould.read(data)) is not None:
                return self._choices[mould.choice].read_piece(mould.field, *found, out)
        return False

    def _chunk(self, data: bytes, out: list[Event]) -> None:
        chunk = _load(data)
        if not isinstance(chunk, dict):
            self._fail(out, "engine_malformed", "the engine sent a chunk that is no JSON object", data)
            return
        if data.count(b"[") + data.count(b"{") > _MOST_DEPTH and _is_deep(chunk):
            self._fail(out, "engine_malformed", "the engine sent a chunk that is nested too deeply", data)
            return
        # Errors come in band, as an envelope in place of a chunk: look for it before anything else.
        if (error := _error_of(chunk)) is not None:
            self._end(out)
            out.append(error)
            return
        try:
            self._read(chunk, out)
            self._take_mould(data, chunk)
        except _EngineGaveUpError as fault:
            self._fail(out, f"engine_{fault}", f"the engine gave this request up (finish_reason {str(fault)!r})")
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as fault:
            self._fail(out, "engine_malformed", f"the engine sent a chunk of another shape ({fault})", data)

    def _read(self, chunk: Ext, out: list[Event]) -> None:
        if not self._opened:
            self._open(chunk, out)
        if unknown := chunk.keys() - _CHUNK_FIELDS:
            _extra(None, chunk, unknown, out)
        usage: Ext | None = _checked(chunk.get("usage"), dict, "usage")
        choices = chunk.get("choices") or ()
        for choice in choices:
            index = choice.get("index", 0)
            if self._is_whole and not isinstance(choice.get("message"), dict):
                raise TypeError(f"choice {index!r} has no message")
            reader = self._choices.get(index)
            if reader is None:
                reader = self._choices[index] = self._new_choice(index)
            reader.read(choice, None if self._is_whole else usage, out)
        if usage and (self._is_whole or not choices):
            self._usage_was_final = True
            out.append(EngineUsage(usage, final=True))

    def _take_mould(self, data: bytes, chunk: Ext) -> None:
        if self._moulds_left and not self._is_whole and (mould := mould_of(data, chunk)) is not None:
            self._moulds_left -= 1
            self._moulds[mould.choice] = mould

    def _new_choice(self, index: Any) -> "_ChoiceReader":
        if type(index) is not int or not 0 <= index < self._most_choices:
            raise ValueError(f"choice index {index!r}, but the request asked for {self._most_choices}")
        return _ChoiceReader(index, self._own_stops)

    def _open(self, chunk: Ext, out: list[Event]) -> None:
        self._opened = True
        engine_id = _checked(chunk.get("id"), str, "id")
        model = _checked(chunk.get("model"), str, "model")
        created = _checked(chunk.get("created"), int, "created")
        whole = _encodable(chunk, None) if self._is_whole else None
        out.append(EngineOpened(engine_id, model, created, whole))
        if usage := _checked(chunk.get("usage"), dict, "usage"):
            out.append(EngineUsage(usage, final=False))

    def _fail(self, out: list[Event], code: str, message: str, chunk: bytes = b"") -> None:
        self._end(out)
        quote = repr(chunk[:80]) if chunk else ""
        out.append(Failed(code, message, retryable=True, origin="upstream", quote=quote))


class _ChoiceReader:
    """One choice: its unfinished characters and its running token count."""

    def __init__(self, index: int, own_stops: Collection[str | int]) -> None:
        self._index = index
        self._own_stops = own_stops
        self._tokens = 0
        self._fields: dict[str, WholeCharacters] = {}
        self._last_field = ""
        self._arguments: dict[int, WholeCharacters] = {}
        self._is_finished = False
        self._said_more = False
        self.usage_at_finish: Ext | None = None

    def read(self, choice: Ext, usage: Ext | None, out: list[Event]) -> None:
        delta = choice.get("delta") or choice.get("message") or {}
        if self._is_finished:
            self._after_finish(delta, out)
            return
        if unknown := choice.keys() - _CHOICE_FIELDS:
            _extra(self._index, choice, unknown, out)
        if unknown := delta.keys() - _DELTA_FIELDS:
            _extra(self._index, delta, unknown, out, in_delta=True)
        tokens = self._new_tokens(_count(usage, "completion_tokens") if usage else 0)
        logprobs = _checked((choice.get("logprobs") or {}).get("content"), list, "logprobs.content")
        token_ids = _checked(choice.get("token_ids"), list, "token_ids")
        extras: _Extras = (tokens, logprobs, token_ids)
        if role := _checked(delta.get("role"), str, "role"):
            out.append(Role(self._index, role))
        if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
            extras = self._text("reasoning", Channel.REASONING, reasoning, extras, out)
        if content := delta.get("content"):
            extras = self._text("content", Channel.RAW, content, extras, out)
        if refusal := delta.get("refusal"):
            extras = self._text("refusal", Channel.ANSWER, refusal, extras, out)
        if calls := delta.get("tool_calls"):
            extras = self._tools(calls, extras, out)
        if reason := _checked(choice.get("finish_reason"), str, "finish_reason"):
            self._finish(reason, _stop_reason(choice.get("stop_reason")), extras, usage, out)
        elif any(extras):  # tokens without text: half a character, or a marker that the engine cut out
            out.append(Text(self._index, Channel.RAW, "", *extras))

    def read_piece(self, field: str, text: str, total: int, out: list[Event]) -> bool:
        """A chunk with nothing but a piece of text and the tokens so far. False where it has to be looked at."""
        if self._is_finished:
            return False
        name = "content" if field == "content" else "reasoning"
        extras: _Extras = (self._new_tokens(total), None, None)
        if text:
            extras = self._text(name, _CHANNEL_OF[name][0], text, extras, out)
        if any(extras):
            out.append(Text(self._index, Channel.RAW, "", *extras))
        return True

    def flush(self, out: list[Event]) -> None:
        """Lets go of a held joiner or flag letter; halves of characters are dropped and said so."""
        self._flush_text(out)
        for index in self._arguments:
            self._flush_arguments(index, out)

    def _flush_text(self, out: list[Event]) -> None:
        if held := self._fields.get(self._last_field):
            if text := held.flush():
                channel, refusal = _CHANNEL_OF[self._last_field]
                out.append(Text(self._index, channel, text, refusal=refusal))
            _warn_of_dropped(held, out)

    def _flush_arguments(self, index: int, out: list[Event]) -> None:
        if held := self._arguments.get(index):
            if text := held.flush():
                out.append(ToolDelta(self._index, index, None, None, text))
            _warn_of_dropped(held, out)

    def _after_finish(self, delta: Ext, out: list[Event]) -> None:
        """A finished choice stays finished: what an engine adds is dropped, and said so once."""
        if not self._said_more and any(delta.get(name) for name in _DELTA_FIELDS if name != "role"):
            self._said_more = True
            out.append(Warned("after_finish", f"choice {self._index} said more after its finish; it was dropped"))

    def _new_tokens(self, total: int) -> int:
        new, self._tokens = max(total - self._tokens, 0), max(total, self._tokens)
        return new

    def _text(self, field: str, channel: Channel, text: str, extras: "_Extras", out: list[Event]) -> "_Extras":
        text = _checked(text, str, field) or ""
        if field != self._last_field:
            self._flush_text(out)
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
        self._flush_text(out)
        tokens, logprobs, token_ids = extras
        for position, call in enumerate(calls):
            function = call.get("function") or {}
            index = call.get("index", position)
            if type(index) is not int:
                raise TypeError(f"tool call index {index!r}")
            call_id = _checked(call.get("id"), str, "tool call id") or None
            name = _checked(function.get("name"), str, "function.name") or None
            if call_id:
                self._flush_arguments(index, out)
            arguments = self._whole_arguments(index, function.get("arguments"))
            out.append(ToolDelta(self._index, index, call_id, name, arguments, tokens))
            tokens = 0
        return tokens, logprobs, token_ids

    def _whole_arguments(self, index: int, arguments: Any) -> str:
        if isinstance(arguments, dict):  # some engines send the whole object instead of its text
            return orjson.dumps(arguments).decode()
        text = _checked(arguments, str, "function.arguments") or ""
        whole = self._arguments.get(index)
        if whole is None:
            if text.isascii():
                return text
            whole = self._arguments[index] = WholeCharacters()
        return whole.feed(text)

    def _finish(
        self,
        reason: str,
        stop_reason: str | int | None,
        extras: "_Extras",
        usage: Ext | None,
        out: list[Event],
    ) -> None:
        self.flush(out)
        self._is_finished = True
        self.usage_at_finish = usage
        if reason in _FAULTS:
            out.append(Text(self._index, Channel.RAW, "", *extras))
            raise _EngineGaveUpError(reason)
        meaning, cause = _meaning(reason, stop_reason, self._own_stops)
        out.append(Finished(self._index, reason, stop_reason, *extras, reason=meaning, cause=cause))


class _EngineGaveUpError(Exception):
    """The engine's own word for a request that it did not finish."""


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
    if isinstance(loaded, dict) and not _is_deep(loaded) and (error := _error_of(loaded)) is not None:
        return error.message, error.engine_body
    return f"the engine answered {status}: {decode_leniently(body[:200])!a}", None


def _meaning(
    raw: str, stop_reason: str | int | None, own_stops: Collection[str | int]
) -> tuple[FinishReason, str | None]:
    if raw not in ("stop", "tool_calls", "function_call"):
        return _REASONS.get(raw, ("other", None))
    reason: FinishReason = "stop" if raw == "stop" else "tool_calls"
    if isinstance(stop_reason, int):
        # A model may have several end tokens; vLLM names all but the first as if the request had asked to stop there.
        return reason, "stop_token" if stop_reason in own_stops else "eos"
    if stop_reason is None:
        return reason, "eos"
    # The plugin's word, which it never gives to a request that has a stop string of that name.
    ended_by_grammar = stop_reason == "grammar" and stop_reason not in own_stops
    return reason, "grammar" if ended_by_grammar else "stop_string"


def _error_of(chunk: Mapping[str, Any]) -> Failed | None:
    """The error envelope of vLLM (`{"error": {...}}`), of older ones (`{"object": "error", ...}`), or None."""
    error = chunk.get("error")
    if not error and chunk.get("object") != "error":
        return None
    details = error if isinstance(error, dict) else chunk if not error else {"message": error}
    code, message = details.get("code"), details.get("message")
    retryable = not (isinstance(code, int) and 400 <= code < 500 and code not in (408, 429))
    if not isinstance(message, str) or not message:
        message = "the engine reported an error without a message"
    body = dict(chunk) if isinstance(error, dict) else {"error": dict(details)}
    status = code if isinstance(code, int) and 400 <= code < 600 else 502
    return Failed("engine_error", message, retryable, "upstream", _encodable(body, None), status)


def _extra(
    choice: int | None, source: Ext, unknown: Iterable[str], out: list[Event], *, in_delta: bool = False
) -> None:
    fields = {name: source[name] for name in sorted(unknown) if source[name] is not None}
    if fields:
        out.append(Extra(choice, fields, in_delta))


def _count(usage: Mapping[str, Any], name: str) -> int:
    return token_count(usage.get(name)) or 0


def _checked(value: Any, kind: type[Any], what: str) -> Any:
    """`value` if it is of this kind or null; every other type is a chunk of another shape."""
    if value is None or type(value) is kind:
        return value
    raise TypeError(f"{what} is {type(value).__name__}")


def _stop_reason(value: Any) -> str | int | None:
    if value is None or type(value) in (str, int):
        return value  # type: ignore[no-any-return]
    raise TypeError(f"stop_reason is {type(value).__name__}")


def _warn_of_dropped(held: WholeCharacters, out: list[Event]) -> None:
    if held.dropped:
        out.append(Warned("invalid_unicode", f"{held.dropped} code units were no characters and were dropped"))
        held.dropped = 0


def _load(data: bytes) -> Any:
    """JSON, leniently: lone surrogates and bytes that are no UTF-8 survive in text, for `WholeCharacters` to mend."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            text = decode_leniently(data)
            return _encodable(json.loads(text, parse_int=_parse_int, parse_constant=_refuse_constant), ())
        except (ValueError, RecursionError):
            return None


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)  # as orjson does; JSON has no larger ones


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _encodable(value: Any, path: tuple[str, ...] | None) -> Any:
    """The same without what is no character, but in the fields of a chunk whose text is put together later.

    `path` is None where there are no such fields.
    """
    if isinstance(value, str):
        return value if path in _TEXT_FIELDS else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_encodable(item, path) for item in value]
    if isinstance(value, dict):
        return {
            _encodable(name, None): _encodable(item, None if path is None else (*path, name))
            for name, item in value.items()
        }
    return value


def _is_deep(value: Any) -> bool:
    """Whether `value` is nested so deeply that it cannot be written again (orjson reads 1024 levels, writes 254)."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
