"""`reasoning: separate | hide | inline`, per request and per deployment, whoever told the channels apart."""

from typing import Any

import pytest

from support.engine import Engine
from support.http_client import Answer, Caller, calling
from support.record import THINKING
from support.scripts import Script
from support.sidecar import sidecar

pytestmark = pytest.mark.engine

THOUGHT, ANSWER = "\nThe user says hi.\n", "\n\nHello! How can I help?"
SHOWN: dict[str, tuple[str, str]] = {
    "separate": (THOUGHT, ANSWER),
    "hide": ("", ANSWER),
    "inline": ("", f"<think>{THOUGHT}</think>{ANSWER}"),
}

models = pytest.mark.parametrize("model", ["tiny", "tiny-parsed"])
policies = pytest.mark.parametrize("policy", SHOWN)


def assert_shown(answer: Answer, policy: str) -> None:
    assert (answer.reasoning(), answer.text()) == SHOWN[policy]
    sizes = answer.usage["bytes"]
    assert sizes["hidden"] == (len(THOUGHT) if policy == "hide" else 0)
    assert sizes["added"] == (len("<think></think>") if policy == "inline" else 0)
    assert answer.usage["reasoning_tokens"] > 0


@models
@policies
async def test_a_request_chooses(penstock: Caller, script: Script, model: str, policy: str) -> None:
    assert_shown(await penstock.stream(**script(THINKING, model=model, penstock={"reasoning": policy})), policy)


@models
@policies
async def test_a_deployment_chooses_for_requests_that_do_not(
    engine: Engine, script: Script, model: str, policy: str
) -> None:
    async with sidecar(engine.url, reasoning=policy) as running, calling(running.url) as caller:
        assert_shown(await caller.stream(**script(THINKING, model=model)), policy)
        own_choice = await caller.stream(**script(THINKING, model=model, penstock={"reasoning": "separate"}))
        assert_shown(own_choice, "separate")


@models
@policies
@pytest.mark.parametrize("streams", [False, True])
async def test_openai_clients_see_the_same(
    penstock: Caller, script: Script, model: str, policy: str, streams: bool
) -> None:
    request = script(THINKING, model=model, penstock={"reasoning": policy}, stream=streams)
    answer = await penstock.chat(**request)
    messages = [choice["delta"] for chunk in answer.chunks for choice in chunk["choices"]] or [
        answer.json["choices"][0]["message"]
    ]
    assert (joined(messages, "reasoning"), joined(messages, "content")) == SHOWN[policy]


def joined(messages: list[dict[str, Any]], name: str) -> str:
    return "".join(message.get(name) or "" for message in messages)


async def test_a_family_of_the_settings_reads_its_own_marks(engine: Engine, script: Script) -> None:
    family = {"models": ["tiny"], "reasoning": {"open": "[[", "close": "]]"}}
    async with sidecar(engine.url, families={"double": family}) as running, calling(running.url) as caller:
        answer = await caller.stream(**script("[[Hm.]]Hello!"))
        assert (answer.reasoning(), answer.text()) == ("Hm.", "Hello!")
        other = await caller.stream(**script(THINKING, penstock={"family": "qwen3"}))
        assert (other.reasoning(), other.text()) == (THOUGHT, ANSWER)


async def test_a_template_that_opens_the_reasoning_needs_its_family(penstock: Caller, script: Script) -> None:
    said = script(THINKING.removeprefix("<think>"), chat_template_kwargs={"open_think": True})
    answer = await penstock.stream(**said, penstock={"family": "deepseek-r1"})
    assert (answer.reasoning(), answer.text()) == (THOUGHT, ANSWER)
