"""Ways around the rules: every field, ending and spelling by which a match might reach a client all the same."""

import json
from typing import Any

import pytest

from penstock.core.citations import CitationPattern
from penstock.core.commands import AskModerator, Ending, NoteIntervention
from penstock.core.events import Channel, Text
from penstock.core.moderation import Moderation
from penstock.core.signals import EngineAnswered, EngineClosed, VerdictReached
from penstock.core.tool_policy import ToolRule
from penstock.core.verdicts import Watch, Watching
from support.chunks import (
    DONE,
    answer,
    answer_of,
    content,
    error,
    final_usage,
    finish,
    frame,
    reasoning,
    role,
    spoken,
    tool,
    whole,
)
from support.moderating import policy
from support.playbook import BARE, STARTED, Outcome, Step, ask, play

NAME = "Project Zephyr"
CODENAME = {"id": "codename", "literal": NAME, "category": "internal"}
TICKET = {"id": "ticket", "regex": "TKT-[0-9]{6}", "action": "halt", "category": "internal"}
FLAGGED = {"id": "flagged", "literal": NAME, "action": "flag"}
XML = "<tool_call>\n<function=f>\n<parameter=q>\n{}\n</parameter>\n</function>\n</tool_call>"
NOW = STARTED


def said(outcome: Outcome) -> str:
    return "".join(event["text"] for event in outcome.all_of("delta.text"))


def noted(outcome: Outcome) -> list[str]:
    return [one.intervention.text for one in outcome.commands if isinstance(one, NoteIntervention)]


def assert_hidden(outcome: Outcome, text: str = "Zephyr") -> None:
    shown = outcome.data.decode() if outcome.events or outcome.data else json.dumps(outcome.body)
    assert text not in shown


# --- Fields beside the text -----------------------------------------------------------------------


def test_a_denial_does_not_name_the_tool_whose_name_is_redacted() -> None:
    pieces = [tool(call_id="c", name=NAME, arguments="{}")]
    rules = [ToolRule("none", ("*",), allows=False)]
    outcome = play(ask(tools=["f"]), answer(*pieces), policy=policy(CODENAME), tool_rules=rules)
    assert (outcome.one("tool_call.denied")["name"], outcome.one("tool_call.denied")["rule"]) == ("redacted", "none")
    assert_hidden(outcome)


def test_an_id_that_the_model_made_of_the_name_is_another_one() -> None:
    pieces = [tool(call_id=f"functions.{NAME}:0", name=NAME, arguments="{}"), tool(arguments=" {}")]
    outcome = play(ask(tools=["f"]), answer(*pieces), policy=policy(CODENAME))
    ids = {event["call_id"] for event in outcome.events if "call_id" in event}
    assert ids == {"call_redacted_0_0"}
    assert_hidden(outcome)


def test_a_flagged_name_is_told() -> None:
    outcome = play(ask(tools=["f"]), answer(tool(call_id="c", name=NAME, arguments="{}")), policy=policy(FLAGGED))
    assert outcome.one("moderation")["action"] == "flag"
    assert outcome.one("tool_call.start")["name"] == NAME


def test_a_halt_in_the_name_of_a_call() -> None:
    outcome = play(
        ask(tools=["f"]), answer(tool(call_id="c", name="TKT-123456", arguments="{}")), policy=policy(TICKET)
    )
    assert outcome.all_of("tool_call.start") == []
    assert outcome.one("finish")["reason"] == "content_filter"
    assert_hidden(outcome, "TKT")


@pytest.mark.parametrize(
    "fields",
    [{"output_ids": [7, 8]}, {"spelled": [[7], {"a": 8}]}, {"said": {"inner": ["x"]}}, {"said": "7 8"}],
    ids=str,
)
def test_what_may_spell_the_text_of_a_choice_is_left_out(fields: Any) -> None:
    in_choice = answer(content(NAME, **fields))
    in_delta = answer(spoken({"content": NAME, **fields}))
    for steps in (in_choice, in_delta, answer(spoken({"content": NAME, "token_ids": [7]}))):
        outcome = play(None, steps, policy=policy(CODENAME))
        assert [event["code"] for event in outcome.all_of("warning")] == ["unmoderated_fields"]
        assert not any(
            "ext" in event and event["ext"] != {"system_fingerprint": "vllm-0.32.0-925e852b"}
            for event in outcome.events
        )


