"""The Markdown of the repository: which files there are, and the links, blocks and commands in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_MADE = ("build", "dist")  # by tools, at the root

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text without the fence."""

    page: Path
    language: str
    text: str


@cache
def pages() -> tuple[Path, ...]:
    """Every Markdown file that belongs to the repository."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in _MADE]
    return tuple(sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    return [Block(page, found[2], found[3]) for found in _FENCE.finditer(page.read_text("utf-8"))]


def links(page: Path) -> list[str]:
    """The targets of all links, as they are written."""
    return _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text("utf-8"))))


def inline_code(page: Path) -> list[str]:
    return [code[1:-1] for code in _CODE.findall(_FENCE.sub("", page.read_text("utf-8")))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[str]:
    """What a reader would type: the lines of blocks without a language, a continued line joined to the next."""
    for block in blocks(page):
        if block.language in ("", "sh", "console"):
            yield from _joined(block.text)


def _joined(text: str) -> Iterator[str]:
    """Lines, where a backslash or an open single quote goes on in the next."""
    command = ""
    for line in text.splitlines():
        command += line
        if command.endswith("\\"):
            command = command[:-1]
        elif command.count("'") % 2:
            command += "\n"
        elif command.strip():
            yield command.strip()
            command = ""
