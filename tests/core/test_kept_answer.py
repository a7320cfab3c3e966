"""What is kept of an engine's answer: told again, it is the same answer, and only a whole one is kept at all."""

import json
from typing import Any

import pytest

from penstock.core.commands import Ending, KeepAnswer
from penstock.core.events import EngineDone, EngineOpened, EngineUsage, Event, Text
from penstock.core.kept_answer import KeptAnswer
from penstock.core.signals import (
    AnswerTold,
    Cancelled,
    ClientBacklog,
    EngineAnswered,
    EngineChosen,
    EngineClosed,
    EngineSpoke,
)
from support import chunks
from support.chunks import DONE, answer_of, content, final_usage, finish, role, whole
from support.golden import read_recordings
from support.moderating import policy
from support.playbook import STARTED, Json, Outcome, Step, ask, play

PLENTY = 1 << 20
REDACTS = {"id": "secret", "literal": "secret", "category": "internal"}
HALTS = {**REDACTS, "action": "halt"}
FREE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
# Recordings whose answer is whole and calls no tool, with what their client asked.
WHOLE = {
    name: recording
    for name, recording in read_recordings().items()
    if recording.status == 200
    and recording.is_event_stream
    and not recording.request.get("tools")
    and not name.startswith("error-")
}


def keeping(body: Json | None, steps: list[Step], most: int = PLENTY, **setting: Any) -> KeptAnswer | None:
    outcome = play(body, steps, keep_bytes=most, **setting)
    return next((command.answer for command in outcome.commands if isinstance(command, KeepAnswer)), None)


def told_again(answer: KeptAnswer, body: Json | None = None, **setting: Any) -> Outcome:
    """As the shell tells it, but all at once."""
    begin: list[Event] = [EngineOpened("chatcmpl-again", answer.model, 1, None, answer.state)]
    if setting.get("dialect") == "chat_whole":
        assert answer.whole is not None
        begin = [EngineOpened("chatcmpl-again", answer.model, 1, {**json.loads(answer.whole), "usage": FREE})]
    events = [*begin, EngineUsage(FREE, final=True), *answer.again(), EngineDone()]
    pieces: list[Step] = [AnswerTold([event], STARTED) for event in events]
    return play(body, [EngineChosen("answers/cache", None, STARTED), *pieces], **setting)


@pytest.mark.parametrize("name", WHOLE)
def test_told_again_it_is_the_same_answer_at_no_cost(name: str) -> None:
    recording = WHOLE[name]
    body = {**recording.request, **({"penstock": {"family": "deepseek-r1"}} if "opened" in name else {})}
    said: list[Step] = [EngineSpoke(chunk.data, STARTED) for chunk in recording.chunks]
    first = play(body, said, keep_bytes=PLENTY)
    if first.one("stream.end")["status"] != "completed":
        assert first.count(KeepAnswer) == 0
        return
    answer = first.only(KeepAnswer).answer
    for _ in range(2):
        again = told_again(answer, body)
        assert again.contents() == first.contents()
        assert again.finishes() == first.finishes()
        assert _logprobs(again) == _logprobs(first)
        usage = again.record.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.delivered_tokens) == (0, 0, 0)
        assert not usage.estimated
        assert usage.sizes == first.record.usage.sizes


def _logprobs(outcome: Outcome) -> list[Any]:
    told = (event.get("logprobs") for event in outcome.all_of("delta.text") + outcome.all_of("finish"))
    return [entry for entries in told for entry in entries or ()]


def test_there_are_recordings_of_every_kind() -> None:
    assert len(WHOLE) > 15
    assert {"choices", "logprobs", "thinking", "thinking-parsed", "plain"} <= WHOLE.keys()


def test_an_unstreamed_answer_is_told_again_too() -> None:
    body = whole({"content": "Hello", "reasoning": "Hm"})
    answer = keeping(None, [EngineAnswered(body, STARTED)], dialect="chat_whole")
    assert answer is not None
    for _ in range(2):
        message = told_again(answer, dialect="chat_whole").body["choices"][0]["message"]
        assert (message["content"], message["reasoning"]) == ("Hello", "Hm")