def test_what_spells_nothing_is_passed_on() -> None:
    outcome = play(None, answer(content("Hi", score=0.5, is_cut=False, ranks=[0.25])), policy=policy(CODENAME))
    assert outcome.one("delta.text")["ext"] == {"is_cut": False, "ranks": [0.25], "score": 0.5}


def test_fields_beside_the_choices_and_in_the_count_are_read() -> None:
    beside = frame({"choices": [], "said": {"so far": [NAME]}, "system_fingerprint": "v1"})
    for dialect in ("ndjson", "chat"):
        steps = [role(), content("Hi"), beside, finish(), final_usage(3, said=NAME), DONE]
        outcome = play(ask(stream_options={"include_usage": True}), steps, policy=policy(CODENAME), dialect=dialect)
        assert_hidden(outcome)
        assert b"v1" in outcome.data
    answered = json.loads(whole({"content": "Hi"}))
    answered["usage"]["said"] = answered["said"] = NAME
    outcome = play(
        None, [EngineAnswered(json.dumps(answered).encode(), NOW)], policy=policy(CODENAME), dialect="chat_whole"
    )
    assert_hidden(outcome)
    assert outcome.body["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("watched", [False, True])
def test_an_error_of_the_engine_quotes_nothing(watched: bool) -> None:
    judge: Any = {"watching": gate()} if watched else {"policy": policy(CODENAME)}
    of_another_shape = frame({"choices": [{"index": 7, "delta": {"content": NAME[:9]}}]})
    outcome = play(None, [role(), content("Hi "), of_another_shape], **judge)
    assert outcome.one("error")["code"] == "engine_malformed"
    assert_hidden(outcome, NAME[:9])
    unjudged = play(None, [role(), content("Hi "), of_another_shape])
    assert NAME[:9] in unjudged.one("error")["message"]


@pytest.mark.parametrize("dialect", ["ndjson", "chat"])
def test_an_error_in_which_a_rule_finds_something_is_told_without_its_words(dialect: Any) -> None:
    outcome = play(
        None, [role(), content("Hi"), error(f"cannot parse: {NAME}")], policy=policy(CODENAME), dialect=dialect
    )
    assert_hidden(outcome)
    assert b"moderation withholds" in outcome.data
    harmless = play(None, [role(), content("Hi"), error("out of memory")], policy=policy(CODENAME), dialect=dialect)
    assert b"out of memory" in harmless.data


def test_a_citation_is_judged_by_classifiers_too() -> None:
    pattern = CitationPattern("[", "]", r"(?P<source>[^\[\]]+)")
    outcome = play(None, answer_of(["see [the secret source]."]), watching=gate(), citations=[pattern])
    assert "secret source" in "".join(one.text for one in outcome.commands if isinstance(one, AskModerator))
    assert_hidden(outcome, "secret")


# --- Other choices, other calls ------------------------------------------------------------------


def test_what_is_held_of_another_choice_stays_back_at_a_halt() -> None:
    started = [role(), role(1), tool(call_id="c", name="f", arguments='{"a": "TKT-99999', choice=1)]
    outcome = play(ask(tools=["f"], n=2), [*started, content("TKT-123456")], policy=policy(TICKET))
    assert outcome.one("tool_call.end")["arguments"] == '{"a": "'
    assert_hidden(outcome, "TKT")


def test_what_follows_a_halt_in_the_same_read_is_in_no_end_of_a_call() -> None:
    started = [role(), role(1), tool(call_id="c", name="f", arguments='{"a": "', choice=1)]
    more = tool(arguments='TKT-999999"}', choice=1) + finish("tool_calls", 1)
    outcome = play(ask(tools=["f"], n=2), [*started, content("TKT-123456") + more], policy=policy(TICKET))
    end = outcome.one("tool_call.end")
    assert (end["arguments"], end["valid"], end["status"]) == ('{"a": "', False, "incomplete")
    assert outcome.all_of("tool_call.ready") == []
    assert_hidden(outcome, "TKT")


def test_choices_are_lanes_of_their_own() -> None:
    pieces = [content("Project "), content("Zephyr", 1), content("Zephyr"), content(" Project", 1), finish(choice=1)]
    outcome = play(ask(n=2), [role(), role(1), *pieces, finish(), DONE], policy=policy(CODENAME))
    assert (outcome.blocks(0), outcome.blocks(1)) == (["text: [redacted]"], ["text: Zephyr Project"])


def test_inlined_reasoning_is_halted_before_its_end_mark() -> None:
    rule = {"id": "word", "words": ["boom"], "action": "halt"}
    steps = answer(reasoning("a boom"), content("yes"))
    outcome = play(None, steps, policy=policy(rule), reasoning="inline")
    assert outcome.blocks() == ["text: <think>a "]
    assert outcome.types()[-6:] == ["moderation", "error", "text.end", "finish", "usage", "stream.end"]


@pytest.mark.parametrize(("policy_of_reasoning", "shown"), [("separate", 1), ("inline", 1), ("hide", 0)])
def test_reasoning_however_it_is_shown(policy_of_reasoning: Any, shown: int) -> None:
    steps = answer_of(list(f"<think>It is {NAME}.</think>It is {NAME}."))
    outcome = play(None, steps, policy=policy(CODENAME), reasoning=policy_of_reasoning, family="qwen3")
    assert outcome.data.count(b"[redacted]") == 1 + shown
    assert_hidden(outcome)


# --- Arguments -------------------------------------------------------------------------------------


def test_arguments_that_are_made_of_xml_are_redacted_and_the_bill_is_right() -> None:
    outcome = play(
        ask(tools=["f"]), answer_of(list(XML.format(f"{NAME} and more"))), policy=policy(CODENAME), family=BARE
    )
    assert outcome.one("tool_call.ready")["arguments"] == {"q": "[redacted] and more"}
    assert noted(outcome) == [NAME]
    assert_hidden(outcome)


def test_arguments_that_are_made_of_xml_are_gated() -> None:
    steps = answer_of(list(XML.format("the secret thing")))
    held = play(ask(tools=["f"]), steps, watching=gate(), family=BARE)
    assert "secret" in "".join(one.text for one in held.commands if isinstance(one, AskModerator))
    assert_hidden(held, "secret")
    stopped: list[Step] = [*steps, VerdictReached(1, 0, "violation", "x", NOW)]
    outcome = play(ask(tools=["f"]), stopped, watching=gate(), family=BARE)
    assert outcome.all_of("tool_call.ready") == []
    assert_hidden(outcome, "secret")


@pytest.mark.parametrize(
    "escaped", [r"Project\u0020Zephyr", r"\u0050rojec\u0074 Zephyr", r"Project\/Zephyr", r"Pro\u200bject Zephyr"]
)
def test_escapes_at_every_cut(escaped: str) -> None:
    rule = {"id": "r", "regex": "Project[ /]Zephyr"}
    text = f'{{"q": "{escaped}", "n": 1}}'
    for at in range(1, len(text)):
        pieces = [tool(call_id="c", name="f", arguments=text[:at]), tool(arguments=text[at:])]
        outcome = play(ask(tools=["f"]), answer(*pieces), policy=policy(rule))
        assert outcome.one("tool_call.ready")["arguments"] == {"q": "[redacted]", "n": 1}, at
        assert "".join(event["text"] for event in outcome.all_of("tool_call.arguments_chunk")) == (
            '{"q": "[redacted]", "n": 1}'
        )


# --- Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text", "value"),
    [
        ({"response_format": {"type": "json_object"}}, f'{{"a": "{NAME}"}}', {"a": "[redacted]"}),
        ({"penstock": {"structured": {"schema": {}}}}, r'{"a": "\u0050roject Zephyr"}', {"a": "[redacted]"}),
        (
            {"penstock": {"structured": {"sections": True}}},
            r'a <<<JSON>>>{"a": "\u0050roject Zephyr"}<<<END>>> b',
            {"a": "[redacted]"},
        ),
        ({"structured_outputs": {"json": {}}}, '{"a": 4111111111111111}', {"a": "[redacted]"}),
    ],
)
@pytest.mark.parametrize("shows", ["show", "hide"])
def test_a_value_holds_the_placeholder_and_its_text_nothing_else(body: Any, text: str, value: Any, shows: str) -> None:
    card = {"id": "card", "regex": r"\b[0-9]{16}\b", "check": "luhn"}
    asked = {**body, "penstock": {"structured": {**body.get("penstock", {}).get("structured", {}), "text": shows}}}
    outcome = play(ask(**asked), answer_of(list(text)), policy=policy(CODENAME, card))
    assert outcome.one("structured")["value"] == value
    assert_hidden(outcome)
    assert_hidden(outcome, "4111")


