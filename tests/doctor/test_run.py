"""The whole command, on a small catalogue and small parts: output, JSON, exit codes."""

from __future__ import annotations

import getpass
import io
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import rich.console

from zimage_cli.app import main
from zimage_cli.commands import doctor
from zimage_cli.terminal.console import THEME, Console
from zimage_mlx.doctor import checking, device, parts, rates, run
from zimage_mlx.doctor.cases import Case
from zimage_mlx.doctor.checking import Pace
from zimage_ref.doctor.findings import Findings, Machine, Problem, Rate, Verdict
from zimage_ref.errors import BackendError

SLOW = Pace(dict.fromkeys(("bf16", "f16", "f32"), 1e6), 1e6)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check at its smallest size, every rate and part of a model of small width."""
    monkeypatch.setattr(Pace, "measure", lambda: SLOW)
    monkeypatch.setattr(rates, "_WIDTH", 256)
    monkeypatch.setattr(rates, "_MEMORY", 1 << 16)
    monkeypatch.setattr(parts, "_CAPTION", 32)
    monkeypatch.setattr(parts, "_FEWEST", 1)
    config = replace(parts.OFFICIAL_TRANSFORMER, dim=384, n_heads=3, cap_feat_dim=64, n_refiner_layers=1)
    monkeypatch.setattr(parts, "OFFICIAL_TRANSFORMER", config)
    monkeypatch.setattr(
        parts, "OFFICIAL_VAE", replace(parts.OFFICIAL_VAE, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    )
    encoder = replace(parts.OFFICIAL_TEXT_ENCODER, hidden_size=128, intermediate_size=256)
    monkeypatch.setattr(parts, "OFFICIAL_TEXT_ENCODER", encoder)
    monkeypatch.setattr(parts.Measurer, "least", lambda self, case, precision, side: float(side > 64))
    monkeypatch.setattr(run, "SIDES", (64, 64, 64))
    monkeypatch.setattr(run, "QUICK", replace(run.QUICK, rate=0.001, part=0.01, megabytes=1))
    monkeypatch.setattr(run, "FULL", replace(run.FULL, rate=0.001, part=0.01, megabytes=1))


@pytest.fixture
def cheap(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `small`, with three checks, and without the built-in model's picture, which the test of a quick run draws."""

    def picture(dtype: str) -> Verdict:
        return Verdict("picture of the built-in model", dtype, "128 x 128", 0.0, 1.0, 0.0, 1.0, 0.0)

    names = ("product", "rotation", "gradient of a block")
    chosen = [case for case in run.catalogue(packed=False) if case.name in names]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "catalogue", lambda packed: chosen)
    monkeypatch.setattr(run, "built_in", picture)


