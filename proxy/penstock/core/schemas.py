"""The JSON Schemas of a request, ready to judge what the model wrote.

Schemas come from callers and values from models, so neither is trusted: nothing is fetched from a network, a regular
expression has a time limit, and what is said about a value never quotes it, since moderation sees no such sentence.
"""

from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import jsonschema
import orjson
import regex
from jsonschema.validators import extend, validator_for
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable

# A pattern of a few characters can take for ever on a text of thirty (catastrophic backtracking).
_PATTERN_SECONDS = 0.1
# Agents send the same tools with every request; compiling one costs a millisecond, finding it again a microsecond.
_MOST_KEPT = 512
_MOST_KEPT_BYTES = 32 * 1024
_MOST_SHOWN = 160
# References and choices within each other; past this a schema goes round in circles.
_MOST_DEPTH = 16
_TYPE_OF = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"
}  # fmt: skip


class SchemaError(ValueError):
    """Not a JSON Schema; the text says where and why."""


class Schema:
    """One schema. Raises `SchemaError` where it is none; judging never raises."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        kind = validator_for(raw, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(dict(raw))
            self._validator = _careful(kind)(raw, registry=REGISTRY)
            self._words = orjson.dumps(raw).decode()
        except jsonschema.SchemaError as error:
            raise SchemaError(f"at {error.json_path}: {_short(error.message)}") from None
        except (RecursionError, TypeError, ValueError) as error:
            raise SchemaError(f"it cannot be read: {_short(str(error))}") from None

    def problem(self, value: Any) -> str | None:
        """Where `value` does not fit and which rule says so, or None."""
        try:
            error = jsonschema.exceptions.best_match(self._validator.iter_errors(value))
        except _CannotJudge as problem:
            return str(problem)
        except Unresolvable as problem:
            return f"the schema refers to {_short(str(problem.ref))}, which is not in it"
        except RecursionError:
            return "the value is nested too deeply for the schema"
        except (ArithmeticError, TypeError, ValueError, regex.error) as problem:
            return f"the schema cannot judge the value ({type(problem).__name__})"
        return None if error is None else self._sentence(error)

    def types_of(self, parameter: str) -> list[str]:
        """The JSON types that the schema allows for a property of an object; none where it does not know it."""
        properties = self.raw.get("properties")
        found = properties.get(parameter) if isinstance(properties, Mapping) else None
        return sorted(self._types(found, 0) or {"string"}) if isinstance(found, Mapping) else []

    def _types(self, schema: Any, depth: int) -> set[str]:
        if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
            return set()
        named = schema.get("type")
        types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else set()
        values = schema.get("enum")
        types |= {_TYPE_OF.get(type(value), "string") for value in values} if isinstance(values, list) else set()
        for key in ("anyOf", "oneOf", "allOf"):
            for choice in schema.get(key) or ():
                types |= self._types(choice, depth + 1)
        return types | self._types(self._local(schema.get("$ref")), depth + 1)

    def _local(self, reference: Any) -> Any:
        """What a reference within this schema leads to, or None."""
        found: Any = self.raw
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        for step in reference[2:].split("/"):
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found

    def _sentence(self, error: jsonschema.ValidationError) -> str:
        rule = f"{error.validator}: {_short(_written(error.validator_value))}"
        return f"at {self._path(error)}: {_MEANINGS.get(str(error.validator), 'it breaks')} {rule}"

    def _path(self, error: jsonschema.ValidationError) -> str:
        """The place in the value. A name that the schema does not know is the model's own and is not told."""
        steps = ["$"]
        for step in error.absolute_path:
            is_known = isinstance(step, str) and orjson.dumps(step).decode() in self._words
            steps.append(f"[{step}]" if isinstance(step, int) else f".{step}" if is_known else ".*")
        return "".join(steps)


class _CannotJudge(Exception):
    """A rule of the schema gave no answer; the text says which."""


_MEANINGS = {"required": "a required property is missing,", "additionalProperties": "a property is not known,"}


def schema_of(raw: Mapping[str, Any]) -> Schema:
    """The schema, made once for equal ones. Raises `SchemaError`."""
    try:
        key = orjson.dumps(raw)
    except TypeError as error:
        raise SchemaError(f"it cannot be read: {_short(str(error))}") from None
    return _kept(key) if len(key) <= _MOST_KEPT_BYTES else Schema(raw)


@lru_cache(_MOST_KEPT)
def _kept(key: bytes) -> Schema:
    return Schema(orjson.loads(key))


@cache
def _careful(kind: type[Any]) -> type[Any]:
    """The validator of a draft with its regular expressions bounded."""
    made: type[Any] = extend(  # type: ignore[no-untyped-call]  # jsonschema leaves it untyped
        kind, {"pattern": _pattern, "patternProperties": _pattern_properties}
    )
    return made


def _pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not _search(pattern, value):
        yield jsonschema.ValidationError("does not match the pattern")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: Any, _schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, dict):
        for pattern, schema in patterns.items():
            for name, inner in value.items():
                if _search(pattern, name):
                    yield from validator.descend(inner, schema, path=name, schema_path=pattern)


def _search(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=_PATTERN_SECONDS) is not None
    except TimeoutError:
        raise _CannotJudge(f"the schema's pattern {_short(pattern)!r} takes too long on this value") from None


def _written(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return repr(value)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
