"""The official OpenAI SDK as a client, and its objects made comparable between two servers.

What two runs of the same request may differ in is masked: ids, the time of creation, and how much of the prompt
came from the engine's cache. A field that is null counts as a field that is left out: vLLM spells nulls out for
fields of its own that Penstock does not send. Streams are compared by what they add up to, since a server may cut
the same text into other pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

Json = dict[str, Any]
Flavour = Literal["sync", "async"]

_RUN_DEPENDENT = ("id", "created", "cached_tokens", "created_cache_tokens")
_KEY = "an-api-key-of-no-meaning"


@dataclass(frozen=True)
class SdkError:
    """What a program that uses the SDK sees of a failure."""

    kind: type[openai.APIError]
    status: int | None
    body: Any


async def complete(url: str, flavour: Flavour, request: Json) -> Json:
    """The `ChatCompletion` of a request that does not stream, comparable."""
    if flavour == "sync":
        return await asyncio.to_thread(_complete, url, request)
    async with _async_client(url) as client:
        answer: Json = comparable(await client.chat.completions.create(**request))
        return answer


async def stream(url: str, flavour: Flavour, request: Json) -> Json:
    """What the chunks of a streamed answer add up to, comparable."""
    if flavour == "sync":
        return await asyncio.to_thread(_stream, url, request)
    async with _async_client(url) as client:
        chunks = await client.chat.completions.create(**request, stream=True)
        return added_up([chunk async for chunk in chunks])


async def final_completion(url: str, flavour: Flavour, request: Json) -> Json:
    """What the SDK's own accumulation, `client.chat.completions.stream`, makes of a streamed answer, comparable."""
    if flavour == "sync":
        return await asyncio.to_thread(_final_completion, url, request)
    async with _async_client(url) as client, client.chat.completions.stream(**request) as events:
        answer: Json = comparable(await events.get_final_completion())
        return answer


async def failure(ask: Callable[[str, Flavour, Json], Any], url: str, flavour: Flavour, request: Json) -> SdkError:
    """The error with which `ask` fails."""
    try:
        answer = await ask(url, flavour, request)
    except openai.APIError as error:
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        return SdkError(type(error), status, error.body)
    raise AssertionError(f"no error, but {answer}")


def comparable(thing: object) -> Any:
    """Plain data without what differs from run to run, and without nulls."""
    if isinstance(thing, BaseModel):
        return comparable(thing.model_dump())
    if isinstance(thing, dict):
        kept = {name: comparable(value) for name, value in thing.items() if name not in _RUN_DEPENDENT}
        return {name: value for name, value in kept.items() if value is not None}
    if isinstance(thing, list):
        return [comparable(item) for item in thing]
    return thing


def added_up(chunks: Iterable[BaseModel]) -> Json:
    """One object of all chunks: texts and lists joined, calls by their index, the last of everything else."""
    total: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        data = comparable(chunk)
        for choice in data.pop("choices"):
            _add(choices.setdefault(choice["index"], {}), choice)
        total |= data
    return {**total, "choices": [choices[index] for index in sorted(choices)]}


def _add(total: Json, piece: Json) -> None:
    for name, value in piece.items():
        if name == "tool_calls":
            calls = total.setdefault(name, {})
            for call in value:
                _add(calls.setdefault(call["index"], {}), call)
        elif isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        elif isinstance(value, list):
            total[name] = total.get(name, []) + value
        elif name in ("content", "reasoning", "refusal", "arguments"):
            total[name] = total.get(name, "") + value
        else:
            total[name] = value


def _complete(url: str, request: Json) -> Json:
    with _sync_client(url) as client:
        answer: Json = comparable(client.chat.completions.create(**request))
        return answer


def _stream(url: str, request: Json) -> Json:
    with _sync_client(url) as client:
        return added_up(client.chat.completions.create(**request, stream=True))


def _final_completion(url: str, request: Json) -> Json:
    with _sync_client(url) as client, client.chat.completions.stream(**request) as events:
        answer: Json = comparable(events.get_final_completion())
        return answer


@contextmanager
def _sync_client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=_KEY, max_retries=0, timeout=120) as client:
        yield client


@asynccontextmanager
async def _async_client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=_KEY, max_retries=0, timeout=120) as client:
        yield client