# --- Where one stream ends and another begins ------------------------------------------------------


def test_a_match_that_begins_in_what_the_caller_wrote_is_not_finished() -> None:
    body = ask(continue_final_message=True, add_generation_prompt=False)
    body["messages"] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is Project Z"}]
    outcome = play(body, answer_of(["eph", "yr, and Project Zephyr"]), policy=policy(CODENAME))
    assert said(outcome) == "[redacted], and [redacted]"
    assert noted(outcome) == [NAME, NAME]
    body["messages"][-1]["content"] = f"I say {NAME} and TKT-123456, TKT-12345"
    once = policy(CODENAME, TICKET)
    assert said(play(body, answer_of([". Yes"]), policy=once)) == ". Yes"
    halted = play(body, answer_of(["6. Yes"]), policy=once)
    assert (said(halted), halted.record.ending) == ("", Ending.HALTED)


def test_what_was_sent_of_a_broken_stream_never_ends_within_a_match() -> None:
    text = f"It is {NAME}, yes"
    for at in range(len(text)):
        outcome = play(None, [role(), content(text[:at]), EngineClosed(None, NOW)], policy=policy(CODENAME))
        rest = ask(continue_final_message=True)
        rest["messages"] = [{"role": "assistant", "content": said(outcome)}]
        # The engine goes on from what was sent, so it writes the whole of the match anew.
        gone_on = play(rest, answer_of([text[len(said(outcome)) :]]), policy=policy(CODENAME))
        if NAME not in text[:at]:
            assert said(outcome) + said(gone_on) == "It is [redacted], yes"
        assert NAME not in said(outcome) + said(gone_on)