def ran(*argv: str) -> tuple[int, str, str]:
    """Exit code and output of a command."""
    out, err = io.StringIO(), io.StringIO()
    console = Console(
        rich.console.Console(file=out, theme=THEME, width=150), rich.console.Console(file=err, theme=THEME, width=200)
    )
    return main(["doctor", *argv], console), out.getvalue(), err.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ran("--quick", "--json", "found.json")
    assert code == 0, err
    assert "healthy: all" in out and "found.json" in out and "WRONG" not in out
    assert "checks ran at smaller sizes than the real model's" in err
    text = (tmp_path / "found.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["healthy"] and data["quick"] and {each["verdict"] for each in data["right"]} == {"right"}
    assert {rate["name"] for rate in data["fast"]} == {"memory", "product", "attention", "convolution"}
    assert data["predicted"]["forward_seconds"]["f32"]["512"] > 0
    assert [name.rpartition(" ")[0] for name in data["measured"]] == [
        "forward f32", "forward 8", "step lean f32", "decode lean f32", "text f32",
    ]  # fmt: skip
    personal = {getpass.getuser(), socket.gethostname(), str(Path.home()), str(tmp_path)} - {"root"}
    assert [word for word in personal if word in text] == []
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_a_full_run_checks_every_dtype_and_shows_every_step() -> None:
    said: list[tuple[str, int, int, str]] = []
    found = run.diagnose(quick=False, progress=lambda *words: said.append(words))
    assert found.healthy
    assert [v.dtype for v in found.verdicts if v.name == "rotation"] == ["bf16", "f16", "f32"]
    sections = dict.fromkeys(section for section, *_ in said)
    assert list(sections) == ["machine", "right", "whole", "rates", "parts"]
    for section in sections:
        done = [n for name, n, _, _ in said if name == section]
        assert done == list(range(len(done)))  # one word before each, and one at the end
    assert {name.rpartition(" ")[0] for name in found.measured} >= {"step fast f32", "step lean 4", "decode fast f32"}


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = mx.matmul
    monkeypatch.setattr(mx, "matmul", lambda a, b: matmul(a, b) * 1.01)
    code, out, err = ran("--quick")
    assert code == 1 and "WRONG" in out and "not healthy: 2 of " in out
    assert "error: product in f32 is wrong: " in err and "MLX_ENABLE_TF32=0" in err


def test_without_mlx_the_machine_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(work: str) -> None:
        raise BackendError(f"{work} needs MLX, which is not installed")

    monkeypatch.setattr(doctor, "require_mlx", absent)
    code, out, err = ran("--json", str(tmp_path / "found.json"))
    assert code == 1 and "architecture" in out
    assert "error: zimage doctor needs MLX, which is not installed" in err
    assert json.loads((tmp_path / "found.json").read_text())["problems"][0]["grave"]


def test_the_json_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    code, _, err = ran("--json", str(tmp_path))
    assert code == 1 and "error: " in err


def test_a_problem_that_is_not_grave_is_a_warning() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(
        rich.console.Console(file=out, theme=THEME), rich.console.Console(file=err, theme=THEME, width=200)
    )
    doctor.show(Findings(True, Machine({"memory": 8e9}, [Problem("it is slow", "wait")])), console)
    assert "warning: it is slow: wait" in err.getvalue() and "8.0 GB" in out.getvalue()


def test_times_are_easy_to_read() -> None:
    assert [doctor.duration(s) for s in (0.027, 4.2, 42.4, 300, 9000, 40000)] == [
        "0.027 s", "4.2 s", "42 s", "5 min", "150 min", "11 h",
    ]  # fmt: skip


def test_a_mac_without_its_gpu_or_with_an_old_mlx_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.sys, "platform", "darwin")
    monkeypatch.setattr(device, "_VERSION", "0.31.2.dev20260101+abc")
    monkeypatch.setattr(device.mx.metal, "is_available", lambda: True)
    facts = [problem.fact for problem in device.describe(None).problems]
    assert facts == ["MLX does not use the GPU of this Mac", "mlx 0.31.2.dev20260101+abc has known faults on Metal"]
    monkeypatch.setattr(device, "_VERSION", "0.32.1")
    assert device.version() == (0, 32, 1)


def test_a_chip_that_emulates_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)

    def rate(dtype: str, per_second: float) -> Rate:
        return Rate("product", dtype, "", per_second, "FLOP")

    (problem,) = device.slow_bfloat16([rate("bf16", 1.9e12), rate("f16", 2.5e12)])
    assert problem.fact == "float16 is 1.3 times as fast as bfloat16 on this chip" and "`dtype`" in problem.remedy
    assert device.slow_bfloat16([rate("bf16", 1.9e12), rate("f16", 2e12)]) == []
    assert device.slow_bfloat16([rate("bf16", 1.9e12)]) == []


def test_the_pace_of_this_machine_is_measured_in_a_moment() -> None:
    pace = Pace.measure()
    assert pace.numpy > 1e8 and all(each > 1e7 for each in pace.device.values())
    case: Case = run.catalogue(packed=False)[0]
    assert pace.seconds(case, case.sizes[0], "f32") > pace.seconds(case, case.sizes[-1], "f32")
    assert "mlx.core" in sys.modules and checking.text((1, 2)) == "1 x 2"
