"""Answers of engines that are told again: which requests may have one, whose it is, and how many are kept.

They are in the memory of this replica and are gone with it. What is kept is what the engine said, before moderation.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from penstock.core.kept_answer import KeptAnswer
from penstock.core.request import StreamRequest
from penstock.settings import AnswerCacheSettings

UPSTREAM = "answers/cache"
"""What `stream.start` and the usage record name as the engine of an answer that is told again."""


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: KeptAnswer
    until: float


class AnswerCache:
    """Ask for a request's key once; without one its answer is neither told again nor kept."""

    def __init__(self, settings: AnswerCacheSettings, now: Callable[[], float] | None = None) -> None:
        self._settings = settings
        self._now = now or asyncio.get_running_loop().time
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the one not asked for longest comes first
        self._size = 0

    def key_of(self, request: StreamRequest, family: str, principal: str, authorization: str) -> bytes | None:
        """Equal for requests that the engine would be asked in the same words for the same caller.

        `authorization` is what goes on to the engine where that, not Penstock, asks for keys: a key that the engine
        has not seen gets nothing that it has not said to it.
        """
        if not self._may_have_one(request):
            return None
        whose = "" if self._settings.across_callers else principal
        asked = repr((whose, authorization, request.model, family)).encode(errors="surrogateescape")
        return blake2b(asked + b"\n" + request.engine_body, digest_size=32).digest()

    def find(self, key: bytes) -> KeptAnswer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._now() >= entry.until:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def keep(self, key: bytes, answer: KeptAnswer) -> None:
        if key in self._entries:
            self._drop(key)
        self._entries[key] = _Entry(answer, self._now() + self._settings.seconds)
        self._size += answer.size
        while len(self._entries) > self._settings.answers or self._size > self._settings.bytes:
            self._drop(next(iter(self._entries)))

    def _may_have_one(self, request: StreamRequest) -> bool:
        """A call of a tool is an act, and a stream that is continued has no beginning of its own: neither is kept."""
        wanted = self._settings.requests
        if wanted == "none" or request.cache is False or request.tools or request.continues is not None:
            return False
        return request.cache is True or (wanted == "deterministic" and request.temperature == 0)

    def _drop(self, key: bytes) -> None:
        self._size -= self._entries.pop(key).answer.size
