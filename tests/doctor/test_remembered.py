"""The doctor's figures are kept for this machine, and estimates come from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from zimage_ref.doctor import remembered
from zimage_ref.doctor.findings import Findings, Machine, Problem
from zimage_ref.doctor.remembered import Figures, cache_file, precision_name, remember
from zimage_ref.formats.quantize import Quantization
from zimage_ref.model.config import OFFICIAL_TRANSFORMER

PREDICTED = {
    "forward_seconds": {"bf16": {"512": 1.0, "1024": 5.0}},
    "decode_seconds": {"bf16": {"lean": {"512": 0.5, "1024": 2.0}}},
    "step_seconds": {"bf16": {"lean": {"512": 4.0, "1024": 16.0}}},
    "text_seconds": {"bf16": 0.25},
}


def test_figures_hold_for_this_machine_and_these_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Figures.of_this_machine() is None
    remember(Findings(True, Machine({}, []), predicted=PREDICTED))
    figures = Figures.of_this_machine()
    assert figures is not None and figures.predicted == PREDICTED
    assert Figures.for_model(OFFICIAL_TRANSFORMER) == figures
    assert Figures.for_model(replace(OFFICIAL_TRANSFORMER, n_layers=2)) is None
    monkeypatch.setattr(remembered, "__version__", "another")
    assert Figures.of_this_machine() is None


def test_a_damaged_file_counts_as_none() -> None:
    remember(Findings(True, Machine({}, []), predicted=PREDICTED))
    cache_file().write_text("{", encoding="utf-8")
    assert Figures.of_this_machine() is None


def test_a_sick_machine_is_not_kept() -> None:
    remember(Findings(True, Machine({}, [Problem("a", "b", grave=True)]), predicted=PREDICTED))
    assert not cache_file().exists()


def test_estimates() -> None:
    figures = Figures(PREDICTED)
    assert figures.picture("bf16", 512 * 512, 8, "lean") == pytest.approx(0.25 + 8 * 1.0 + 0.5)
    assert figures.picture("bf16", 1024 * 1024, 16, "lean") == pytest.approx(0.25 + 16 * 5.0 + 2.0)
    assert figures.step("bf16", 512 * 1024, "lean") == pytest.approx(8.0)
    assert figures.step("bf16", 2048 * 2048, "lean") == pytest.approx(64.0)
    assert figures.picture("f16", 512 * 512, 8, "lean") is None and figures.step("bf16", 512 * 512, "fast") is None
    assert [precision_name("bfloat16", bits) for bits in (None, Quantization(8))] == ["bf16", "8"]


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_file() == Path.home() / "Library/Caches/zimage/doctor.json"
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_file() == Path.home() / ".cache/zimage/doctor.json"