def test_what_is_kept_is_what_the_engine_said_before_moderation() -> None:
    redacts = policy(REDACTS)
    answer = keeping(None, list(answer_of(["a ", "secret", " b"])), policy=redacts)
    assert answer is not None
    assert told_again(answer).blocks() == ["text: a secret b"]
    assert "secret" not in told_again(answer, policy=redacts).blocks()[0]
    halted = told_again(answer, policy=policy(HALTS))
    assert halted.record.ending is Ending.HALTED


def test_the_bounds_are_held_before_the_end() -> None:
    words = [f"{'w' * 100} " for _ in range(50)]
    answer = keeping(None, list(answer_of(words)))
    assert answer is not None
    assert sum(isinstance(event, Text) for event in answer.events) == 1, "texts are put together"
    assert 5050 < answer.size < 6050
    assert keeping(None, list(answer_of(words)), answer.size) is not None
    assert keeping(None, list(answer_of(words)), answer.size - 1) is None


@pytest.mark.parametrize(
    ("why", "steps", "setting"),
    [
        ("cut by max_tokens", answer_of(["a"], "length"), {}),
        ("the engine failed", [role(), content("a"), chunks.error()], {}),
        ("it broke off", [role(), content("a"), EngineClosed(None, STARTED)], {}),
        ("no end mark", [role(), content("a"), finish(), EngineClosed(None, STARTED)], {}),
        ("cancelled", [role(), content("a"), Cancelled(STARTED)], {}),
        ("halted", answer_of(["the secret"]), {"policy": policy(HALTS)}),
        ("our own stop string", [role(), content("a.b"), content("c")], {"body": {"penstock": {"stop": ["."]}}}),
        ("a call", [role(), chunks.tool(call_id="c", name="f", arguments="{}"), finish("tool_calls"), DONE], {}),
        ("not asked to", answer_of(["a"]), {"most": 0}),
    ],
)
def test_nothing_else_is_kept(why: str, steps: list[Step], setting: Json) -> None:
    body = ask(**setting.pop("body", {}))
    assert keeping(body, list(steps), **setting) is None, why


def test_an_engine_that_failed_before_another_answered_is_no_part_of_it() -> None:
    steps: list[Step] = [role(), EngineChosen("other", None, STARTED), *answer_of(["Hi"])]
    answer = keeping(None, steps)
    assert answer is not None
    assert told_again(answer).blocks() == ["text: Hi"]


def test_a_whole_answer_that_our_stop_string_cut_is_kept_whole() -> None:
    said = b"".join([role(), content("a.b"), finish(), final_usage(3), DONE])
    answer = keeping(ask(penstock={"stop": ["."]}), [said])
    assert answer is not None
    assert told_again(answer).blocks() == ["text: a.b"]
    assert told_again(answer, ask(penstock={"stop": ["."]})).blocks() == ["text: a"]


@pytest.mark.parametrize("unsent", [0, 1 << 22], ids=["a quick client", "one that lags"])
def test_what_a_client_that_lags_makes_of_an_answer_is_not_what_is_kept(unsent: int) -> None:
    """Its deltas are merged, with their logprobs; neither the first telling nor a later one changes what is kept."""
    logprobs = [{"content": [{"token": letter, "logprob": -0.5, "top_logprobs": []}]} for letter in "abc"]
    pieces = [content(letter, logprobs=one) for letter, one in zip("abc", logprobs, strict=True)]
    lags, reads = ClientBacklog(unsent, STARTED), ClientBacklog(0, STARTED)
    body = ask(logprobs=True)
    kept = keeping(body, [role(), pieces[0], lags, *pieces[1:], reads, finish(), DONE])
    assert kept is not None
    for _ in range(2):
        events: list[Event] = [EngineOpened("chatcmpl-again", kept.model, 1, None, None), *kept.again(), EngineDone()]
        told: list[Step] = [AnswerTold([event], STARTED) for event in events]
        play(body, [EngineChosen("cache", None, STARTED), *told[:3], lags, *told[3:-1], reads, told[-1]])
    texts = [event for event in kept.events if isinstance(event, Text)]
    merged = [(text.text, [one["token"] for one in text.logprobs or []]) for text in texts]
    assert merged == [("a", ["a"]), ("b", ["b"]), ("c", ["c"])]
