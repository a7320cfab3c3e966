"""Which calls may run: by rule, and what clients of each dialect learn of those that may not."""

from typing import Any

import pytest

from penstock.core.commands import Respond
from penstock.core.schemas import Schema
from penstock.core.signals import EngineAnswered
from penstock.core.tool_policy import ToolRule
from support import chunks
from support.playbook import STARTED, Json, Outcome, ask, play

REQUEST = ask(tools=["f", "g", "pay"])
CHAT = ask(tools=["f", "g", "pay"], stream=True, stream_options={"include_usage": True})
NO_PAY = ToolRule("no-money", ("pay*",), allows=False, reason="payments are made by people")


def calls(*pairs: tuple[str, str], reason: str = "tool_calls", size: int = 3) -> list[bytes]:
    said = []
    for index, (name, arguments) in enumerate(pairs):
        said.append(chunks.tool(index, call_id=f"c{index}", name=name, arguments=""))
        said += [
            chunks.tool(index, arguments=arguments[at : at + size], tokens=index * 1000 + at + 1)
            for at in range(0, len(arguments), size)
        ]
    return chunks.answer(*said, reason=reason)


def played(rules: list[ToolRule], *pairs: tuple[str, str], **more: Any) -> Outcome:
    return play(REQUEST, calls(*pairs), tool_rules=rules, **more)


