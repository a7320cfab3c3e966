"""`penstock demo`: one look at everything, in a terminal."""

import re

import pytest

from penstock.shell.replay import serving as serving_engine
from support.commands import penstock
from support.http_client import calling
from support.upstreams import answering, engine_app, replay

_COLOURS = re.compile(r"\x1b\[\d+m")


async def test_the_demo_shows_every_part_and_what_to_try_next() -> None:
    outcome = await penstock("demo")
    assert (outcome.status, outcome.errors) == (0, "")
    shown = _COLOURS.sub("", outcome.output)
    for part in (
        "an embedded engine that replays vllm",
        "reasoning  ",
        "answer     ",
        "👩‍👩‍👧",
        "你好，世界",
        'tool call  get_weather {"city": "Paris", "unit": "celsius"}',
        'ready      get_weather(city="Paris", unit="celsius")',
        "finish     tool_calls",
        "usage      ",
        " reasoning, ",
        "end        completed",
        "Next: penstock serve --upstream",
        "curl -N localhost:8080/v1/streams",
    ):
        assert part in shown
    assert shown.index("reasoning  ") < shown.index("answer     ") < shown.index("tool call  ") < shown.index("usage")


async def test_the_demo_runs_against_another_engine() -> None:
    async with serving_engine(replay()) as url, calling(url) as direct:
        assert (await direct.get("/v1/models")).json["data"]
        outcome = await penstock("demo", "--upstream", url)
    assert (outcome.status, outcome.errors) == (0, "")
    assert "in front of vLLM, model tiny" in _COLOURS.sub("", outcome.output)
    assert "end        completed" in _COLOURS.sub("", outcome.output)


async def test_a_demo_without_an_engine_exits_with_1_and_the_reason() -> None:
    outcome = await penstock("demo", "--upstream", "http://127.0.0.1:9")
    assert outcome.status == 1
    assert "engine_unreachable" in outcome.output
    assert "Traceback" not in outcome.errors


@pytest.mark.parametrize("status", [400, 503])
async def test_a_demo_that_fails_exits_with_1_and_the_reason(status: int) -> None:
    app, _ = engine_app(answering(b'{"error": {"message": "Not today.", "code": 400}}', status))
    async with serving_engine(app) as url:
        outcome = await penstock("demo", "--upstream", url)
    assert outcome.status == 1
    assert "Not today." in outcome.output
    assert "Traceback" not in outcome.errors
