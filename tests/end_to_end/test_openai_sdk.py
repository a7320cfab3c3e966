"""The official OpenAI SDK sees no difference between Penstock and vLLM itself."""

from typing import Any

import pytest
from openai import APIError, BadRequestError, NotFoundError

from support import openai_client as sdk
from support.http_client import Caller
from support.openai_client import Flavour, Json
from support.record import CLOCK, JSON_PLACE, LONG, PARIS, THINKING, THINKING_TOOL, TOKYO, WEATHER
from support.scripts import Script

pytestmark = pytest.mark.engine


@pytest.fixture
def plugin() -> str:
    """vLLM's own chunks: its `system_fingerprint` is not among what the plugin tells."""
    return "off"


HELLO = "Hello! 👩‍👩‍👧 你好 How can I help?"
_FUNCTION: Any = WEATHER["function"]
STRICT_WEATHER: Json = {"type": "function", "function": {**_FUNCTION, "strict": True}}
TWO_CALLS = f"<think>\n\n</think>\n\n{PARIS}\n{TOKYO}"
PLACE: Any = JSON_PLACE["response_format"]
NO_THINKING: Json = {"chat_template_kwargs": {"enable_thinking": False}}
USAGE: Json = {"stream_options": {"include_usage": True}}
RUNNING_USAGE: Json = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


class Case:
    """What the model says and what the client asks for; `extra` are fields of vLLM, sent by `extra_body`."""

    def __init__(self, *said: str, model: str = "tiny", extra: Json | None = None, **fields: Any) -> None:
        self.said = said
        self.model = model
        self.extra = extra or {}
        self.fields = fields

    def request(self, script: Script) -> Json:
        scripted = script(*self.said, **self.fields)
        extra_body = {"vllm_xargs": scripted.pop("vllm_xargs"), **self.extra}
        messages = [{"role": "user", "content": "hi"}]
        base = {"model": self.model, "messages": messages, "max_tokens": 512, "temperature": 0}
        return {**base, **scripted, "extra_body": extra_body}


CHOICES_WITH_TOOLS = Case(THINKING, f"<think>\nHm.\n</think>\n\n{PARIS}", model="tiny-parsed", tools=[WEATHER])
TOOL_CUT = Case(TWO_CALLS, model="tiny-parsed", tools=[WEATHER], max_tokens=18)

CASES = {
    "plain": Case(HELLO),
    "thinking": Case(THINKING, model="tiny-parsed"),
    "never thinks": Case(HELLO, model="tiny-parsed", extra=NO_THINKING),
    "choices": Case(HELLO, "Another answer.", n=2),
    "choices, parsed": CHOICES_WITH_TOOLS,
    "tool": Case(THINKING_TOOL, model="tiny-parsed", tools=[WEATHER]),
    "two tools": Case(TWO_CALLS, model="tiny-parsed", tools=[WEATHER, CLOCK]),
    "tool required": Case(f"<think>\n\n</think>{PARIS}", model="tiny-parsed", tools=[WEATHER], tool_choice="required"),
    "tool named": Case(
        f"<think>\n\n</think>{PARIS}",
        model="tiny-parsed",
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    ),
    "logprobs": Case("Hi 👧!", logprobs=True, top_logprobs=2),
    "logprobs, parsed": Case(THINKING, model="tiny-parsed", logprobs=True, top_logprobs=2),
    "stop": Case("One two three END four", stop=["three END"]),
    "stop, shown": Case("One two three END four", stop=["three END"], extra={"include_stop_str_in_output": True}),
    "max tokens": Case(HELLO, max_tokens=4),
    "structured": Case('{"city": "Paris"}', response_format=PLACE, extra=NO_THINKING),
    "token ids": Case(HELLO, extra={"return_token_ids": True}),
    "special tokens": Case(HELLO, extra={"skip_special_tokens": False, "min_tokens": 2}),
    "penalties": Case(HELLO, extra={"top_k": 5, "repetition_penalty": 1.1}, seed=7, user="somebody"),
}

STREAMED = {
    **CASES,
    "usage": Case(THINKING, model="tiny-parsed", **USAGE),
    "usage of choices": Case(HELLO, "Another answer.", **USAGE),
    "usage of tools": Case(THINKING_TOOL, model="tiny-parsed", tools=[WEATHER], **USAGE),
    "running usage": Case(HELLO, **RUNNING_USAGE),
    "tool cut": TOOL_CUT,
    "merged": Case(HELLO, extra={"stream_interval": 4}),
}


