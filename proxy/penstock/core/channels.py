"""Raw text -> reasoning, answer and tool markup, by the family's table; holds back only half-seen markers.

Three ways an engine can speak are met here: it split the channels itself (`reasoning` fields), it left everything
inline, or it split some of it. The first reasoning field of a choice settles that the engine splits, and from
there on its text is answer.
"""

import re
from typing import Literal, assert_never

from penstock.core.events import Channel, Event, Finished, Text, ToolDelta, ToolMarkup, Withheld
from penstock.core.extras import Extras
from penstock.core.families import Family, State

ReasoningPolicy = Literal["separate", "hide", "inline"]

# How much of a header is kept to decide by; a longer one is still counted, but not stored.
_MOST_HEADER = 512
_INLINE_MARKS = ("<think>", "</think>")


class Channels:
    """The step. `thinking` is False where the request switched it off, so that nothing starts as reasoning."""

    def __init__(self, family: Family, *, policy: ReasoningPolicy, tools: bool, thinking: bool = True) -> None:
        self._family = family if tools else family.without_tools
        self._start = family.start if thinking else family.start_without_thinking
        self._policy = policy
        self._choices: dict[int, _ChoiceChannels] = {}

    def begin_in(self, state: str) -> None:
        """The engine knows what the prompt has opened; told before the first text, and nothing where we do not."""
        if state in self._family.states:
            self._start = state

    def feed(self, items: list[Event]) -> list[Event]:
        out: list[Event] = []
        for item in items:
            if isinstance(item, Text):
                self._choice(item.choice).text(item, out)
            elif isinstance(item, ToolDelta):
                self._choice(item.choice).settle(out)
                out.append(item)
            elif isinstance(item, Finished):
                self._choice(item.choice).finish(item, out)
                out.append(item)
            else:
                out.append(item)
        return out

    def flush(self) -> list[Event]:
        """Everything still held, when the stream ends without the choices' own ends."""
        out: list[Event] = []
        for choice in self._choices.values():
            choice.settle(out)
        return out

    def _choice(self, choice: int) -> "_ChoiceChannels":
        found = self._choices.get(choice)
        if found is None:
            found = self._choices[choice] = _ChoiceChannels(choice, self._family, self._start, self._policy)
        return found