def denials(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [(event["name"], event["rule"], event["reason"]) for event in outcome.all_of("tool_call.denied")]


def ready(outcome: Outcome) -> list[str]:
    return [event["name"] for event in outcome.all_of("tool_call.ready")]


def test_a_denied_call_is_told_at_its_start_and_never_ready() -> None:
    outcome = played([NO_PAY], ("pay", '{"sum": 5}'), ("f", "{}"))
    assert denials(outcome) == [("pay", "no-money", "payments are made by people")]
    assert outcome.types()[2:4] == ["tool_call.start", "tool_call.denied"]
    assert ready(outcome) == ["f"]
    end = outcome.all_of("tool_call.end")[0]
    assert (end["valid"], end["problem"]) == (False, "denied by policy: payments are made by people")


def test_without_a_rule_for_it_a_call_is_allowed() -> None:
    assert ready(played([NO_PAY], ("f", "{}"), ("g", "{}"))) == ["f", "g"]


def test_the_first_rule_that_names_a_tool_decides() -> None:
    rules = [ToolRule("pay-ok", ("pay",)), ToolRule("rest", ("*",), allows=False)]
    outcome = played(rules, ("pay", "{}"), ("f", "{}"))
    assert ready(outcome) == ["pay"]
    assert denials(outcome) == [("f", "rest", "'f' is not allowed here")]


def test_a_number_of_calls_in_one_stream() -> None:
    outcome = played([ToolRule("few", ("*",), most_calls=2)], *[("f", "{}")] * 3)
    assert ready(outcome) == ["f", "f"]
    assert denials(outcome) == [("f", "few", "more than 2 calls in one stream")]


def test_arguments_that_are_too_long_are_denied_as_they_grow() -> None:
    outcome = played([ToolRule("short", ("*",), most_bytes=8)], ("f", '{"a": "' + "é" * 50 + '"}'))
    assert denials(outcome) == [("f", "short", "its arguments are longer than 8 bytes")]
    assert outcome.types().index("tool_call.denied") < outcome.types().index("tool_call.end")
    assert ready(outcome) == []


def test_arguments_that_the_rule_does_not_allow() -> None:
    rule = ToolRule("small", ("pay",), arguments=Schema({"properties": {"sum": {"maximum": 100}}}))
    assert ready(played([rule], ("pay", '{"sum": 100}'))) == ["pay"]
    outcome = played([rule], ("pay", '{"sum": 101}'))
    assert denials(outcome) == [("pay", "small", "its arguments are not allowed: at $.sum: it breaks maximum: 100")]


def test_a_call_in_the_text_that_was_denied_is_no_reason_to_wait_for_it() -> None:
    said = chunks.answer_of(['<tool_call>{"name": "pay", "arguments": {}}</tool_call>'])
    finish = play(REQUEST, said, tool_rules=[NO_PAY]).finishes()[0]
    assert (finish["reason"], finish["raw_reason"]) == ("stop", "stop")


# --- In dialects without a word for it ------------------------------------------------------------


def chat(rules: list[ToolRule], release: str, *pairs: tuple[str, str], **more: Any) -> list[Any]:
    return play(CHAT, calls(*pairs, **more), dialect="chat", tool_rules=rules, release=release).chat_chunks()


def calls_of(said: list[Any]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for chunk in said[:-1]:
        for choice in chunk.get("choices", ()):
            for call in choice["delta"].get("tool_calls", ()):
                place = found.setdefault(call["index"], ["", ""])
                place[0] += call["function"].get("name", "")
                place[1] += call["function"]["arguments"]
    return found


def pieces_of(said: list[Any]) -> int:
    return sum("tool_calls" in choice["delta"] for chunk in said[:-1] for choice in chunk["choices"])


def errors(said: list[Any]) -> list[Json]:
    return [chunk["error"] for chunk in said if isinstance(chunk, dict) and "error" in chunk]


def finishes(said: list[Any]) -> list[str]:
    return [c["finish_reason"] for chunk in said[:-1] for c in chunk.get("choices", ()) if c["finish_reason"]]


@pytest.mark.parametrize("release", ["stream", "ready"])
def test_a_denied_call_is_left_out_and_the_others_are_numbered_anew(release: str) -> None:
    said = chat([NO_PAY], release, ("pay", '{"sum": 5}'), ("f", '{"a": 1}'), ("g", "{}"))
    assert calls_of(said) == {0: ["f", '{"a": 1}'], 1: ["g", "{}"]}
    assert (errors(said), finishes(said)) == ([], ["tool_calls"])


@pytest.mark.parametrize("release", ["stream", "ready"])
def test_where_every_call_was_denied_the_choice_is_an_error(release: str) -> None:
    said = chat([NO_PAY], release, ("pay", "{}"))
    assert (calls_of(said), finishes(said), said[-1]) == ({}, [], "[DONE]")
    [error] = errors(said)
    assert (error["code"], error["type"]) == ("tool_call_denied", "policy_error")


def test_fragments_go_out_as_they_come_or_when_the_call_is_valid() -> None:
    streamed, held = (chat([], release, ("f", '{"abc": 12345}')) for release in ("stream", "ready"))
    assert calls_of(streamed) == calls_of(held) == {0: ["f", '{"abc": 12345}']}
    pieces = [
        sum("tool_calls" in c["delta"] for chunk in said[:-1] for c in chunk["choices"]) for said in (streamed, held)
    ]
    assert pieces == [6, 2]


@pytest.mark.parametrize(("release", "shown"), [("stream", {0: ["f", '{"a": ']}), ("ready", {})])
def test_a_call_that_ends_invalid_ends_the_choice_with_an_error(release: str, shown: Any) -> None:
    said = chat([], release, ("f", '{"a": '))
    assert (calls_of(said), finishes(said), said[-1]) == (shown, [], "[DONE]")
    [error] = errors(said)
    assert (error["code"], error["message"]) == (
        "invalid_tool_call",
        "the model's call of 'f' is not valid: the arguments are not JSON (at character 6)",
    )


@pytest.mark.parametrize("release", ["stream", "ready"])
def test_a_call_that_was_cut_by_length_says_length(release: str) -> None:
    said = chat([], release, ("f", '{"a": '), reason="length")
    assert (errors(said), finishes(said)) == ([], ["length"])


def test_a_call_denied_for_its_arguments_after_its_beginning_was_told_is_an_error() -> None:
    rule = ToolRule("short", ("*",), most_bytes=4)
    [error] = errors(chat([rule], "stream", ("g", "{}"), ("f", '{"a": 12345}')))
    assert error["code"] == "tool_call_denied"
    said = chat([rule], "ready", ("g", "{}"), ("f", '{"a": 12345}'))
    assert (calls_of(said), errors(said), finishes(said)) == ({0: ["g", "{}"]}, [], ["tool_calls"])


def test_each_choice_finishes_before_the_error_of_another() -> None:
    body = {**CHAT, "n": 2}
    said = [
        chunks.role(),
        chunks.tool(0, call_id="c", name="f", arguments="{"),
        chunks.finish("tool_calls"),
        chunks.content("Hi", 1),
        chunks.finish("stop", 1),
        chunks.final_usage(5),
        chunks.DONE,
    ]
    told = play(body, said, dialect="chat", release="stream").chat_chunks()
    assert finishes(told) == ["stop"]
    assert [error["code"] for error in errors(told)] == ["invalid_tool_call"]


@pytest.mark.parametrize(("arguments", "status", "code"), [("{}", 200, None), ("{", 502, "invalid_tool_call")])
def test_an_answer_that_is_not_streamed(arguments: str, status: int, code: str | None) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    body = chunks.whole({"tool_calls": [call]}, finish_reason="tool_calls")
    outcome = play(REQUEST, [EngineAnswered(body, STARTED)], dialect="chat_whole", release="ready")
    assert outcome.only(Respond).status == status
    if code:
        assert outcome.body["error"]["code"] == code
    else:
        assert outcome.body["choices"][0]["message"]["tool_calls"] == [call]


def test_a_denied_call_is_left_out_of_an_answer_that_is_not_streamed() -> None:
    made = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for n, name in enumerate(("pay", "f"))
    ]
    body = chunks.whole({"tool_calls": made}, finish_reason="tool_calls")
    steps = [EngineAnswered(body, STARTED)]
    outcome = play(REQUEST, steps, dialect="chat_whole", release="ready", tool_rules=[NO_PAY])
    assert [c["function"]["name"] for c in outcome.body["choices"][0]["message"]["tool_calls"]] == ["f"]
