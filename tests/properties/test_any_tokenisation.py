"""Whatever way the model's text is cut into deltas, the blocks are the same, and they are the right ones."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.channels import ReasoningPolicy
from support import chunks
from support.playbook import FAMILY_NAMES, Json, Outcome, ask, play
from support.strategies import (
    CLUSTERS,
    HALVES,
    WORDS,
    argument_objects,
    cut,
    families,
    hermes_bodies,
    hermes_calls,
    model_texts,
    pieces_of,
    policies,
    thorough,
)

TOOLS = ["f", "g", "get_weather"]
THINKING = [name for name in FAMILY_NAMES if name not in ("bare", "llama")]
QWEN, DEEPSEEK = "qwen3", "deepseek-r1"


def summary(outcome: Outcome, *, with_usage: bool = True) -> dict[str, Any]:
    """What must not depend on the tokens."""
    return {
        "contents": outcome.contents(),
        "types": outcome.types(),
        "finishes": outcome.finishes(),
        "ready": [event["arguments"] for event in outcome.all_of("tool_call.ready")],
        "ends": [(event["valid"], event.get("problem"), event["status"]) for event in outcome.all_of("tool_call.end")],
        "bytes": outcome.usage()["bytes"] if with_usage else None,
    }


def said(pieces: list[str], request: Json, family: str, policy: ReasoningPolicy, reason: str = "stop") -> Outcome:
    return play(request, chunks.answer_of(pieces, reason), family=family, reasoning=policy)


@thorough(1200)
@given(st.data(), model_texts, families, policies, st.booleans(), st.sampled_from(["stop", "length"]))
def test_raw_text(data: st.DataObject, text: str, family: str, policy: Any, offers: bool, reason: str) -> None:
    request = ask(tools=TOOLS if offers else [])
    pieces = data.draw(pieces_of(text))
    assert summary(said(pieces, request, family, policy, reason)) == summary(
        said([text], request, family, policy, reason)
    )


@thorough(500)
@given(st.data(), model_texts, families)
def test_raw_text_cut_between_the_halves_of_its_characters(data: st.DataObject, text: str, family: str) -> None:
    """Engines exist that count in UTF-16 and send each half of a character in a chunk of its own."""
    units = text.encode("utf-16-le")
    halves = "".join(units[n : n + 2].decode("utf-16-le", "surrogatepass") for n in range(0, len(units), 2))
    pieces = data.draw(pieces_of(halves))
    request = ask(tools=TOOLS)
    assert summary(said(pieces, request, family, "separate")) == summary(said([text], request, family, "separate"))


@thorough(700)
@given(st.data(), st.lists(hermes_calls(), min_size=1, max_size=3), st.sampled_from(["", "\n", "and"]))
def test_calls_in_the_text(data: st.DataObject, calls: list[str], between: str) -> None:
    text = between.join(calls)
    cut_up, uncut = (said(p, ask(tools=TOOLS), QWEN, "separate") for p in (data.draw(pieces_of(text)), [text]))
    assert summary(cut_up) == summary(uncut)


@thorough(700)
@given(
    st.data(), model_texts, policies, st.lists(st.sampled_from(["STOP", "TO", "OPS", "ST", "é", "\n\n"]), min_size=1)
)
def test_stop_strings(data: st.DataObject, text: str, policy: Any, stops: list[str]) -> None:
    """The count is another one: an engine that is stopped earlier has said less."""
    request = ask(tools=TOOLS, penstock={"stop": stops[:3], "include_stop": data.draw(st.booleans())})
    pieces = data.draw(pieces_of(text))
    cut_up, uncut = (said(p, request, QWEN, policy) for p in (pieces, [text]))
    assert summary(cut_up, with_usage=False) == summary(uncut, with_usage=False)


# --- Engines that split the channels themselves ---------------------------------------------------

_PLAIN = (*CLUSTERS, *WORDS, *HALVES, "\n\n", " ")
plain_texts = st.lists(st.sampled_from(_PLAIN), min_size=1, max_size=5).map("".join)


@thorough(700)
@given(st.data(), plain_texts, plain_texts, argument_objects, families, policies)
def test_fields_that_the_engine_split(
    data: st.DataObject, reasoning: str, text: str, arguments: Json, family: str, policy: Any
) -> None:
    body = json.dumps(arguments)

    def stream(reasonings: list[str], texts: list[str], bodies: list[str]) -> Outcome:
        call = [chunks.tool(call_id="c1", name="f"), *(chunks.tool(arguments=piece) for piece in bodies)]
        steps = [*map(chunks.reasoning, reasonings), *map(chunks.content, texts), *call]
        return play(ask(tools=TOOLS), chunks.answer(*steps, reason="tool_calls"), family=family, reasoning=policy)

    cut_up = stream(*(data.draw(pieces_of(whole)) for whole in (reasoning, text, body)))
    uncut = stream([reasoning], [text], [body])
    assert summary(cut_up) == summary(uncut)
    assert cut_up.one("tool_call.ready")["arguments"] == arguments
    if policy == "separate":
        assert cut_up.blocks()[0] == f"reasoning: {reasoning}"


# --- What is known to be in the text comes out ----------------------------------------------------

_CHARACTERS = st.text(st.characters(codec="utf-8", exclude_characters="<[|§\u200d"), min_size=1, max_size=20)
prose = _CHARACTERS.map(lambda text: f"a{text}z").filter(lambda text: not _has_flags(text))


def _has_flags(text: str) -> bool:
    return any("\U0001f1e6" <= character <= "\U0001f1ff" for character in text)


def spell(family: str, reasoning: str, answer: str, bodies: list[str]) -> str:
    """One turn as a model of this family writes it."""
    if family == "harmony":
        calls = "".join(f"<|start|>assistant<|channel|>commentary to=functions.f<|message|>{b}<|call|>" for b in bodies)
        thought = f"<|channel|>analysis<|message|>{reasoning}<|end|>"
        return f"{thought}<|start|>assistant<|channel|>final<|message|>{answer}<|end|>{calls}"
    opening, closing, call, end = {
        "custom": ("§§", "§§", "§!", "§!"),
        "deepseek-r1": ("", "</think>", "<tool_call>", "</tool_call>"),
        "deepseek": ("<think>", "</think>", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        "mistral": ("[THINK]", "[/THINK]", "[TOOL_CALLS]f", ""),
    }.get(family, ("<think>", "</think>", "<tool_call>", "</tool_call>"))
    return f"{opening}{reasoning}{closing}{answer}" + "".join(f"{call}{body}{end}" for body in bodies)


@thorough(1000)
@given(
    st.data(),
    st.sampled_from(THINKING),
    prose,
    prose,
    st.lists(argument_objects, max_size=2),
)
def test_what_a_model_of_each_family_writes(
    data: st.DataObject, family: str, reasoning: str, answer: str, calls: list[Json]
) -> None:
    if family in ("harmony", "mistral", "deepseek"):
        bodies = [json.dumps(call) for call in calls]
    else:
        bodies = [data.draw(hermes_bodies("f", call)) for call in calls]
    text = spell(family, reasoning, answer, bodies)
    outcome = said(data.draw(pieces_of(text)), ask(tools=TOOLS), family, "separate")
    assert outcome.blocks()[:2] == [f"reasoning: {reasoning}", f"text: {answer}"]
    assert [event["arguments"] for event in outcome.all_of("tool_call.ready")] == calls
    assert len(outcome.blocks()) == 2 + len(calls)
    assert outcome.finishes()[0]["reason"] == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("start", ["", "<think>", "\n<think>\n"])
def test_deepseek_with_and_without_its_opening_tag(start: str) -> None:
    text = f"{start}hm</think>Hi"
    for size in range(1, len(text)):
        pieces = cut(text, range(size, len(text), size))
        blocks = said(pieces, ask(), DEEPSEEK, "separate").blocks()
        assert [block.replace("\n", "") for block in blocks] == ["reasoning: hm", "text: Hi"]


def test_the_custom_family_is_no_built_in_one() -> None:
    blocks = said(["  §§hm§", "§\nHi <think>§", "!{}§!"], ask(tools=TOOLS), "custom", "separate").blocks()
    assert blocks == ["reasoning: hm", "text: \nHi <think>", "tool_call: ({})"]
