"""Answers that no engine is asked for: written or recorded beforehand, told at a set pace.

They take the same journey as an engine's: what comes out of here are vLLM's own chunks.
"""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from string import Template
from typing import Any

import orjson

from penstock.core.errors import Problem
from penstock.core.prompt import last_question
from penstock.core.request import StreamRequest
from penstock.core.signals import EngineAnswered, EngineChosen, EngineSpoke
from penstock.settings import PreparedSettings
from penstock.shell.sources import Ear

# A longer question is for a model; and a pattern must not take long over what anybody may send.
_LONGEST_QUESTION = 2000
# What is told at once: a word and the space before it, as tokens mostly are.
_PIECE = re.compile(r"\s*\S+\s*?(?=\s|$)|\s+")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One answer of the settings and the questions that it is for."""

    settings: PreparedSettings
    pattern: re.Pattern[str]

    def answer(self, request: StreamRequest) -> "PreparedAnswer | None":
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
        return PreparedAnswer(self.settings.id, request, text, self.settings.words_per_second)


def prepare(answers: list[PreparedSettings]) -> list[Prepared]:
    return [Prepared(answer, re.compile(answer.question, re.IGNORECASE | re.DOTALL)) for answer in answers]


class PreparedAnswer:
    """The source of one stream. It cannot fail, so there is nobody else to try."""

    def __init__(self, name: str, request: StreamRequest, text: str, words_per_second: float) -> None:
        self._name = name
        self._request = request
        self._text = text
        self._pause = 1 / words_per_second
        self._id = f"chatcmpl-{name}"
        self._created = int(time.time())
        self._now = asyncio.get_running_loop().time
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def speak(self, ear: Ear) -> None:
        ear.hear(EngineChosen(f"answers/{self._name}", None, self._now()))
        if not self._request.streams:
            ear.hear(EngineAnswered(self._whole(), self._now()))
            return
        due = self._now()
        for chunk in self._chunks():
            # By the clock, not by pauses: what the writing took does not slow the pace.
            await asyncio.sleep(max(0.0, due - self._now()))
            await self._flowing.wait()
            if ear.is_over:
                return
            ear.hear(EngineSpoke(b"data: %b\n\n" % orjson.dumps(chunk), self._now()))
            due += self._pause
        ear.hear(EngineSpoke(b"data: [DONE]\n\n", self._now()))

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

    def _chunks(self) -> Iterator[dict[str, Any]]:
        yield self._told("chat.completion.chunk", {"delta": {"role": "assistant", "content": ""}})
        for piece in _PIECE.findall(self._text):
            yield self._told("chat.completion.chunk", {"delta": {"content": piece}})
        yield self._told("chat.completion.chunk", {"delta": {}, "finish_reason": "stop"})
        yield {**self._told("chat.completion.chunk", {}), "choices": [], "usage": _NO_TOKENS}

    def _whole(self) -> bytes:
        message = {"role": "assistant", "content": self._text}
        told = self._told("chat.completion", {"message": message, "finish_reason": "stop"})
        return orjson.dumps({**told, "usage": _NO_TOKENS})

    def _told(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        choices = [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
        model = self._request.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "choices": choices}


# No engine worked, so there is nothing to bill.
_NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
