"""The requests that sidecars have open in this process, and what becomes of them. Knows nothing of vLLM."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from penstock_vllm import frames
from penstock_vllm.channels import Run, Table, Tagger
from penstock_vllm.frames import Cause
from penstock_vllm.outbox import Outbox

Json = Mapping[str, Any]


class Stream:
    """One request on one connection. It ends once: by END, ERROR or LOST, by a refusal, or silently by an abort.

    Records go to the outbox; whoever calls from outside an engine step commits them.
    """

    def __init__(
        self,
        number: int,
        outbox: Outbox,
        table: Table,
        stop_engine: Callable[[], None],
        *,
        choices: int = 1,
        own_stop_ids: Collection[int] = (),
        shows_stop_tokens: bool = False,
        skips_special: bool = True,
        shows_prompt: bool = False,
    ) -> None:
        """`own_stop_ids` are those the request named; `shows_stop_tokens`: the id that ends a choice is part of it;
        `skips_special`: special tokens are left out of the text; `shows_prompt`: all of the prompt's ids are told."""
        self.number = number
        self.outbox = outbox
        self.own_stop_ids = own_stop_ids
        self.shows_stop_tokens = shows_stop_tokens
        self.skips_special = skips_special
        self.shows_prompt = shows_prompt
        self.is_over = False
        self.has_begun = False
        self.engine_ids: list[str] = []
        self._table = table
        self._stop_engine = stop_engine
        self._unfinished = set(range(choices))
        self._from_prompt: Tagger | None = None
        self._choices: dict[int, Choice] = {}

    def begin(self, prompt: Sequence[int], prompt_tokens: int, cached_tokens: int) -> None:
        """Told once, before the first token. `prompt` is empty where it had no ids."""
        self.has_begun = True
        tagger = self._from_prompt = self._table.tagger(prompt)
        end = prompt if self.shows_prompt else self._table.prompt_end(prompt, skips_special=self.skips_special)
        self.outbox.put(frames.begin(self.number, prompt_tokens, cached_tokens, end, tagger.state_name))

    def choice(self, index: int) -> "Choice":
        """A choice that begins, after `begin`."""
        assert self._from_prompt is not None
        choice = self._choices[index] = Choice(self, index, self._from_prompt.fork())
        return choice

    def conclude(self, reasons: Mapping[int, tuple[Cause, str]]) -> None:
        """The engine has let go of the request; `reasons` are for choices that no engine step ended (an abort)."""
        for index in sorted(self._unfinished):
            cause, reason = reasons.get(index, (Cause.UNKNOWN, ""))
            self.finished(index, cause, reason, None)

    def finished(self, index: int, cause: Cause, reason: str, stop: int | str | None) -> None:
        """After the last token of a choice."""
        if self.is_over or index not in self._unfinished:
            return
        self._unfinished.discard(index)
        self.outbox.put(frames.finish(self.number, index, cause, reason, stop))
        if not self._unfinished:
            self.is_over = True
            self.outbox.put(frames.end(self.number))

    def fail(self, status: int, body: Json) -> None:
        """The engine's own error: a refusal before the first token, ERROR after it. The engine is told to stop."""
        if self.is_over:
            return
        if self.has_begun:
            for index in self._unfinished & self._choices.keys():
                self._choices[index].last_tokens(())
            self.outbox.put(frames.error(self.number, status, json.dumps(body, ensure_ascii=False).encode()))
        else:
            self.outbox.put_text(self.number, refused(self.number, status, body))
        self.abort()

    def abort(self) -> None:
        """The engine is told to stop; nothing more is sent."""
        self.is_over = True
        self._stop_engine()


def refused(number: int, status: int, body: Json) -> str:
    """The message for a request that the engine did not take."""
    return json.dumps({"op": "refused", "stream": number, "status": status, "body": body})


class Choice:
    """One choice of a stream while the engine generates it."""

    __slots__ = ("index", "stream", "tagger")

    def __init__(self, stream: Stream, index: int, tagger: Tagger) -> None:
        self.stream = stream
        self.index = index
        self.tagger = tagger

    def tokens(self, ids: Sequence[int]) -> None:
        self._put(self.tagger.feed(ids))

    def finish(self, ids: Sequence[int], cause: Cause, reason: str, stop: int | str | None) -> None:
        """The last ids of the choice, which may be none, and why there are no more."""
        # A grammar stop ends with an end token that the engine wrote itself, so that its own text is whole.
        by_token = cause in (Cause.EOS, Cause.STOP_TOKEN, Cause.GRAMMAR) and not self.stream.shows_stop_tokens
        self._put(self.tagger.finish(ids, ended_by_token=by_token))
        self.stream.finished(self.index, cause, reason, stop)

    def last_tokens(self, ids: Sequence[int]) -> None:
        """The last ids of a choice that the engine gave up."""
        self._put(self.tagger.finish(ids, ended_by_token=False))

    def _put(self, runs: Sequence[Run]) -> None:
        stream = self.stream
        if not stream.is_over:
            for channel, ids in runs:
                stream.outbox.put(frames.tokens(stream.number, self.index, channel, ids))


class OpenStreams:
    """All of a process: by the request's id, and by the engine's own id of each choice once it has spoken of it."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}
        self.choices: dict[str, Choice] = {}
        self.lost = 0
        self._outboxes: dict[Outbox, int] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def join(self, engine_id: str, stream: Stream, index: int) -> Choice:
        """The engine speaks for the first time of choice `index`, which it calls `engine_id`."""
        choice = self.choices[engine_id] = stream.choice(index)
        stream.engine_ids.append(engine_id)
        return choice

    def of_request(self, request_id: str) -> Stream | None:
        return self._streams.get(request_id)

    def add(self, request_id: str, stream: Stream) -> None:
        self._streams[request_id] = stream
        self._outboxes[stream.outbox] = self._outboxes.get(stream.outbox, 0) + 1

    def remove(self, request_id: str) -> None:
        """Idempotent; the engine may go on to speak of it, which nobody hears."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        for engine_id in stream.engine_ids:
            self.choices.pop(engine_id, None)
        self._outboxes[stream.outbox] -= 1
        if not self._outboxes[stream.outbox]:
            del self._outboxes[stream.outbox]

    def fail_all(self, status: int, body: Json) -> None:
        for stream in list(self._streams.values()):
            stream.fail(status, body)

    def commit(self) -> None:
        """The end of an engine step."""
        for outbox in self._outboxes:
            outbox.commit()

    @property
    def waiting_bytes(self) -> int:
        return sum(outbox.waiting_bytes for outbox in self._outboxes)
