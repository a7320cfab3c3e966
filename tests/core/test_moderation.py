"""Rules at work: what goes out, what is held, what a placeholder replaces and how a halt ends a stream."""

import json
from typing import Any

import pytest

from penstock.core.citations import CitationPattern
from penstock.core.commands import Ending, NoteIntervention
from penstock.core.events import Intervention
from penstock.core.schemas import schema_of
from penstock.core.signals import Cancelled, ClockTicked, Draining, EngineAnswered, EngineClosed
from penstock.core.tool_policy import ToolRule
from support.chunks import answer, answer_of, content, finish, reasoning, role, tool, whole
from support.moderating import policy
from support.playbook import STARTED, Outcome, ask, play

CODENAME = {"id": "codename", "literal": "Project Zephyr", "category": "internal"}
TICKET = {"id": "ticket", "regex": "TKT-[0-9]{6}", "action": "halt", "category": "internal"}
CARD = {"id": "card", "regex": r"\b[0-9](?:[ -]?[0-9]){12,18}\b", "check": "luhn", "category": "pii"}
RUDE = {"id": "rude", "words": ["damn"], "action": "flag"}
NOW = STARTED


def said(outcome: Outcome) -> str:
    return "".join(event["text"] for event in outcome.all_of("delta.text"))


def moderations(outcome: Outcome) -> list[tuple[Any, ...]]:
    names = ("action", "rule", "block", "offset", "length")
    return [tuple(event[name] for name in names) for event in outcome.all_of("moderation")]


def notes(outcome: Outcome) -> list[Intervention]:
    return [command.intervention for command in outcome.commands if isinstance(command, NoteIntervention)]


def stream(*texts: str, rules: list[dict[str, Any]], **setting: Any) -> Outcome:
    return play(None, answer_of(texts), policy=policy(*rules), **setting)


# --- Redaction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [["We call it Project Zephyr."], list("We call it Project Zephyr.")])
def test_a_match_is_replaced_however_it_is_cut(texts: list[str]) -> None:
    outcome = stream(*texts, rules=[CODENAME])
    assert said(outcome) == "We call it [redacted]."
    assert moderations(outcome) == [("redact", "codename", 0, 11, 10)]
    [note] = notes(outcome)
    assert (note.text, note.start, note.channel) == ("Project Zephyr", 11, "answer")
    assert outcome.record.usage.sizes["moderation"] == len("Project Zephyr")
    assert outcome.record.usage.sizes["added"] == len("[redacted]")


def test_text_goes_out_the_moment_it_can_no_longer_match() -> None:
    outcome = play(None, [role(), content("The Project"), content(" Zebra")], policy=policy(CODENAME))
    assert [event["text"] for event in outcome.all_of("delta.text")] == ["The ", "Project Zebra"]


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_what_is_held_when_the_answer_ends_was_no_match_and_goes_out(reason: str) -> None:
    steps = answer(content("It is Project Zep"), reason=reason)
    assert said(play(None, steps, policy=policy(CODENAME))) == "It is Project Zep"


@pytest.mark.parametrize(
    "end",
    [Cancelled(NOW), EngineClosed(None, NOW), Draining(NOW), ClockTicked(NOW + 601)],
    ids=lambda s: type(s).__name__,
)
def test_what_is_held_when_the_stream_breaks_stays_back_since_another_may_go_on_from_there(end: Any) -> None:
    key = {"id": "key", "regex": "sk-[0-9a-z]{4,32}"}
    broken = play(None, [role(), content("a b Project Z"), end], policy=policy(CODENAME, key))
    assert said(broken) == "a b "
    assert broken.record.usage.sizes["moderation"] == len("Project Z")
    assert notes(broken) == []
    whole = play(None, [role(), content("a b sk-abcd1"), end], policy=policy(CODENAME, key))
    assert said(whole) == "a b "
    assert [note.text for note in notes(whole)] == ["sk-abcd1"]


def test_a_match_that_can_still_grow_is_swallowed_whole() -> None:
    key = {"id": "key", "regex": "sk-[0-9a-z]{4,32}"}
    assert said(stream(*"use sk-abcd1234efgh now", rules=[key])) == "use [redacted] now"


