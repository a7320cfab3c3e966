"""Deltas or markup -> whole calls: started as soon as the name is known, ready once when the JSON is whole.

Two sources feed it: the `tool_calls` deltas of an engine that parses calls itself, and the text between a
family's tool markers, read in the family's syntax. Arguments are passed on raw as they come; they are never
repaired. A call ends where its end marker comes, where the next thing begins and its JSON is whole, or with
its choice.
"""

import json
import re
from collections.abc import Callable

import orjson

from penstock.core.events import (
    BlockStatus,
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

# `{"name": "x", "arguments": {` in the order that every Hermes-style template asks for.
_HERMES_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
# Past this the head is in another order and is read whole at the end marker, not searched again per token.
_MOST_HEAD = 2048
# What follows the arguments is kept up to here, to judge it at the end.
_MOST_TAIL = 2048
_LINE_BREAKS = re.compile(r"[\r\n]+")
_BETWEEN = re.compile(r"[ \t\r\n,:]*")


class ToolCalls:
    """The step. `offered` are the names the request offers; `new_id(choice, index)` names a call without an id."""

    def __init__(self, offered: frozenset[str], new_id: Callable[[int, int], str]) -> None:
        self._offered = offered
        self._new_id = new_id
        self._choices: dict[int, _ChoiceCalls] = {}

    def feed(self, items: list[Event]) -> list[Event]:
        if not self._choices and not any(isinstance(item, ToolDelta | ToolMarkup) for item in items):
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

    @property
    def longest_call(self) -> int:
        """UTF-8 bytes of the longest call that is still open, whether they were passed on or held."""
        return max((calls.longest for calls in self._choices.values()), default=0)

    def _choice(self, choice: int) -> "_ChoiceCalls":
        found = self._choices.get(choice)
        if found is None:
            found = self._choices[choice] = _ChoiceCalls(choice, self._offered, self._new_id)
        return found


class _Call:
    __slots__ = (
        "call_id",
        "changed",
        "engine_id",
        "index",
        "name",
        "over",
        "pieces",
        "problem",
        "size",
        "started",
        "tokens",
    )

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

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class _ChoiceCalls:
    def __init__(self, choice: int, offered: frozenset[str], new_id: Callable[[int, int], str]) -> None:
        self._choice = choice
        self._offered = offered
        self._new_id = new_id
        self._count = 0
        self._valid = 0
        self._ids: set[str] = set()
        self._open: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._reader: _HermesReader | _ArgumentsReader | None = None
        self._markup_call: _Call | None = None
        self._in_text = False

    @property
    def longest(self) -> int:
        held = self._reader.held if isinstance(self._reader, _HermesReader) else 0
        return max((call.size for call in self._open), default=0) + held

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
        if call.over:
            self._come_too_late(call, item, out)
        elif item.arguments:
            self._arguments(call, item.arguments, item.tokens, out)
        elif item.tokens:
            out.append(Withheld(self._choice, "marker", "", item.tokens))

    def markup(self, item: ToolMarkup, out: list[Event]) -> None:
        match item.phase:
            case "opened":
                self._in_text = True
                self.end_complete(out)
                self._reader = _ArgumentsReader(item.name) if item.syntax == "arguments" else _HermesReader()
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
            if call.problem is None and call.arguments.strip() and _object_problem(call.arguments) is None:
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
                out.append(Withheld(self._choice, "marker", call.arguments, call.tokens))
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
            out.append(Warned("late_arguments", f"call {call.call_id} got more arguments after its JSON was whole"))

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

    def _arguments(self, call: _Call, text: str, tokens: int, out: list[Event]) -> None:
        call.pieces.append(text)
        call.size += utf8_size(text)
        call.changed = True
        if call.started:
            out.append(ToolArguments(self._choice, call.call_id, text, tokens))
        else:
            call.tokens += tokens

    def _read(self, text: str, tokens: int, out: list[Event]) -> None:
        reader = self._reader
        if reader is None:
            return
        markup, arguments = reader.feed(text)
        if reader.name is not None and self._markup_call is None:
            self._markup_call = self._new_call(None, reader.name)
            self._start(self._markup_call, out)
        if markup or (tokens and not arguments):
            out.append(Withheld(self._choice, "marker", markup, 0 if arguments else tokens))
        if arguments and self._markup_call is not None:
            self._arguments(self._markup_call, arguments, tokens, out)

    def _close_markup(self, *, has_end_mark: bool, out: list[Event]) -> None:
        """At the end mark the call is over; without one its JSON and its choice's end decide."""
        if self._reader is None:
            return
        reader, self._reader = self._reader, None
        markup, arguments, call_problem = reader.close()
        call, self._markup_call = self._markup_call, None
        if call is None:
            call = self._new_call(None, reader.name or "")
            self._start(call, out)
        if markup:
            out.append(Withheld(self._choice, "marker", markup))
        if arguments:
            self._arguments(call, arguments, 0, out)
        call.problem = call_problem
        if has_end_mark or call_problem:
            self._end(call, None, "complete" if has_end_mark else "incomplete", out)

    def _end(self, call: _Call, problem: str | None, status: BlockStatus, out: list[Event]) -> None:
        if not call.started:
            self._start(call, out)
        self._open.remove(call)
        call.over = True
        arguments = call.arguments
        problem = problem or call.problem or self._name_problem(call.name) or _object_problem(arguments)
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


def _object_problem(arguments: str) -> str | None:
    """Why `arguments` is not one whole JSON object, or None. No text at all counts as the empty object."""
    if not arguments.strip():
        return None
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError as error:
        return f"the arguments are not JSON (at character {error.pos})"
    return None if isinstance(value, dict) else "the arguments are not a JSON object"


class _ArgumentsReader:
    """The markup is nothing but the arguments; the name came with the header (Harmony)."""

    def __init__(self, name: str | None) -> None:
        self.name = name or ""

    def feed(self, text: str) -> tuple[str, str]:
        return "", text

    def close(self) -> tuple[str, str, str | None]:
        return "", "", None


class _HermesReader:
    """`{"name": …, "arguments": {…}}`: `feed` returns what is markup and what is arguments of each piece."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.held = 0  # UTF-8 bytes that wait for the name
        self._pieces: list[str] = []
        self._size = 0
        self._tail = ""
        self._end: _ObjectEnd | None = None
        self._over = False

    def feed(self, text: str) -> tuple[str, str]:
        if self._over:
            self._tail = (self._tail + text)[: _MOST_TAIL + 1]
            return text, ""
        if self._end is not None:
            return self._take(self._end, text)
        self._pieces.append(text)
        head = "".join(self._pieces) if self._size < _MOST_HEAD else ""
        self._size += len(text)
        self.held += utf8_size(text)
        found = _HERMES_HEAD.match(head, 0, _MOST_HEAD)
        name = _json_string(found.group(1)) if found else None
        if found is None or name is None:
            return "", ""
        self.name = name
        self.held = 0
        self._end = _ObjectEnd()
        markup, arguments = self._take(self._end, head[found.end() :])
        return found.group() + markup, arguments

    def close(self) -> tuple[str, str, str | None]:
        """What was still held, as markup and arguments, and what is wrong with the call, if anything."""
        if self._end is None:
            return self._read_whole()
        is_closed = self._over and _closes_the_call(self._tail)
        return "", "", None if is_closed else "the call is not one closed JSON object"

    def _take(self, end: "_ObjectEnd", text: str) -> tuple[str, str]:
        stop = end.find(text)
        if stop is None:
            return "", text
        self._over = True
        self._tail = text[stop:][: _MOST_TAIL + 1]
        return text[stop:], text[:stop]

    def _read_whole(self) -> tuple[str, str, str | None]:
        """A call in another order than the usual one, or none at all; then all of it is shown as its arguments."""
        text = "".join(self._pieces)
        found = _split_call(text)
        if found is None:
            return "", text, "the call is not a JSON object with a name and arguments"
        self.name, markup, arguments = found
        return markup, arguments, None


def _json_string(text: str) -> str | None:
    try:
        return str(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


def _closes_the_call(tail: str) -> bool:
    """Whether `tail`, right behind the arguments, ends the call's object; other keys may come before its end."""
    try:
        rest = orjson.loads('{"":0' + tail) if len(tail) <= _MOST_TAIL else None
    except orjson.JSONDecodeError:
        return False
    return isinstance(rest, dict) and not rest.keys() & {"name", "arguments", "parameters"}


def _split_call(text: str) -> tuple[str, str, str] | None:
    """Name, markup and raw arguments of a call whose keys come in any order, or None."""
    try:
        call = orjson.loads(text)
        spans = _value_spans(text) if isinstance(call, dict) else {}
    except (ValueError, RecursionError):  # also a number of more digits than Python reads
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    start, end = spans.get("arguments") or spans.get("parameters") or (len(text), len(text))
    return call["name"], text[:start] + text[end:], text[start:end]


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where each value of the (valid) JSON object `text` stands."""
    decoder, spans = json.JSONDecoder(strict=False), {}
    position = _skip(text, text.index("{") + 1)
    while text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        start = _skip(text, position)
        _, end = decoder.raw_decode(text, start)
        spans[key] = (start, end)
        position = _skip(text, end)
    return spans


def _skip(text: str, position: int) -> int:
    """The next position that is neither space nor a separator of JSON."""
    found = _BETWEEN.match(text, position)
    return found.end() if found else position


class _ObjectEnd:
    """Finds where a JSON object ends in text that comes in pieces. Each character is looked at once."""

    _OUTSIDE = re.compile(r'["{}\[\]]')
    _INSIDE = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The position right after the object's last brace, or None while it is open."""
        position = 0
        if self._escaped and text:
            self._escaped, position = False, 1
        while found := (self._INSIDE if self._in_string else self._OUTSIDE).search(text, position):
            position = found.end()
            match found.group():
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._escaped = position == len(text)
                    position += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth == 0:
                        return position
        return None
