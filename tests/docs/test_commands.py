"""The commands in the pages run: a page's blocks one after the other, made small by the rules of support/errands.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.errands import Errands
from support.networks import HAS_MLX, long_only
from support.pages import PAGES, Block, blocks, identify

REASONS = re.compile(r"not run: \w.*|test command|slow: \w.*")  # comments before a block that say why it does not run
NEEDS_MLX = ("train", "demo")


def commands(block: Block) -> list[str]:
    """The commands of a block, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def runnable(page: Path, slow: bool) -> list[Block]:
    return [
        block for block in blocks(page, "sh") if block.marker.startswith("slow") == slow and (slow or not block.marker)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page, slow=False)], ids=identify)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    errands = Errands(tmp_path)
    for block in runnable(page, slow=False):
        for command in commands(block):
            assert command.startswith("zimage "), f"line {block.line}: no reason is given why {command!r} does not run"
            if HAS_MLX or command.split()[1] not in NEEDS_MLX:
                assert errands.run(command) == 0, f"line {block.line}: {command}"


@long_only
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page, slow=True)], ids=identify)
def test_the_slow_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in runnable(page, slow=True):
        assert [Errands(tmp_path).run(command) for command in commands(block)] == [0] * len(commands(block))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_a_block_that_does_not_run_says_why(page: Path) -> None:
    marked = [block for block in blocks(page, "sh") if block.marker]
    assert [block.line for block in marked if not REASONS.fullmatch(block.marker)] == []
