"""The tables of options and folders in the pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support.pages import ROOT, identify, read

from zimage_cli.commands import COMMANDS


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script docs/tables.py as a module."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=identify)
def test_no_table_is_out_of_date(page: Path, tables: ModuleType) -> None:
    assert tables.updated(read(page)) == read(page), "run: python docs/tables.py"


def test_every_option_of_every_command_has_one_row(tables: ModuleType) -> None:
    shown = [pair for page in tables.pages() for pair in tables.named_options(read(page))]
    known = {(command, name) for command in COMMANDS for name in tables.options_of(command)}
    assert len(shown) == len(set(shown))
    assert set(shown) == known


def test_a_row_has_flag_default_and_meaning(tables: ModuleType) -> None:
    rank = tables.options_of("train")["rank"]
    assert (rank.flag, rank.default) == ("--rank", "16") and "Default" not in rank.meaning
    assert tables.options_of("train")["model_dir"].default == "required"
    assert tables.options_of("generate")["steps"].default == "auto"
    assert "--init-image" in tables.options_of("generate")["strength"].meaning  # fields are shown as options
    assert "euler, heun" in tables.option_table("generate", ["sampler"])
    with pytest.raises(KeyError, match="nothing"):
        tables.option_table("train", ["nothing"])


def test_a_table_can_be_a_group(tables: ModuleType) -> None:
    assert tables.names_of("train", "rank alpha") == ["rank", "alpha"]
    assert tables.names_of("train", "group: Memory") == ["base_precision", "master_weights", "memory", "force"]
    with pytest.raises(KeyError, match="no group 'Nothing'"):
        tables.names_of("train", "group: Nothing")
