"""Raw text told apart, however the model's text is cut into tokens; nothing that came with a token is lost."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.channels import Channels, ReasoningPolicy
from penstock.core.events import Channel, Event, Finished, Role, Text, ToolDelta, ToolMarkup, Withheld
from penstock.core.families import FAMILIES, Family, State, choose_family, thinking_family
from support.strategies import model_texts, pieces_of, policies

# One marker that opens and closes, and none at all for reasoning.
CUSTOM = Family(
    "custom",
    (),
    start="before",
    start_without_thinking="answer",
    states={
        "before": State("answer", {"§§": "thought", "§!": "call"}, otherwise="answer"),
        "thought": State("reasoning", {"§§": "before"}),
        "answer": State("answer", {"§!": "call", "§§": "thought"}),
        "call": State("tool", {"§!": "before"}, syntax="hermes"),
    },
)
BARE = thinking_family("bare", [], reasoning=None)
EVERY_FAMILY = [*FAMILIES, CUSTOM, BARE]
Part = tuple[str, str]
PHASES = ("opened", "closed", "cut")


def family_called(name: str) -> Family:
    found = choose_family(FAMILIES, "", name)
    assert found is not None
    return found


def raw(text: str, **more: Any) -> Text:
    return Text(0, Channel.RAW, text, **more)


def thought(text: str, **more: Any) -> Text:
    return Text(0, Channel.REASONING, text, **more)


def split(
    items: Sequence[Event | str],
    family: Family | str = "qwen3",
    *,
    policy: ReasoningPolicy = "separate",
    tools: bool = True,
    thinking: bool = True,
) -> list[Event]:
    """What comes of these items, each in a read of its own; a string is raw text."""
    found = family_called(family) if isinstance(family, str) else family
    channels = Channels(found, policy=policy, tools=tools, thinking=thinking)
    out: list[Event] = []
    for item in items:
        out += channels.feed([raw(item) if isinstance(item, str) else item])
    return out + channels.flush()


def parts(events: Sequence[Event]) -> list[Part]:
    """The events as (kind, text), neighbours of a kind joined."""
    return joined([part_of(event) for event in events])


def joined(said: list[Part]) -> list[Part]:
    out: list[Part] = []
    for kind, text in said:
        if out and out[-1][0] == kind and kind not in PHASES:
            out[-1] = (kind, out[-1][1] + text)
        elif text or kind in PHASES:
            out.append((kind, text))
    return out


def part_of(event: Event) -> Part:
    match event:
        case Text(added=True):
            return "added", event.text
        case Text():
            return event.channel.value, event.text
        case ToolMarkup(phase="opened"):
            return "opened", event.name or ""
        case ToolMarkup(phase="text"):
            return "tool", event.text
        case ToolMarkup():
            return event.phase, ""
        case Withheld():
            return event.kind, event.text
        case _:
            return type(event).__name__, ""


def split_naively(text: str, family: Family, *, tools: bool, thinking: bool) -> list[Part]:
    """The whole text at once, character by character, by what the reference says of the states."""
    states = (family if tools else family.without_tools).states
    state = states[family.start if thinking else family.start_without_thinking]
    out: list[Part] = []
    header, position = "", 0
    while position < len(text):
        space = len(text[position:]) - len(text[position:].lstrip()) if state.otherwise else 0
        marker = next((word for word in state.on if text.startswith(word, position + space)), None)
        if state.otherwise and (marker is None or space > 256):
            state = states[state.otherwise]
        elif marker is None:
            out.append(("marker" if state.channel == "markup" else state.channel, text[position]))
            header += text[position] if state.channel == "markup" else ""
            position += 1
        else:
            end = position + space + len(marker)
            out.append(("marker", text[position:end]))
            target, name = follow(state, marker, header[:512])
            out += [("closed", "")] if state.channel == "tool" else []
            out += [("opened", name)] if states[target].channel == "tool" else []
            state, header, position = states[target], "", end
    return [*out, ("cut", "")] if state.channel == "tool" else out


def follow(state: State, marker: str, header: str) -> tuple[str, str]:
    for pattern, target in state.headers:
        if found := re.search(pattern, header):
            return target, found.group(1) if found.groups() else ""
    return state.on[marker], ""


# --- The laws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
@given(data=st.data(), text=model_texts, tools=st.booleans(), thinking=st.booleans())
def test_any_tokenisation_gives_what_a_reader_of_the_whole_gives(
    family: Family, data: st.DataObject, text: str, tools: bool, thinking: bool
) -> None:
    wanted = joined(split_naively(text, family, tools=tools, thinking=thinking))
    pieces = data.draw(pieces_of(text))
    assert parts(split(pieces, family, tools=tools, thinking=thinking)) == wanted
    assert parts(split([text], family, tools=tools, thinking=thinking)) == wanted
    assert parts(split(list(text), family, tools=tools, thinking=thinking)) == wanted


@given(data=st.data(), text=model_texts, family=st.sampled_from(EVERY_FAMILY), policy=policies)
def test_no_token_is_lost(data: st.DataObject, text: str, family: Family, policy: ReasoningPolicy) -> None:
    pieces = data.draw(pieces_of(text))
    items: list[Event] = [
        raw(piece, tokens=1, token_ids=[n], logprobs=[{"token": n}]) for n, piece in enumerate(pieces)
    ]
    events = split([*items, Finished(0, "stop", tokens=1, token_ids=[-1])], family, policy=policy)
    told = [event for event in events if isinstance(event, Text | Finished)]
    ids = [n for event in told for n in event.token_ids or []]
    logprobs = [entry["token"] for event in told for entry in event.logprobs or []]
    assert sum(getattr(event, "tokens", 0) for event in events) == len(pieces) + 1
    assert logprobs == [n for n in ids if n >= 0]
    if policy != "hide":
        assert ids == [*range(len(pieces)), -1]


@given(data=st.data(), family=st.sampled_from(EVERY_FAMILY))
def test_of_hidden_tokens_neither_text_nor_logprobs_nor_ids_are_told(data: st.DataObject, family: Family) -> None:
    words = ["a", "b ", " ", "<", "analysis", *(marker for state in family.states.values() for marker in state.on)]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=12)))
    channels = Channels(family, policy="hide", tools=True)
    hidden, told = set[int](), set[int]()
    for n, piece in enumerate(data.draw(pieces_of(text))):
        for event in channels.feed([raw(piece, token_ids=[n], logprobs=[{"token": piece}])]):
            if isinstance(event, Withheld) and event.kind == "hidden":
                hidden.add(n)
            elif isinstance(event, Text):
                assert event.channel is Channel.ANSWER
                told |= set(event.token_ids or ())
                assert len(event.logprobs or ()) == len(event.token_ids or ())
    assert not hidden & told


# --- Reasoning: separate, hidden, inline ----------------------------------------------------------

INLINE_TEXT = ["<think>", "hm", "m</think>", "\n\nHi"]
ENGINE_SPLIT = [thought("hm"), thought("m"), raw("\n\nHi")]


@pytest.mark.parametrize(
    ("items", "markers"),
    [pytest.param(INLINE_TEXT, True, id="left inline"), pytest.param(ENGINE_SPLIT, False, id="split by the engine")],
)
@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("separate", [("reasoning", "hmm"), ("answer", "\n\nHi")]),
        ("hide", [("hidden", "hmm"), ("answer", "\n\nHi")]),
        ("inline", [("added", "<think>"), ("answer", "hmm"), ("added", "</think>"), ("answer", "\n\nHi")]),
    ],
)
def test_the_three_ways_to_show_reasoning(
    items: list[Any], markers: bool, policy: ReasoningPolicy, wanted: list[Part]
) -> None:
    events = [event if isinstance(event, str) else Text(0, event.channel, event.text) for event in items]
    found = parts(split(events, policy=policy))
    assert [part for part in found if part[0] != "marker"] == wanted
    assert [part for part in found if part[0] == "marker"] == [("marker", "<think>"), ("marker", "</think>")] * markers


def test_inlined_reasoning_is_marked_as_such() -> None:
    inlined = [event for event in split(["<think>a</think>b"], policy="inline") if isinstance(event, Text)]
    assert [(event.text, event.added, event.inlined) for event in inlined] == [
        ("<think>", True, True),
        ("a", False, True),
        ("</think>", True, True),
        ("b", False, False),
    ]


@pytest.mark.parametrize(
    "following",
    [
        pytest.param([], id="the end of the stream"),
        pytest.param([Finished(0, "length")], id="the end of the choice"),
        pytest.param([ToolDelta(0, 0, "c1", "f", "{}")], id="a call by the engine's parser"),
        pytest.param(["</think><tool_call>"], id="a call in the text"),
    ],
)
def test_inlined_reasoning_is_closed_before(following: list[Event | str]) -> None:
    events = split(["<think>hm", *following], policy="inline")
    kinds = [kind for kind, _ in parts(events) if kind != "marker"]
    assert kinds[:3] == ["added", "answer", "added"]
    assert kinds.count("added") == 2


def test_hidden_text_leaves_no_trace_where_one_chunk_holds_answer_and_reasoning() -> None:
    said = "a<|end|><|channel|>analysis<|message|>secret"
    logprobs = [{"token": "a"}, {"token": "secret"}]
    events = split([raw(said, logprobs=logprobs, token_ids=[1, 2])], "harmony", policy="hide")
    assert [event for event in events if isinstance(event, Text)] == [Text(0, Channel.ANSWER, "a")]
    held = split([raw("a<|end|><|channel|>analysis<|message|><", token_ids=[1, 2]), "b"], "harmony", policy="hide")
    assert [event for event in held if isinstance(event, Text)] == [Text(0, Channel.ANSWER, "a")]


# --- Who splits -----------------------------------------------------------------------------------


def test_where_the_engine_splits_a_family_that_starts_thinking_does_not() -> None:
    assert parts(split([thought("hm"), "Hi"], "deepseek-r1")) == [("reasoning", "hm"), ("answer", "Hi")]


def test_where_thinking_is_off_a_family_that_starts_thinking_does_not() -> None:
    assert parts(split(["Hi"], "deepseek-r1")) == [("reasoning", "Hi")]
    assert parts(split(["Hi"], "deepseek-r1", thinking=False)) == [("answer", "Hi")]


def test_text_that_was_held_is_let_go_when_the_engine_speaks_of_something_else() -> None:
    assert parts(split(["Hi </too", thought("hm")])) == [("answer", "Hi </too"), ("reasoning", "hm")]
    assert parts(split([" \n", thought("hm")])) == [("answer", " \n"), ("reasoning", "hm")]
    refusal = Text(0, Channel.ANSWER, "No.", refusal=True)
    assert parts(split(["<thi", refusal])) == [("answer", "<thiNo.")]
    assert [event.refusal for event in split(["<thi", refusal]) if isinstance(event, Text)] == [False, True]


def test_a_call_in_the_text_is_cut_where_the_engine_speaks_of_something_else() -> None:
    events = split(['<tool_call>{"a', thought("hm"), "Hi"])
    assert parts(events)[1:] == [("opened", ""), ("tool", '{"a'), ("cut", ""), ("reasoning", "hm"), ("answer", "Hi")]


def test_where_no_tools_are_offered_their_markers_are_text() -> None:
    assert parts(split(["<tool_call>{}</tool_call>"], tools=False)) == [("answer", "<tool_call>{}</tool_call>")]


def test_other_events_pass() -> None:
    role, call = Role(0, "assistant"), ToolDelta(0, 0, "c1", "f", "{}")
    assert split([role, call]) == [role, call]


def test_each_choice_has_its_own_state() -> None:
    channels = Channels(family_called("qwen3"), policy="separate", tools=True)
    events = channels.feed([raw("<think>a"), Text(1, Channel.RAW, "b <tool"), raw("c")])
    events += channels.flush()
    assert [(event.choice, event.channel.value, event.text) for event in events if isinstance(event, Text)] == [
        (0, "reasoning", "a"),
        (1, "answer", "b "),
        (0, "reasoning", "c"),
        (1, "answer", "<tool"),
    ]


# --- White space before a block -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["\n", "\n", "<think>"], [("marker", "\n\n<think>")]),
        (["\n", "Hi"], [("answer", "\nHi")]),
        (["\n"], [("answer", "\n")]),
        ([" " * 256, "<think>"], [("marker", " " * 256 + "<think>")]),
        ([" " * 257, "<think>"], [("answer", " " * 257 + "<think>")]),
        (["Hi\n", "<tool_call>"], [("answer", "Hi\n"), ("marker", "<tool_call>"), ("opened", ""), ("cut", "")]),
        (
            ["<think>a</think>", "\n\n", "<tool_call>"],
            [
                ("marker", "<think>"),
                ("reasoning", "a"),
                ("marker", "</think>\n\n<tool_call>"),
                ("opened", ""),
                ("cut", ""),
            ],
        ),
        (
            ["<tool_call>{}</tool_call>", "\n", "<tool_call>"],
            [
                *[
                    ("marker", "<tool_call>"),
                    ("opened", ""),
                    ("tool", "{}"),
                    ("marker", "</tool_call>"),
                    ("closed", ""),
                ],
                *[("marker", "\n<tool_call>"), ("opened", ""), ("cut", "")],
            ],
        ),
    ],
)
def test_space_belongs_to_the_block_that_it_stands_before(pieces: list[str], wanted: list[Part]) -> None:
    assert parts(split(pieces)) == wanted


def test_space_is_not_held_longer_than_it_may_stand_before_a_block() -> None:
    channels = Channels(family_called("qwen3"), policy="separate", tools=True)
    assert [channels.feed([raw(" ")]) for _ in range(256)] == [[]] * 256
    assert channels.feed([raw(" ")]) == [Text(0, Channel.ANSWER, " " * 257)]


# --- Harmony --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("<|channel|>analysis", [("reasoning", "x")]),
        ("<|start|>assistant<|channel|>analysis", [("reasoning", "x")]),
        ("<|channel|>final", [("answer", "x")]),
        ("<|channel|>commentary", [("answer", "x")]),
        ("<|channel|>whatever", [("answer", "x")]),
        ("<|start|>assistant", [("answer", "x")]),
        ("<|channel|>commentary to=functions.f <|constrain|>json", [("opened", "f"), ("tool", "x"), ("cut", "")]),
        ("<|start|>assistant to=functions.f<|channel|>commentary", [("opened", "f"), ("tool", "x"), ("cut", "")]),
        ("<|channel|>analysis to=python code", [("opened", "python"), ("tool", "x"), ("cut", "")]),
        ("<|channel|>final" + "y" * 600 + "to=functions.f", [("answer", "x")]),
    ],
)  # fmt: skip
def test_a_header_says_where_its_text_belongs(header: str, wanted: list[Part]) -> None:
    found = parts(split([f"{header}<|message|>", "x"], "harmony"))
    assert found == [("marker", f"{header}<|message|>"), *wanted]
    assert parts(split(list(f"{header}<|message|>x"), "harmony")) == found


def test_a_header_that_no_rule_fits_leads_where_its_marker_does() -> None:
    header = State("markup", {"|": "said"}, headers=(("^x$", "thought"),))
    states = {"header": header, "said": State("answer"), "thought": State("reasoning")}
    family = Family("headed", (), "header", "header", states)
    assert parts(split(["x|a"], family)) == [("marker", "x|"), ("reasoning", "a")]
    assert parts(split(["y|a"], family)) == [("marker", "y|"), ("answer", "a")]


def test_a_whole_turn_of_harmony() -> None:
    said = (
        "<|channel|>analysis<|message|>Need it.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    events = split([said], "harmony")
    assert [part for part in parts(events) if part[0] != "marker"] == [
        ("reasoning", "Need it."),
        ("opened", "f"),
        ("tool", "{}"),
        ("closed", ""),
        ("answer", "Done."),
    ]
    assert {event.syntax for event in events if isinstance(event, ToolMarkup)} == {"arguments"}


def test_text_without_any_header_is_answer() -> None:
    assert parts(split(["Hi"], "harmony")) == [("answer", "Hi")]


# --- What comes with a token ----------------------------------------------------------------------


def test_tokens_of_a_marker_are_the_marker_s_and_its_ids_go_with_what_comes_next() -> None:
    events = split([raw("<think>", tokens=1, token_ids=[7]), raw("a", tokens=1, token_ids=[8])])
    assert [(type(event).__name__, getattr(event, "tokens", 0)) for event in events] == [("Withheld", 1), ("Text", 1)]
    assert getattr(events[1], "token_ids", None) == [7, 8]


def test_what_came_with_held_text_goes_with_the_finish_where_no_text_follows() -> None:
    finish = Finished(0, "stop", tokens=1, logprobs=[3], token_ids=[3])
    empty = raw("", tokens=1, logprobs=[2], token_ids=[2])
    *_, last = split([raw("<think>", logprobs=[1], token_ids=[1], tokens=1), empty, finish])
    assert last == Finished(0, "stop", tokens=2, logprobs=[1, 2, 3], token_ids=[1, 2, 3])


def test_an_empty_delta_of_the_engine_s_own_reasoning_keeps_its_tokens_for_the_next() -> None:
    events = split([thought("", tokens=1, token_ids=[1]), thought("a", tokens=1, token_ids=[2])])
    assert events == [thought("a", tokens=2, token_ids=[1, 2])]


def test_what_follows_on_within_one_read_is_one_event() -> None:
    channels = Channels(family_called("qwen3"), policy="separate", tools=True)
    first = raw("a", tokens=1, logprobs=[1], token_ids=[1])
    second = raw("b", tokens=2, logprobs=[2], token_ids=[2])
    third, fourth = raw("c"), Text(1, Channel.RAW, "d")
    assert channels.feed([first, second, third, fourth]) == [
        Text(0, Channel.ANSWER, "abc", tokens=3, logprobs=[1, 2], token_ids=[1, 2]),
        Text(1, Channel.ANSWER, "d"),
    ]


def test_logprobs_that_begin_in_the_middle_of_a_read_are_kept() -> None:
    channels = Channels(family_called("qwen3"), policy="separate", tools=True)
    [event] = channels.feed([raw("a"), raw("b", logprobs=[2], token_ids=[2])])
    assert event == Text(0, Channel.ANSWER, "ab", logprobs=[2], token_ids=[2])
