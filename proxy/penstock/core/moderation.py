"""Nothing leaves before its verdict.

Every field that carries the model's words is a lane: the answer, the reasoning, a refusal, the arguments of each
call. A lane lets text go as soon as it can no longer be part of a match, puts a placeholder in the place of what a
rule redacts, and stops the stream at what a rule forbids. Without rules the step passes everything.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import orjson

from penstock.core.errors import PolicyError
from penstock.core.events import (
    Annotation,
    Channel,
    EngineUsage,
    Event,
    Ext,
    Extra,
    Failed,
    Finished,
    Intervention,
    Moderated,
    Role,
    Text,
    ToolArguments,
    ToolDenied,
    ToolEnded,
    ToolReady,
    ToolResult,
    ToolStarted,
    Warned,
    Withheld,
)
from penstock.core.folding import view_of
from penstock.core.lanes import JsonIn, Lane
from penstock.core.rules import Policy, RuleChannel, Scanner

_SPOILED = "moderation redacted the arguments, and what is left is no JSON object"
_UNFIT = "moderation redacted the arguments, and what is left may not be executed"
_HIDDEN_NAME = "moderation redacted the name of the tool"
_STOPPED = "moderation stopped the answer"
_NAME_SHOWN = "redacted"
_HIDDEN_ERROR = "the engine reported an error, in words that moderation withholds"
# Values of unknown fields that were found to be clean are remembered, since engines repeat them with every chunk.
_MOST_CLEAN = 64
_MOST_CLEAN_CHARS = 1024
_KEPT_OF_A_CHOICE = ("index", "message", "finish_reason", "stop_reason", "logprobs")
_KEPT_OF_A_MESSAGE = ("role", "content", "reasoning", "reasoning_content", "refusal")


Judge = Callable[[str, str], str | None]


class Moderation:
    """The step. `policy` is None where no rule applies to the stream; `most_held` bounds a lane, in characters.

    `begun` is text that stands before the answer and is the caller's own: a match may begin in it.

    `fits(name, arguments)` says why redacted arguments may not be executed, or None; what came before us has judged
    the ones that the model wrote.
    """

    def __init__(
        self,
        policy: Policy | None,
        *,
        most_held: int,
        fits: Judge | None = None,
        json_in_answer: JsonIn = "none",
        begun: str = "",
    ) -> None:
        self._policy = policy
        self.fits = fits
        self._most_held = most_held
        self._json_in_answer = json_in_answer
        self._begun = begun
        self._lanes: dict[int, dict[str, Lane | None]] = {}
        self._calls: dict[tuple[int, str], _Call] = {}
        self._notes: list[Intervention] = []
        self._told: set[str] = set()
        self._clean: set[str] = set()
        self.halted: PolicyError | None = None
        """Why the stream must end now, once a rule has said so."""

    def feed(self, items: list[Event]) -> list[Event]:
        if self._policy is None:
            return items
        out: list[Event] = []
        for item in items:
            if self.halted is not None:
                self._withhold(item, out)
            elif isinstance(item, Text):
                self._text(item, out)
            else:
                self._other(item, out)
        return out

    def flush(self) -> list[Event]:
        """The stream broke: what may have become part of a match is not sent, since another may go on from here."""
        out: list[Event] = []
        for lanes in self._lanes.values():
            for lane in lanes.values():
                if lane is not None and lane.is_holding:
                    lane.break_off(out) if self.halted is None else lane.withhold(out)
        for call in self._calls.values():
            call.break_off(out)
        return out

    def take_notes(self) -> list[Intervention]:
        """What was done since the last time, for the audit."""
        notes, self._notes = self._notes, []
        return notes

    def fit_to_tell(self, failed: Failed) -> Failed:
        """The engine's error; without its words where a rule finds something in them."""
        said = [failed.message, orjson.dumps(failed.engine_body).decode() if failed.engine_body else ""]
        if self._policy is None or not any(map(self._matches, said)):
            return failed
        return replace(failed, message=_HIDDEN_ERROR, engine_body=None)

    def without_unseen_text(self, whole: Ext) -> Ext:
        """The engine's unstreamed answer without fields of its choices that no lane has scanned."""
        if self._policy is None or not isinstance(whole.get("choices"), list):
            return whole
        own = ("choices", "usage")
        told = {name: value for name, value in whole.items() if name in own or not self._has_match(name, value)}
        if isinstance(usage := told.pop("usage", None), dict):
            told["usage"] = _without_text(usage)
        choices = []
        for choice in whole["choices"]:
            if not isinstance(choice, dict):
                continue
            kept = {name: choice[name] for name in _KEPT_OF_A_CHOICE if name in choice}
            message = choice.get("message")
            if isinstance(message, dict):
                kept["message"] = {name: message[name] for name in _KEPT_OF_A_MESSAGE if name in message}
            if kept.get("logprobs") is not None:
                kept["logprobs"] = None
            choices.append(kept)
        return {**told, "choices": choices}

    # -- by kind of event --------------------------------------------------------------------------

    def _text(self, item: Text, out: list[Event]) -> None:
        if item.added:
            self._settle(item.choice, out)
            self._pass(item, out)
            return
        is_thought = item.channel is Channel.REASONING or item.inlined
        name = "refusal" if item.refusal else "reasoning" if is_thought else "answer"
        lanes = self._lanes.get(item.choice)
        if lanes is None or name not in lanes:
            lane = self._open_text_lane(item, name, "reasoning" if is_thought else "answer")
        else:
            lane = lanes[name]
        if len(self._lanes[item.choice]) > 1:
            self._settle(item.choice, out, but=name)
        if item.logprobs is not None or item.token_ids is not None:
            item.logprobs = item.token_ids = None
            self._tell(Warned("logprobs_dropped", "logprobs and token ids would spell what is redacted"), out)
        if lane is None or self.halted is not None:
            self._pass(item, out)
        else:
            lane.feed(item.text, item.tokens, item, out)

    def _other(self, item: Event, out: list[Event]) -> None:
        match item:
            case ToolStarted():
                self._settle(item.choice, out)
                if self.halted is None:
                    self._start_call(item, out)
            case ToolArguments():
                self._calls[item.choice, item.call_id].feed(item, out)
            case ToolReady():
                call = self._calls[item.choice, item.call_id]
                call.settle(out)
                if self.halted is None and call.makes_ready(item):
                    out.append(item)
            case ToolDenied():
                out.append(self._calls[item.choice, item.call_id].denied(item))
            case ToolEnded():
                self._calls[item.choice, item.call_id].end(item, out)
            case ToolResult() if item.content is not None:
                self._judge_result(item, item.content, out)
            case EngineUsage():
                item.fields = _without_text(item.fields)
                out.append(item)
            case Finished():
                self._settle(item.choice, out)
                item.logprobs = item.token_ids = None
                self._pass(item, out)
            case Annotation() if item.inline and item.choice is not None:
                item.data = self._judged_note(item, out)
                self._pass(item, out)
            case Extra():
                self._scrub(item, out)
            case _:
                out.append(item)

    def _judged_note(self, item: Annotation, out: list[Event]) -> dict[str, Any]:
        """What a citation quotes is the model's text, and comes whole: a string that matches is replaced whole."""
        data = dict(item.data)
        for name, value in data.items():
            if _has_text(value) and self.halted is None:
                text = value if isinstance(value, str) else orjson.dumps(value).decode()
                shown = self._judged(text, "answer", item.choice or 0, f"annotation:{item.kind}", out)
                data[name] = value if shown == text else shown
        return data

    def _judge_result(self, item: ToolResult, content: str, out: list[Event]) -> None:
        """A tool's words are not the model's; where they are shown they are text of the answer all the same."""
        item.content = self._judged(
            content, "tools", item.choice, f"tool_result:{item.name}", out, call_id=item.call_id
        )
        self._pass(item, out)

    def _judged(
        self, text: str, channel: RuleChannel, choice: int, name: str, out: list[Event], *, call_id: str | None = None
    ) -> str:
        """Text that comes whole, with placeholders; what was done to it is told. At a halt nothing is left of it."""
        scanner = self._policy.scanner(channel) if self._policy else None
        if scanner is None or not text:
            return text
        lane = Lane(self, scanner, choice, name, _speaker(Text(choice, Channel.ANSWER, "")), json="none")
        told: list[Event] = []
        lane.take_whole(text, told)
        for event in told:
            if isinstance(event, Moderated):
                event.call_id, event.back, event.length = call_id, 0, 0  # it stands in no block's text
                out.append(event)
        return "" if self.halted else "".join(event.text for event in told if isinstance(event, Text))

    def _pass(self, item: Event, out: list[Event]) -> None:
        if self.halted is None:
            out.append(item)
        else:
            self._withhold(item, out)

    def _scrub(self, item: Extra, out: list[Event]) -> None:
        """Engine fields that Penstock does not know. Those of a choice may spell its text, which no lane would see."""
        of_choice = item.choice is not None
        kept = {
            name: value
            for name, value in item.fields.items()
            if not (_may_spell(value) if of_choice else self._has_match(name, value))
        }
        if len(kept) < len(item.fields):
            names = ", ".join(sorted(set(item.fields) - set(kept)))
            detail = f"moderation cannot read these fields of the engine, so they are left out: {names[:200]}"
            self._tell(Warned("unmoderated_fields", detail), out)
        if kept:
            out.append(replace(item, fields=kept))

    def _has_match(self, name: str, value: Any) -> bool:
        """Whether a rule finds something in a field that comes whole."""
        if not _has_text(value):
            return False
        key = f"{name} {orjson.dumps(value).decode()}"
        if key in self._clean:
            return False
        if self._matches(key):
            return True
        if len(self._clean) < _MOST_CLEAN and len(key) <= _MOST_CLEAN_CHARS:
            self._clean.add(key)
        return False

    def _matches(self, text: str) -> bool:
        folded = view_of(text, json=True, whole=True).text
        channels: tuple[RuleChannel, ...] = ("answer", "reasoning", "tools")
        for channel in channels if folded and self._policy else ():
            scanner = self._policy.scanner(channel) if self._policy else None
            scan = scanner.scan(folded, first=0, whole=True) if scanner else None
            if scan is not None and (scan.halt or any(span.rule.action != "flag" for span in scan.spans)):
                return True
        return False

    def _tell(self, warning: Warned, out: list[Event]) -> None:
        if warning.code not in self._told:
            self._told.add(warning.code)
            out.append(warning)

    def _withhold(self, item: Event, out: list[Event]) -> None:
        """Behind a halt: counted, not sent. Only the ends of calls that the client knows are still told."""
        if isinstance(item, Text | ToolArguments):
            if not (isinstance(item, Text) and item.added):
                out.append(Withheld(item.choice, "moderation", item.text, item.tokens))
        elif isinstance(item, Finished):
            if item.tokens:
                out.append(Withheld(item.choice, "moderation", "", item.tokens))
        elif isinstance(item, ToolEnded):
            if (call := self._calls.get((item.choice, item.call_id))) is not None:
                call.stop(item, out)
        elif isinstance(item, Withheld | EngineUsage | Warned | Role):
            out.append(item)

    # -- lanes -------------------------------------------------------------------------------------

    def _open_text_lane(self, like: Text, name: str, channel: RuleChannel) -> "Lane | None":
        scanner = self._policy.scanner(channel) if self._policy else None
        lane = None
        if scanner is not None:
            spell = _speaker(like)
            json: JsonIn = self._json_in_answer if channel == "answer" else "none"
            lane = Lane(self, scanner, like.choice, name, spell, json=json)
            if self._begun and name == "answer":
                lane.begin_after(self._begun[-self._most_held :])
        self._lanes.setdefault(like.choice, {})[name] = lane
        return lane

    def _settle(self, choice: int, out: list[Event], *, but: str = "") -> None:
        """What was held of the choice's other lanes goes out: what comes next must not overtake it."""
        for name, lane in self._lanes.get(choice, {}).items():
            if lane is not None and name != but and lane.is_holding:
                lane.settle(out) if self.halted is None else lane.withhold(out)

    def _start_call(self, item: ToolStarted, out: list[Event]) -> None:
        scanner = self._policy.scanner("tools") if self._policy else None
        call, engine_id = _Call(self, scanner, item), item.call_id
        call.start(item, out)
        if self.halted is None:
            self._calls[item.choice, engine_id] = call

    @property
    def most_held(self) -> int:
        return self._most_held

    def note(self, intervention: Intervention) -> None:
        self._notes.append(intervention)

    def halt(self, problem: PolicyError) -> None:
        self.halted = self.halted or problem


