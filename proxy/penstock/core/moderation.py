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
    Finished,
    Intervention,
    Moderated,
    Role,
    Text,
    ToolArguments,
    ToolEnded,
    ToolReady,
    ToolStarted,
    Warned,
    Withheld,
)
from penstock.core.folding import View, ends_in_string, view_of
from penstock.core.rules import Policy, Rule, RuleChannel, Scan, Scanner, Span

_SPOILED = "moderation redacted the arguments, and what is left is no JSON object"
_UNFIT = "moderation redacted the arguments, and what is left may not be executed"
_HIDDEN_NAME = "moderation redacted the name of the tool"
_KEPT_OF_A_CHOICE = ("index", "message", "finish_reason", "stop_reason", "logprobs")
_KEPT_OF_A_MESSAGE = ("role", "content", "reasoning", "reasoning_content", "refusal")


Judge = Callable[[str, str], str | None]


class Moderation:
    """The step. `policy` is None where no rule applies to the stream; `most_held` bounds a lane, in characters.

    `fits(name, arguments)` says why redacted arguments may not be executed, or None; what came before us has judged
    the ones that the model wrote.
    """

    def __init__(
        self, policy: Policy | None, *, most_held: int, fits: Judge | None = None, json_answer: bool = False
    ) -> None:
        self._policy = policy
        self.fits = fits
        self._most_held = most_held
        self._json_answer = json_answer
        self._lanes: dict[int, dict[str, _Lane | None]] = {}
        self._calls: dict[tuple[int, str], _Call] = {}
        self._notes: list[Intervention] = []
        self._told: set[str] = set()
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
        """What is still held, when the stream ends without the choices' own ends."""
        out: list[Event] = []
        for choice in list(self._lanes):
            self._settle(choice, out)
        for call in self._calls.values():
            call.settle(out)
        return out

    def take_notes(self) -> list[Intervention]:
        """What was done since the last time, for the audit."""
        notes, self._notes = self._notes, []
        return notes

    def without_unseen_text(self, whole: Ext) -> Ext:
        """The engine's unstreamed answer without fields of its choices that no lane has scanned."""
        if self._policy is None or not isinstance(whole.get("choices"), list):
            return whole
        choices = []
        for choice in whole["choices"]:
            kept = {name: choice[name] for name in _KEPT_OF_A_CHOICE if name in choice}
            message = choice.get("message")
            if isinstance(message, dict):
                kept["message"] = {name: message[name] for name in _KEPT_OF_A_MESSAGE if name in message}
            if kept.get("logprobs") is not None:
                kept["logprobs"] = None
            choices.append(kept)
        return {**whole, "choices": choices}

    # -- by kind of event --------------------------------------------------------------------------

    def _text(self, item: Text, out: list[Event]) -> None:
        if item.added:
            self._settle(item.choice, out)
            out.append(item)
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
            case ToolEnded():
                self._calls[item.choice, item.call_id].end(item, out)
            case Finished():
                self._settle(item.choice, out)
                item.logprobs = item.token_ids = None
                self._pass(item, out)
            case Annotation() if item.inline and item.choice is not None:
                item.data = self._judged_note(item, out)
                self._pass(item, out)
            case Extra() if item.choice is not None:
                self._scrub(item, out)
            case _:
                out.append(item)

    def _judged_note(self, item: Annotation, out: list[Event]) -> dict[str, Any]:
        """What a citation quotes is the model's text, and comes whole: a string that matches is replaced whole."""
        scanner = self._policy.scanner("answer") if self._policy else None
        data = dict(item.data)
        for name, value in data.items():
            if scanner is None or not _has_text(value) or self.halted is not None:
                continue
            text = value if isinstance(value, str) else orjson.dumps(value).decode()
            lane = _Lane(self, scanner, item.choice or 0, f"annotation:{item.kind}", _nothing, json=False)
            told: list[Event] = []
            lane.feed(text, 0, Text(0, Channel.ANSWER, text), told)
            lane.settle(told)
            out += [event for event in told if isinstance(event, Moderated)]
            if lane.changed:
                data[name] = "".join(event.text for event in told if isinstance(event, Text))
        return data

    def _pass(self, item: Event, out: list[Event]) -> None:
        if self.halted is None:
            out.append(item)
        else:
            self._withhold(item, out)

    def _scrub(self, item: Extra, out: list[Event]) -> None:
        """Engine fields that Penstock does not know may carry text, which no lane would see."""
        kept = {name: value for name, value in item.fields.items() if not _has_text(value)}
        if len(kept) < len(item.fields):
            names = ", ".join(sorted(set(item.fields) - set(kept)))
            detail = f"moderation cannot read these fields of the engine, so they are left out: {names[:200]}"
            self._tell(Warned("unmoderated_fields", detail), out)
        if kept:
            out.append(replace(item, fields=kept))

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
                item.valid, item.status = False, "incomplete"
                call.end(item, out)
        elif isinstance(item, Withheld | EngineUsage | Warned | Role):
            out.append(item)

    # -- lanes -------------------------------------------------------------------------------------

    def _open_text_lane(self, like: Text, name: str, channel: RuleChannel) -> "_Lane | None":
        scanner = self._policy.scanner(channel) if self._policy else None
        lane = None
        if scanner is not None:
            spell = _speaker(like)
            lane = _Lane(self, scanner, like.choice, name, spell, json=self._json_answer and channel == "answer")
        self._lanes.setdefault(like.choice, {})[name] = lane
        return lane

    def _settle(self, choice: int, out: list[Event], *, but: str = "") -> None:
        """What was held of the choice's other lanes goes out: what comes next must not overtake it."""
        for name, lane in self._lanes.get(choice, {}).items():
            if lane is not None and name != but and lane.is_holding:
                lane.settle(out) if self.halted is None else lane.withhold(out)

    def _start_call(self, item: ToolStarted, out: list[Event]) -> None:
        scanner = self._policy.scanner("tools") if self._policy else None
        call = _Call(self, scanner, item)
        call.start(item, out)
        if self.halted is None:
            self._calls[item.choice, item.call_id] = call

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


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_text, inner))


