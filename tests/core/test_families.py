"""The table of model families: which one is taken, what a row may say, and how one is made of four markers."""

from typing import Any

import pytest

from penstock.core.families import FAMILIES, HARMONY, Family, State, choose_family, thinking_family

ANSWER = State("answer")


def family(states: dict[str, State], start: str = "a", start_without_thinking: str = "a") -> Family:
    return Family("mine", ("mine*",), start, start_without_thinking, states)


# --- Which one is taken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai/gpt-oss-120b", "harmony"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-r1"),
        ("Qwen/QwQ-32B", "deepseek-r1"),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507", "deepseek-r1"),
        ("mistralai/Magistral-Small-2509", "mistral"),
        ("mistralai/Ministral-8B-Instruct", "mistral"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "qwen3"),
        ("", "qwen3"),
    ],
)
def test_the_family_of_a_model(model: str, name: str) -> None:
    found = choose_family(FAMILIES, model)
    assert found is not None
    assert found.name == name


def test_the_first_family_that_fits_is_taken() -> None:
    first, second = (thinking_family(name, ("*Model*",), reasoning=None) for name in ("first", "second"))
    assert choose_family([first, second], "my-model-1") is first
    assert choose_family([second, first, *FAMILIES], "MY-MODEL-1") is second


def test_a_wanted_family_is_taken_whatever_the_model_is_called() -> None:
    assert choose_family(FAMILIES, "Qwen/Qwen3-8B", "harmony") is HARMONY


def test_an_unknown_family_and_a_model_that_nothing_fits_are_none() -> None:
    assert choose_family(FAMILIES, "Qwen/Qwen3-8B", "Harmony") is None
    assert choose_family([HARMONY], "llama") is None


def test_each_built_in_family_has_its_own_name() -> None:
    names = [built_in.name for built_in in FAMILIES]
    assert len(set(names)) == len(names)


# --- What a row may not say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "message"),
    [
        pytest.param({}, r"does not have: \['a'\]", id="no start"),
        pytest.param({"a": State("answer", {"<x>": "b"})}, r"does not have: \['b'\]", id="a marker to nowhere"),
        pytest.param({"a": State("answer", {}, otherwise="b")}, r"does not have: \['b'\]", id="otherwise to nowhere"),
        pytest.param(
            {"a": State("markup", {"<x>": "a"}, headers=(("t", "b"),))},
            r"does not have: \['b'\]",
            id="header to nowhere",
        ),
        pytest.param({"a": State("answer", {"": "a"})}, "'' is empty", id="an empty marker"),
        pytest.param({"a": State("answer", {"<": "a", "<x>": "a"})}, "'<' .* stands within", id="one within another"),
        pytest.param(
            {"a": State("markup", {"<x>": "a"}, headers=(("(", "a"),))},
            r"state 'a' of family 'mine': the header '\(' is no regular expression",
            id="a broken pattern",
        ),
        pytest.param(
            {"a": State("answer", {"<x>": "a"}, otherwise="a")}, "'a' has one", id="a state that passes on to itself"
        ),
        pytest.param(
            {"a": State("answer", {}, otherwise="b"), "b": State("answer", {}, otherwise="a")},
            "otherwise must lead to a state that has none, but 'b' has one",
            id="two states that pass on to each other",
        ),
        pytest.param(
            {"a": State("answer", {"\n<x>": "b"}, otherwise="b"), "b": ANSWER},
            r"none may begin with it: \['\\n<x>'\]",
            id="a marker that begins with the space that is held",
        ),
    ],
)
def test_a_row_that_cannot_work_is_refused(states: dict[str, State], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(states)


def test_the_start_without_thinking_must_be_there_too() -> None:
    with pytest.raises(ValueError, match=r"family 'mine' leads to states that it does not have: \['b'\]"):
        family({"a": ANSWER}, start_without_thinking="b")


def test_a_marker_with_space_before_it_is_fine_where_no_space_is_held() -> None:
    assert family({"a": State("answer", {"\n<x>": "a"})}).states["a"].next_marker("b\n<x>") == (1, 5, "\n<x>")


# --- What a state sees ----------------------------------------------------------------------------

BEFORE = State("answer", {"<x>": "x"}, otherwise="a")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<x>a", (0, 3, "<x>")),
        (" \n\u3000<x>", (0, 6, "<x>")),
        (" " * 256 + "<x>", (0, 259, "<x>")),
        (" " * 257 + "<x>", None),
        ("a<x>", None),
        (" <", None),
        ("", None),
    ],
)
def test_before_a_block_space_is_part_of_the_marker(text: str, found: Any) -> None:
    assert BEFORE.next_marker(text) == found


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("", True),
        (" ", True),
        (" <", True),
        (" " * 256, True),
        (" " * 256 + "<x", True),
        (" " * 257, False),
        ("a", False),
    ],
)
def test_how_long_a_block_may_still_open(text: str, may: bool) -> None:
    assert BEFORE.may_open_a_block(text) is may


# --- A family of four markers ---------------------------------------------------------------------


def channels_of(family: Family) -> dict[str, str]:
    return {name: state.channel for name, state in family.states.items()}


def test_a_family_that_thinks_and_calls() -> None:
    made = thinking_family("mine", ["mine*"], reasoning=("<r>", "</r>"), tools=("<t>", "</t>"), tool_syntax="arguments")
    assert (made.models, made.start, made.start_without_thinking) == (("mine*",), "opening", "opening")
    assert made.states["opening"].on == {"<r>": "reasoning", "<t>": "tool"}
    assert made.states["answer"].on == {"<t>": "tool"}
    assert made.states["reasoning"].on == {"</r>": "opening"}
    assert made.states["tool"].on == {"</t>": "opening"}
    assert made.states["tool"].syntax == "arguments"


def test_a_template_that_opens_the_reasoning() -> None:
    made = thinking_family("mine", [], reasoning=("<r>", "</r>"), opened_by_template=True)
    assert (made.start, made.start_without_thinking) == ("opened", "opening")
    assert made.states["opened"].on == {"<r>": "reasoning", "</r>": "opening"}


def test_without_reasoning_there_is_nothing_for_a_template_to_open() -> None:
    made = thinking_family("mine", [], reasoning=None, opened_by_template=True)
    assert made.start == "opening"
    assert channels_of(made) == {"opening": "answer", "answer": "answer", "tool": "tool"}


def test_without_tools_there_is_no_state_for_them() -> None:
    made = thinking_family("mine", [], reasoning=("<r>", "</r>"), tools=None)
    assert set(channels_of(made).values()) == {"answer", "reasoning"}


@pytest.mark.parametrize("built_in", FAMILIES, ids=lambda built_in: built_in.name)
def test_no_marker_leads_to_a_call_where_no_tools_are_offered(built_in: Family) -> None:
    without = built_in.without_tools
    assert (without.name, without.models, without.start) == (built_in.name, built_in.models, built_in.start)
    for name, state in without.states.items():
        assert all(without.states[target].channel != "tool" for target in state.on.values())
        original = built_in.states[name]
        assert (state.channel, state.otherwise, state.headers) == (
            original.channel,
            original.otherwise,
            original.headers,
        )
    assert built_in.without_tools is without, "made once, not once a request"
