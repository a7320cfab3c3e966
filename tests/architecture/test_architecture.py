"""The shape that the documents promise is the shape of the code."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from support.documents import DOCS, ROOT

PENSTOCK = ROOT / "proxy" / "penstock"
PLUGIN = ROOT / "plugin" / "penstock_vllm"
PAGE = DOCS / "explanation" / "architecture.md"
FORBIDDEN = {"asyncio", "aiohttp", "time", "logging", "random"}
# Folders that exist on one machine only. Written in halves, or this file would be found too.
MACHINE_PATHS = tuple("/" + path for path in ("work/", "root/", "tmp/brief", "home/"))


def modules(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """The top-level names of everything that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def quoted_names(text: str) -> list[str]:
    """Words in backticks that may be modules."""
    return re.findall(r"`([a-z_]+(?:/(?:[a-z_]+\.py)?)?)`", text)


# --- The journey --------------------------------------------------------------------------------------


def journey_of_the_code() -> list[str]:
    """The modules of the steps in the order in which `Journey.travel` calls them, feeding each."""
    tree = ast.parse((PENSTOCK / "core" / "journey.py").read_text("utf-8"))
    journey = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Journey")
    methods = {node.name: node for node in journey.body if isinstance(node, ast.FunctionDef)}
    module_of_class = {
        alias.name: (node.module or "").rpartition(".")[2]
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    made_by = {name: method.returns.id for name, method in methods.items() if isinstance(method.returns, ast.Name)}
    class_of_attribute = {
        target.attr: _class_made(node.value.func, made_by)
        for node in ast.walk(methods["__init__"])
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    fed = [
        node.func.value.attr
        for statement in methods["travel"].body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "feed"
        and isinstance(node.func.value, ast.Attribute)
    ]
    return [module_of_class[class_of_attribute[attribute]] for attribute in fed]


def _class_made(called: ast.expr, made_by: dict[str, str]) -> str:
    """The class behind `Step(...)`, or behind `self._step_for(...)` by what that method says it returns."""
    if isinstance(called, ast.Attribute):
        return made_by[called.attr]
    assert isinstance(called, ast.Name)
    return called.id


def journey_section() -> str:
    return PAGE.read_text("utf-8").partition("## The journey\n")[2].partition("\n## ")[0]


def test_the_journey_in_the_document_is_that_of_the_code() -> None:
    steps = re.findall(r"^\d+\. \*\*`(\w+)`\*\*", journey_section(), re.MULTILINE)
    assert len(steps) > 5
    assert steps == journey_of_the_code()


def test_the_journey_in_the_diagram_is_that_of_the_code() -> None:
    [line] = [line for line in journey_section().splitlines() if "engine_stream -->" in line]
    assert [name.strip() for name in line.split("-->")] == ["engine_stream", *journey_of_the_code(), "dialects"]


def test_the_map_of_the_core_gives_the_same_order() -> None:
    steps = journey_of_the_code()
    named = [name for name in quoted_names(docstring(PENSTOCK / "core" / "__init__.py")) if name in steps]
    assert named == steps


# --- Imports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", modules(PENSTOCK / "core"), ids=lambda path: path.stem)
def test_the_core_has_no_clock_no_network_no_log_and_no_randomness(path: Path) -> None:
    assert imported(path) & FORBIDDEN == set()


@pytest.mark.parametrize("path", [*modules(PENSTOCK), *modules(PLUGIN)], ids=lambda path: path.stem)
def test_sidecar_and_plugin_never_import_each_other(path: Path) -> None:
    stranger = "penstock_vllm" if path.is_relative_to(PENSTOCK) else "penstock"
    assert stranger not in imported(path)


# --- Maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "core", "shell"])
def test_every_module_in_a_map_exists(folder: str) -> None:
    package = PENSTOCK / folder
    names = quoted_names(docstring(package / "__init__.py"))
    assert names
    missing = [name for name in names if not (package / name).exists() and not (package / f"{name}.py").exists()]
    assert missing == []


@pytest.mark.parametrize("folder", ["core", "shell"])
def test_every_file_is_in_the_map_of_its_package(folder: str) -> None:
    package = PENSTOCK / folder
    present = {path.stem for path in package.glob("*.py") if path.name != "__init__.py"}
    assert present - set(quoted_names(docstring(package / "__init__.py"))) == set()


def test_the_architecture_page_names_every_file_and_no_other() -> None:
    text = PAGE.read_text("utf-8").partition("## Every file\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert named == {str(path.relative_to(PENSTOCK)) for path in modules(PENSTOCK)}


def test_the_diagram_of_the_parts_shows_files_that_exist() -> None:
    text = PAGE.read_text("utf-8").partition("## The parts\n")[2].partition("\n## ")[0]
    shown = re.findall(r'(\w+)\["(\w+\.py)"\]', text)
    assert len(shown) > 5
    for node, name in shown:
        folder = "core" if node == "exchange" else "shell"
        assert (PENSTOCK / folder / name).exists()


# --- The repository -----------------------------------------------------------------------------------


def test_no_file_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    found = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            text = path.read_text("utf-8", errors="replace")
            found += [f"{name}: {word}" for word in MACHINE_PATHS if re.search(rf"(?<![\w.}}]){word}", text)]
    assert found == []
