"""The parts of the reference pages that are drawn from the code: settings, commands and model families.

    cd tests && python -m support.reference            # says which pages differ
    cd tests && python -m support.reference --write    # writes them

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; the rest of a page is written by hand.
"""

import argparse
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from penstock import cli
from penstock.core.families import FAMILIES, Family, State
from penstock.settings import Settings

REFERENCE: Final = Path(__file__).parents[2] / "docs" / "reference"
PAGES: Final = (REFERENCE / "settings.md", REFERENCE / "cli.md", REFERENCE / "model_families.md")

_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
_BOUNDS: Final = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_PLAIN: Final = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    SecretStr: "text",
    type(None): "nothing",
    Any: "anything",
}


def page_as_it_should_be(text: str) -> str:
    """The page with every generated part drawn anew. Raises `KeyError` for a part that nothing draws."""
    parts = {"settings": settings_tables, "commands": command_tables, "families": family_diagrams}
    return _PART.sub(lambda found: f"{found[1]}\n{parts[found[2]]()}\n{found[3]}", text)


# --- Settings -----------------------------------------------------------------------------------------


def settings_tables() -> str:
    """One table for each part of the settings file."""
    return "\n".join(_tables("", Settings))


def _tables(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """The table of one part, then those of the parts inside it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    rows: list[str] = []
    for name, field in model.model_fields.items():
        part, suffix = _inner(field)
        key = f"{prefix}{name}"
        if part is not None:
            inner.append((f"{key}{suffix}.", part))
        value = f"[below](#{_anchor(f'{key}{suffix}.')})" if part else _type(field)
        rows.append(_row(f"`{key}`", value, _default(field, part), _prose(field.description)))
    yield "\n".join([f"### {_title(prefix)}\n", *_table("key", "value", "default", "meaning"), *rows, ""])
    for part_prefix, part in inner:
        yield from _tables(part_prefix, part)


def _inner(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The settings class inside a field, and how a key goes on to reach it."""
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            suffixes: dict[Any, str] = {list: "[]", dict: ".NAME"}
            suffix = suffixes.get(get_origin(field.annotation), "")
            return annotation, suffix
    return None, ""


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{word} {getattr(rule, name)}"
        for rule in field.metadata
        for name, word in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_annotation(field.annotation), *bounds])