class _ChoiceChannels:
    def __init__(self, choice: int, family: Family, start: str, policy: ReasoningPolicy) -> None:
        self._choice = choice
        self._family = family
        self._policy = policy
        self._state: State = family.states[start]
        self._held = ""
        self._header = ""
        self._extras = Extras()
        self._engine_splits = False
        self._inline_open = False

    def text(self, item: Text, out: list[Event]) -> None:
        match item.channel:
            case Channel.RAW:
                self._raw(item, out)
            case Channel.REASONING:
                self._interrupt(out)
                if not self._engine_splits:
                    self._engine_splits = True
                    self._state = self._family.states[self._family.start_without_thinking]
                self._reasoning(item, out)
            case Channel.ANSWER:
                self._interrupt(out)
                self._answer(item, out)
            case _:
                assert_never(item.channel)

    def settle(self, out: list[Event]) -> None:
        """Lets go of what is held: the engine itself said that something else begins."""
        self._interrupt(out)
        self._close_inline(out)

    def finish(self, item: Finished, out: list[Event]) -> None:
        self.settle(out)
        self._extras.give(item)

    def _raw(self, item: Text, out: list[Event]) -> None:
        state = self._state
        if not self._held and state.otherwise is None and state.markers.are_excluded_by(item.text):
            self._emit(state, item, out)
            return
        self._extras.keep(item)
        scan = self._scan_hiding if self._policy == "hide" else self._scan
        self._held = scan(self._held + item.text, out)

    def _scan_hiding(self, text: str, out: list[Event]) -> str:
        """Logprobs and ids do not say which text of a chunk is theirs: where some of it is hidden, none are told."""
        said: list[Event] = []
        held = self._scan(text, said)
        is_hiding = held and self._state.channel == "reasoning"
        is_hiding = is_hiding or any(isinstance(event, Withheld) and event.kind == "hidden" for event in said)
        for event in said:
            if isinstance(event, Text):
                if is_hiding:
                    event.logprobs = event.token_ids = None
                _append(event, out)
            else:
                out.append(event)
        return held

    def _scan(self, text: str, out: list[Event]) -> str:
        """Walks from marker to marker and returns what may yet become one."""
        while text:
            state = self._state
            found = state.next_marker(text)
            if found is not None:
                start, end, marker = found
                if start:
                    self._emit_piece(text[:start], out)
                self._pass_marker(marker, text[start:end], out)
                text = text[end:]
            elif state.otherwise is None:
                free = len(text) - state.markers.unfinished(text)
                if free:
                    self._emit_piece(text[:free], out)
                return text[free:]
            elif state.may_open_a_block(text):
                return text
            else:
                self._state = self._family.states[state.otherwise]
        return ""

    def _pass_marker(self, marker: str, text: str, out: list[Event]) -> None:
        state = self._state
        target, tool = state.on[marker], None
        if marker in state.keeps:
            self._keep_marker(marker, text[: -len(marker)], target, out)
            return
        out.append(Withheld(self._choice, "marker", text, self._extras.take_tokens()))
        if state.headers:
            target, tool = self._read_header(state, target)
        self._enter(self._family.states[target], tool, out)

    def _enter(self, following: State, tool: str | None, out: list[Event]) -> None:
        state, self._state = self._state, following
        if state.channel == "tool":
            out.append(ToolMarkup(self._choice, state.syntax, "", phase="closed"))
        if following.channel == "tool":
            self._close_inline(out)
            out.append(ToolMarkup(self._choice, following.syntax, "", phase="opened", name=tool))

    def _keep_marker(self, marker: str, space: str, target: str, out: list[Event]) -> None:
        """A marker that is also the first text of what it leads to; within one state it is nothing but text."""
        if space:
            out.append(Withheld(self._choice, "marker", space))
        following = self._family.states[target]
        if following is not self._state:
            self._enter(following, None, out)
        self._emit_piece(marker, out)

    def _read_header(self, state: State, default: str) -> tuple[str, str | None]:
        header, self._header = self._header, ""
        for pattern, target in state.headers:
            if found := re.search(pattern, header):
                return target, found.group(1) if found.groups() else None
        return default, None

    def _emit_piece(self, text: str, out: list[Event]) -> None:
        self._emit(self._state, Text(self._choice, Channel.RAW, text), out)

    def _emit(self, state: State, item: Text, out: list[Event]) -> None:
        match state.channel:
            case "answer":
                self._answer(item, out)
            case "reasoning":
                self._reasoning(item, out)
            case "tool":
                self._extras.keep(item)
                out.append(ToolMarkup(self._choice, state.syntax, item.text, tokens=self._extras.take_tokens()))
            case "markup":
                self._extras.keep(item)
                self._header = (self._header + item.text)[:_MOST_HEADER]
                out.append(Withheld(self._choice, "marker", item.text, self._extras.take_tokens()))
            case _:
                assert_never(state.channel)

    def _answer(self, item: Text, out: list[Event]) -> None:
        if not item.text:
            self._extras.keep(item)
            return
        if self._inline_open:
            self._close_inline(out)
        item.channel = Channel.ANSWER
        self._extras.give(item)
        _append(item, out)

    def _reasoning(self, item: Text, out: list[Event]) -> None:
        if not item.text:
            self._extras.keep(item)
            return
        if self._policy == "hide":
            self._extras.keep(item)
            out.append(Withheld(self._choice, "hidden", item.text, self._extras.take_tokens()))
            self._extras.forget()
            return
        if self._policy == "inline" and not self._inline_open:
            self._inline_open = True
            out.append(Text(self._choice, Channel.ANSWER, _INLINE_MARKS[0], added=True, inlined=True))
        item.inlined = self._policy == "inline"
        item.channel = Channel.ANSWER if item.inlined else Channel.REASONING
        self._extras.give(item)
        _append(item, out)

    def _close_inline(self, out: list[Event]) -> None:
        if self._inline_open:
            self._inline_open = False
            out.append(Text(self._choice, Channel.ANSWER, _INLINE_MARKS[1], added=True, inlined=True))

    def _interrupt(self, out: list[Event]) -> None:
        """Something that is not raw text begins: held text was no marker, and a call in the text ends here."""
        self._release(out)
        if self._state.channel == "tool":
            out.append(ToolMarkup(self._choice, self._state.syntax, "", phase="cut"))
            self._state = self._family.states[self._family.start_without_thinking]

    def _release(self, out: list[Event]) -> None:
        if self._held:
            text, self._held = self._held, ""
            if self._state.otherwise is not None:
                self._state = self._family.states[self._state.otherwise]
            self._emit_piece(text, out)


def _append(item: Text, out: list[Event]) -> None:
    """Text that follows on in the same channel within one read becomes one event: one object, one write."""
    last = out[-1] if out else None
    if (
        isinstance(last, Text)
        and last.choice == item.choice
        and last.channel is item.channel
        and last.refusal is item.refusal
        and last.inlined is item.inlined
        and not last.added
    ):
        last.text += item.text
        last.tokens += item.tokens
        if item.logprobs is not None:
            last.logprobs = (last.logprobs or []) + item.logprobs
        if item.token_ids is not None:
            last.token_ids = (last.token_ids or []) + item.token_ids
    else:
        out.append(item)
