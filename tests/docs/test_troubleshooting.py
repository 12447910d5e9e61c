"""Each message that the program prints is found in docs/troubleshooting.md by its words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import ROOT, identify, read

import zimage_ref
from zimage_ref import ZImageError

PAGE = ROOT / "docs" / "troubleshooting.md"
FILES = [path for package in ("zimage_ref", "zimage_mlx", "cli") for path in sorted((ROOT / package).rglob("*.py"))]
PUBLIC = {name: getattr(zimage_ref, name) for name in zimage_ref.__all__}  # `vars` has only those in use by now
ERRORS = {name for name, value in PUBLIC.items() if isinstance(value, type) and issubclass(value, ZImageError)}
SPEAKERS = {*ERRORS, "Notice", "warn", "note", "error"}  # what is called with a message as its first argument
_SHORTEST = 8  # letters of a part that is looked for: shorter ones are everywhere
_NO_MESSAGE = re.compile(r"^ {2}| +$|^[^a-z]*$")


def parts(node: ast.expr) -> list[str]:
    """The fixed parts of the text that an expression makes, of every way it may go."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        joined = "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        return joined.split("\0")
    if isinstance(node, ast.BinOp):
        return [*parts(node.left), *parts(node.right)]
    return []


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and longest fixed part of every message in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            longest = max(map(plain, parts(node.args[0])), key=len, default="")
            if name in SPEAKERS and len(longest) >= _SHORTEST:
                yield node.lineno, longest


def plain(text: str) -> str:
    """Fields in backticks as options of the command line, other backticks gone, one space between words."""
    text = re.sub(r"`([a-z][a-z0-9_]*)`", lambda field: f"--{field[1].replace('_', '-')}", text)
    return " ".join(text.replace("`", "").split()).strip(" :;,.()")


@pytest.fixture(scope="module")
def page() -> str:
    return plain(read(PAGE))


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_every_message_is_on_the_page(path: Path, page: str) -> None:
    missing = [f"line {line}: {text}" for line, text in messages(read(path)) if text not in page]
    assert missing == []


def test_messages_are_found_in_source() -> None:
    source = (
        'raise ConfigError(f"{path}: `init_image` is far too small: {fact}")\nnote("a short one" + f"{x} and more")'
    )
    assert [text for _, text in messages(source)] == ["--init-image is far too small", "a short one"]
