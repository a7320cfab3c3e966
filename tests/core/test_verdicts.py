"""Classifiers: what they are asked, what waits for them, and what their verdicts do."""

from typing import Any

import pytest

from penstock.core.citations import CitationPattern
from penstock.core.commands import AbortEngine, AskModerator, Ending, NoteIntervention, WakeAt
from penstock.core.signals import ClockTicked, EngineAnswered, EngineClosed, VerdictReached
from penstock.core.verdicts import Watch, Watching
from support.chunks import DONE, answer_of, content, final_usage, finish, reasoning, role, tool, whole
from support.playbook import STARTED, Outcome, Step, ask, play

ALL: Any = frozenset({"answer", "reasoning", "tools"})
NOW = STARTED


def watching(*, gates: bool = False, fails_open: bool = True, channels: Any = ALL, **sizes: Any) -> Watching:
    told = {"window_chars": 10, "overlap_chars": 4, "window_seconds": 0.4, "gate_chars": 40, **sizes}
    return Watching((Watch("guard", gates, fails_open, channels),), **told)


def verdict(number: int, opinion: Any = "pass", category: str = "") -> VerdictReached:
    return VerdictReached(number, 0, opinion, category, NOW)


def asked(outcome: Outcome) -> list[str]:
    return [command.text for command in outcome.commands if isinstance(command, AskModerator)]


def said(outcome: Outcome) -> str:
    return "".join(event["text"] for event in outcome.all_of("delta.text"))


def test_windows_overlap() -> None:
    outcome = play(None, [role(), content("0123456789"), content("abcdefghij")], watching=watching())
    assert asked(outcome) == ["0123456789", "6789abcdefghij"]
    assert said(outcome) == "0123456789abcdefghij"


def test_less_than_a_window_is_asked_about_in_time() -> None:
    outcome = play(None, [role(), content("abc")], watching=watching())
    assert asked(outcome) == []
    assert min(c.when for c in outcome.commands if isinstance(c, WakeAt)) <= NOW + 0.4
    ticked = play(None, [role(), content("abc"), ClockTicked(NOW + 0.5)], watching=watching())
    assert asked(ticked) == ["abc"]


def test_a_violation_ends_the_stream() -> None:
    steps: list[Step] = [role(), content("0123456789"), content("more"), verdict(1, "violation", "violence")]
    outcome = play(None, steps, watching=watching())
    assert said(outcome) == "0123456789more"
    assert outcome.types()[-6:] == ["moderation", "error", "text.end", "finish", "usage", "stream.end"]
    assert outcome.one("moderation")["category"] == "violence"
    assert outcome.one("finish")["reason"] == "content_filter"
    assert outcome.record.ending is Ending.HALTED
    assert [c.intervention.rule for c in outcome.commands if isinstance(c, NoteIntervention)] == ["guard"]


def test_a_finish_waits_for_its_verdicts() -> None:
    steps: list[Step] = [*answer_of(["short"]), EngineClosed(None, NOW)]
    waiting = play(None, steps, watching=watching())
    assert said(waiting) == "short"
    assert waiting.all_of("finish") == []
    passed = play(None, [*steps, verdict(1)], watching=watching())
    assert passed.one("finish")["reason"] == "stop"
    assert passed.one("stream.end")["status"] == "completed"
    halted = play(None, [*steps, verdict(1, "violation", "hate")], watching=watching())
    assert halted.one("finish")["reason"] == "content_filter"


def test_without_an_end_mark_it_waits_too() -> None:
    steps: list[Step] = [role(), content("short"), finish(), final_usage(2), EngineClosed(None, NOW), verdict(1)]
    assert play(None, steps, watching=watching()).one("stream.end")["status"] == "completed"


def test_a_gate_holds_until_the_verdict() -> None:
    steps: list[Step] = [role(), content("0123456789"), content("abc")]
    held = play(None, steps, watching=watching(gates=True))
    assert said(held) == ""
    assert said(play(None, [*steps, verdict(1)], watching=watching(gates=True))) == "0123456789"
    stopped = play(None, [*steps, verdict(1, "violation", "x")], watching=watching(gates=True))
    assert said(stopped) == ""
    assert stopped.record.usage.sizes["moderation"] == 13


def test_verdicts_may_come_in_any_order() -> None:
    steps: list[Step] = [role(), content("0123456789"), content("abcdefghij"), verdict(2), verdict(1)]
    assert said(play(None, steps[:4], watching=watching(gates=True))) == ""
    assert said(play(None, steps, watching=watching(gates=True))) == "0123456789abcdefghij"