def test_overlapping_matches_share_one_placeholder() -> None:
    rules = [{"id": "a", "literal": "abcdef"}, {"id": "b", "literal": "defghi"}]
    outcome = stream(*"xabcdefghix", rules=rules)
    assert said(outcome) == "x[redacted]x"
    assert [note.rule for note in notes(outcome)] == ["a", "b"]


def test_a_number_is_redacted_only_if_its_checksum_is_right() -> None:
    outcome = stream(*"4111 1111 1111 1111 and 4111 1111 1111 1112.", rules=[CARD])
    assert said(outcome) == "[redacted] and 4111 1111 1111 1112."


def test_what_is_flagged_goes_out_and_is_told() -> None:
    outcome = stream(*"well damn it", rules=[RUDE])
    assert said(outcome) == "well damn it"
    assert moderations(outcome) == [("flag", "rude", 0, 5, 4)]


def test_flags_hold_nothing() -> None:
    outcome = play(None, [role(), content("da")], policy=policy(RUDE))
    assert said(outcome) == "da"


# --- Halts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [["See TKT-123456 please"], list("See TKT-123456 please")])
def test_a_halt_ends_the_stream_before_the_match(texts: list[str]) -> None:
    outcome = stream(*texts, rules=[TICKET])
    assert said(outcome) == "See "
    assert outcome.types()[-6:] == ["moderation", "error", "text.end", "finish", "usage", "stream.end"]
    assert moderations(outcome) == [("halt", "ticket", 0, 4, 0)]
    error = outcome.one("error")
    assert (error["code"], error["origin"], error["retryable"]) == ("content_filtered", "policy", False)
    assert outcome.one("finish")["reason"] == "content_filter"
    assert outcome.one("stream.end")["status"] == "failed"
    assert outcome.record.ending is Ending.HALTED
    assert [(note.rule, note.text) for note in notes(outcome)] == [("ticket", "TKT-123456")]


def test_a_halt_at_the_first_word() -> None:
    outcome = stream("TKT-123456", rules=[TICKET])
    assert outcome.types() == ["stream.start", "delta.role", "moderation", "error", "finish", "usage", "stream.end"]
    assert moderations(outcome) == [("halt", "ticket", None, 0, 0)]


def test_all_choices_end_with_a_halt() -> None:
    steps = [role(), role(1), content("one"), content("TKT-123456", 1), content("more"), finish()]
    outcome = play(ask(n=2), steps, policy=policy(TICKET))
    assert {n: f["reason"] for n, f in outcome.finishes().items()} == {0: "content_filter", 1: "content_filter"}
    assert "more" not in said(outcome)


def test_an_openai_client_sees_content_filter() -> None:
    chunks = stream("See TKT-123456", rules=[TICKET], dialect="chat").chat_chunks()
    *_, last, end = chunks
    assert isinstance(last, dict)
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert end == "[DONE]"
    assert "TKT" not in json.dumps(chunks)
    body = stream_whole("See TKT-123456", TICKET)
    assert body["choices"][0]["finish_reason"] == "content_filter"
    assert body["choices"][0]["message"]["content"] == "See "


# --- Answers that are not streams -----------------------------------------------------------------


def stream_whole(text: str, *rules: dict[str, Any], **message: Any) -> Any:
    answered = EngineAnswered(whole({"content": text, **message}, logprobs={"content": [{"token": text}]}), NOW)
    return play(None, [answered], policy=policy(*rules), dialect="chat_whole").body


def test_a_whole_answer_gets_the_same_verdict() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"q":"Project Zephyr"}'}}
    more = {"reasoning": "Project Zephyr?", "tool_calls": [call], "audio": {"transcript": "Project Zephyr"}}
    body = stream_whole("It is Project Zephyr", CODENAME, **more)
    assert "Zephyr" not in json.dumps(body)
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("It is [redacted]", "[redacted]?")
    assert message["tool_calls"][0]["function"]["arguments"] == '{"q":"[redacted]"}'
    assert body["choices"][0]["logprobs"] is None


# --- Every field ----------------------------------------------------------------------------------


