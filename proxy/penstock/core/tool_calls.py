"""Deltas or markup -> whole calls: started as soon as the name is known, ready once when the JSON is whole.

Two sources feed it: the `tool_calls` deltas of an engine that parses calls itself, and the text between a
family's tool markers, read in the family's syntax. Arguments are passed on raw as they come; they are never
repaired. A call ends where its end marker comes, where the next thing begins and its JSON is whole, or with
its choice.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from penstock.core.events import (
    BlockStatus,
    Channel,
    Event,
    Finished,
    Text,
    ToolArguments,
    ToolDelta,
    ToolEnded,
    ToolMarkup,
    ToolReady,
    ToolStarted,
    Warned,
    Withheld,
    utf8_size,
)
from penstock.core.json_text import ObjectEnd
from penstock.core.schemas import Schema
from penstock.core.tool_markup import Part, Reader, reader_of

_LINE_BREAKS = re.compile(r"[\r\n]+")


_OF_TOOLS = (ToolDelta, ToolMarkup)


def _speak_of_tools(items: list[Event]) -> bool:
    for item in items:  # noqa: SIM110  # every token comes by here, and `any` costs twice as much
        if isinstance(item, _OF_TOOLS):
            return True
    return False


class ToolCalls:
    """The step. `offered` are the tools of the request, each with the schema of its arguments where it gave one.

    `new_id(choice, index)` names a call without an id.
    """

    def __init__(self, offered: Mapping[str, Schema | None], new_id: Callable[[int, int], str]) -> None:
        self._offered = offered
        self._new_id = new_id
        self._choices: dict[int, _ChoiceCalls] = {}

    def feed(self, items: list[Event]) -> list[Event]:
        if not self._choices and not _speak_of_tools(items):
            return items
        out: list[Event] = []
        for item in items:
            match item:
                case ToolDelta():
                    self._choice(item.choice).delta(item, out)
                case ToolMarkup():
                    self._choice(item.choice).markup(item, out)
                case Text() if item.choice in self._choices:
                    self._choices[item.choice].end_complete(out)
                    out.append(item)
                case Finished() if item.choice in self._choices:
                    self._choices[item.choice].finish(item, out)
                    out.append(item)
                case _:
                    out.append(item)
        return out

    def flush(self) -> list[Event]:
        """Ends every open call as incomplete: the stream broke, so nothing becomes ready any more."""
        out: list[Event] = []
        for calls in self._choices.values():
            calls.abandon(out)
        return out

    def problem_of(self, name: str, arguments: str) -> str | None:
        """Why a call of an offered tool is not valid with these arguments, or None."""
        return _arguments_problem(name, arguments, self._offered.get(name))

    @property
    def longest_call(self) -> int:
        """UTF-8 bytes of the longest call that is still open, whether they were passed on or held."""
        return max((calls.longest for calls in self._choices.values()), default=0) if self._choices else 0

    def next_round(self) -> None:
        """The engine speaks anew in the same stream: it counts its calls from the beginning, we go on."""
        for calls in self._choices.values():
            calls.next_round()

    def _choice(self, choice: int) -> "_ChoiceCalls":
        found = self._choices.get(choice)
        if found is None:
            found = self._choices[choice] = _ChoiceCalls(choice, self._offered, self._new_id)
        return found


class _Call:
    __slots__ = (
        "call_id", "changed", "doubler", "end", "engine_id", "index", "is_doubled", "is_markup", "is_whole", "name",
        "over", "pieces", "problem", "size", "started", "surplus", "tokens",
    )  # fmt: skip

    def __init__(self, call_id: str, engine_id: str | None, index: int, name: str) -> None:
        self.call_id = call_id
        self.engine_id = engine_id
        self.index = index
        self.name = name
        self.pieces: list[str] = []
        self.size = 0  # UTF-8 bytes of the pieces
        self.tokens = 0  # of arguments that came before the name
        self.problem: str | None = None
        self.started = False
        self.changed = False
        self.over = False
        self.is_markup = False
        self.end: ObjectEnd | None = ObjectEnd()
        self.is_whole = False
        self.surplus = ""  # came behind the last brace: the same again, or a fault; judged when the call ends
        self.doubler = _Doubler()
        self.is_doubled = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class _Doubler:
    """Notices an engine that sends each chunk of a call twice.

    Two signs: an engine that counts tokens with every chunk and adds none for the second of two equal ones, and an
    engine that sent the call's first chunk twice and every one since.
    """

    __slots__ = ("_is_second_due", "_last", "_last_tokens", "_pairs", "_seen")

    def __init__(self) -> None:
        self._seen = 0
        self._last: tuple[str | None, str] = (None, "")
        self._last_tokens = 0
        self._pairs = False
        self._is_second_due = False

    def is_second(self, item: ToolDelta) -> bool:
        """Whether this is the delta before it once again."""
        self._seen += 1
        is_equal, self._last = (item.name, item.arguments) == self._last, (item.name, item.arguments)
        if self._seen == 2 and item.name and is_equal:
            self._pairs = True
            return True
        is_second = bool(item.arguments) and is_equal and item.tokens == 0 and self._last_tokens > 0
        if self._pairs and self._seen > 2 and item.arguments:
            is_second |= self._is_second_due and is_equal
            self._pairs = is_equal or not self._is_second_due
            self._is_second_due = not self._is_second_due
        self._last_tokens = self._last_tokens if is_second else item.tokens
        return is_second


class _ChoiceCalls:
    def __init__(self, choice: int, offered: Mapping[str, Schema | None], new_id: Callable[[int, int], str]) -> None:
        self._choice = choice
        self._offered = offered
        self._new_id = new_id
        self._count = 0
        self._valid = 0
        self._ids: set[str] = set()
        self._open: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._reader: Reader | None = None
        self._markup_call: _Call | None = None
        self._in_text = False
        self._held = 0  # UTF-8 bytes that the reader of markup has and has not passed on

    @property
    def longest(self) -> int:
        return max((call.size for call in self._open), default=0) + self._held

    def delta(self, item: ToolDelta, out: list[Event]) -> None:
        call = self._by_index.get(item.index)
        if call is None or self._is_another(call, item):
            self.end_complete(out)
            call = self._by_index[item.index] = self._new_call(item.call_id, item.name or "")
        elif not call.started:
            call.name = call.name or item.name or ""
        call.engine_id = call.engine_id or item.call_id
        if call.name and not call.started:
            self.end_complete(out)
            self._start(call, out)
        if call.doubler.is_second(item):
            self._drop_double(call, item.arguments, item.tokens, out)
        elif call.over:
            self._come_too_late(call, item, out)
        elif item.arguments:
            self._pass_on(call, item.arguments, item.tokens, out)
        elif item.tokens:
            out.append(Withheld(self._choice, "marker", "", item.tokens))

    def next_round(self) -> None:
        self._by_index.clear()
        self._valid = 0
        self._in_text = False

    def markup(self, item: ToolMarkup, out: list[Event]) -> None:
        match item.phase:
            case "opened":
                self._in_text = True
                self.end_complete(out)
                self._reader, self._held = reader_of(item.syntax, item.name, self._types_of), 0
                self._read("", 0, out)
            case "text":
                self._read(item.text, item.tokens, out)
            case "closed" | "cut":
                self._close_markup(has_end_mark=item.phase == "closed", out=out)

    def end_complete(self, out: list[Event]) -> None:
        """Something else begins: calls whose JSON is whole are over, the others may stay open under it."""
        for call in list(self._open):
            if call is self._markup_call or not call.started or not call.changed:
                continue
            call.changed = False
            self._settle_surplus(call, out)
            # A delta's call is read as it comes; that of markup without an end mark is read here.
            may_be_whole = call.is_whole or (call.is_markup and call.arguments.strip())
            if call.problem is None and may_be_whole and _object_problem(call.arguments) is None:
                self._end(call, None, "complete", out)

    def finish(self, item: Finished, out: list[Event]) -> None:
        status: BlockStatus = "incomplete" if item.reason == "length" else "complete"
        for call in sorted(self._open, key=lambda call: not call.started):  # a block that ends before one that opens
            is_cut = status == "incomplete" and not call.arguments.strip()
            self._end(call, "the answer ended before the arguments" if is_cut else None, status, out)
        if self._valid and item.reason == "stop" and item.cause != "stop_string":
            item.reason, item.calls_in_text = "tool_calls", self._in_text

    def abandon(self, out: list[Event]) -> None:
        for call in list(self._open):
            if not call.started:  # it was never told, so there is nothing to end
                self._open.remove(call)
                out.append(Withheld(self._choice, "marker", call.arguments + call.surplus, call.tokens))
                continue
            self._end(call, "the stream ended before the call did", "incomplete", out)

    @staticmethod
    def _is_another(call: _Call, item: ToolDelta) -> bool:
        """Engines exist that give every call the same index: there a new id, or a name after the end, is a new call."""
        if item.call_id and call.engine_id and item.call_id != call.engine_id:
            return bool(call.pieces or (call.started and item.name))
        return call.over and bool(item.name)

    def _come_too_late(self, call: _Call, item: ToolDelta, out: list[Event]) -> None:
        """The call was whole and the next thing had begun, so it was ended; space after its JSON is no loss."""
        if item.arguments or item.tokens:
            out.append(Withheld(self._choice, "marker", item.arguments, item.tokens))
        if item.arguments.strip():
            out.append(Warned("late_arguments", f"call {call.index} got more arguments after its JSON was whole"))

    def _new_call(self, engine_id: str | None, name: str) -> _Call:
        call_id = engine_id
        if not call_id or call_id in self._ids:
            call_id = self._new_id(self._choice, self._count)
        self._ids.add(call_id)
        call = _Call(call_id, engine_id, self._count, name)
        self._count += 1
        self._open.append(call)
        return call

    def _start(self, call: _Call, out: list[Event]) -> None:
        call.started = True
        out.append(ToolStarted(self._choice, call.call_id, call.index, call.name))
        if call.pieces:  # arguments that came before the name
            out.append(ToolArguments(self._choice, call.call_id, call.arguments, call.tokens))

    def _arguments(self, call: _Call, text: str, tokens: int, out: list[Event], *, added: bool = False) -> None:
        call.pieces.append(text)
        call.size += utf8_size(text)
        call.changed = True
        if call.started:
            out.append(ToolArguments(self._choice, call.call_id, text, tokens, added=added))
        else:
            call.tokens += tokens

    def _pass_on(self, call: _Call, text: str, tokens: int, out: list[Event]) -> None:
        """Passes a delta on up to the last brace; what follows that is kept back until the call ends."""
        own = text
        if call.is_whole:
            own = ""
        elif call.end is not None and (end := call.end.find(text)) is not None:
            call.is_whole, own = True, text[:end]
        call.surplus += text[len(own) :]
        call.size += utf8_size(text) - utf8_size(own)
        if own:
            self._arguments(call, own, tokens, out)
        elif tokens:
            out.append(Withheld(self._choice, "marker", "", tokens))

    def _drop_double(self, call: _Call, text: str, tokens: int, out: list[Event]) -> None:
        if text or tokens:
            out.append(Withheld(self._choice, "marker", text, tokens))
            self._warn_of_double(call, out)

    def _warn_of_double(self, call: _Call, out: list[Event]) -> None:
        if not call.is_doubled:
            call.is_doubled = True
            out.append(Warned("doubled_delta", f"the engine sent parts of call {call.index} twice; they count once"))

    def _settle_surplus(self, call: _Call, out: list[Event]) -> None:
        """What came behind the last brace: the whole of the arguments once again is dropped, all else is theirs."""
        surplus, call.surplus = call.surplus, ""
        call.size -= utf8_size(surplus)
        if surplus.strip() and surplus.strip() == call.arguments.strip():
            self._drop_double(call, surplus, 0, out)
        elif surplus:
            self._arguments(call, surplus, 0, out)
            if surplus.strip():
                call.is_whole, call.end = False, None

    def _types_of(self, name: str, parameter: str) -> list[str]:
        schema = self._offered.get(name)
        return schema.types_of(parameter) if schema else []

    def _read(self, text: str, tokens: int, out: list[Event]) -> None:
        if self._reader is None:
            return
        self._held += utf8_size(text)
        for part in self._reader.feed(text):
            tokens = self._take(part, tokens, out)
        if tokens:
            out.append(Withheld(self._choice, "marker", "", tokens))

    def _take(self, part: Part, tokens: int, out: list[Event]) -> int:
        """One part of the markup; returns the tokens left for the next: arguments and answers are what they pay for."""
        call = self._markup_call
        if part.kind in ("markup", "arguments", "answer"):
            self._held = max(0, self._held - utf8_size(part.text))
        match part.kind:
            case "begin":
                self.end_complete(out)
                call = self._markup_call = self._new_call(part.call_id, part.text)
                call.is_markup = True
                self._start(call, out)
            case "markup" if part.text:
                out.append(Withheld(self._choice, "marker", part.text))
            case "answer":
                out.append(Text(self._choice, Channel.ANSWER, part.text, tokens))
                return 0
            case "end" if call is not None:
                self._markup_call = None
                self._end(call, part.text or None, "complete", out)
            case "arguments" | "written" if call is not None and part.text:
                self._arguments(call, part.text, tokens, out, added=part.kind == "written")
                return 0
            case _:
                pass
        return tokens

    def _close_markup(self, *, has_end_mark: bool, out: list[Event]) -> None:
        """At the end mark the call is over; without one its JSON and its choice's end decide."""
        if self._reader is None:
            return
        reader, self._reader, self._held = self._reader, None, 0
        for part in reader.close():
            call = self._markup_call
            if part.kind != "end" or call is None:
                self._take(part, 0, out)
                continue
            self._markup_call = None
            call.problem = part.text or None
            if has_end_mark or call.problem:
                self._end(call, None, "complete" if has_end_mark else "incomplete", out)

    def _end(self, call: _Call, problem: str | None, status: BlockStatus, out: list[Event]) -> None:
        if not call.started:
            self._start(call, out)
        self._settle_surplus(call, out)
        self._open.remove(call)
        call.over = True
        arguments = call.arguments
        problem = (
            problem
            or call.problem
            or self._name_problem(call.name)
            or _arguments_problem(call.name, arguments, self._offered.get(call.name))
        )
        if problem is None:
            self._valid += 1
            one_line = _LINE_BREAKS.sub(" ", arguments.strip()) or "{}"
            out.append(ToolReady(self._choice, call.call_id, call.name, one_line))
            status = "complete"
        out.append(ToolEnded(self._choice, call.call_id, arguments, problem is None, problem, status))

    def _name_problem(self, name: str) -> str | None:
        if not name:
            return "the model named no tool"
        if name not in self._offered:
            return f"the request offers no tool called {name!r}"
        return None


def _arguments_problem(name: str, arguments: str, schema: Schema | None) -> str | None:
    problem = _object_problem(arguments)
    if problem is not None or schema is None:
        return problem
    problem = schema.problem(_loaded(arguments))
    return None if problem is None else f"the arguments do not fit the schema of {name!r}: {problem}"


def _object_problem(arguments: str) -> str | None:
    """Why `arguments` is not one whole JSON object, or None. No text at all counts as the empty object."""
    value = _loaded(arguments)
    if isinstance(value, _NotJson):
        return f"the arguments are not JSON (at character {value.position})"
    return None if isinstance(value, dict) else "the arguments are not a JSON object"


class _NotJson:
    def __init__(self, position: int) -> None:
        self.position = position


def _loaded(arguments: str) -> Any:
    if not arguments.strip():
        return {}
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError as error:
        return _NotJson(error.pos)
