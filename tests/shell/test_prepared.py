"""Answers that no engine is asked for: the same events, at the pace of the settings."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.settings import SettingsError, load_settings
from support import chunks
from support.http_client import FOLDED, NDJSON, SSE, Caller, Json, calling, chat
from support.sidecar import sidecar
from support.upstreams import Seen, engine_app, in_front_of, saying

pytestmark = pytest.mark.usefixtures("no_blocking_calls")

HOURS = {
    "id": "hours",
    "question": r"when .*open\W*",
    "text": "We are open from nine to five.",
    "words_per_second": 1000,
}
NAMED = {
    "id": "named",
    "question": r"i am (?P<name>\w+)\W*",
    "text": "Hello $name, this is $model; $other.",
    "models": ["ti*"],
}


@asynccontextmanager
async def stage(*answers: Json, **flags: Any) -> AsyncIterator[tuple[Caller, Seen]]:
    app, seen = engine_app(saying(*chunks.answer_of(["From the engine."])))
    async with in_front_of(app, answers=list(answers or (HOURS, NAMED)), **flags) as setup:
        yield setup.caller, seen


def asking(text: Any) -> list[Json]:
    return [{"role": "system", "content": "You are a shop."}, {"role": "user", "content": text}]


@pytest.mark.parametrize("accept", [SSE, NDJSON])
async def test_a_known_question_is_answered_without_an_engine(accept: str) -> None:
    async with stage() as (caller, seen):
        answer = await caller.stream(accept, messages=asking("When are you OPEN?"))
        assert answer.text() == HOURS["text"]
        assert answer.one("stream.start")["upstream"] == "answers/hours"
        assert answer.end["status"] == "completed"
        assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (0, 0)
        assert seen.requests == 0


async def test_the_other_forms_tell_the_same() -> None:
    async with stage() as (caller, seen):
        folded = await caller.stream(FOLDED, messages=asking("when open"))
        assert folded.json["choices"][0]["text"] == HOURS["text"]
        whole = await caller.chat(messages=asking("when open"))
        assert whole.json["choices"][0]["message"]["content"] == HOURS["text"]
        assert whole.json["choices"][0]["finish_reason"] == "stop"
        streamed = await caller.chat(messages=asking("when open"), stream=True)
        assert (
            "".join(c["choices"][0]["delta"].get("content", "") for c in streamed.chunks if c["choices"])
            == HOURS["text"]
        )
        assert seen.requests == 0


async def test_words_of_the_question_and_the_model_are_filled_in() -> None:
    async with stage() as (caller, _):
        answer = await caller.stream(messages=asking([{"type": "text", "text": "I am Ada."}]))
        assert answer.text() == "Hello Ada, this is tiny; $other."


async def test_it_is_an_answer_also_of_a_model_that_would_think_first() -> None:
    async with stage({**HOURS, "models": ["*"]}) as (caller, _):
        answer = await caller.stream(messages=asking("when open"), penstock={"family": "deepseek-r1"})
        assert (answer.text(), answer.reasoning()) == (HOURS["text"], "")


async def test_one_that_is_cancelled_has_an_exact_bill_of_nothing() -> None:
    async with stage({**HOURS, "words_per_second": 2}) as (caller, _):
        async with caller.opened("/v1/streams", chat(messages=asking("when open")), {"Accept": NDJSON}) as response:
            await response.content.readuntil(b"delta.text")
            await caller.delete(response.headers["X-Stream-Id"])
            last = (await response.content.read()).splitlines()[-2]
        assert b'"completion_tokens":0' in last
        assert b'"estimated":false' in last


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": asking("Where are you?")},
        {"messages": asking("please tell me: when are you open?")},
        {"messages": [*asking("when open"), {"role": "assistant", "content": "At"}]},
        {"messages": asking("when " + "x" * 5000 + " open")},
        {"messages": asking(None)},
        {"messages": []},
        {"messages": asking("i am Ada"), "model": "large"},
        {"messages": asking("when open"), "n": 2},
    ],
)
async def test_everything_else_is_for_the_engine(request_: Json) -> None:
    async with stage() as (caller, seen):
        await caller.stream(**request_)
        assert seen.requests == 1


async def test_it_is_told_at_its_pace() -> None:
    clock = asyncio.get_running_loop()
    async with stage({**HOURS, "words_per_second": 20}) as (caller, _):
        began = clock.time()
        answer = await caller.stream(messages=asking("when open"))
        # A role, seven words, an end: eight pauses and a half of 50 ms.
        assert 0.3 < clock.time() - began < 2
        assert len(answer.of("delta.text")) >= 7


async def test_it_needs_no_engine_at_all() -> None:
    async with sidecar("http://127.0.0.1:9", answers=[HOURS]) as running, calling(running.url) as caller:
        assert (await caller.stream(messages=asking("when open"))).text() == HOURS["text"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"question": "("}, r"is no regular expression"),
        ({"id": "a b"}, r"answers\.0\.id: 'a b'"),
        ({"text": ""}, r"answers\.0\.text"),
        ({"words_per_second": 0}, r"answers\.0\.words_per_second: 0 .* how fast it is told"),
    ],
)
def test_a_wrong_answer(change: Json, sentence: str) -> None:
    flags = {"upstreams": [{"url": "http://vllm"}], "answers": [{**HOURS, **change}]}
    with pytest.raises(SettingsError, match=sentence):
        load_settings(environment={}, flags=flags)