def test_reasoning_and_answer_are_lanes_of_their_own() -> None:
    steps = answer(reasoning("think Project "), content("Zephyr of Project Zephyr"))
    outcome = play(None, steps, policy=policy(CODENAME))
    assert outcome.blocks() == ["reasoning: think Project ", "text: Zephyr of [redacted]"]


def test_a_rule_may_be_for_one_channel() -> None:
    steps = answer(reasoning("Project Zephyr"), content("Project Zephyr"))
    outcome = play(None, steps, policy=policy({**CODENAME, "channels": ["answer"]}))
    assert outcome.blocks() == ["reasoning: Project Zephyr", "text: [redacted]"]


def test_nothing_overtakes_held_text() -> None:
    steps = [role(), content("Project"), reasoning("hm"), content(" Zephyr")]
    outcome = play(None, steps, policy=policy(CODENAME))
    assert outcome.blocks() == ["text: Project", "reasoning: hm", "text: [redacted]"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('{"q": "Project Zephyr"}', '{"q": "[redacted]"}'),
        ('{"q": "Pro\\u006aect Zephyr\\n"}', '{"q": "[redacted]\\n"}'),
        ('{"q": "Project\\tZephyr"}', '{"q": "[redacted]"}'),
    ],
)
def test_arguments_are_read_as_what_they_stand_for(arguments: str, told: str) -> None:
    pieces = [tool(call_id="c", name="f"), *(tool(arguments=letter) for letter in arguments)]
    outcome = play(ask(tools=["f"]), answer(*pieces, reason="tool_calls"), policy=policy(CODENAME))
    end = outcome.one("tool_call.end")
    assert (end["arguments"], end["valid"]) == (told, True)
    assert outcome.one("tool_call.ready")["arguments"] == json.loads(told)
    assert outcome.one("moderation")["block"] == end["block"]


def test_a_redacted_number_in_json_becomes_a_string() -> None:
    pieces = [tool(call_id="c", name="f", arguments='{"card": 4111111111111111, "n": 1}')]
    outcome = play(ask(tools=["f"]), answer(*pieces, reason="tool_calls"), policy=policy(CARD))
    assert outcome.one("tool_call.ready")["arguments"] == {"card": "[redacted]", "n": 1}


def test_arguments_that_redaction_spoils_never_become_ready() -> None:
    rule = {"id": "odd", "literal": 'q": "x'}
    pieces = [tool(call_id="c", name="f", arguments='{"q": "x"}')]
    outcome = play(ask(tools=["f"]), answer(*pieces, reason="tool_calls"), policy=policy(rule))
    assert outcome.all_of("tool_call.ready") == []
    end = outcome.one("tool_call.end")
    assert not end["valid"]
    assert "moderation redacted" in end["problem"]


