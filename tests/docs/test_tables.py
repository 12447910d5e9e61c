"""The tables of options and folders in the pages say what the code says."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support.pages import ROOT, identify, read

from zimage_cli.commands import COMMANDS


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    """The script docs/tables.py as a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("tables")


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


def test_a_chip_twice_as_fast_takes_half_the_time(tables: ModuleType) -> None:
    times = tables.times
    slow = type(tables.CHIPS[0])("one", 8, 1.278, 68)
    fast = replace(slow, cores=16, bandwidth=136)
    assert slow.peak == pytest.approx(2.6, abs=0.05)  # as published for an M1
    one, two = vars(times(slow)), vars(times(fast))
    seconds = [name for name in one if name not in ("chip", "read_1024", "products")]
    assert len(seconds) == 8
    assert {name: two[name] for name in seconds} == pytest.approx({name: one[name] / 2 for name in seconds})
    assert two["read_1024"] == pytest.approx(2 * one["read_1024"]) and two["products"] == pytest.approx(one["products"])
    quick = times(replace(slow, accelerated=4.0))
    assert quick.products < one["products"] and one["forward_512"] / 4 < quick.forward_512 < one["forward_512"] / 2