# --- Text made to be hard to read -----------------------------------------------------------------


VARIANTS = {
    "ligature": ("office", "oﬃce"),
    "sharp s": ("Strasse", "STRAẞE"),
    "sharp s in the rule": ("Straße", "STRASSE"),
    "dotted capital": ("istanbul", "İSTANBUL"),
    "final sigma": ("σοφος", "ΣΟΦΟΣ"),
    "georgian": ("თბილისი", "ᲗᲑᲘᲚᲘᲡᲘ"),
    "cherokee": ("ᏣᎳᎩ", "ꮳꮃꭹ"),
    "kelvin": ("kilo", "\u212ailo"),
    "long s": ("sure", "\u017fure"),
    "stroke": ("prøject", "PROJECT"),
    "enclosing mark": ("zephyr", "Ze\u0489phy\u20ddr"),
    "half mark": ("zephyr", "Ze\ufe20phyr"),
    "pointed": ("zephyr", "Ze\u05b0ph\u064byr"),
    "right to left": ("zephyr", "Ze\u202eph\u200fyr"),
    "control": ("zephyr", "Ze\x00ph\x7fy\x9br"),
    "joiners": ("zephyr", "Z\u200de\u2060p\u034fhyr"),
    "tags and selectors": ("zephyr", "Ze\U000e0041p\ufe0fhyr"),
    "boxes": ("zephyr", "🅩🅔🅟🅗🅨🅡"),
    "flags": ("zephyr", "🇿🇪🇵🇭🇾🇷"),
    "bold": ("zephyr", "𝐙𝐞𝐩𝐡𝐲𝐫"),
    "circled": ("zephyr", "ⓩⓔⓟⓗⓨⓡ"),
    "full width": ("zephyr 12", "Ｚｅｐｈｙｒ　１２"),
    "digits": ("code 42", "code ४２"),
    "line separators": ("a b c", "a\u2028b\x0bc"),
    "blank": ("a b", "a\u2800b"),
}


