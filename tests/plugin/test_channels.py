"""Ids -> channels: every id comes out once, in order, in the channel that the family's table says."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_vllm.channels import FamilyError, Run, Table, Tables, Tagger
from penstock_vllm.frames import Channel
from penstock_vllm.vocabulary import TokenizerVocabulary
from support.reference_tagger import FakeVocabulary, tags
from support.tokenizers_made import made

ANSWER, REASONING, TOOL, MARKER = Channel

QWEN: dict[str, Any] = {
    "start": "opening",
    "states": {
        "opening": {
            "channel": "answer",
            "on": {"<think>": "reasoning", "<tool_call>": "tool"},
            "otherwise": "answer",
        },
        "answer": {"channel": "answer", "on": {"<tool_call>": "tool"}},
        "reasoning": {"channel": "reasoning", "on": {"</think>": "opening"}},
        "tool": {"channel": "tool", "on": {"</tool_call>": "opening"}},
    },
}
HARMONY: dict[str, Any] = {
    "start": "between",
    "states": {
        "between": {
            "channel": "answer",
            "on": {"<|start|>": "header", "<|channel|>": "header", "<|end|>": "between", "<|return|>": "between"},
            "otherwise": "answer",
        },
        "header": {
            "channel": "markup",
            "on": {"<|message|>": "answer"},
            "headers": [[r"to=(?:functions\.)?([\w.-]+)", "tool"], [r"(?:^|\|>)\s*analysis", "reasoning"]],
        },
        "reasoning": {"channel": "reasoning", "on": {"<|end|>": "between", "<|start|>": "header"}},
        "answer": {"channel": "answer", "on": {"<|end|>": "between", "<|start|>": "header", "<|return|>": "between"}},
        "tool": {"channel": "tool", "on": {"<|end|>": "between", "<|start|>": "header"}},
    },
}


def flat(runs: Sequence[Run]) -> list[tuple[int, int]]:
    return [(channel, number) for channel, ids in runs for number in ids]


def told(tagger: Tagger, ids: Sequence[int], *, ended_by_token: bool = False) -> list[tuple[Channel, list[int]]]:
    """The runs of a whole choice that came an id a step."""
    out: list[tuple[int, int]] = []
    for number in ids[:-1]:
        out += flat(tagger.feed([number]))
    out += flat(tagger.finish(ids[-1:], ended_by_token=ended_by_token))
    runs: list[tuple[Channel, list[int]]] = []
    for channel, number in out:
        if runs and runs[-1][0] == channel:
            runs[-1][1].append(number)
        else:
            runs.append((Channel(channel), [number]))
    return runs


def spelled(shape: str, runs: list[tuple[Channel, list[int]]]) -> list[tuple[Channel, str]]:
    piece = TokenizerVocabulary(made(shape).tokenizer).piece
    return [(channel, b"".join(map(piece, ids)).decode(errors="replace")) for channel, ids in runs]


def table(shape: str, family: dict[str, Any]) -> Table:
    return Table(family, TokenizerVocabulary(made(shape).tokenizer))


def walk(shape: str, family: dict[str, Any], text: str, prompt: str = "") -> list[tuple[Channel, str]]:
    encode = made(shape).encode
    return spelled(shape, told(table(shape, family).tagger(encode(prompt)), encode(text)))


# --- Markers that are one token -----------------------------------------------------------------------


def test_thinking_answer_and_tool_call() -> None:
    text = "<think>\nHm.\n</think>\n\nOne moment.\n<tool_call>\n{}\n</tool_call>"
    assert walk("qwen", QWEN, text) == [
        (MARKER, "<think>"),
        (REASONING, "\nHm.\n"),
        (MARKER, "</think>"),
        (ANSWER, "\n\nOne moment.\n"),
        (MARKER, "<tool_call>"),
        (TOOL, "\n{}\n"),
        (MARKER, "</tool_call>"),
    ]


def test_the_token_that_ends_a_choice_is_a_marker_and_no_answer() -> None:
    ids = made("qwen").encode("Hi!<|im_end|>")
    runs = told(table("qwen", QWEN).tagger(()), ids, ended_by_token=True)
    assert spelled("qwen", runs) == [(ANSWER, "Hi!"), (MARKER, "<|im_end|>")]


def test_a_thought_begins_only_where_a_block_may_begin() -> None:
    assert walk("qwen", QWEN, "We write <think> so.") == [(ANSWER, "We write <think> so.")]
    assert walk("qwen", QWEN, "\n <think>so") == [(ANSWER, "\n "), (MARKER, "<think>"), (REASONING, "so")]


def test_a_marker_spelled_by_other_tokens_is_text_where_the_model_has_a_token_for_it() -> None:
    letters = made("qwen").bytes
    ids = [letters[byte] for byte in b"<think>"]
    assert told(table("qwen", QWEN).tagger(()), ids) == [(ANSWER, ids)]


def test_a_burst_of_several_ids_is_parted_within_one_step() -> None:
    encode = made("qwen").encode
    tagger = table("qwen", QWEN).tagger(())
    ids = encode("<think>a</think>b<tool_call>")
    runs = [(Channel(channel), list(run)) for channel, run in tagger.feed(ids)]
    assert spelled("qwen", runs) == [
        (MARKER, "<think>"),
        (REASONING, "a"),
        (MARKER, "</think>"),
        (ANSWER, "b"),
        (MARKER, "<tool_call>"),
    ]


# --- The prompt -----------------------------------------------------------------------------------------

TURN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        (TURN, ANSWER),
        (TURN + "<think>\n", REASONING),
        (TURN + "<think>\n\n</think>\n\n", ANSWER),
        ("<|im_start|>user\nwhat does <tool_call> mean?<|im_end|>\n<|im_start|>assistant\n", ANSWER),
        ("<|im_start|>assistant\n<think>\nNo end<|im_end|>\n" + TURN, ANSWER),
        ("", ANSWER),
        ("<think>\n", REASONING),
    ],
)
def test_the_last_turn_of_the_prompt_says_where_the_model_begins(prompt: str, first: Channel) -> None:
    assert walk("qwen", QWEN, "so", prompt) == [(first, "so")]


def test_the_roles_name_in_the_prompt_does_not_count_as_answer() -> None:
    assert walk("qwen", QWEN, "<think>so", TURN)[0] == (MARKER, "<think>")


def test_each_choice_goes_its_own_way_from_the_prompt() -> None:
    encode = made("qwen").encode
    first = table("qwen", QWEN).tagger(encode(TURN + "<think>\n"))
    second = first.fork()
    first.feed(encode("</think>"))
    assert flat(first.feed(encode("a"))) == [(ANSWER, encode("a")[0])]
    assert flat(second.feed(encode("a"))) == [(REASONING, encode("a")[0])]


def test_a_prompt_far_back_is_not_walked() -> None:
    ids = made("qwen").encode("<think>") + made("qwen").encode("a") * 5000
    assert told(table("qwen", QWEN).tagger(ids), made("qwen").encode("a"))[0][0] is ANSWER


# --- Headers ----------------------------------------------------------------------------------------------


def test_harmonys_headers_say_which_channel_follows() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|message|>{}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
    )
    assert walk("tiktoken", HARMONY, text, "<|start|>user<|message|>hi<|end|><|start|>assistant") == [
        (MARKER, "<|channel|>analysis<|message|>"),
        (REASONING, "Hm."),
        (MARKER, "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|message|>"),
        (TOOL, "{}"),
        (MARKER, "<|end|><|start|>assistant<|channel|>final<|message|>"),
        (ANSWER, "Hello!"),
        (MARKER, "<|return|>"),
    ]


# --- Markers of several tokens ----------------------------------------------------------------------------

SPELLED: dict[str, Any] = {
    "start": "answer",
    "states": {
        "answer": {"channel": "answer", "on": {"[THINK]": "reasoning"}},
        "reasoning": {"channel": "reasoning", "on": {"[/THINK]": "answer"}},
    },
}


@pytest.mark.parametrize("shape", ["plain_delimiters", "tiktoken", "llama", "gemma", "unigram"])
def test_a_marker_of_several_tokens_is_found_however_it_is_spelled(shape: str) -> None:
    runs = walk(shape, SPELLED, "a[THINK]e[/THINK]a")
    assert [channel for channel, _ in runs] == [ANSWER, MARKER, REASONING, MARKER, ANSWER]
    assert "".join(text for _, text in runs).strip() == "a[THINK]e[/THINK]a"


def test_what_may_become_a_marker_is_held_until_that_is_decided() -> None:
    letters = made("qwen").bytes
    tagger = table("qwen", SPELLED).tagger(())
    ids = {letter: letters[ord(letter)] for letter in "a[THINK]"}
    assert flat(tagger.feed([ids["a"], ids["["], ids["T"]])) == [(ANSWER, ids["a"])]
    assert flat(tagger.feed([ids["H"]])) == []
    # "[TH" may not go on with "[", which may itself be a beginning.
    assert flat(tagger.feed([ids["["]])) == [(ANSWER, ids["["]), (ANSWER, ids["T"]), (ANSWER, ids["H"])]
    assert flat(tagger.feed([ids[letter] for letter in "THINK]"])) == [(MARKER, ids[letter]) for letter in "[THINK]"]


def test_what_is_held_goes_out_with_the_end() -> None:
    letters = made("qwen").bytes
    tagger = table("qwen", SPELLED).tagger(())
    ids = [letters[byte] for byte in b"[TH"]
    assert flat(tagger.feed(ids)) == []
    assert flat(tagger.finish([], ended_by_token=False)) == [(ANSWER, number) for number in ids]


def test_ids_without_text_are_not_held_without_bound() -> None:
    tagger = Table(SPELLED, FakeVocabulary([b"[", b""])).tagger(())
    out = flat(tagger.feed([0, *[1] * 1000]))
    assert len(out) == 1001 - len("[/THINK")


# --- Any family, any ids, any cut -----------------------------------------------------------------------

PIECES = [
    b"<",
    b">",
    b"a",
    b"b",
    b" ",
    b"\n",
    b"<a",
    b"b>",
    b">\n",
    b"ab",
    b" <",
    b"</",
    b"\xc3",
    b"\xa9",
    b"<ab>",
    b"#",
]
ADDED = {"<t>": 16, "</t>": 17, "<h>": 18}
VOCABULARY = FakeVocabulary([*PIECES, b"<t>", b"</t>", b"<h>"], ADDED)
MARKERS = ["<ab>", "</ab>", "<t>", "</t>", "<h>", "é#", "##"]
STATES = ["one", "two", "three"]

markers = st.dictionaries(st.sampled_from(MARKERS), st.sampled_from(STATES), max_size=4)
headers = st.lists(st.tuples(st.sampled_from(["a", "^b", "<", ""]), st.sampled_from(STATES)).map(list), max_size=2)


@st.composite
def families(draw: st.DrawFn) -> dict[str, Any]:
    states = {}
    for name in STATES:
        channel = draw(st.sampled_from(["answer", "reasoning", "tool", "markup"]))
        states[name] = {"channel": channel, "on": draw(markers), "headers": draw(headers)}
    if draw(st.booleans()):
        states["one"]["otherwise"] = "two"
    return {"start": draw(st.sampled_from(STATES)), "states": states}


@st.composite
def steps(draw: st.DrawFn) -> list[list[int]]:
    ids = draw(st.lists(st.integers(0, len(VOCABULARY.pieces) - 1), max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[start:end] for start, end in pairwise([0, *cuts, len(ids)])]


@given(families(), steps())
def test_the_tags_are_those_of_the_whole_text_however_it_is_cut_into_steps(
    family: dict[str, Any], steps: list[list[int]]
) -> None:
    tagger = Table(family, VOCABULARY).tagger(())
    ids = [number for step in steps for number in step]
    out: list[tuple[int, int]] = []
    fed = 0
    for step in steps[:-1]:
        out += flat(tagger.feed(step))
        fed += len(step)
        assert fed - len(out) < max(map(len, MARKERS))
    out += flat(tagger.finish(steps[-1], ended_by_token=False))
    assert out == list(zip(tags(family, VOCABULARY, ids), ids, strict=True))


# --- Families from outside ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        {},
        {"start": "a", "states": {}},
        {"start": "b", "states": {"a": {"channel": "answer", "on": {}}}},
        {"start": ["a"], "states": {"a": {"channel": "answer", "on": {}}}},
        {"start": "a", "states": {"a": {"channel": "thoughts", "on": {}}}},
        {"start": "a", "states": {"a": {"channel": "answer", "on": {"x": "b"}}}},
        {"start": "a", "states": {"a": {"channel": "answer", "on": {"": "a"}}}},
        {"start": "a", "states": {"a": {"channel": "answer", "on": {"x" * 257: "a"}}}},
        {"start": "a", "states": {"a": {"channel": "answer", "on": ["x"]}}},
        {"start": "a", "states": {"a": {"channel": "markup", "on": {}, "headers": [["(", "a"]]}}},
        {"start": "a", "states": {"a": {"channel": "markup", "on": {}, "headers": ["a"]}}},
        {"start": "a", "states": {"a": {"channel": "answer", "on": {}, "otherwise": "a"}}},
        {"start": "a", "states": {"a": "answer"}},
        {"start": "a", "states": {str(number): {"channel": "answer", "on": {}} for number in range(65)}},
    ],
)
def test_a_family_that_makes_no_sense_is_refused(family: dict[str, Any]) -> None:
    with pytest.raises(FamilyError):
        Table(family, FakeVocabulary([]))


def test_a_family_is_compiled_once_and_the_least_used_go() -> None:
    tables = Tables(FakeVocabulary([b"a"]))
    families = [{"start": "a", "states": {"a": {"channel": "answer", "on": {f"<{n}>": "a"}}}} for n in range(40)]
    kept = tables.table(families[0])
    for family in families:
        tables.table(family)
        assert tables.table(families[0]) is kept
    assert tables.table(families[39]) is tables.table(families[39])