class _Lane:
    """One field of one choice. Positions are characters that the model wrote, counted from the lane's beginning.

    `_window` is text from `_base` on: what is held, what may still be part of a flagged match, and one character
    before it as context. All before `_sent` has gone out, or was withheld for good.
    """

    __slots__ = (
        "_base", "_choice", "_covered", "_flagged", "_has_context", "_in_string", "_json", "_marks", "_name",
        "_owner", "_scanner", "_sent", "_speak", "_tokens", "_window", "changed",
    )  # fmt: skip

    def __init__(
        self,
        owner: Moderation,
        scanner: Scanner,
        choice: int,
        name: str,
        speak: Callable[[str, int, bool], Event],
        *,
        json: bool,
    ) -> None:
        self._owner = owner
        self._scanner = scanner
        self._choice = choice
        self._name = name
        self._speak = speak
        self._json = json
        self._window = ""
        self._base = 0
        self._sent = 0
        self._has_context = False
        self._in_string = False
        self._covered = -1  # where the last redaction ends, so that one that overlaps needs no second placeholder
        self._flagged: dict[str, int] = {}
        self._marks: list[tuple[int, int]] = []  # position up to which some tokens were paid, and how many
        self._tokens = 0
        self.changed = False

    @property
    def is_holding(self) -> bool:
        return self._base + len(self._window) > self._sent

    def feed(self, text: str, tokens: int, item: Event, out: list[Event]) -> None:
        """`item` is the event that brought the text: where nothing is held and nothing found, it goes on itself."""
        was_idle = not self.is_holding
        window = self._window = self._window + text
        if window.isascii() and not (self._json and "\\" in window):
            view = View(window, None, None, len(window))
        else:
            view = view_of(window, json=self._json, whole=False)
        first = int(self._has_context)
        scan = self._scanner.scan(view.text, first=first, whole=False) if len(view.text) > first else None
        if scan is None and was_idle and not self._json and view.starts is None:
            self._base += len(window) - 1
            self._sent = self._base + 1
            self._window = window[-1]
            self._has_context = True
            self._tokens += tokens
            out.append(item)
            return
        if tokens:
            self._marks.append((self._base + len(window), tokens))
        self._advance(view, scan, out, whole=False)

    def settle(self, out: list[Event]) -> None:
        """Nothing may be held any longer. What comes later is still seen together with the end of this."""
        view = view_of(self._window, json=self._json, whole=True)
        first = int(self._has_context)
        scan = self._scanner.scan(view.text, first=first, whole=True) if len(view.text) > first else None
        self._advance(view, scan, out, whole=True)

    def withhold(self, out: list[Event]) -> None:
        """Another lane was halted: what is held here is not sent either."""
        held = self._window[self._sent - self._base :]
        out.append(Withheld(self._choice, "moderation", held, self._take_tokens(self._base + len(self._window))))
        self._sent = self._base + len(self._window)

    def _advance(self, view: View, scan: Scan | None, out: list[Event], *, whole: bool) -> None:
        spans = scan.spans if scan else []
        size, length = len(self._window), len(view.text)
        free = size if whole else view.start(length - scan.held) if scan and scan.held else view.read
        if scan is not None and scan.halt is not None:
            free = min(free, view.start(scan.stop))
        if not whole and size - free > self._owner.most_held:
            # No rule is that wide: invisible characters pad the text, and what they may hide is not sent.
            return self._halt_for_padding(free, out)
        cursor = self._sent - self._base
        kept = view.start(length - scan.kept) if scan and scan.kept else view.read
        for span in spans:
            start, end = view.start(span.start), view.end(span.end)
            if start >= free:
                break
            if span.rule.action != "flag":
                cursor = self._redact(span.rule, start, end, cursor, out)
            elif start < kept or whole:  # else it may still grow
                cursor = self._flag(span.rule, start, end, cursor, min(end, free), out)
        if free > cursor:
            self._say(cursor, free, out)
            cursor = free
        self._sent = self._base + cursor
        if scan is not None and scan.halt is not None:
            return self._halt(scan.halt, view.start(scan.halt.start), view.end(scan.halt.end), out)
        self._forget(min(kept, cursor), view.starts)
        return None

    def _flag(self, rule: Rule, start: int, end: int, cursor: int, until: int, out: list[Event]) -> int:
        if self._base + start <= self._flagged.get(rule.id, -1):
            return cursor
        self._flagged[rule.id] = self._base + start
        if until > cursor:
            self._say(cursor, until, out)
            cursor = until
        self._note(rule.id, "flag", rule.category, start, self._window[start:end])
        back = max(cursor - start, 0)
        out.append(Moderated("flag", rule.id, rule.category, self._choice, back=back, length=min(end - start, back)))
        return cursor

    def _redact(self, rule: Rule, start: int, end: int, cursor: int, out: list[Event]) -> int:
        base = self._base
        if end <= cursor:
            return cursor
        if start > cursor:
            self._say(cursor, start, out)
        begun = max(start, cursor)
        self._note(rule.id, "redact", rule.category, start, self._window[start:end])
        self.changed = True
        if base + begun != self._covered:
            placeholder = self._placeholder(rule.placeholder, begun)
            out.append(self._speak(placeholder, 0, True))
            size = len(placeholder)
            out.append(Moderated("redact", rule.id, rule.category, self._choice, back=size, length=size))
        out.append(Withheld(self._choice, "moderation", self._window[begun:end], self._take_tokens(base + end)))
        self._covered = base + end
        return end

    def _placeholder(self, text: str, at: int) -> str:
        """Within JSON the placeholder stays a string, or becomes one in the place of a number."""
        if not self._json:
            return text
        quoted = orjson.dumps(text).decode()
        is_inside = ends_in_string(self._window[:at], begins_in_string=self._in_string)
        return quoted[1:-1] if is_inside else quoted

    def _say(self, start: int, end: int, out: list[Event]) -> None:
        out.append(self._speak(self._window[start:end], self._take_tokens(self._base + end), False))

    def _take_tokens(self, until: int) -> int:
        """The tokens of all text up to `until` that no event has carried yet."""
        tokens = 0
        while self._marks and self._marks[0][0] <= until:
            tokens += self._marks.pop(0)[1]
        self._tokens += tokens
        return tokens

    def _forget(self, place: int, starts: list[int] | None) -> None:
        """Drops what stands before `place` but for one visible character, the context of what follows."""
        before = place - 1 if starts is None else max((s for s in starts if s < place), default=-1)
        if before < 0:
            return
        if self._json:
            self._in_string = ends_in_string(self._window[:before], begins_in_string=self._in_string)
        self._window = self._window[before:]
        self._base += before
        self._has_context = True

    def _note(self, rule: str, action: str, category: str, start: int, text: str) -> None:
        begun = self._base + start
        self._owner.note(Intervention(rule, action, category, self._choice, self._name, begun, self._tokens, text))

    def _halt(self, span: Span, start: int, end: int, out: list[Event]) -> None:
        rule = span.rule
        self._note(rule.id, "halt", rule.category, start, self._window[start:end])
        self._stop(rule.id, rule.category, f"the answer was stopped by the rule {rule.id} ({rule.category})", out)

    def _halt_for_padding(self, start: int, out: list[Event]) -> None:
        self._note("hold_limit", "halt", "evasion", start, self._window[start:])
        message = (
            f"more than {self._owner.most_held} characters would have to be held (moderation.hold_chars): invisible "
            "characters pad what may become a match"
        )
        self._stop("hold_limit", "evasion", message, out)

    def _stop(self, rule: str, category: str, message: str, out: list[Event]) -> None:
        out.append(Moderated("halt", rule, category, self._choice, back=0, length=0))
        rest = self._window[self._sent - self._base :]
        out.append(Withheld(self._choice, "moderation", rest, self._take_tokens(self._base + len(self._window))))
        self._sent = self._base + len(self._window)
        self.changed = True
        self._owner.halt(PolicyError("content_filtered", message))


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
        self._lane: _Lane | None = None
        if scanner is not None:
            self._lane = _Lane(owner, scanner, item.choice, f"tool:{item.index}", self._speak, json=True)

    def start(self, item: ToolStarted, out: list[Event]) -> None:
        """The name is the model's text too. It comes whole, so it is judged at once."""
        if self._scanner is not None and item.name:
            lane = _Lane(self._owner, self._scanner, item.choice, f"tool_name:{item.index}", _nothing, json=False)
            told: list[Event] = []
            lane.feed(item.name, 0, item, told)
            lane.settle(told)
            if self._owner.halted is not None:
                out += [event for event in told if isinstance(event, Moderated)]
                self._lane = None
                return
            if lane.changed:
                self._name_is_hidden = True
                item.name = "redacted"
                out.append(item)
                out += [event for event in told if isinstance(event, Moderated)]
                return
        out.append(item)

    def feed(self, item: ToolArguments, out: list[Event]) -> None:
        if self._lane is None:
            out.append(item)
            return
        told: list[Event] = []
        self._lane.feed(item.text, item.tokens, item, told)
        self._tell(told, out)

    def settle(self, out: list[Event]) -> None:
        if self._lane is not None and self._lane.is_holding:
            told: list[Event] = []
            self._lane.settle(told) if self._owner.halted is None else self._lane.withhold(told)
            self._tell(told, out)

    def makes_ready(self, item: ToolReady) -> bool:
        """Puts the redacted arguments in; False where they may not be executed any more."""
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

    def end(self, item: ToolEnded, out: list[Event]) -> None:
        self.settle(out)
        if self._lane is not None and self._lane.changed:
            item.arguments = "".join(self._delivered)
        if item.valid and self._problem is not None:
            item.valid, item.problem = False, self._problem
        elif self._name_is_hidden:
            item.problem = _HIDDEN_NAME
        out.append(item)

    def _tell(self, told: list[Event], out: list[Event]) -> None:
        for event in told:
            if isinstance(event, ToolArguments):
                self._delivered.append(event.text)
            elif isinstance(event, Moderated):
                event.call_id = self._call_id
            out.append(event)

    def _speak(self, text: str, tokens: int, added: bool) -> Event:
        return ToolArguments(self._choice, self._call_id, text, tokens, added=added)


def _nothing(text: str, tokens: int, added: bool) -> Event:
    return Text(0, Channel.ANSWER, text, tokens, added=added)


def _as_object(arguments: str) -> str | None:
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return None
    return orjson.dumps(value).decode() if isinstance(value, dict) else None
