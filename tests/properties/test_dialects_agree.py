"""Whatever dialect a client asked for, it gets the same answer: the same texts, calls, reasons and count."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.commands import Respond
from penstock.core.signals import EngineAnswered, EngineClosed
from support import chunks
from support.playbook import STARTED, Json, Outcome, Step, ask, play
from support.strategies import families, garbage, model_texts, policies, streams, thorough

REQUEST = ask(n=2, tools=["f", "g"], stream_options={"include_usage": True})
Answer = dict[int, dict[str, Any]]


def of_the_log(outcome: Outcome) -> Answer:
    """What each choice of a native log says, as an OpenAI client would see it."""
    answer: Answer = {}
    for event in outcome.events:
        choice = answer.setdefault(event.get("choice", 0), _empty())
        match event["type"]:
            case "delta.text":
                choice["refusal" if event.get("refusal") else "content"] += event["text"]
            case "delta.reasoning":
                choice["reasoning"] += event["text"]
            case "tool_call.start":
                choice["calls"][event["index"]] = [event["call_id"], event["name"], ""]
            case "tool_call.arguments_chunk":
                place = next(call for call in choice["calls"].values() if call[0] == event["call_id"])
                place[2] += event["text"]
            case "finish":
                choice["reason"] = _plain(event["raw_reason"])
    return answer


def of_the_chunks(said: list[Any]) -> Answer:
    """What each choice of `chat.completion.chunk`s adds up to."""
    answer: Answer = {}
    for chunk in said:
        for spoken in chunk["choices"]:
            choice, delta = answer.setdefault(spoken["index"], _empty()), spoken["delta"]
            for name in ("content", "reasoning", "refusal"):
                choice[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                place = choice["calls"].setdefault(call["index"], ["", "", ""])
                function = call["function"]
                for number, piece in enumerate((call.get("id"), function.get("name"), function.get("arguments"))):
                    place[number] += piece or ""
            choice["reason"] = _plain(spoken["finish_reason"]) or choice["reason"]
    return answer


def _plain(reason: str | None) -> str | None:
    """The dialect says `tool_calls` where calls were found in the text: told by the calls, not compared here."""
    return "stop" if reason == "tool_calls" else reason


def _empty() -> dict[str, Any]:
    return {"content": "", "reasoning": "", "refusal": "", "calls": {}, "reason": None}


@thorough(700)
@given(st.data(), streams(), st.lists(garbage, max_size=1), families, policies)
def test_a_stream(data: st.DataObject, frames: list[bytes], bad: list[bytes], family: str, policy: Any) -> None:
    for frame in bad:
        frames.insert(data.draw(st.integers(0, len(frames))), frame)
    steps: list[Step] = [*frames, EngineClosed(None, STARTED)]
    native = play(REQUEST, steps, family=family, reasoning=policy)
    chat = play(REQUEST, steps, family=family, reasoning=policy, dialect="chat")
    assert chat.record.ending == native.record.ending
    assert chat.record.usage == native.record.usage
    assert chat.count(Respond) == native.count(Respond)
    if chat.count(Respond):
        return
    *said, end = chat.chat_chunks()
    assert end == "[DONE]"
    failures = [chunk for chunk in said if "error" in chunk]
    assert len(failures) == len(native.all_of("error"))
    told = of_the_chunks([chunk for chunk in said if "error" not in chunk])
    expected = of_the_log(native)
    if failures:
        _forget_reasons(told, expected)
    assert {n: choice for n, choice in told.items() if choice != _empty()} == {
        n: choice for n, choice in expected.items() if choice != _empty()
    }


def _forget_reasons(*answers: Answer) -> None:
    """A stream that failed tells an OpenAI client no reason for what the failure cut."""
    for answer in answers:
        for choice in answer.values():
            choice["reason"] = None


@thorough(500)
@given(streams(), families, policies)
def test_the_folded_answer_is_the_log_added_up(frames: list[bytes], family: str, policy: Any) -> None:
    native = play(REQUEST, frames, family=family, reasoning=policy)
    folded = play(REQUEST, frames, family=family, reasoning=policy, dialect="folded")
    assert folded.record.usage == native.record.usage
    if native.count(Respond):
        assert folded.body == native.body
        return
    end = native.one("stream.end")
    assert folded.body["status"] == end["status"]
    assert folded.body["last_seq"] == end["seq"]
    assert _blocks(folded.body) == native.contents()


def _blocks(body: Json) -> list[tuple[int, int, str, str]]:
    return [
        (choice["choice"], block["block"], block["type"], _told(block))
        for choice in body["choices"]
        for block in sorted(choice["blocks"], key=lambda block: int(block["block"]))
    ]


def _told(block: Json) -> str:
    return f"{block['name']}({block['arguments_text']})" if block["type"] == "tool_call" else str(block["text"])


@thorough(500)
@given(model_texts, families, policies, st.sampled_from(["stop", "length"]))
def test_an_answer_that_was_not_streamed_is_the_one_that_was(text: str, family: str, policy: Any, reason: str) -> None:
    request = ask(tools=["f", "g", "get_weather"])
    setting: Json = {"family": family, "reasoning": policy}
    whole = chunks.whole({"content": text}, finish_reason=reason)
    streamed = play(request, chunks.answer_of([text], reason), **setting)
    read_whole = play(request, [EngineAnswered(whole, STARTED)], **setting)
    assert of_the_log(read_whole) == of_the_log(streamed)
    (choice,) = play(request, [EngineAnswered(whole, STARTED)], dialect="chat_whole", **setting).body["choices"]
    told = of_the_log(streamed)[0]
    assert (choice["message"]["content"] or "") == told["content"]
    assert (choice["message"].get("reasoning") or "") == told["reasoning"]
    assert _plain(choice["finish_reason"]) == told["reason"]
    calls = [list(call["function"].values()) for call in choice["message"].get("tool_calls") or ()]
    assert calls == [[name, arguments] for _, name, arguments in told["calls"].values()]