def _annotation(annotation: Any) -> str:
    """A type as a sentence would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotation(arguments[0])
    if origin is Literal:
        return " · ".join(f"`{word}`" if word else "empty" for word in arguments)
    if origin in (Union, types.UnionType):
        return _annotation(next(argument for argument in arguments if argument is not type(None)))
    if origin is list:
        return f"list of {_annotation(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_annotation, arguments))}]"
    if origin is dict:
        return f"{_annotation(arguments[0])} → {_annotation(arguments[1])}"
    return _PLAIN[annotation]


def _default(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if inner is not None or value is None or value in ("", [], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _title(prefix: str) -> str:
    return f"`{prefix.removesuffix('.')}`" if prefix else "All of it"


def _anchor(prefix: str) -> str:
    """The anchor that GitHub gives to a heading: lower case, punctuation dropped."""
    return re.sub(r"[^\w-]", "", prefix.lower())


# --- Commands -----------------------------------------------------------------------------------------


def command_tables() -> str:
    """For each command what it does and its arguments, as the parser knows them."""
    parser = cli._parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    told = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return "\n".join(_command(name, told[name], command) for name, command in commands.choices.items())


def _command(name: str, about: str, command: argparse.ArgumentParser) -> str:
    arguments = [action for action in command._actions if action.dest != "help"]
    lines = [f"### `penstock {name}`\n", f"{about[:1].upper()}{about[1:]}.\n"]
    if arguments:
        lines += [*_table("argument", "default", "meaning"), *map(_argument, arguments), ""]
    return "\n".join(lines)


def _argument(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    named = ", ".join(action.option_strings)
    takes_value = action.nargs != 0
    shown = f"{named} {value}" if named and takes_value else named or f"{value}{' ...' if action.nargs == '*' else ''}"
    default = "" if action.default in (None, []) else f"`{action.default}`"
    return _row(f"`{shown}`", default, _prose(action.help))


# --- Model families -----------------------------------------------------------------------------------


def family_diagrams() -> str:
    """The built-in families in the order in which they are tried, each with its diagram."""
    order = [*_table("family", "model names"), *(_row(f"`{f.name}`", _patterns(f)) for f in FAMILIES), ""]
    return "\n".join([*order, *map(_family, FAMILIES)])


def _patterns(family: Family) -> str:
    return ", ".join(f"`{pattern}`" for pattern in family.models)


def _family(family: Family) -> str:
    headers = [line for name, state in _reachable(family) if state.headers for line in _header_table(name, state)]
    diagram = ["```mermaid", *diagram_of(family), "```", ""]
    return "\n".join([f"### `{family.name}`\n", *diagram, *headers])


def diagram_of(family: Family) -> list[str]:
    """A mermaid state diagram: a box for each state with its channel, an arrow for each marker."""
    states = _reachable(family)
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{_escape(_box(name, state))}" as {name}' for name, state in states]
    lines.append(f"    [*] --> {family.start}")
    if family.start_without_thinking != family.start:
        lines.append(f"    [*] --> {family.start_without_thinking} : {_escape('thinking switched off')}")
    for name, state in states:
        lines += [f"    {name} --> {target} : {_escape(label)}" for target, label in _arrows(state)]
    return lines


def _reachable(family: Family) -> list[tuple[str, State]]:
    """The states that some text leads to; a family may have one that only its neighbours need."""
    found = list(dict.fromkeys([family.start, family.start_without_thinking]))
    for name in found:
        found += [target for target, _ in _arrows(family.states[name]) if target not in found]
    return [(name, state) for name, state in family.states.items() if name in found]


def _box(name: str, state: State) -> str:
    return f"{name} ({state.channel})" if name != state.channel else name


def _arrows(state: State) -> Iterator[tuple[str, str]]:
    """Where each marker leads, markers with one goal on one arrow."""
    markers: dict[str, list[str]] = {}
    for marker, target in state.on.items():
        markers.setdefault(target, []).append(marker)
    if state.headers:
        for number, (_, target) in enumerate(state.headers, 1):
            yield target, f"{' or '.join(state.on)}, rule {number}"
    else:
        for target, words in markers.items():
            yield target, " or ".join(words)
    if state.otherwise:
        yield state.otherwise, "anything else"


def _header_table(name: str, state: State) -> Iterator[str]:
    yield f"The text of `{name}` decides where its marker leads; the first rule that is found in it wins:\n"
    yield from _table("rule", "found in the text (a regular expression)", "next state")
    for number, (pattern, target) in enumerate(state.headers, 1):
        yield _row(str(number), f"`{pattern}`" if pattern else "anything", f"`{target}`")
    yield ""


def _escape(text: str) -> str:
    """What mermaid reads as markup goes in as its entity codes (`#60;` is `<`)."""
    return re.sub(r"""[<>:;#"{}\\-]""", lambda found: f"#{ord(found[0])};", text)


# --- Markdown and the command -------------------------------------------------------------------------


def _table(*headings: str) -> list[str]:
    return [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]


def _prose(text: str | None) -> str:
    """A sentence of the code as Markdown: `<` would open a tag."""
    return (text or "").replace("<", "\\<")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(arguments: list[str]) -> int:
    """Compares the pages with the code, or writes them. Returns the exit status."""
    if arguments not in ([], ["--write"]):
        print(__doc__)
        return 2
    wanted: Mapping[Path, str] = {page: page_as_it_should_be(page.read_text("utf-8")) for page in PAGES}
    stale = [page for page, text in wanted.items() if text != page.read_text("utf-8")]
    for page in stale:
        print(f"{page.name}: differs from the code")
        if arguments:
            page.write_text(wanted[page], "utf-8")
    return 1 if stale and not arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
