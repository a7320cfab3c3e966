"""How each model family writes its channels into the text: one table row per family.

A family is a small state machine over markers. A state says which channel its text belongs to and which marker
leads to which state; `docs/reference/model_families.md` draws them. A family is added by a row here or, without
code, by `families:` in the settings.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from penstock.core.markers import Markers

StateChannel = Literal["answer", "reasoning", "tool", "markup"]

# How much white space may be held before a block; past it the space is text, so that nothing holds without bound.
_MOST_SPACE = 256


@dataclass(frozen=True)
class State:
    """One state of a family.

    `on` maps a marker to the next state. A state with `otherwise` stands before a block: white space is held
    until a marker comes (then it counts as part of the markup) or anything else does (then `otherwise` is
    entered with the space). `headers` belongs to a `markup` state whose text decides where its marker leads:
    the first pattern found in the text wins, its first group names the tool. `syntax` says how a tool
    state's text spells a call. `keeps` are markers that are also the first text of the state they lead to.
    """

    channel: StateChannel
    on: Mapping[str, str] = field(default_factory=dict)
    otherwise: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    syntax: str = ""
    keeps: frozenset[str] = frozenset()

    @cached_property
    def markers(self) -> Markers:
        return Markers(self.on)

    def next_marker(self, text: str) -> tuple[int, int, str] | None:
        """Where the next marker starts and ends, and which it is; before a block its leading space is part of it."""
        if self.otherwise is None:
            found = self.markers.pattern.search(text)
            return None if found is None else (found.start(), found.end(), found.group())
        rest = text.lstrip()
        space = len(text) - len(rest)
        found = self.markers.pattern.match(rest) if space <= _MOST_SPACE else None
        return None if found is None else (0, space + found.end(), found.group())

    def may_open_a_block(self, text: str) -> bool:
        """Whether `text`, standing before a block, may still become white space and a marker."""
        rest = text.lstrip()
        return len(text) - len(rest) <= _MOST_SPACE and self.markers.may_begin(rest)


@dataclass(frozen=True)
class Family:
    """`models` are shell patterns over the lower-cased model name; `start` and `start_without_thinking` name states."""

    name: str
    models: tuple[str, ...]
    start: str
    start_without_thinking: str
    states: Mapping[str, State]

    def __post_init__(self) -> None:
        """Refuses what cannot work now, not at the first token."""
        wanted = {self.start, self.start_without_thinking}
        for state in self.states.values():
            _ = state.markers
            wanted |= set(state.on.values()) | {target for _, target in state.headers}
            wanted |= {state.otherwise} if state.otherwise else set()
        if missing := wanted - set(self.states):
            raise ValueError(f"family {self.name!r} leads to states that it does not have: {sorted(missing)}")
        for name, state in self.states.items():
            self._check(name, state)

    def _check(self, name: str, state: State) -> None:
        place = f"state {name!r} of family {self.name!r}"
        if unknown := sorted(state.keeps - state.on.keys()):
            raise ValueError(f"{place} keeps what is no marker of it: {unknown}")
        for pattern, _ in state.headers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{place}: the header {pattern!r} is no regular expression: {error}") from None
        if state.otherwise is None:
            return
        if self.states[state.otherwise].otherwise is not None:  # two of them would pass the text on for ever
            raise ValueError(f"{place}: otherwise must lead to a state that has none, but {state.otherwise!r} has one")
        if spaced := [marker for marker in state.on if marker[0].isspace()]:
            raise ValueError(f"{place} holds white space before its markers, so none may begin with it: {spaced}")

    @cached_property
    def without_tools(self) -> "Family":
        """The same family for a request that offers no tools: tool markers are plain text there."""
        tool = {name for name, state in self.states.items() if state.channel == "tool"}
        # What stands around calls and has no other use (DeepSeek's list of calls) goes with them.
        around = {name for name, s in self.states.items() if s.channel == "markup" and not s.headers}
        tool |= {name for name in around if tool & set(self.states[name].on.values())}
        states = {name: self._without(state, tool) for name, state in self.states.items()}
        return Family(self.name, self.models, self.start, self.start_without_thinking, states)

    @staticmethod
    def _without(state: State, targets: set[str]) -> State:
        on = {marker: target for marker, target in state.on.items() if target not in targets}
        return State(state.channel, on, state.otherwise, state.headers, state.syntax, state.keeps & on.keys())


def thinking_family(
    name: str,
    models: Iterable[str],
    *,
    reasoning: tuple[str, str] | None,
    opened_by_template: bool = False,
    tools: tuple[str, str] | None = ("<tool_call>", "</tool_call>"),
    tool_syntax: str = "hermes",
) -> Family:
    """A family that thinks between two markers and calls tools between two others.

    `opened_by_template` means that the chat template already wrote the opening marker, so that the model's
    first token is thought (DeepSeek-R1); the marker is accepted there too.
    """
    to_tool = {tools[0]: "tool"} if tools else {}
    to_reasoning = {reasoning[0]: "reasoning"} if reasoning else {}
    states = {
        "opening": State("answer", {**to_reasoning, **to_tool}, otherwise="answer"),
        "answer": State("answer", to_tool),
    }
    if reasoning:
        closed = {reasoning[1]: "opening"}
        states["opened"] = State("reasoning", {**to_reasoning, **closed}, otherwise="reasoning")
        states["reasoning"] = State("reasoning", closed)
    if tools:
        states["tool"] = State("tool", {tools[1]: "opening"}, syntax=tool_syntax)
    start = "opened" if reasoning and opened_by_template else "opening"
    return Family(name, tuple(models), start, "opening", states)


def _calling(
    family: Family, entries: Mapping[str, str], states: Mapping[str, State], kept: Iterable[str] = ()
) -> Family:
    """The family with more states, for tools, entered from its answer by `entries`; `kept` ones are a call's text."""
    entered = {
        name: State(state.channel, {**state.on, **entries}, state.otherwise, keeps=frozenset(kept))
        for name, state in family.states.items()
        if state.channel == "answer"
    }
    all_states = {**family.states, **entered, **states}
    return Family(family.name, family.models, family.start, family.start_without_thinking, all_states)


