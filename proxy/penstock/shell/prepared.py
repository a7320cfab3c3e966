"""Answers that no engine is asked for, told at a set pace: written beforehand, or given by an engine before.

They take the same journey as an engine's: what comes out of here is what a reader makes of an engine's words.
"""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from string import Template

import orjson

from penstock.core.errors import Problem
from penstock.core.events import (
    Channel,
    EngineDone,
    EngineOpened,
    EngineUsage,
    Event,
    Ext,
    Finished,
    Role,
    Text,
    utf8_size,
)
from penstock.core.kept_answer import KeptAnswer
from penstock.core.prompt import last_question
from penstock.core.request import StreamRequest
from penstock.core.signals import AnswerTold, EngineChosen
from penstock.settings import PreparedSettings
from penstock.shell.sources import Ear

# A longer question is for a model; and a pattern must not take long over what anybody may send.
_LONGEST_QUESTION = 2000
# What is told at once: a word and the space before it, as tokens mostly are.
_PIECE = re.compile(r"\s*\S+\s*?(?=\s|$)|\s+")
# No engine worked, so there is nothing to bill.
_NO_TOKENS: Ext = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One answer of the settings and the questions that it is for."""

    settings: PreparedSettings
    pattern: re.Pattern[str]

    def answer(self, request: StreamRequest, stream_id: str) -> "ToldAnswer | None":
        """The answer to this request, None where it is not for it."""
        if request.choices != 1 or not any(fnmatchcase(request.model, model) for model in self.settings.models):
            return None
        question = last_question(request.engine_body)
        match = self.pattern.fullmatch(question) if 0 < len(question) <= _LONGEST_QUESTION else None
        if match is None:
            return None
        # What stands for nothing known stays as it is.
        words = {"model": request.model, **{k: v or "" for k, v in match.groupdict().items()}}
        text = Template(self.settings.text).safe_substitute(words)
        pace = self.settings.words_per_second
        return ToldAnswer(f"answers/{self.settings.id}", _written(text), request, stream_id, pace)


def prepare(answers: list[PreparedSettings]) -> list[Prepared]:
    return [Prepared(answer, re.compile(answer.question, re.IGNORECASE | re.DOTALL)) for answer in answers]


def _written(text: str) -> KeptAnswer:
    """A text as the answer that a model would have given."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = orjson.dumps({"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [choice]})
    finish = Finished(0, "stop", reason="stop", cause="eos")
    return KeptAnswer(None, None, whole, (Role(0, "assistant"), Text(0, Channel.ANSWER, text), finish), utf8_size(text))


class ToldAnswer:
    """The source of one stream. It cannot fail, so there is nobody else to try."""

    def __init__(
        self, upstream: str, answer: KeptAnswer, request: StreamRequest, stream_id: str, words_per_second: float
    ) -> None:
        self._upstream = upstream
        self._answer = answer
        self._request = request
        self._id = f"chatcmpl-{stream_id}"
        self._pause = 1 / words_per_second
        self._now = asyncio.get_running_loop().time
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def speak(self, ear: Ear) -> None:
        ear.hear(EngineChosen(self._upstream, None, self._now()))
        begin: list[Event] = [self._opened(), EngineUsage(_NO_TOKENS, final=True)]
        if not self._request.streams:
            ear.hear(AnswerTold([*begin, *self._answer.again(), EngineDone()], self._now()))
            return
        due = self._now()
        for piece in self._pieces():
            # By the clock, not by pauses: what the writing took does not slow the pace.
            await asyncio.sleep(max(0.0, due - self._now()))
            await self._flowing.wait()
            if ear.is_over:
                return
            ear.hear(AnswerTold([*begin, piece], self._now()))
            begin = []
            due += self._pause
        ear.hear(AnswerTold([EngineDone()], self._now()))

    def pause(self) -> None:
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def abort(self) -> None:
        """`speak` stops by itself once the stream is over."""
        self._flowing.set()

    def try_another(self, problem: Problem) -> None:
        pass

    async def is_healthy(self) -> bool:
        return True

    def _opened(self) -> EngineOpened:
        answer, model, created = self._answer, self._answer.model or self._request.model, int(time.time())
        whole = None
        if answer.whole is not None and not self._request.streams:
            named = {"id": self._id, "created": created, "model": model, "usage": dict(_NO_TOKENS)}
            whole = orjson.loads(answer.whole) | named
        return EngineOpened(self._id, model, created, whole, answer.state)

    def _pieces(self) -> Iterator[Event]:
        for event in self._answer.again():
            if isinstance(event, Text) and event.logprobs is None and event.token_ids is None:
                yield from (replace(event, text=word) for word in _PIECE.findall(event.text))
            else:
                yield event
