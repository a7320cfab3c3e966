"""The plugin's records of one stream -> events: the other source of an exchange, beside `engine_stream`.

The text is decoded here and walks through the same steps as vLLM's own chunks, so that both ways give the same
events. Markers that vLLM would have cut out of the text as special tokens are written out for the channel step.
"""

from typing import assert_never

from penstock.core.characters import WholeCharacters
from penstock.core.detokenize import Detokenizer, Vocabulary
from penstock.core.engine_stream import refusal_message
from penstock.core.events import (
    Channel,
    EngineDone,
    EngineOpened,
    EngineUsage,
    Event,
    Extra,
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
_ENDED_BY_TOKEN = ("eos", "stop_token", "grammar")


class TaggedReader:
    """Reads the records of one stream, in order. After a `Failed` or `EngineDone` it says no more.

    A choice's last tokens and its finish must come in one `read`: only the finish tells that the last id is no text.
    """

    def __init__(
        self,
        request: StreamRequest,
        vocabulary: Vocabulary,
        engine_id: str,
        model: str,
        *,
        fingerprint: str | None = None,
    ) -> None:
        """`fingerprint` is vLLM's `system_fingerprint`, where it tells one."""
        self._request = request
        self._wants_token_ids = request.wants_token_ids
        self._vocabulary = vocabulary
        self._engine_id = engine_id
        self._model = model
        self._fingerprint = fingerprint
        self._begin: Begin | None = None
        self._choices: list[_Choice] = []
        self._completion_tokens = 0
        self._over = False

    def read(self, records: list[Record]) -> list[Event]:
        if len(records) == 1 and (text := self._ordinary(records[0])) is not None:
            return [text]
        out: list[Event] = []
        for position, record in enumerate(records):
            if self._over:
                break
            match record:
                case Tokens():
                    following = records[position + 1] if position + 1 < len(records) else None
                    self._tokens(record, following, out)
                case Finish():
                    self._finish(record, out)
                case Begin():
                    self._open(record, out)
                case End():
                    self._over = True
                    out += [*self._flush(), *self._last_fields(), EngineUsage(self._usage(), final=True), EngineDone()]
                case EngineFailed():
                    self._fail(_failure(record), out)
                case Lost():
                    message = "the sidecar did not keep up with the engine, which dropped this stream"
                    self._fail(Failed("engine_outbox_full", message, True, "upstream", status=503), out)
                case _:
                    assert_never(record)
        return out

    def close(self) -> list[Event]:
        """The stream broke off. What it had not finished is for the exchange to judge."""
        if self._over:
            return []
        self._over = True
        return self._flush()

    def _ordinary(self, record: Record) -> Text | None:
        """The hot path: one run of text, in the middle of a choice."""
        if self._over or not isinstance(record, Tokens) or record.tag is Tag.MARKER:
            return None
        if record.choice >= len(self._choices) or self._choices[record.choice].is_finished:
            return None
        ids = record.ids
        self._completion_tokens += len(ids)
        token_ids = list(ids) if self._wants_token_ids else None
        return Text(record.choice, Channel.RAW, self._choices[record.choice].read(ids), len(ids), None, token_ids)

    def _open(self, begin: Begin, out: list[Event]) -> None:
        if self._begin is not None:
            self._fail(_malformed("began twice"), out)
            return
        self._begin = begin
        out.append(EngineOpened(self._engine_id, self._model, None, state=begin.state))
        out.append(EngineUsage(self._usage(), final=False))

    def _tokens(self, record: Tokens, following: Record | None, out: list[Event]) -> None:
        choice = self._choice(record.choice, out)
        if choice is None:
            return
        self._completion_tokens += len(record.ids)
        finish = following if isinstance(following, Finish) and following.choice == record.choice else None
        ids = record.ids
        if record.tag is Tag.MARKER and finish is not None and self._ended_by_token(finish):
            ids = ids[:-1]
        text = choice.read_marker(ids) if record.tag is Tag.MARKER else choice.read(ids)
        token_ids = list(record.ids) if self._request.wants_token_ids else None
        if finish is not None and not text:
            choice.last = (len(record.ids), None, token_ids)
        else:
            out.append(Text(record.choice, Channel.RAW, text, len(record.ids), None, token_ids))

    def _ended_by_token(self, finish: Finish) -> bool:
        return finish.cause in _ENDED_BY_TOKEN and not self._request.shows_stop_token

    def _finish(self, record: Finish, out: list[Event]) -> None:
        if self._begin is None:  # the engine gave the request up before its first token
            self._open(Begin(record.stream, 0, 0, ()), out)
        choice = self._choice(record.choice, out)
        if choice is None:
            return
        if text := choice.flush():
            out.append(Text(record.choice, Channel.RAW, text))
        choice.is_finished = True
        if record.cause in ("abort", "error"):
            self._give_up(record, choice, out)
            return
        reason = _REASONS.get(record.reason, "other")
        cause = None if record.cause == "unknown" else record.cause
        out.append(Finished(record.choice, record.reason, record.stop, *choice.last, reason=reason, cause=cause))

    def _give_up(self, record: Finish, choice: "_Choice", out: list[Event]) -> None:
        out.append(Text(record.choice, Channel.RAW, "", *choice.last))
        if all(one.is_finished for one in self._choices):
            out.append(EngineUsage(self._usage(), final=True))
        message = f"the engine gave this request up (finish_reason {record.reason!r})"
        self._fail(Failed(f"engine_{record.cause}", message, retryable=True, origin="upstream"), out)

    def _choice(self, number: int, out: list[Event]) -> "_Choice | None":
        """The choice, if the contract allows it to speak now; otherwise the stream has failed."""
        if self._begin is None:
            self._fail(_malformed("spoke before it began"), out)
            return None
        if not self._choices:
            self._take_the_floor(self._begin, out)
        if number >= len(self._choices):
            self._fail(_malformed(f"spoke for choice {number} of {self._request.choices}"), out)
            return None
        choice = self._choices[number]
        if choice.is_finished:
            self._fail(_malformed(f"went on with choice {number} after its finish"), out)
            return None
        return choice

    def _take_the_floor(self, begin: Begin, out: list[Event]) -> None:
        """All roles before the first token, as vLLM does; not earlier, so that an error until then has a status."""
        prompt: list[Event] = []
        if self._wants_token_ids and len(begin.prompt_end) == begin.prompt_tokens:
            prompt = [Extra(None, {"prompt_token_ids": list(begin.prompt_end)})]
        for number in range(self._request.choices):
            self._choices.append(_Choice(self._request, self._vocabulary, begin.prompt_end))
            out += [*prompt, Role(number, "assistant")]

    def _fail(self, failure: Failed, out: list[Event]) -> None:
        out += [*self.close(), failure]

    def _flush(self) -> list[Event]:
        texts = [(number, choice.flush()) for number, choice in enumerate(self._choices)]
        return [Text(number, Channel.RAW, text) for number, text in texts if text]

    def _last_fields(self) -> list[Event]:
        """What vLLM writes beside its last count."""
        return [Extra(None, {"system_fingerprint": self._fingerprint})] if self._fingerprint else []

    def _usage(self) -> dict[str, object]:
        prompt = self._begin.prompt_tokens if self._begin else 0
        cached = self._begin.cached_tokens if self._begin else 0
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._completion_tokens,
            "completion_tokens": self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class _Choice:
    """The text of one choice: whole characters, of which a joiner or half a flag may wait for the next."""

    def __init__(self, request: StreamRequest, vocabulary: Vocabulary, prompt_end: tuple[int, ...]) -> None:
        self._detokenizer = Detokenizer(
            vocabulary,
            prompt_end,
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
        )
        self._skipped = vocabulary.special if request.skip_special_tokens else {}
        self._characters = WholeCharacters()
        self.is_finished = False
        self.last: tuple[int, None, list[int] | None] = (0, None, None)
        """Count and ids of last tokens without text: they go with the finish, as in vLLM's last chunk."""

    def read(self, ids: tuple[int, ...]) -> str:
        text = self._detokenizer.feed(ids)
        return self._characters.feed(text)

    def read_marker(self, ids: tuple[int, ...]) -> str:
        """The same with what the decoder skips written out."""
        pieces = [self._detokenizer.feed((number,)) or self._skipped.get(number, "") for number in ids]
        return self._characters.feed("".join(pieces))

    def flush(self) -> str:
        return self._characters.flush()


def _failure(record: EngineFailed) -> Failed:
    message, body = refusal_message(record.status, record.body)
    status = record.status if 400 <= record.status < 600 else 502
    retryable = status in (408, 429) or status >= 500
    return Failed("engine_error", message, retryable, "upstream", body, status)


def _malformed(what: str) -> Failed:
    message = f"the plugin's frames are not of the contract: this stream {what}"
    return Failed("engine_malformed", message, retryable=True, origin="upstream")