@pytest.mark.parametrize("gates", [True, False])
def test_a_classifier_that_fails_open_lets_go_with_a_warning(gates: bool) -> None:
    steps: list[Step] = [*answer_of(["0123456789"]), verdict(1, "failed")]
    outcome = play(None, steps, watching=watching(gates=gates))
    assert said(outcome) == "0123456789"
    assert outcome.one("warning")["code"] == "classifier_failed"
    assert outcome.one("stream.end")["status"] == "completed"


@pytest.mark.parametrize("gates", [True, False])
def test_one_that_fails_closed_ends_the_stream(gates: bool) -> None:
    steps: list[Step] = [role(), content("0123456789"), verdict(1, "failed")]
    outcome = play(None, steps, watching=watching(gates=gates, fails_open=False))
    error = outcome.one("error")
    assert (error["code"], error["origin"], error["retryable"]) == ("moderation_unavailable", "policy", True)
    assert said(outcome) == ("" if gates else "0123456789")


@pytest.mark.parametrize("fails_open", [True, False])
def test_a_gate_holds_so_much_and_no_more(fails_open: bool) -> None:
    steps: list[Step] = [role(), *(content("0123456789") for _ in range(5))]
    outcome = play(None, steps, watching=watching(gates=True, fails_open=fails_open))
    if fails_open:
        assert said(outcome) == "0123456789" * 5
        assert outcome.one("warning")["code"] == "classifier_failed"
    else:
        assert outcome.one("error")["code"] == "moderation_unavailable"


def test_what_is_gated_when_the_stream_breaks_is_not_sent() -> None:
    steps: list[Step] = [role(), content("abc"), EngineClosed(None, NOW)]
    outcome = play(None, steps, watching=watching(gates=True))
    assert said(outcome) == ""
    assert outcome.one("error")["code"] == "engine_incomplete"


def test_reasoning_and_arguments_are_judged_too() -> None:
    pieces = [reasoning("thinking hard"), tool(call_id="c", name="f", arguments='{"q": "secret"}')]
    steps: list[Step] = [role(), *pieces, finish("tool_calls"), final_usage(3), DONE]
    outcome = play(ask(tools=["f"]), [*steps, verdict(1), verdict(2)], watching=watching(gates=True))
    assert asked(outcome) == ["thinking hard", '{"q": "secret"}']
    assert outcome.one("tool_call.ready")["arguments"] == {"q": "secret"}
    stopped = play(ask(tools=["f"]), [*steps, verdict(1), verdict(2, "violation", "x")], watching=watching(gates=True))
    assert "secret" not in stopped.data.decode()
    assert stopped.all_of("tool_call.ready") == []


def test_a_whole_answer_waits_and_gets_the_same_verdict() -> None:
    answered = EngineAnswered(whole({"content": "0123456789"}), NOW)
    passed = play(None, [answered, verdict(1)], watching=watching(), dialect="chat_whole")
    assert passed.body["choices"][0]["finish_reason"] == "stop"
    stopped = play(None, [answered, verdict(1, "violation", "x")], watching=watching(), dialect="chat_whole")
    assert stopped.body["choices"][0]["finish_reason"] == "content_filter"


def test_a_citation_that_keeps_its_text_waits_for_the_verdict_on_it() -> None:
    pattern = CitationPattern("<cite>", "</cite>", r"(?P<title>[^<]*)", keeps=True)
    text = "<cite>a bad source</cite> says so"

    def after(*verdicts: Step) -> Outcome:
        steps: list[Step] = [role(), content(text), finish(), DONE, *verdicts]
        return play(None, steps, watching=watching(gates=True, window_chars=1000), citations=[pattern])

    for outcome in (after(), after(verdict(1, "violation"))):
        assert (outcome.all_of("annotation"), said(outcome)) == ([], "")
    passed = after(verdict(1))
    [note] = passed.all_of("annotation")
    assert (note["data"]["title"], said(passed), asked(passed)) == ("a bad source", text, [text])


def test_what_a_gate_holds_of_citations_counts() -> None:
    pattern = CitationPattern("[", "]", r"(?P<source>\d)")
    flood: list[Step] = [role(), *[content("[1]")] * 20]
    outcome = play(None, flood, watching=watching(gates=True, fails_open=False), citations=[pattern])
    assert outcome.record.ending is Ending.HALTED


def test_our_own_stop_string_stops_the_engine_while_a_verdict_is_out() -> None:
    steps: list[Step] = [role(), content("0123456789 STOP"), *[content("not wanted by anybody")] * 9]
    outcome = play(ask(penstock={"stop": ["STOP"]}), [*steps, verdict(1), verdict(2)], watching=watching())
    assert sum(isinstance(command, AbortEngine) for command in outcome.commands) >= 1
    assert (outcome.record.ending, said(outcome)) == (Ending.COMPLETED, "0123456789 ")
    assert outcome.record.usage.sizes["generated"] == len("0123456789 STOP")
