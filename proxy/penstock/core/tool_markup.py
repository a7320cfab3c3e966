"""How each kind of model writes its calls between its markers: one row per syntax.

A reader takes the text as it comes and says what each piece of it is. Three kinds of rows: JSON behind a head that
names the tool, XML whose values become JSON, and arguments alone. Arguments that are JSON already are never rewritten.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import orjson

from penstock.core.json_text import ObjectEnd, value_spans

# Past this the head is in another order and is read whole at the end, not searched again per token.
_MOST_HEAD = 2048
# What follows the arguments is kept up to here, to judge it.
_MOST_TAIL = 2048
# The longest tag of a call in XML, its name included; what is longer is no tag.
_MOST_TAG = 320

ParameterTypes = Callable[[str, str], Sequence[str]]
"""The JSON types that a tool's schema allows for a parameter; none where the schema says nothing of it."""


@dataclass(slots=True)
class Part:
    """What a piece of the text is.

    `begin`: a call begins; `text` is its tool's name, `call_id` the model's own id of it. `markup`: not for the client.
    `arguments`: a raw piece of them. `written`: a piece of the arguments that the model did not write so (XML turned
    into JSON). `end`: the call is over; `text` says what is wrong with it, or nothing. `answer`: it is no call at all.
    """

    kind: Literal["begin", "markup", "arguments", "written", "end", "answer"]
    text: str
    call_id: str | None = None


class Reader(Protocol):
    """Reads what stands between one pair of markers."""

    def feed(self, text: str) -> list[Part]: ...

    def close(self) -> list[Part]:
        """The rest. A call that is still open is ended."""


def reader_of(syntax: str, name: str | None, types: ParameterTypes) -> Reader:
    """A reader of this syntax; `name` is the tool's where a header has named it."""
    if syntax == "arguments":
        return _ArgumentsReader(name or "")
    return _ChosenReader(_SYNTAXES[syntax], types)