@pytest.mark.parametrize(("rule", "text"), VARIANTS.values(), ids=VARIANTS)
def test_a_variant_is_found_however_it_is_cut(rule: str, text: str) -> None:
    chosen = policy({"id": "r", "literal": rule})
    for pieces in ([f"a: {text} z"], list(f"a: {text} z"), [f"a: {text[:2]}", f"{text[2:]} z"]):
        assert said(play(None, answer_of(pieces), policy=chosen)) == "a: [redacted] z"


@pytest.mark.parametrize(
    ("word", "text", "shown"),
    [
        ("C++", "use C++ or C++11, not XC++", "use [redacted] or C++11, not XC++"),
        ("-rf", "rm -rf / and a-rf", "rm [redacted] / and a-rf"),
        ("机密", "这是机密x文件机密", "这是[redacted]x文件[redacted]"),
        ("слово", "слово, словом", "[redacted], словом"),
    ],
)
@pytest.mark.parametrize("action", ["redact", "halt"])
def test_whole_words_of_signs_and_of_other_scripts(word: str, text: str, shown: str, action: str) -> None:
    chosen = policy({"id": "r", "words": [word, "other", "机会", "С++"], "action": action})
    for pieces in ([text], list(text)):
        outcome = play(None, answer_of(pieces), policy=chosen)
        assert said(outcome) == (shown if action == "redact" else shown.partition("[")[0])


@pytest.mark.parametrize("pieces", [["see key=abc12345 now"], list("see key=abc12345 now")])
def test_a_flag_lets_out_nothing_that_another_rule_redacts(pieces: list[str]) -> None:
    rules = [{"id": "seen", "regex": "key=[a-z0-9]{3,9}", "action": "flag"}, {"id": "key", "regex": "[a-z]{3}[0-9]{5}"}]
    outcome = play(None, answer_of(pieces), policy=policy(*rules))
    assert said(outcome) == "see key=[redacted] now"
    assert sorted(event["rule"] for event in outcome.all_of("moderation")) == ["key", "seen"]


@pytest.mark.parametrize("text", ["Zephуr", "Ζephyr", "Ze.phyr", "Z e p h y r", "WmVwaHly", "rypheZ"])
def test_what_the_page_says_is_not_read(text: str) -> None:
    assert said(play(None, answer_of([text]), policy=policy({"id": "r", "literal": "zephyr"}))) == text


@pytest.mark.parametrize(
    ("regex", "text"),
    [
        ("x[à-ü]{2}x", "xéèx"),
        ("x[éß]x", "xßx"),
        ("x[ﬁ]x", "xﬁx"),
        ("x[Ａ-Ｚ]x", "xＢx"),
        ("x[①-⑳]x", "x⑫x"),
        ("x[A-Za-zÀ-ÿ]{2,9}x", "xÉßax"),
        ("x[а-я]{2}x", "xййx"),
        ("x[^a]x", "xéx"),
    ],
)
def test_the_letters_of_a_set_are_folded_too(regex: str, text: str) -> None:
    assert (
        said(play(None, answer_of(list(f"a {text} b")), policy=policy({"id": "r", "regex": regex}))) == "a [redacted] b"
    )


@pytest.mark.parametrize("action", ["redact", "flag"])
@pytest.mark.parametrize("start", ["", "a", "Proj"])
def test_invisible_text_does_not_pile_up(action: str, start: str) -> None:
    step = Moderation(policy({**CODENAME, "action": action}), most_held=64)
    for piece in [start, *["\u200b" * 8] * 200]:
        if piece and step.halted is None:
            step.feed([Text(0, Channel.ANSWER, piece, 1)])
    lane = step._lanes[0]["answer"]
    assert lane is not None
    assert len(lane._window) < 80
    assert (step.halted is not None) is (action == "redact" and start == "Proj")


def test_the_bill_of_a_halt() -> None:
    """Tokens go with the text that they cost: what is withheld is generated and billed, and not delivered."""
    pieces = [content(text, tokens=n) for n, text in enumerate(["See ", "it: ", "TKT-", "123", "456", "!"], 1)]
    outcome = play(None, [role(), *pieces], policy=policy(TICKET))
    usage = outcome.usage()
    assert (usage["completion_tokens"], usage["delivered_tokens"], usage["answer_tokens"]) == (5, 2, 2)
    assert usage["bytes"] == {**dict.fromkeys(usage["bytes"], 0), "generated": 18, "delivered": 8, "moderation": 10}


