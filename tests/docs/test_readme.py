"""README stays one page, and what other tools take from it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pages import ROOT, blocks, read

README = ROOT / "README.md"
LARGEST = 200_000  # bytes of a picture


def test_it_is_one_page() -> None:
    assert 600 <= len(read(README).split()) <= 800


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    """.ci/run takes the lines between the comment and the end of its block, without fence and comment."""
    lines = read(README).splitlines()
    begin = lines.index("<!-- test command -->")
    command = [line for line in lines[begin : lines.index("```", begin)] if not line.startswith(("```", "<!--"))]
    assert len(command) == 1 and command[0].startswith("python3 -m venv .venv && ") and "pytest" in command[0]


def test_the_first_command_installs_and_runs_the_demo() -> None:
    first = blocks(README, "sh")[0].text.strip()
    assert first == 'python3 -m venv .venv && .venv/bin/pip install -e ".[cpu]" && .venv/bin/zimage demo'


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_enough_for_a_page(picture: Path) -> None:
    assert picture.stat().st_size < LARGEST