_DEEPSEEK_ENTRIES = {
    "<｜tool▁calls▁begin｜>": "calls",
    "<｜tool▁call▁begin｜>": "call",
    "<｜DSML｜function_calls>": "dsml",
    "<｜DSML｜tool_calls>": "dsml",
}
_DEEPSEEK_STATES = {
    "calls": State("markup", {"<｜tool▁call▁begin｜>": "call", "<｜tool▁calls▁end｜>": "opening"}),
    "call": State(
        "tool",
        {"<｜tool▁call▁end｜>": "calls", "<｜tool▁calls▁end｜>": "opening", "<｜tool▁sep｜>": "call"},
        syntax="deepseek",
        keeps=frozenset({"<｜tool▁sep｜>"}),
    ),
    "dsml": State("tool", {"</｜DSML｜function_calls>": "opening", "</｜DSML｜tool_calls>": "opening"}, syntax="dsml"),
}
# A call of Llama's has no marker of its own: it is an answer that begins like one. Other orders are answers.
_LLAMA_HEADS = tuple(
    f'{{{space}"{key}"' for key in ("name", "type") for space in ("", " ", "\n", "\n ", "\n  ", "\n    ")
)
_HARMONY_ENDS = {"<|end|>": "between", "<|return|>": "between", "<|call|>": "between"}
_HARMONY_HEADERS = {"<|start|>": "header", "<|channel|>": "header"}

HARMONY = Family(
    "harmony",
    ("*gpt-oss*",),
    start="between",
    start_without_thinking="between",
    states={
        "between": State("answer", {**_HARMONY_HEADERS, **_HARMONY_ENDS}, otherwise="answer"),
        "header": State(
            "markup",
            {"<|message|>": "answer"},
            headers=(
                (r"to=(?:functions\.)?([\w.-]+)", "tool"),
                (r"(?:^|\|>)\s*analysis", "reasoning"),
                (r"", "answer"),
            ),
        ),
        "reasoning": State("reasoning", {**_HARMONY_ENDS, **_HARMONY_HEADERS}),
        "answer": State("answer", {**_HARMONY_ENDS, **_HARMONY_HEADERS}),
        "tool": State("tool", {**_HARMONY_ENDS, **_HARMONY_HEADERS}, syntax="arguments"),
    },
)

# The order counts: the first family with a matching pattern is taken, so the special comes before the general.
FAMILIES: tuple[Family, ...] = (
    HARMONY,
    _calling(
        thinking_family(
            "deepseek-r1",
            ("*deepseek-r1*", "*r1-distill*", "*qwq*", "*qwen3*thinking*"),
            reasoning=("<think>", "</think>"),
            opened_by_template=True,
        ),
        _DEEPSEEK_ENTRIES,
        _DEEPSEEK_STATES,
    ),
    _calling(
        thinking_family("deepseek", ("*deepseek*",), reasoning=("<think>", "</think>"), tools=None),
        _DEEPSEEK_ENTRIES,
        _DEEPSEEK_STATES,
    ),
    _calling(
        thinking_family(
            "mistral",
            ("*magistral*", "*mistral*", "*ministral*", "*devstral*"),
            reasoning=("[THINK]", "[/THINK]"),
            tools=None,
        ),
        {"[TOOL_CALLS]": "tool"},
        {
            "tool": State(
                "tool",
                {"[TOOL_CALLS]": "tool", "[ARGS]": "tool", "[CALL_ID]": "tool"},
                syntax="mistral",
                keeps=frozenset({"[ARGS]", "[CALL_ID]"}),
            )
        },
    ),
    Family(
        "llama",
        ("*llama-3*instruct*", "*llama-4*instruct*", "*meta-llama*"),
        start="opening",
        start_without_thinking="opening",
        states={
            "opening": State(
                "answer",
                {**dict.fromkeys(_LLAMA_HEADS, "tool"), "<|python_tag|>": "tool"},
                otherwise="answer",
                keeps=frozenset(_LLAMA_HEADS),
            ),
            "answer": State("answer", {"<|python_tag|>": "tool"}),
            "tool": State("tool", syntax="llama"),
        },
    ),
    _calling(
        thinking_family("qwen3-coder", ("*qwen3-coder*", "*qwen3.5*", "*qwen3.6*"), reasoning=("<think>", "</think>")),
        {"<function=": "function"},
        {"function": State("tool", {"</tool_call>": "opening"}, syntax="hermes")},
        kept=["<function="],
    ),
    thinking_family("qwen3", ("*",), reasoning=("<think>", "</think>")),
)


def choose_family(families: Iterable[Family], model: str, wanted: str | None = None) -> Family | None:
    """The family called `wanted`, else the first whose pattern matches `model`, else None."""
    name = model.lower()
    for family in families:
        if family.name == wanted if wanted else any(fnmatchcase(name, glob.lower()) for glob in family.models):
            return family
    return None
