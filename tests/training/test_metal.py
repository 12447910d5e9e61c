"""What may happen to a run on a Mac: the GPU fails, hours pass, other machines are late, the memory is another."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.daily import daily
from support.pages import ROOT
from support.training_runs import Run, Workshop, after, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_cli.app import main
from zimage_mlx import Checkpointed, Done, ZImagePipeline, device
from zimage_mlx.training import learner, loop, machines, run
from zimage_mlx.training.gradient import LossAndGradients
from zimage_ref import BackendError, TrainingError
from zimage_ref.options_file import dump_options
from zimage_ref.training.run_folder import RunFolder

FAILED = "[METAL] Command buffer execution failed: "
NO_MEMORY = FAILED + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
SCREEN = FAILED + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
TOO_LONG = FAILED + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
ERRORS = {
    NO_MEMORY: "the GPU has no memory left: take a smaller size, fewer bits or `memory` lean",
    "[metal::malloc] Resource limit (499000) exceeded.": "the GPU has no memory left",
    SCREEN: "macOS ended the work because the screen had to wait: let the display sleep, or set AGX_RELAX",
    TOO_LONG: "macOS ended the work because it took the GPU too long: take a smaller size, or set AGX_RELAX",
    FAILED + "Internal Error": "the GPU has failed: start again",
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("metal"))


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_metal_is_one_line_with_the_way_out(error: str) -> None:
    with pytest.raises(BackendError) as caught, device.gpu_errors_explained():
        raise RuntimeError(error)
    assert ERRORS[error] in str(caught.value) and error in str(caught.value) and "resume" not in str(caught.value)
    with pytest.raises(TrainingError, match="`resume` goes on from the last save"), device.gpu_errors_explained(True):
        raise RuntimeError(error)
    with pytest.raises(RuntimeError, match="another thing"), device.gpu_errors_explained():
        raise RuntimeError("another thing")


def test_training_that_metal_ends_says_so_and_keeps_its_last_save(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = shop.train("whole", steps=4).bytes
    call, calls = LossAndGradients.__call__, []

    def fails(self: LossAndGradients, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise RuntimeError(SCREEN)
        return call(self, batch)

    monkeypatch.setattr(LossAndGradients, "__call__", fails)
    file = shop.folder / "ended.toml"
    file.write_text(dump_options(shop.config("ended", steps=4, resume_every=2)), encoding="utf-8")
    assert main(["train", "--config", str(file)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "the screen had to wait" in lines[0] and "--resume goes on" in lines[0]
    saved, _ = RunFolder(shop.folder / "ended.safetensors").latest()
    assert saved is not None and saved.step == 2
    assert shop.train("ended", steps=4, resume=True).bytes == expected


def test_generation_that_metal_ends_says_so(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(ZImagePipeline, "predict", fails)
    pipe = ZImagePipeline.from_pretrained(model_dir, "float32")
    options = {"width": 32, "height": 32, "steps": 1}
    for work in (lambda: pipe("a fox", **options), lambda: list(pipe.stream("a fox", **options))):
        with pytest.raises(BackendError, match="the GPU has no memory left"):
            work()
    size = ["--width", "32", "--height", "32", "--steps", "1", "--backend", "mlx", "--dtype", "float32"]
    arguments = ["--model-dir", str(model_dir), "--prompt", "a fox", "--output", str(tmp_path / "p.png"), *size]
    assert main(["generate", *arguments]) == 1
    assert "error: the GPU has no memory left" in capsys.readouterr().err.replace("\n", " ")


def saves(run: Run) -> list[int]:
    return [event.step for event in run.of(Checkpointed)]


def test_a_run_saves_every_five_minutes_and_changes_no_bit(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shop.train("quick", steps=4)
    assert saves(plain) == [4]
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "clock", lambda: 150.0 * next(ticks))
    slow = shop.train("slow", steps=4)
    assert len(saves(slow)) > 1 and slow.bytes == plain.bytes
    monkeypatch.setattr(loop, "clock", lambda: 0.0)
    assert saves(shop.train("at-once", steps=2)) == [2]
    hours = iter(range(10**6))
    monkeypatch.setattr(loop, "clock", lambda: 3600.0 * next(hours))
    assert saves(shop.train("hours", steps=2)) == [1, 2]


def test_a_resumed_run_keeps_as_much_for_the_gradient(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []
    made = learner.LossAndGradients
    monkeypatch.setattr(learner, "LossAndGradients", lambda m, b, compiled: budgets.append(b) or made(m, b, compiled))
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: 10**9)
    whole = shop.train("kept", steps=4, memory="auto")
    count = len(whole.events) - len(whole.steps) - 3  # what comes before the first step: `should_stop` is asked there
    shop.train("again", after(count + 1), steps=4, memory="auto")
    active = mx.get_active_memory
    monkeypatch.setattr(mx, "get_active_memory", lambda: active() + 10**6)
    rest = shop.train("again", steps=4, memory="auto", resume=True)
    assert budgets[1] == budgets[2] and rest.of(Done) and rest.bytes == whole.bytes
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: 5 * 10**8)
    shop.train("again", steps=5, memory="auto", resume=True, resume_anyway=True)
    assert budgets[3] < budgets[2] / 1.5  # another machine


def test_without_a_launcher_no_library_of_one_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    init = mx.distributed.init
    monkeypatch.setattr(mx.distributed, "init", lambda **options: asked.append(options) or init(**options))
    for name in machines._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    assert machines.is_first() and asked == [{"backend": "ring"}]
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    machines.group()
    assert asked[1:] == [{}]


def test_what_comes_from_other_machines_is_computed_before_it_is_used() -> None:
    """Each call is evaluated or read by its own statement: see `machines.summed`."""
    calls = []
    for path in sorted((ROOT / "zimage_mlx").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert "average_gradients" not in source
        for function in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)):
            text = ast.unparse(function)
            if "mx.distributed.all_" in text:
                calls.append(function.name)
                assert "mx.eval(total)" in text or "mx.eval(most)" in text
    assert calls == ["summed", "greatest"]


@pytest.mark.parametrize("asked", daily(["float32", "bfloat16"], "float32"))
def test_float32_means_float32_before_the_first_product(asked: str, model_dir: Path) -> None:
    program = (
        "import os, sys, zimage_mlx; from pathlib import Path;"
        "zimage_mlx.ZImagePipeline.from_pretrained(Path(sys.argv[1]), sys.argv[2]);"
        "print(os.environ.get('MLX_ENABLE_TF32'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    for given, expected in ((None, "0" if asked == "float32" else "None"), ("1", "1")):
        environment.update({"MLX_ENABLE_TF32": given} if given else {})
        command = [sys.executable, "-c", program, str(model_dir), asked]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("gpu", "metal", "expected"), [(True, False, ("7", "50")), (True, True, ("7", None)), (False, False, ("7", None))]
)
def test_memory_comes_back_early_on_cuda_unless_a_user_said_otherwise(
    gpu: bool, metal: bool, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "")  # so that it is deleted in the end
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER")
    device.give_memory_back_early()
    assert (os.environ["MLX_MAX_OPS_PER_BUFFER"], os.environ.get("MLX_MAX_MB_PER_BUFFER")) == expected


@pytest.mark.parametrize(("memory", "times"), [("lean", 1), ("fast", 0)])
def test_training_asks_for_it_where_memory_is_short(
    memory: str, times: int, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(run, "give_memory_back_early", lambda: asked.append(1))
    shop.train(f"early-{memory}", steps=1, memory=memory)
    assert len(asked) == times
