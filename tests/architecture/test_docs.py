"""What the documents say can be done: links lead somewhere, settings load, commands parse, families part text."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp.web import AbstractRoute

from penstock.cli import _parser
from penstock.core.families import Family, choose_family
from penstock.settings import load_settings
from support.chunks import answer_of
from support.documents import DOCS, ROOT, Block, anchors, blocks, commands, inline_code, links, pages, shown
from support.playbook import ask, play
from support.sidecar import sidecar

PENSTOCK = ROOT / "proxy" / "penstock"
HTTP_PAGE = DOCS / "reference" / "http.md"
FAMILIES_PAGE = DOCS / "reference" / "model_families.md"
ENGINE = {"upstreams": [{"url": "http://vllm:8000"}]}
SETTINGS_FILE = "# penstock.yaml"
PROBLEMS = {"CallerError", "EngineError", "LimitReached", "Overloaded", "OurBug", "PolicyError", "Failed"} | {
    "_fail",
    "_error",
    "challenged",
}


# --- Links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_map_names_every_document() -> None:
    map_page = DOCS / "README.md"
    linked = {(map_page.parent / link).resolve() for link in links(map_page)}
    assert [shown(page) for page in DOCS.rglob("*.md") if page != map_page and page not in linked] == []


# --- Commands -----------------------------------------------------------------------------------------


def penstock_calls(line: str) -> Iterator[list[str]]:
    """The arguments of every call of `penstock` in a line of shell."""
    words = shlex.shlex(re.sub(r"\$\([^)]*\)", "", line), posix=True, punctuation_chars="|&;<>")
    words.whitespace_split = True
    command: list[str] = []
    for word in [*words, ";"]:
        if not set(word) <= set("|&;<>"):
            command += [] if not command and re.match(r"[A-Z_]+=", word) else [word]
            continue
        if command and Path(command[0]).name == "penstock":
            yield command[1:]
        command = []


def typed_calls() -> list[tuple[str, list[str]]]:
    return [(shown(page), call) for page in pages() for line in commands(page) for call in penstock_calls(line)]


def mentioned_commands() -> set[tuple[str, str]]:
    """Commands named in sentences, without their arguments."""
    mentions = ((page, re.match(r"penstock ([a-z][a-z-]*)", code)) for page in pages() for code in inline_code(page))
    return {(shown(page), found[1]) for page, found in mentions if found}


@pytest.mark.parametrize(("page", "arguments"), typed_calls(), ids=str)
def test_every_penstock_command_parses(page: str, arguments: list[str]) -> None:
    assert _parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize(("page", "command"), sorted(mentioned_commands()), ids=str)
def test_every_mentioned_command_exists(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args([command, "--help"])
    assert end.value.code == 0
    assert f"penstock {command}" in capsys.readouterr().out


# --- Settings -----------------------------------------------------------------------------------------


def settings_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page) if block.text.startswith(SETTINGS_FILE)]


def test_every_yaml_block_says_which_file_it_is() -> None:
    bare = [
        shown(page) for page in pages() for block in blocks(page) if block.language == "yaml" and block.text[0] != "#"
    ]
    assert bare == []


@pytest.mark.parametrize("block", settings_blocks(), ids=lambda block: shown(block.page))
def test_every_settings_file_loads(block: Block, tmp_path: Path) -> None:
    loaded = settings_of(block, tmp_path)
    assert loaded.upstreams


def settings_of(block: Block, folder: Path) -> Any:
    given = yaml.safe_load(block.text)
    path = folder / "penstock.yaml"
    path.write_text(block.text)
    return load_settings(path, environment={}, flags=None if "upstreams" in given else ENGINE)


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_every_json_block_is_json(page: Path) -> None:
    for block in blocks(page):
        if block.language == "json" and "…" not in block.text:
            json.loads(block.text)


# --- Model families -----------------------------------------------------------------------------------


def family_examples() -> list[tuple[Block, str, list[str]]]:
    """A settings file, what the model writes, and the blocks of it: three fenced blocks in a row."""
    page = blocks(FAMILIES_PAGE)
    return [
        (block, page[index + 1].text.rstrip("\n"), page[index + 2].text.splitlines())
        for index, block in enumerate(page)
        if block.text.startswith(SETTINGS_FILE)
    ]


@pytest.mark.parametrize(("block", "said", "expected"), family_examples(), ids=["marks", "names", "states"])
def test_every_family_of_the_page_parts_text_as_the_page_says(
    block: Block, said: str, expected: list[str], tmp_path: Path
) -> None:
    family = first_family(block, tmp_path)
    for pieces in ([said], list(said)):
        outcome = play(ask(tools=["weather"]), answer_of(pieces), family=family)
        assert outcome.blocks() == expected


def first_family(block: Block, folder: Path) -> Family:
    """The family that the example's own pattern of model names leads to."""
    settings = settings_of(block, folder)
    name, described = next(iter(settings.families.items()))
    family = choose_family(settings.all_families(), described.models[0].replace("*", "7b"))
    assert family is not None
    assert family.name == name
    return family


# --- HTTP ---------------------------------------------------------------------------------------------


def table_column(heading: str) -> set[str]:
    """The words in backticks that open the rows of the tables under a heading."""
    section = HTTP_PAGE.read_text("utf-8").partition(f"{heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


async def test_the_page_names_every_route_and_no_other() -> None:
    async with sidecar("http://127.0.0.1:9") as running:
        resources = running.server.application().router.resources()
    routes = {
        f"{route.method} {resource.canonical}" for resource in resources for route in resource if _is_meant(route)
    }
    assert routes == table_column("# HTTP")


def _is_meant(route: AbstractRoute) -> bool:
    return route.method != "HEAD"  # aiohttp adds it to every GET


def codes_in_the_code(makers: set[str]) -> tuple[set[str], set[str]]:
    """Every code that is written out where one of `makers` is called, and the beginnings of those that are composed."""
    written: set[str] = set()
    composed: set[str] = set()
    for path in (*(PENSTOCK / "core").rglob("*.py"), *(PENSTOCK / "shell").rglob("*.py")):
        if path.name == "replay.py":
            continue
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", getattr(call.func, "attr", "")) not in makers:
                continue
            for code in call.args[:2]:
                if isinstance(code, ast.Constant) and re.fullmatch(r"[a-z_]+", str(code.value)):
                    written.add(str(code.value))
                    break
                if isinstance(code, ast.JoinedStr) and isinstance(code.values[0], ast.Constant):
                    composed.add(str(code.values[0].value))
                    break
    return written, composed


def test_the_page_has_every_error_code_and_no_other() -> None:
    written, composed = codes_in_the_code(PROBLEMS)
    documented = table_column("## Errors")
    assert written <= documented
    assert [code for code in documented - written if not code.startswith(tuple(composed))] == []


def test_the_page_has_every_warning_and_no_other() -> None:
    warnings, _ = codes_in_the_code({"Warned"})
    assert warnings == table_column("## Warnings")
