"""The connections to classifiers: OpenAI's moderations shape, and a guard model on a vLLM's chat route."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from penstock.core.commands import AskModerator
from penstock.core.events import Opinion
from penstock.core.request import StreamRequest
from penstock.core.signals import VerdictReached
from penstock.core.verdicts import Watch, Watching
from penstock.moderation_settings import ClassifierSettings, ModerationSettings

_MOST_ANSWER_BYTES = 256 * 1024
_MOST_CATEGORY = 64
# What a guard model may call a category: not a sentence, in which it could repeat what it judged.
_CODES = re.compile(
    r"[A-Za-z]{0,3}[0-9]{1,3}(?:, ?[A-Za-z]{0,3}[0-9]{1,3}){0,7}|[A-Za-z]{1,20}(?:[_ /&-]{1,3}[A-Za-z]{1,20}){0,3}"
)


class Moderator:
    """All classifiers. A question never raises: what fails is an opinion of its own."""

    def __init__(self, settings: ModerationSettings, session: aiohttp.ClientSession) -> None:
        self._classifiers = settings.classifiers
        self._session = session
        # A question that waits for its turn spends its own time, so that a slow classifier cannot pile questions up.
        self._turns = [asyncio.Semaphore(one.concurrency) for one in settings.classifiers]
        self.watching = _watching(settings)

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: ModerationSettings) -> AsyncIterator["Moderator"]:
        """While the block runs classifiers can be asked. Connects only then."""
        most = sum(one.concurrency for one in settings.classifiers) or 1
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=most)) as session:
            yield cls(settings, session)

    async def ask(self, question: AskModerator, watch: int, request: StreamRequest) -> VerdictReached:
        """What one classifier thinks of one window, within its `timeout_ms`."""
        one = self._classifiers[watch]
        opinion: Opinion
        try:
            async with asyncio.timeout(one.timeout_ms / 1000), self._turns[watch]:
                opinion, category = await self._judge(one, question.text, request.last_user_text)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, IndexError):
            opinion, category = "failed", ""
        now = asyncio.get_running_loop().time()
        return VerdictReached(question.number, watch, opinion, category[:_MOST_CATEGORY], now)

    async def _judge(self, one: ClassifierSettings, text: str, prompt: str) -> tuple[Opinion, str]:
        headers = {"Content-Type": "application/json"}
        if one.api_key is not None:
            headers["Authorization"] = f"Bearer {one.api_key.get_secret_value()}"
        body = _openai_body(one, text) if one.shape == "openai" else _guard_body(one, text, prompt)
        posting = self._session.post(one.url, data=orjson.dumps(body), headers=headers, allow_redirects=False)
        async with posting as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            told = orjson.loads(await _read(answer.content))
        return _openai_verdict(told) if one.shape == "openai" else _guard_verdict(told)


async def _read(content: aiohttp.StreamReader) -> bytes:
    data = b""
    async for piece in content.iter_any():
        data += piece
        if len(data) > _MOST_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {_MOST_ANSWER_BYTES} bytes is no verdict")
    return data


def _watching(settings: ModerationSettings) -> Watching | None:
    if not settings.classifiers:
        return None
    window = settings.window
    watches = tuple(
        Watch(one.label, one.mode == "gate", one.on_failure == "open", frozenset(one.channels))
        for one in settings.classifiers
    )
    return Watching(watches, window.chars, window.overlap_chars, window.ms / 1000, window.gate_chars)


def _openai_body(one: ClassifierSettings, text: str) -> dict[str, Any]:
    return {"input": text, **({"model": one.model} if one.model else {})}


def _openai_verdict(told: Any) -> tuple[Opinion, str]:
    """`{"results": [{"flagged": true, "categories": {"violence": true}}]}`; the first category that is true is told."""
    [result, *_] = told["results"]
    if result["flagged"] is False:
        return "pass", ""
    if result["flagged"] is not True:
        raise ValueError("flagged is neither true nor false")
    categories = result.get("categories")
    named = [name for name, is_so in categories.items() if is_so is True] if isinstance(categories, dict) else []
    return "violation", str(named[0]) if named else "flagged"


def _guard_body(one: ClassifierSettings, text: str, prompt: str) -> dict[str, Any]:
    """The exchange as Llama Guard and its kin judge it: what the user asked, what the assistant said."""
    messages = [{"role": "user", "content": prompt or "(not told)"}, {"role": "assistant", "content": text}]
    return {"model": one.model, "messages": messages, "max_tokens": 20, "temperature": 0}


def _guard_verdict(told: Any) -> tuple[Opinion, str]:
    """`safe`, or `unsafe` and a line of category codes; anything else is no verdict."""
    lines = told["choices"][0]["message"]["content"].strip().split("\n")
    match lines[0].strip().lower():
        case "safe":
            return "pass", ""
        case "unsafe":
            named = lines[1].strip() if len(lines) > 1 else ""
            return "violation", named if _CODES.fullmatch(named) else "unsafe"
    raise ValueError("the guard said neither safe nor unsafe")
