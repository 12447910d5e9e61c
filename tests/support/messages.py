"""The texts that the program says, found in its source: messages, help, and longer texts that it prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import cast

from zimage_ref import errors
from zimage_serve import refusals

from .pages import ROOT
from .sources import nodes

FILES = [
    path
    for package in ("zimage_ref", "zimage_mlx", "zimage_serve", "cli")
    for path in sorted((ROOT / package).rglob("*.py"))
]
ERRORS = {
    name
    for name, value in (vars(errors) | vars(refusals)).items()
    if isinstance(value, type) and issubclass(value, errors.ZImageError)
}
SPEAKERS = {*ERRORS, "Denial", "Notice", "warn", "note", "error"}  # what is called with a message as its first argument
_MARKUP = re.compile(r"\s*[<:{]")  # HTML and style sheets
_SHORTEST = 8  # letters of a part that is looked for: shorter ones are everywhere


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
    for node in nodes(source):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            longest = max(map(plain, parts(node.args[0])), key=len, default="")
            if name in SPEAKERS and len(longest) >= _SHORTEST:
                yield node.lineno, longest


def plain(text: str) -> str:
    """Fields in backticks as options of the command line, other backticks gone, one space between words."""
    text = re.sub(r"`([a-z][a-z0-9_]*)`", lambda field: f"--{field[1].replace('_', '-')}", text)
    return " ".join(text.replace("`", "").split()).strip(" :;,.()")


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of everything in `source` that a person may read: all strings of several words, X for each value.

    Docstrings are not among them, nor are pages for a browser.
    """
    inner: set[int] = set()  # parts of a text that is found as a whole
    for node in nodes(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            inner.add(id(cast(ast.Expr, node.body[0]).value))
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in inner:
            said = "X".join(parts(node))
            if " " in said:
                inner |= {id(part) for part in ast.walk(node)}
            if len(said.split()) > 1 and not _MARKUP.match(said):
                yield node.lineno, said