def _speaker(like: Text) -> Callable[[str, int, bool], Event]:
    choice, channel, refusal, inlined = like.choice, like.channel, like.refusal, like.inlined

    def speak(text: str, tokens: int, added: bool) -> Event:
        return Text(choice, channel, text, tokens, refusal=refusal, added=added, inlined=inlined)

    return speak


def _without_text(fields: Ext) -> Ext:
    return {name: value for name, value in fields.items() if not _has_text(value)}


def _may_spell(value: Any) -> bool:
    """Text, or a list of whole numbers, which may be token ids."""
    if isinstance(value, list):
        return any(type(item) is int or _may_spell(item) for item in value)
    if isinstance(value, dict):
        return any(map(_may_spell, value.values()))
    return _has_text(value)


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_text, inner))


class _Call:
    """One tool call: its name, its arguments as they may be told, and its end."""

    def __init__(self, owner: Moderation, scanner: Scanner | None, item: ToolStarted) -> None:
        self._owner = owner
        self._scanner = scanner
        self._choice = item.choice
        self._call_id = item.call_id
        self._name_is_hidden = False
        self._problem: str | None = None  # what the redaction made of a call that was ready
        self._delivered: list[str] = []
        self._lane: Lane | None = None
        if scanner is not None:
            self._lane = Lane(owner, scanner, item.choice, f"tool:{item.index}", self._speak, json="all")

    def start(self, item: ToolStarted, out: list[Event]) -> None:
        """The name is the model's text, and with some models the id too. Both come whole and are judged at once."""
        told: list[Event] = []
        self._name_is_hidden = self._changes(item.name, item, told)
        if self._owner.halted is None and self._changes(item.call_id, item, []):
            self._call_id = item.call_id = f"call_redacted_{item.choice}_{item.index}"
        if self._owner.halted is None:
            item.name = _NAME_SHOWN if self._name_is_hidden else item.name
            out.append(item)
        for event in told:
            if isinstance(event, Moderated):
                event.call_id, event.back, event.length = None if self._owner.halted else self._call_id, 0, 0
                out.append(event)

    def _changes(self, text: str, item: ToolStarted, told: list[Event]) -> bool:
        if self._scanner is None or not text or self._owner.halted is not None:
            return False
        lane = Lane(self._owner, self._scanner, item.choice, f"tool_name:{item.index}", _nothing, json="none")
        lane.take_whole(text, told)
        return lane.changed

    def feed(self, item: ToolArguments, out: list[Event]) -> None:
        item.call_id = self._call_id
        if self._lane is None:
            self._tell([item], out)
            return
        self._lane.is_written_here = item.added
        told: list[Event] = []
        self._lane.feed(item.text, item.tokens, item, told)
        self._tell(told, out)

    def settle(self, out: list[Event]) -> None:
        if self._lane is not None and self._lane.is_holding:
            told: list[Event] = []
            self._lane.settle(told) if self._owner.halted is None else self._lane.withhold(told)
            self._tell(told, out)

    def break_off(self, out: list[Event]) -> None:
        if self._lane is not None and self._lane.is_holding:
            told: list[Event] = []
            self._lane.break_off(told) if self._owner.halted is None else self._lane.withhold(told)
            self._tell(told, out)

    def makes_ready(self, item: ToolReady) -> bool:
        """Puts the redacted arguments in; False where they may not be executed any more."""
        item.call_id = self._call_id
        if self._name_is_hidden:
            self._problem = _HIDDEN_NAME
        elif self._lane is not None and self._lane.changed:
            arguments = _as_object("".join(self._delivered))
            item.arguments = arguments or ""
            self._problem = _SPOILED if arguments is None else self._misfit(item.name, arguments)
        return self._problem is None

    def _misfit(self, name: str, arguments: str) -> str | None:
        problem = self._owner.fits(name, arguments) if self._owner.fits else None
        return None if problem is None else f"{_UNFIT}: {problem}"

    def denied(self, item: ToolDenied) -> ToolDenied:
        item.call_id = self._call_id
        if self._name_is_hidden:
            item.name, item.reason = _NAME_SHOWN, f"the rule {item.rule} denies it"
        return item

    def end(self, item: ToolEnded, out: list[Event]) -> None:
        """What the end repeats is what was told, not what the model wrote."""
        self.settle(out) if item.status == "complete" else self.break_off(out)
        item.call_id, item.arguments = self._call_id, "".join(self._delivered)
        if item.valid and self._problem is not None:
            item.valid, item.problem = False, self._problem
        elif self._name_is_hidden:
            item.problem = _HIDDEN_NAME
        out.append(item)

    def stop(self, item: ToolEnded, out: list[Event]) -> None:
        """Its end behind a halt: whatever the model made of it, it is not to be executed."""
        if item.valid:
            item.valid, item.problem = False, _STOPPED
        item.status = "incomplete"
        self.end(item, out)

    def _tell(self, told: list[Event], out: list[Event]) -> None:
        for event in told:
            if isinstance(event, ToolArguments):
                self._delivered.append(event.text)
            elif isinstance(event, Moderated):
                event.call_id = self._call_id
            out.append(event)

    def _speak(self, text: str, tokens: int, added: bool) -> Event:
        is_added = added or (self._lane is not None and self._lane.is_written_here)
        return ToolArguments(self._choice, self._call_id, text, tokens, added=is_added)


def _nothing(text: str, tokens: int, added: bool) -> Event:
    return Text(0, Channel.ANSWER, text, tokens, added=added)


def _as_object(arguments: str) -> str | None:
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return None
    return orjson.dumps(value).decode() if isinstance(value, dict) else None
