"""Source as trees. Many tests read the same files, and none changes a tree: so each file is parsed once."""

from __future__ import annotations

import ast
from functools import cache


@cache
def parsed(source: str) -> ast.Module:
    """The tree of `source`."""
    return ast.parse(source)


@cache
def nodes(source: str) -> list[ast.AST]:
    """All nodes of the tree of `source`."""
    return list(ast.walk(parsed(source)))