@pytest.mark.parametrize(("types", "becomes_ready"), [(["integer"], False), (["integer", "string"], True)])
def test_redacted_arguments_are_judged_by_the_schema_again(types: list[str], becomes_ready: bool) -> None:
    parameters = {"type": "object", "properties": {"card": {"type": types}}}
    body = {**ask(), "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}
    pieces = [tool(call_id="c", name="f", arguments='{"card": 4111111111111111}')]
    outcome = play(body, answer(*pieces, reason="tool_calls"), policy=policy(CARD))
    end = outcome.one("tool_call.end")
    assert (len(outcome.all_of("tool_call.ready")), end["valid"]) == (int(becomes_ready), becomes_ready)
    assert end["arguments"] == '{"card": "[redacted]"}'
    if not becomes_ready:
        assert end["problem"].startswith("moderation redacted the arguments, and what is left may not be executed: the")
        assert "at $.card" in end["problem"]


@pytest.mark.parametrize("pattern", ["^Project", "redacted"])
def test_redacted_arguments_are_judged_by_the_tool_policy_again(pattern: str) -> None:
    arguments = schema_of({"properties": {"q": {"pattern": pattern}}})
    rules = [ToolRule("narrow", ("f",), arguments=arguments)]
    pieces = [tool(call_id="c", name="f", arguments='{"q": "Project Zephyr, Project redacted"}')]
    outcome = play(ask(tools=["f"]), answer(*pieces), policy=policy(CODENAME), tool_rules=rules)
    end = outcome.one("tool_call.end")
    assert end["valid"] is (pattern == "redacted")
    assert len(outcome.all_of("tool_call.ready")) == end["valid"]
    assert outcome.all_of("tool_call.denied") == []


def test_the_name_of_a_call_is_text_too() -> None:
    pieces = [tool(call_id="c", name="Project Zephyr", arguments="{}")]
    outcome = play(ask(tools=["f"]), answer(*pieces, reason="tool_calls"), policy=policy(CODENAME))
    assert outcome.one("tool_call.start")["name"] == "redacted"
    assert "Zephyr" not in outcome.data.decode()


def test_a_halt_in_arguments_ends_the_call_unready() -> None:
    pieces = [tool(call_id="c", name="f", arguments='{"q": "'), tool(arguments='TKT-123456"}')]
    outcome = play(ask(tools=["f"]), answer(*pieces), policy=policy(TICKET))
    end = outcome.one("tool_call.end")
    assert (end["arguments"], end["valid"], end["status"]) == ('{"q": "', False, "incomplete")
    assert "TKT" not in outcome.data.decode()


def test_logprobs_and_unknown_fields_would_spell_it_and_are_left_out() -> None:
    spelled = [{"token": "Zephyr"}]
    steps = answer(content("Project Zephyr", logprobs={"content": spelled}, token_ids=[7], whisper="Project Zephyr"))
    outcome = play(None, steps, policy=policy(CODENAME))
    assert "Zephyr" not in outcome.data.decode()
    assert {event["code"] for event in outcome.all_of("warning")} == {"logprobs_dropped", "unmoderated_fields"}


def test_structured_answers_are_read_through_their_escapes() -> None:
    body = ask(response_format={"type": "json_object"})
    outcome = play(body, answer_of(['{"a": "\\u0050roject Ze', 'phyr"}']), policy=policy(CODENAME))
    assert said(outcome) == '{"a": "[redacted]"}'


# --- What looks alike -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "project zephyr",
        "PROJECT ZEPHYR",
        "Ｐｒｏｊｅｃｔ Ｚｅｐｈｙｒ",
        "Pro\u200bject\u00ad Ze\u2060phyr",
        "Pröject Zéphyr",
        "Project\nZephyr",
        "𝐏𝐫𝐨𝐣𝐞𝐜𝐭 𝒁𝒆𝒑𝒉𝒚𝒓",
        "P̸r̸o̸j̸e̸c̸t Zephyr",
    ],
)
def test_variants_of_a_literal(text: str) -> None:
    assert said(stream(*f"a {text} b", rules=[CODENAME])) == "a [redacted] b"


def test_invisible_padding_without_end_is_a_halt_not_a_leak() -> None:
    text = "Proj" + "\u200b" * 400 + "ect Zephyr"
    outcome = play(None, answer_of(list(text)), policy=policy(CODENAME, hold_chars=64), hold_chars=64)
    assert outcome.one("moderation")["rule"] == "hold_limit"
    assert said(outcome) == ""


def test_without_rules_nothing_is_changed() -> None:
    steps = answer(content("Hi", logprobs={"content": [{"token": "Hi"}]}, token_ids=[7]))
    assert play(None, steps).data == play(None, steps, policy=None).data
    assert play(None, steps).one("delta.text")["token_ids"] == [7]


def test_a_rule_for_other_models_and_keys_does_not_apply() -> None:
    from support.moderating import rulebook

    book = rulebook({**CODENAME, "models": ["big-*"], "keys": ["bob"]})
    assert book.choose("big-1", "bob") is not None
    assert book.choose("big-1", "eve") is None
    assert book.choose("small", "bob") is None


def test_what_a_citation_quotes_is_text_too() -> None:
    pattern = CitationPattern("[", "]", r"(?P<source>[^\[\]]+)")
    outcome = play(None, answer_of(list("see [Project Zephyr] now")), policy=policy(CODENAME), citations=[pattern])
    assert outcome.one("annotation")["data"] == {"marker": "[[redacted]]", "text": "[redacted]", "source": "[redacted]"}
    assert "Zephyr" not in outcome.data.decode()
