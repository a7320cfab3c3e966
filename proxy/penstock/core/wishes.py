"""What a request asks of the tools, the final values and the notes beside the text, read from its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import orjson
import regex

from penstock.core.errors import CallerError
from penstock.core.schemas import Schema, SchemaError, schema_of

ToolRelease = Literal["stream", "ready"]

_PATTERN_SECONDS = 0.1
_DELIMITERS = ("<<<JSON>>>", "<<<END>>>")
_MOST_DELIMITER = 64


@dataclass(frozen=True, slots=True)
class ToolRun:
    """One call to run. `key` is the same for the same call of the same request, whoever runs it."""

    call_id: str
    name: str
    arguments: str
    key: str


@dataclass(frozen=True, slots=True)
class LoopTerms:
    """`bound` are the tools of this request that Penstock runs. `key` begins the idempotency key of each call."""

    bound: frozenset[str]
    rounds: int
    key: str
    shows_results: bool = False


@dataclass(frozen=True, slots=True)
class StructuredWish:
    """What a request wants as a value.

    Without `sections` the whole answer of each choice is one: JSON that fits `schema` (an object where `is_object`),
    one of `choices`, or text that `pattern` matches. With them, each piece between the two delimiters is one, in JSON.
    `shows_text` is False where the caller wants the value without its text.
    """

    schema: Schema | None = None
    schema_name: str | None = None
    is_object: bool = False
    choices: Sequence[str] | None = None
    pattern: str | None = None
    sections: tuple[str, str] | None = None
    shows_text: bool = True

    def read(self, text: str) -> tuple[str, str | None]:
        """The value as JSON, and what is wrong with it, if anything."""
        if self.choices is not None:
            return orjson.dumps(text).decode(), None if text in self.choices else "it is none of the choices"
        if self.pattern is not None:
            return orjson.dumps(text).decode(), self._mismatch(text)
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            return "", f"it is not JSON (at character {error.pos})"
        if self.is_object and not isinstance(value, dict):
            return "", "it is not a JSON object"
        return text.strip(), self.schema.problem(value) if self.schema else None

    def _mismatch(self, text: str) -> str | None:
        try:
            found = regex.fullmatch(self.pattern or "", text, timeout=_PATTERN_SECONDS)
        except (TimeoutError, regex.error) as error:
            return f"the expression cannot judge it ({type(error).__name__})"
        return None if found else "it does not match the expression"


def read_schema(given: Any, place: str) -> Schema | None:
    """The schema at `place` of a request; None where there is none. Raises `CallerError` where it is no schema."""
    if not isinstance(given, dict):
        return None  # vLLM refuses what is neither an object nor null
    try:
        return schema_of(given)
    except SchemaError as error:
        message = f"{place} is no JSON Schema, {error}; nothing could be judged by it, so mend or leave it out"
        raise CallerError("invalid_schema", message, param=place) from None


def tool_release_of(options: Mapping[str, Any]) -> ToolRelease | None:
    """How calls go out in dialects that have no word for a call that is ready."""
    given = _object(options, "tools", ("release", "run"))
    release = given.get("release")
    if release is not None and release not in get_args(ToolRelease):
        raise _wrong("tools.release", f"is {release!r}; it must be one of {', '.join(get_args(ToolRelease))}")
    return release


def runs_tools_of(options: Mapping[str, Any]) -> bool:
    """Whether Penstock runs the tools that the deployment has bound."""
    runs = _object(options, "tools", ("release", "run")).get("run", True)
    if not isinstance(runs, bool):
        raise _wrong("tools.run", "must be true or false")
    return runs


def citations_of(options: Mapping[str, Any]) -> bool:
    """Whether citations are looked for, where the deployment has patterns for them."""
    wants = _object(options, "annotations", ("citations",)).get("citations", True)
    if not isinstance(wants, bool):
        raise _wrong("annotations.citations", "must be true or false")
    return wants


def structured_of(request: Mapping[str, Any], options: Mapping[str, Any]) -> StructuredWish | None:
    """What `response_format`, vLLM's `structured_outputs` and `penstock.structured` ask for; None where nothing.

    A grammar and a structural tag have no value that could be judged.
    """
    own = _object(options, "structured", ("name", "schema", "sections", "text"))
    schema = read_schema(own.get("schema"), "penstock.structured.schema")
    name, text, sections = own.get("name"), own.get("text", "show"), own.get("sections")
    if "schema" in own and schema is None:
        raise _wrong("structured.schema", "must be a JSON Schema, an object")
    if not isinstance(name, str | None):
        raise _wrong("structured.name", "must be a string")
    if text not in ("show", "hide"):
        raise _wrong("structured.text", f"is {text!r}; it must be show or hide")
    shows = text == "show"
    if sections:
        return StructuredWish(schema, name, sections=_delimiters(sections), shows_text=shows)
    if schema is not None:
        return StructuredWish(schema, name, shows_text=shows)
    return _of_the_engine(request, name, shows)


def _of_the_engine(request: Mapping[str, Any], name: str | None, shows: bool) -> StructuredWish | None:
    """What the engine was asked to write under a grammar."""
    form, outputs = request.get("response_format"), request.get("structured_outputs")
    if isinstance(form, dict) and form.get("type") == "json_object":
        return StructuredWish(None, name, is_object=True, shows_text=shows)
    if isinstance(form, dict) and isinstance(given := form.get("json_schema"), dict):
        schema = read_schema(given.get("schema"), "response_format.json_schema.schema")
        called = given.get("name")
        return StructuredWish(schema, name or (called if isinstance(called, str) else None), shows_text=shows)
    if not isinstance(outputs, dict):
        return None
    choices, pattern = outputs.get("choice"), outputs.get("regex")
    if outputs.get("json_object") is True:
        return StructuredWish(None, name, is_object=True, shows_text=shows)
    if (given := outputs.get("json")) is not None:
        loaded = _loaded(given) if isinstance(given, str) else given
        return StructuredWish(read_schema(loaded, "structured_outputs.json"), name, shows_text=shows)
    if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
        return StructuredWish(None, name, choices=tuple(choices), shows_text=shows)
    return StructuredWish(None, name, pattern=pattern, shows_text=shows) if isinstance(pattern, str) else None


def _delimiters(given: Any) -> tuple[str, str]:
    if given is True:
        return _DELIMITERS
    pair = (given.get("open"), given.get("close")) if isinstance(given, dict) else (None, None)
    opening, closing = pair
    if not isinstance(opening, str) or not isinstance(closing, str):
        raise _wrong("structured.sections", "must be true or an object with open and close")
    if not 1 <= len(opening) <= _MOST_DELIMITER or not 1 <= len(closing) <= _MOST_DELIMITER:
        raise _wrong("structured.sections", f"needs delimiters of 1 to {_MOST_DELIMITER} characters")
    return opening, closing


def _loaded(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None  # vLLM refuses it


def _object(options: Mapping[str, Any], name: str, known: Sequence[str]) -> Mapping[str, Any]:
    given = options.get(name, {})
    if not isinstance(given, dict) or (unknown := sorted(given.keys() - set(known))):
        what = f"has no {unknown[0]}" if isinstance(given, dict) else "is no object"
        raise _wrong(name, f"{what}; it is an object with any of {', '.join(known)}")
    return given


def _wrong(name: str, what: str) -> CallerError:
    return CallerError("invalid_request", f"penstock.{name} {what}", param=f"penstock.{name}")