# --- Rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """The beginning of a call, up to the brace of its arguments.

    Groups: `json` for a name as a JSON string or `name` for a bare one, and `id`. `wrapped` means that the arguments
    stand in an object that goes on behind them.
    """

    pattern: re.Pattern[str]
    wrapped: bool


@dataclass(frozen=True)
class _JsonSyntax:
    """Calls as JSON. `fence` is what may follow the arguments where nothing wraps them.

    With `between` calls follow each other within one pair of markers, with these characters around them.
    `may_be_answer` is for models whose calls need no marker, so that what looks like a call may be the answer.
    """

    heads: tuple[_Head, ...]
    between: str = ""
    fence: re.Pattern[str] = re.compile(r"\s*")
    may_be_answer: bool = False


@dataclass(frozen=True)
class _XmlSyntax:
    """Calls as XML. The groups of `parameter` are its name and, where the model says it, whether it is a string.

    `tag` begins the tags of parameters; a value whose own end is missing ends there too. `trims` is for templates that
    put each value on lines of its own.
    """

    call: re.Pattern[str]
    call_end: str
    parameter: re.Pattern[str]
    parameter_end: str
    trims: bool

    @property
    def within_call(self) -> re.Pattern[str]:
        return re.compile(f"{self.parameter.pattern}|{re.escape(self.call_end)}")

    @property
    def within_value(self) -> re.Pattern[str]:
        ends = rf"(?=(?:{self.parameter.pattern})|{re.escape(self.call_end)})"
        return re.compile(f"{re.escape(self.parameter_end)}|{ends}")


# The order that every such template asks for; Llama may put its type first.
_OBJECT = _Head(
    re.compile(
        r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*(?P<json>"(?:[^"\\]|\\.)*")'
        r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
    ),
    wrapped=True,
)
_SYNTAXES: Final[Mapping[str, tuple["_JsonSyntax | _XmlSyntax", ...]]] = {
    # Models of one family write either; the first character tells, since XML begins with an angle bracket.
    "hermes": (
        _JsonSyntax((_OBJECT,)),
        _XmlSyntax(
            call=re.compile(r"<function=\s{0,8}([^>\n]{0,256}?)\s{0,8}>"),
            call_end="</function>",
            parameter=re.compile(r"<parameter=([^>]{0,256})>"),
            parameter_end="</parameter>",
            trims=True,
        ),
    ),
    "llama": (_JsonSyntax((_OBJECT,), between=" \t\r\n;", may_be_answer=True),),
    "mistral": (
        _JsonSyntax(
            (
                _OBJECT,
                _Head(
                    re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*(?P<id>\w+)\s*)?(?:\[ARGS\]\s*)?(?=\{)"),
                    wrapped=False,
                ),
            ),
            between=" \t\r\n[],",
        ),
    ),
    "deepseek": (
        _JsonSyntax(
            (
                _Head(
                    re.compile(r"\s*function\s*<｜tool▁sep｜>\s*(?P<name>[^\n<{]+?)\s*\n\s*```(?:json)?\s*(?=\{)"),
                    wrapped=False,
                ),
                _Head(re.compile(r"\s*(?P<name>[^\n<{]+?)\s*<｜tool▁sep｜>\s*(?=\{)"), wrapped=False),
            ),
            fence=re.compile(r"\s*(?:```)?\s*"),
        ),
    ),
    "dsml": (
        _XmlSyntax(
            call=re.compile(r'<｜DSML｜invoke\s{1,8}name="([^">]{0,256})"\s{0,8}>'),
            call_end="</｜DSML｜invoke>",
            parameter=re.compile(
                r'<｜DSML｜parameter\s{1,8}name="([^">]{0,256})"(?:\s{1,8}string="(true|false)")?\s{0,8}>'
            ),
            parameter_end="</｜DSML｜parameter>",
            trims=False,
        ),
    ),
}

SYNTAXES = ("arguments", *_SYNTAXES)


class _ChosenReader:
    """Waits for the first character that is no space, where that tells the syntax; space before it is markup."""

    def __init__(self, syntaxes: tuple[_JsonSyntax | _XmlSyntax, ...], types: ParameterTypes) -> None:
        self._syntaxes = syntaxes
        self._types = types
        self._reader: Reader | None = self._made(syntaxes[0]) if len(syntaxes) == 1 else None

    def feed(self, text: str) -> list[Part]:
        if self._reader is not None:
            return self._reader.feed(text)
        rest = text.lstrip()
        space = [Part("markup", text[: len(text) - len(rest)])] if len(rest) < len(text) else []
        return space + self._choose(rest).feed(rest) if rest else space

    def close(self) -> list[Part]:
        return (self._reader or self._choose("")).close()

    def _choose(self, text: str) -> Reader:
        is_xml = text.startswith("<")
        chosen = next(syntax for syntax in self._syntaxes if isinstance(syntax, _XmlSyntax) is is_xml)
        self._reader = self._made(chosen)
        return self._reader

    def _made(self, syntax: _JsonSyntax | _XmlSyntax) -> Reader:
        return _XmlReader(syntax, self._types) if isinstance(syntax, _XmlSyntax) else _JsonReader(syntax)


# --- Arguments alone ------------------------------------------------------------------------------


class _ArgumentsReader:
    """The text is nothing but the arguments; the name came with the header (Harmony)."""

    def __init__(self, name: str) -> None:
        self._begin = [Part("begin", name)]

    def feed(self, text: str) -> list[Part]:
        begin, self._begin = self._begin, []
        return [*begin, Part("arguments", text)] if text else begin

    def close(self) -> list[Part]:
        return [*self.feed(""), Part("end", "")]


# --- JSON -----------------------------------------------------------------------------------------

_NO_CALL = "the call is not a JSON object with a name and arguments"
_NOT_CLOSED = "the call is not one closed JSON object"


class _JsonReader:
    """Each step takes what it can of the text and leaves the rest to the step that it has set."""

    def __init__(self, syntax: _JsonSyntax) -> None:
        self._syntax = syntax
        self._step: Callable[[str, list[Part]], str]
        self._head_pieces: list[str] = []
        self._head_size = 0
        self._whole = ObjectEnd()
        self._arguments = ObjectEnd()
        self._wrapping = ObjectEnd(depth=1)
        self._is_wrapped = False
        self._tail = ""
        self._restart()

    def feed(self, text: str) -> list[Part]:
        out: list[Part] = []
        while text:
            text = self._step(text, out)
        return out

    def close(self) -> list[Part]:
        out: list[Part] = []
        if self._step == self._read_head:
            self._read_whole("".join(self._head_pieces), out)
        elif self._step == self._read_arguments:
            out.append(Part("end", _NOT_CLOSED))
        elif self._step == self._read_no_call:
            out.append(Part("end", _NO_CALL))
        elif self._step == self._read_tail:
            is_closed = _closes_the_call(self._tail) if self._is_wrapped else self._syntax.fence.fullmatch(self._tail)
            out.append(Part("end", "" if is_closed and not self._syntax.between else _NOT_CLOSED))
        return out

    def _restart(self) -> None:
        self._step = self._read_between if self._syntax.between else self._read_head
        self._head_pieces.clear()
        self._head_size = 0
        self._whole, self._arguments, self._wrapping = ObjectEnd(), ObjectEnd(), ObjectEnd(depth=1)
        self._tail = ""

    def _read_between(self, text: str, out: list[Part]) -> str:
        rest = text.lstrip(self._syntax.between)
        if space := text[: len(text) - len(rest)]:
            out.append(Part("markup", space))
        if rest:
            is_answer = self._syntax.may_be_answer and not rest.startswith("{")
            self._step = self._read_answer if is_answer else self._read_head
        return rest

    def _read_head(self, text: str, out: list[Part]) -> str:
        self._head_pieces.append(text)
        head = "".join(self._head_pieces) if self._head_size < _MOST_HEAD else ""
        self._head_size += len(text)
        for kind in self._syntax.heads:
            found = kind.pattern.match(head, 0, _MOST_HEAD)
            if found is not None and (name := _name_of(found)) is not None:
                out += [Part("begin", name, found.groupdict().get("id")), Part("markup", found.group())]
                self._is_wrapped = kind.wrapped
                self._step = self._read_arguments
                return head[found.end() :]
        if self._head_size >= _MOST_HEAD and self._is_no_call():
            out += [Part("begin", ""), Part("arguments", "".join(self._head_pieces))]
            self._head_pieces.clear()
            self._step = self._read_no_call
            return ""
        if self._syntax.between and self._head_pieces[0].startswith("{"):
            end = self._whole.find(text)
            if end is not None:
                self._read_whole("".join(self._head_pieces)[: self._head_size - len(text) + end], out)
                return text[end:]
        return ""

    def _is_no_call(self) -> bool:
        """Whether no end could make a call of a head that was not found in time: it is no object, whatever follows."""
        begin = next(filter(str.strip, self._head_pieces), "").lstrip()
        return bool(begin) and not begin.startswith("{")

    def _read_no_call(self, text: str, out: list[Part]) -> str:
        out.append(Part("arguments", text))
        return ""

    def _read_whole(self, text: str, out: list[Part]) -> None:
        """A call in another order than the usual one, or none at all; then all of it is shown as its arguments."""
        found = _split_call(text)
        if found is not None and self._syntax.may_be_answer and not found[2]:
            found = None  # anything may have a name
        if found is not None:
            name, markup, arguments = found
            out += [Part("begin", name), Part("markup", markup), Part("arguments", arguments), Part("end", "")]
        elif self._syntax.may_be_answer:
            out.append(Part("answer", text))
        else:
            out += [Part("begin", ""), Part("arguments", text), Part("end", _NO_CALL)]
        self._restart()
        if found is None and self._syntax.may_be_answer:
            self._step = self._read_answer

    def _read_arguments(self, text: str, out: list[Part]) -> str:
        end = self._arguments.find(text)
        if end is None:
            out.append(Part("arguments", text))
            return ""
        out.append(Part("arguments", text[:end]))
        if self._syntax.between and not self._is_wrapped:
            out.append(Part("end", ""))
            self._restart()
        else:
            self._step = self._read_tail
        return text[end:]

    def _read_tail(self, text: str, out: list[Part]) -> str:
        end = self._wrapping.find(text) if self._syntax.between else None
        piece = text if end is None else text[:end]
        out.append(Part("markup", piece))
        self._tail = (self._tail + piece)[: _MOST_TAIL + 1]
        if end is None:
            return ""
        out.append(Part("end", "" if _closes_the_call(self._tail) else _NOT_CLOSED))
        self._restart()
        return text[end:]

    def _read_answer(self, text: str, out: list[Part]) -> str:
        out.append(Part("answer", text))
        return ""


def _name_of(head: re.Match[str]) -> str | None:
    groups = head.groupdict()
    if groups.get("json") is None:
        return groups.get("name")
    try:
        return str(orjson.loads(groups["json"]))
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
        spans = value_spans(text) if isinstance(call, dict) else {}
    except (ValueError, RecursionError):  # also a number of more digits than Python reads
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    start, end = spans.get("arguments") or spans.get("parameters") or (len(text), len(text))
    return call["name"], text[:start] + text[end:], text[start:end]


# --- XML ------------------------------------------------------------------------------------------


class _XmlReader:
    """Holds a value until its end tag, since only the whole of it can be told from JSON of another type.

    What stands between tags is nobody's, and is not held.
    """

    def __init__(self, syntax: _XmlSyntax, types: ParameterTypes) -> None:
        self._syntax = syntax
        self._types = types
        self._name: str | None = None
        self._parameter: tuple[str, bool | None] | None = None
        self._parameters = 0
        self._has_begun = False
        self._passed: list[str] = []  # of the value, up to where its end tag may begin
        self._rest = ""

    def feed(self, text: str) -> list[Part]:
        self._rest += text
        out: list[Part] = []
        while found := self._pattern().search(self._rest):
            before = "".join(self._passed) + self._rest[: found.start()]
            self._passed.clear()
            self._rest = self._rest[found.end() :]
            out.append(Part("markup", before + found.group()))
            self._meet(found, before, out)
        if len(self._rest) > 2 * _MOST_TAG:
            passed, self._rest = self._rest[:-_MOST_TAG], self._rest[-_MOST_TAG:]
            if self._parameter is None:
                out.append(Part("markup", passed))
            else:
                self._passed.append(passed)
        return out

    def close(self) -> list[Part]:
        rest = "".join(self._passed) + self._rest
        out = [Part("markup", rest)] if rest else []
        if not self._has_begun:
            out = [Part("begin", ""), *out, Part("end", "the call is not written as <function=…>…</function>")]
        elif self._name is not None:
            out.append(Part("end", "the call's markup is not closed"))
        return out

    def _pattern(self) -> re.Pattern[str]:
        if self._parameter is not None:
            return self._syntax.within_value
        return self._syntax.call if self._name is None else self._syntax.within_call

    def _meet(self, found: re.Match[str], before: str, out: list[Part]) -> None:
        if self._parameter is not None:
            self._end_value(*self._parameter, before, out)
        elif self._name is None:
            self._name, self._parameters, self._has_begun = found.group(1), 0, True
            out.insert(len(out) - 1, Part("begin", self._name))
        elif found.group() == self._syntax.call_end:
            out += [Part("written", "}" if self._parameters else "{}"), Part("end", "")]
            self._name = None
        else:
            says = found.group(2) if found.re.groups > 1 else None
            self._parameter = found.group(1), None if says is None else says == "true"

    def _end_value(self, parameter: str, is_string: bool | None, raw: str, out: list[Part]) -> None:
        if self._syntax.trims:
            raw = raw.removeprefix("\n").removesuffix("\n")
        value = _value(raw, self._types(self._name or "", parameter), is_string, is_xml_typed=not self._syntax.trims)
        try:
            pair = f"{_dumped(parameter)}: {_dumped(value)}"
        except RecursionError:  # read at one depth, not written at the same
            pair = f"{_dumped(parameter)}: {_dumped(raw)}"
        out.append(Part("written", f", {pair}" if self._parameters else f"{{{pair}"))
        self._parameters += 1
        self._parameter = None


def _value(raw: str, types: Sequence[str], is_string: bool | None, *, is_xml_typed: bool) -> Any:
    """The JSON value that a parameter's text stands for, as vLLM's parsers take it (`coerce_to_schema_type`)."""
    if not is_xml_typed or is_string:
        return _coerced(raw, types) if types else raw
    value = _loaded(raw)
    if value is _UNREADABLE:
        value = raw
    if isinstance(value, str):
        return _coerced(value, types) if types else value
    return value if isinstance(value, dict | list) or not types else _coerced(_dumped(value), types)


_UNREADABLE: Final = object()


def _coerced(text: str, types: Sequence[str]) -> Any:
    """`text` as the first of these types that it can be, in a fixed order; text itself where it is none."""
    for kind, read in _READERS.items():
        if kind in types and (value := read(text)) is not _UNREADABLE:
            return value
    value = _loaded(text)
    return text if value is _UNREADABLE else value


def _integer(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return _UNREADABLE


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return _UNREADABLE
    if not math.isfinite(value):
        return _UNREADABLE
    return int(value) if value.is_integer() else value


def _boolean(text: str) -> Any:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower().strip(), _UNREADABLE)


def _null(text: str) -> Any:
    return None if text.lower() == "null" else _UNREADABLE


def _loaded(text: str) -> Any:
    """Any JSON but the numbers that JSON has not."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return _UNREADABLE


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# The order counts: the narrow before the wide.
_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _loaded,
    "array": _loaded,
    "string": lambda text: text,
}
