"""The plugin's records of one stream -> events: the other source of an exchange, beside `engine_stream`.

The text is decoded here and walks through the same steps as vLLM's own chunks, so that both ways give the same
events. Markers that vLLM would have cut out of the text as special tokens are written out for the channel step.
"""

import orjson

from penstock.core.detokenize import Detokenizer, Vocabulary
from penstock.core.events import (
    Channel,
    EngineDone,
    EngineOpened,
    EngineUsage,
    Event,
    Failed,
    Finished,
    FinishReason,
    Role,
    Text,
)
from penstock.core.frames import Begin, End, EngineFailed, Finish, Lost, Record, Tag, Tokens
from penstock.core.request import StreamRequest

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
# The id that ended a choice is no part of its text.
_ENDED_BY_TOKEN = ("eos", "stop_token")


class TaggedReader:
    """Reads the records of one stream, in order. After a `Failed` or `EngineDone` it says no more."""

    def __init__(self, request: StreamRequest, vocabulary: Vocabulary, engine_id: str, model: str) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._engine_id = engine_id
        self._model = model
        self._begin: Begin | None = None
        self._choices: dict[int, Detokenizer] = {}
        self._completion_tokens = 0

    def read(self, records: list[Record]) -> list[Event]:
        out: list[Event] = []
        for position, record in enumerate(records):
            match record:
                case Tokens():
                    following = records[position + 1] if position + 1 < len(records) else None
                    self._tokens(record, following, out)
                case Finish():
                    self._finish(record, out)
                case Begin():
                    self._open(record, out)
                case End():
                    out += [EngineUsage(self._usage(), final=True), EngineDone()]
                case EngineFailed():
                    out.append(_failure(record))
                case Lost():
                    message = "the sidecar did not keep up with the engine, which dropped this stream"
                    out.append(Failed("engine_outbox_full", message, retryable=True, origin="upstream", status=503))
        return out

    def _open(self, begin: Begin, out: list[Event]) -> None:
        self._begin = begin
        out.append(EngineOpened(self._engine_id, self._model, None))
        out.append(EngineUsage(self._usage(), final=False))

    def _tokens(self, record: Tokens, following: Record | None, out: list[Event]) -> None:
        detokenizer = self._choices.get(record.choice)
        if detokenizer is None:
            detokenizer = self._choices[record.choice] = self._new_choice(record.choice, out)
        ids = record.ids
        self._completion_tokens += len(ids)
        if record.tag is Tag.MARKER and _ends(record, following):
            ids = ids[:-1]
        text = detokenizer.feed(ids)
        if record.tag is Tag.MARKER and not text:
            text = "".join(self._vocabulary.special.get(number, "") for number in ids)
        token_ids = list(record.ids) if self._request.wants_token_ids else None
        out.append(Text(record.choice, Channel.RAW, text, len(record.ids), None, token_ids))

    def _new_choice(self, choice: int, out: list[Event]) -> Detokenizer:
        out.append(Role(choice, "assistant"))
        return Detokenizer(
            self._vocabulary,
            self._begin.prompt_end if self._begin else (),
            skip_special_tokens=self._request.skip_special_tokens,
            spaces_between_special_tokens=self._request.spaces_between_special_tokens,
        )

    def _finish(self, record: Finish, out: list[Event]) -> None:
        reason = _REASONS.get(record.reason, "other")
        if record.cause in ("abort", "error"):
            message = f"the engine gave this request up (finish_reason {record.reason!r})"
            out.append(Failed(f"engine_{record.cause}", message, retryable=True, origin="upstream"))
            return
        cause = None if record.cause == "unknown" else record.cause
        out.append(Finished(record.choice, record.reason, record.stop, reason=reason, cause=cause))

    def _usage(self) -> dict[str, object]:
        prompt = self._begin.prompt_tokens if self._begin else 0
        cached = self._begin.cached_tokens if self._begin else 0
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._completion_tokens,
            "completion_tokens": self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _ends(record: Tokens, following: Record | None) -> bool:
    return isinstance(following, Finish) and following.choice == record.choice and following.cause in _ENDED_BY_TOKEN


def _failure(record: EngineFailed) -> Failed:
    try:
        body = orjson.loads(record.body)
    except orjson.JSONDecodeError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str):
        message, body = "the engine failed on this request", None
    return Failed("engine_error", message, record.status >= 500, "upstream", body, record.status)