@pytest.fixture(autouse=True)
async def _cached_prompt(direct: Caller) -> None:
    """vLLM 0.32 on a CPU dies of a seeded request whose prompt it computes in parts, as it would two long ones."""
    await direct.chat(tools=[WEATHER], tool_choice="none", max_tokens=1)


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize("name", CASES)
async def test_a_whole_answer_is_equal(
    penstock: Caller, direct: Caller, script: Script, name: str, flavour: Flavour
) -> None:
    request = CASES[name].request(script)
    expected = await sdk.complete(direct.url, flavour, request)
    assert expected["choices"][0]["finish_reason"]
    assert await sdk.complete(penstock.url, flavour, request) == expected


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize("name", STREAMED)
async def test_a_stream_adds_up_to_the_same(
    penstock: Caller, direct: Caller, script: Script, name: str, flavour: Flavour
) -> None:
    request = STREAMED[name].request(script)
    expected = await sdk.stream(direct.url, flavour, request)
    assert expected["choices"][0]["finish_reason"]
    assert ("usage" in expected) == ("stream_options" in request)
    assert await sdk.stream(penstock.url, flavour, request) == expected


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize(
    "case",
    [
        Case(HELLO, **USAGE),
        Case(THINKING_TOOL, model="tiny-parsed", tools=[STRICT_WEATHER]),
        Case(HELLO, "Another answer."),
        Case("Hi 👧!", logprobs=True, top_logprobs=2),
    ],
    ids=["plain", "tool", "choices", "logprobs"],
)
async def test_the_sdks_own_accumulation_is_equal(
    penstock: Caller, direct: Caller, script: Script, case: Case, flavour: Flavour
) -> None:
    request = case.request(script)
    expected = await sdk.final_completion(direct.url, flavour, request)
    assert await sdk.final_completion(penstock.url, flavour, request) == expected


REFUSED: dict[str, tuple[type[APIError], Json]] = {
    "unknown model": (NotFoundError, {"model": "gpt-none"}),
    "bad temperature": (BadRequestError, {"temperature": -1}),
    "prompt too long": (BadRequestError, {"messages": [{"role": "user", "content": LONG}]}),
    "no messages": (BadRequestError, {"messages": []}),
    "message that is none": (BadRequestError, {"messages": ["hi"]}),
    "greedy choices": (BadRequestError, {"n": 2}),
    "no tool parser": (BadRequestError, {"tools": [WEATHER]}),
}


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", REFUSED)
async def test_a_refusal_is_equal(
    penstock: Caller, direct: Caller, script: Script, name: str, streams: bool, flavour: Flavour
) -> None:
    kind, fields = REFUSED[name]
    ask = sdk.stream if streams else sdk.complete
    request = Case(HELLO).request(script) | fields
    expected = await sdk.failure(ask, direct.url, flavour, request)
    assert expected.kind is kind
    assert await sdk.failure(ask, penstock.url, flavour, request) == expected


BROKEN_GRAMMAR = Case(HELLO, extra={"structured_outputs": {"grammar": "root ::= ("}})
BAD_SCRIPT = Case(HELLO, extra={"vllm_xargs": {"script": "nonsense"}})


@pytest.mark.parametrize("case", [BROKEN_GRAMMAR, BAD_SCRIPT], ids=["broken grammar", "bad extra"])
async def test_what_the_engine_notices_late_is_refused_alike(
    penstock: Caller, direct: Caller, script: Script, case: Case
) -> None:
    request = case.request(script)
    expected = await sdk.failure(sdk.complete, direct.url, "async", request)
    assert expected.kind is BadRequestError
    assert await sdk.failure(sdk.complete, penstock.url, "async", request) == expected


@pytest.mark.parametrize("case", [BROKEN_GRAMMAR, BAD_SCRIPT], ids=["broken grammar", "bad extra"])
async def test_an_error_before_the_first_token_gets_its_status_in_a_stream_too(
    penstock: Caller, direct: Caller, script: Script, case: Case
) -> None:
    """vLLM sends its head before it knows; Penstock waits for its first word."""
    request = case.request(script)
    engine_says = await sdk.failure(sdk.stream, direct.url, "async", request)
    penstock_says = await sdk.failure(sdk.stream, penstock.url, "async", request)
    assert (engine_says.kind, engine_says.status) == (APIError, None)
    assert (penstock_says.kind, penstock_says.status) == (BadRequestError, 400)
    assert penstock_says.body == engine_says.body


async def test_an_error_in_the_middle_of_a_stream_fails_alike(penstock: Caller, direct: Caller, script: Script) -> None:
    case = Case('{"city": "Paris" nonsense', response_format=PLACE, extra=NO_THINKING)
    request = case.request(script)
    expected = await sdk.failure(sdk.stream, direct.url, "async", request)
    assert (expected.kind, expected.body["code"]) == (APIError, 500)
    assert await sdk.failure(sdk.stream, penstock.url, "async", request) == expected


async def test_a_call_that_was_cut_is_left_out_of_the_whole_answer(
    penstock: Caller, direct: Caller, script: Script
) -> None:
    """The one difference: of a cut call vLLM makes a call in a stream, but text, markup and all, in a whole answer."""
    request = TOOL_CUT.request(script)
    [engine_says] = (await sdk.complete(direct.url, "async", request))["choices"]
    [penstock_says] = (await sdk.complete(penstock.url, "async", request))["choices"]
    [streamed] = (await sdk.stream(penstock.url, "async", request))["choices"]
    assert "<tool_call>" in engine_says["message"]["content"]
    assert not {"tool_calls", "content"} & penstock_says["message"].keys(), "a whole answer has whole calls only"
    assert streamed["delta"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert penstock_says["finish_reason"] == engine_says["finish_reason"] == "length"


async def test_the_list_of_models_is_the_engines(penstock: Caller, direct: Caller) -> None:
    engine_says, penstock_says = (await direct.get("/v1/models")).json, (await penstock.get("/v1/models")).json
    assert [card["id"] for card in penstock_says["data"]] == ["tiny", "tiny-parsed"]
    assert sdk.comparable(penstock_says) == sdk.comparable(engine_says)
