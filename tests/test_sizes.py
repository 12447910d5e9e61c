"""No file and no function grows beyond what a reader takes in at once."""

from __future__ import annotations

import ast
from pathlib import Path

from support.sources import nodes

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 330, 45  # lines
FILES = [path for folder in ("cli", "docs", "examples", "tests", "zimage_mlx", "zimage_ref", "zimage_serve")
         for path in sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip


def test_no_file_is_too_long() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_no_function_is_too_long() -> None:
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in nodes(path.read_text(encoding="utf-8"))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: count for name, count in found.items() if count > LONGEST_FUNCTION} == {}