# --- The longest match ----------------------------------------------------------------------------


def test_a_match_as_long_as_may_be_held() -> None:
    longest = {"id": "long", "regex": "<[a-z]{0,62}>"}
    text = "<" + "x" * 62 + ">"
    for pieces in ([f"a {text} b"], list(f"a {text} b")):
        outcome = play(None, answer_of(pieces), policy=policy(longest, hold_chars=64), hold_chars=64)
        assert said(outcome) == "a [redacted] b"
    nearly = play(None, answer_of(list("a <" + "x" * 63 + "> b")), policy=policy(longest, hold_chars=64), hold_chars=64)
    assert said(nearly) == "a <" + "x" * 63 + "> b"


# --- Rules and classifiers together ----------------------------------------------------------------


def gate() -> Watching:
    channels: Any = frozenset({"answer", "reasoning", "tools"})
    watch = Watch("guard", gates=True, fails_open=False, channels=channels)
    return Watching((watch,), window_chars=10, overlap_chars=4, window_seconds=0.4, gate_chars=400)


def test_a_gate_never_sees_what_was_redacted_and_keeps_the_order() -> None:
    steps: list[Step] = [*answer_of(list(f"It is {NAME}, certainly so."))]
    verdicts: list[Step] = [VerdictReached(n, 0, "pass", "", NOW) for n in (3, 2, 1)]
    held = play(None, steps, policy=policy(CODENAME), watching=gate())
    assert (said(held), "Zephyr" in "".join(c.text for c in held.commands if isinstance(c, AskModerator))) == (
        "",
        False,
    )
    let_go = play(None, [*steps, *verdicts], policy=policy(CODENAME), watching=gate())
    assert said(let_go) == "It is [redacted], certainly so."
    assert let_go.one("moderation")["offset"] == 6


def test_a_rule_halts_what_a_gate_holds() -> None:
    outcome = play(None, answer_of(["It is fine. ", "See TKT-123456"]), policy=policy(TICKET), watching=gate())
    assert said(outcome) == ""
    assert outcome.record.ending is Ending.HALTED
    assert outcome.types() == ["stream.start", "delta.role", "moderation", "error", "finish", "usage", "stream.end"]


@pytest.mark.parametrize("include", [False, True])
def test_our_own_stop_string_within_a_match(include: bool) -> None:
    body = ask(penstock={"stop": ["Zeph"], "include_stop": include})
    outcome = play(body, answer_of(list(f"It is {NAME}.")), policy=policy(CODENAME))
    assert said(outcome) == "It is Project " + ("Zeph" if include else "")
    rule = {"id": "r", "regex": "Project( Zeph)?"}
    assert said(play(body, answer_of(list(f"It is {NAME}.")), policy=policy(rule))) == (
        "It is [redacted]" if include else "It is [redacted] "
    )


@pytest.mark.parametrize(
    "body", [{"choices": [1]}, {"choices": [None]}, {"choices": ["index"]}, {"choices": [], "usage": "x"}]
)
def test_a_whole_answer_of_another_shape_is_the_engines_fault(body: Any) -> None:
    spoke = EngineAnswered(json.dumps(body).encode(), NOW)
    outcome = play(None, [spoke], policy=policy(CODENAME), dialect="chat_whole")
    assert outcome.record.ending in (Ending.ENGINE_ERROR, Ending.ENGINE_GONE)


@pytest.mark.parametrize("regex", ["TKT-[0-9]{6}", "TKT-[0-9]{6,8}"])
def test_what_is_whole_in_the_callers_own_beginning_halts_nothing(regex: str) -> None:
    rules = policy({"id": "ticket", "regex": regex, "action": "halt", "category": "internal"})
    step = Moderation(rules, most_held=4096, begun="see TKT-123456 and TKT-654321")
    step.feed([Text(0, Channel.ANSWER, ", then", 1)])
    assert step.halted is None
    step.feed([Text(0, Channel.ANSWER, " TKT-111111 ", 1)])
    assert step.halted is not None
