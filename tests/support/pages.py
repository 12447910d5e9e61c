"""The written pages of the project, taken apart: code blocks, prose, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_TABLE = re.compile(r"(<!-- (?:options: .*?|rooms) -->\n).*?(<!-- end of)", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int  # of the page, from 1: where its fence opens
    language: str
    text: str  # without the fence's indentation
    marker: str  # the comment in the line before, if there is one


def identify(path: Path) -> str:
    """A page's or an example's path, as people write it."""
    return path.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    """The text of a page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[Block]:
    """The code blocks of a page that are in `language`."""
    text = read(page)
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()].rstrip("\n").rpartition("\n")[2].strip()
        marker = _COMMENT.fullmatch(before)
        body = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[2], body, marker[1].strip() if marker else ""))
    return [block for block in found if block.language == language]


def prose(text: str) -> str:
    """What a person wrote in a page as sentences: no code, no comments, no tables made by docs/tables.py, no links."""
    text = _FENCE.sub("", _TABLE.sub(r"\1\2", text))
    text = re.sub(r"(`+).+?\1", "CODE", _COMMENT.sub("", text), flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def links(text: str) -> list[str]:
    """The targets of all links and pictures in a page."""
    return _LINK.findall(_FENCE.sub("", text))


def anchors(text: str) -> Iterator[str]:
    """What headings are called in links, as GitHub does it."""
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", heading).lower())
        yield plain.replace(" ", "-")
