"""A run that is stopped anywhere, in any way, and resumed gives the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import tiny
from support.daily import daily
from support.training_runs import EVERYTHING, Run, Workshop, after, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import zimage_ref.training.run_folder
from zimage_mlx import Checkpointed, Done, Started, Stopped, train
from zimage_mlx.training.gradient import LossAndGradients
from zimage_ref import ConfigError, TrainingError
from zimage_ref.formats import safetensors
from zimage_ref.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = workshop(tmp_path_factory.mktemp("resume"))
    sizes = [(40, 40), (44, 40), (40, 44), (64, 32), (64, 36)]
    return Workshop(shop.folder, shop.model, pictures(shop.folder / "shapes", *sizes))


@pytest.fixture(scope="module")
def whole(shop: Workshop) -> Run:
    """All options together, without interruption."""
    return shop.train("whole", **EVERYTHING)


@pytest.mark.parametrize("k", daily([1, 4], 4))
def test_stopping_after_step_k_and_resuming_changes_no_bit(
    shop: Workshop, whole: Run, preparation: int, k: int
) -> None:
    name = f"stopped{k}"
    first = shop.train(name, after(preparation + k - 1), **EVERYTHING)
    assert first.events[-1] == Stopped(k) and len(first.steps) == k
    assert not first.output.exists()
    rest = shop.train(name, **EVERYTHING, resume=True)
    assert rest.of(Started) == [Started(k, 5)] and len(rest.steps) == 5 - k
    assert rest.bytes == whole.bytes
    assert [step.smoothed for step in first.steps + rest.steps] == [step.smoothed for step in whole.steps]
    assert _recorded_steps(rest) == [1, 2, 3, 4, 5]


def _recorded_steps(run: Run) -> list[int]:
    lines = RunFolder(run.output).metrics.read_text(encoding="utf-8").splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def preparation(shop: Workshop) -> int:
    """How often a run asks whether to stop before its first step."""
    asked = []
    for event in train(shop.config("prepared", **EVERYTHING, overwrite=True), lambda: bool(asked.append(1))):
        if isinstance(event, Started):
            return len(asked)
    raise AssertionError("the run did not start")


@pytest.mark.slow
def test_leaving_the_loop_anywhere_and_resuming_changes_no_bit(shop: Workshop, whole: Run) -> None:
    total = len(list(train(shop.config("counted", **EVERYTHING))))
    rng = random.Random(1)
    for cut in rng.sample(range(total), 6):
        config = shop.config(f"left{cut}", **EVERYTHING)
        events = train(config)
        for _ in range(cut):
            next(events)
        events.close()
        resumed = shop.train(f"left{cut}", **EVERYTHING, resume=True)
        assert resumed.bytes == whole.bytes, f"left after event {cut}"


def test_a_damaged_resume_folder_is_named_and_the_one_before_used(shop: Workshop) -> None:
    whole = shop.train("undamaged", steps=3, resume_every=1).bytes
    events = train(shop.config("damaged", steps=3, resume_every=1))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 2):
        pass
    events.close()
    file = RunFolder(shop.folder / "damaged.safetensors").path / "resume" / "step2" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    resumed = shop.train("damaged", steps=3, resume_every=1, resume=True)
    assert resumed.of(Started) == [Started(1, 3)] and "optimizer.safetensors: is damaged" in resumed.notices
    assert resumed.bytes == whole
    assert _recorded_steps(resumed) == [1, 2, 3]  # the second was made and recorded twice


def test_steps_that_failed_before_an_interruption_count_after_it(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = LossAndGradients.__call__

    def fails(self: Any, batch: Any) -> Any:
        loss, gradients = compute(self, batch)
        return loss * float("nan"), gradients

    monkeypatch.setattr(LossAndGradients, "__call__", fails)
    events = train(shop.config("failing", steps=9, resume_every=2))
    while not isinstance(next(events), Checkpointed):
        pass
    events.close()
    with pytest.raises(TrainingError, match="step 3: loss or gradient was not finite 3 times in a row"):
        shop.train("failing", steps=9, resume_every=2, resume=True)


def test_only_two_resume_folders_are_kept(shop: Workshop) -> None:
    run = shop.train("kept", steps=5, resume_every=2)
    assert {p.name for p in (RunFolder(run.output).path / "resume").iterdir()} == {"step4", "step5"}


def _interrupted(shop: Workshop, name: str, **options: Any) -> None:
    events = train(shop.config(name, steps=4, resume_every=2, **options))
    while not isinstance(next(events), Checkpointed):
        pass
    events.close()


def test_no_run_is_overwritten_unasked(shop: Workshop) -> None:
    _interrupted(shop, "precious")
    with pytest.raises(ConfigError, match=r"stopped at step 2: `resume` continues it, `overwrite` replaces it"):
        shop.train("precious", steps=4)
    assert shop.train("precious", steps=4, overwrite=True).of(Started) == [Started(0, 4)]
    before = shop.config("precious").output.read_bytes()
    with pytest.raises(ConfigError, match=r"precious\.safetensors: exists: give `overwrite` to replace it"):
        shop.train("precious", steps=1)
    assert shop.config("precious").output.read_bytes() == before
    assert shop.train("precious", steps=1, overwrite=True).of(Done)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"lr": 2e-3}, r"`lr` 0\.01 -> 0\.002"),
        ({"steps": 5}, "`steps` 4 -> 5"),
        pytest.param({"ema": 0.9}, r"`ema` 0\.0 -> 0\.9", marks=pytest.mark.slow),
        pytest.param({"targets": "attention"}, "`targets`", marks=pytest.mark.slow),
        ({"dataset": "other"}, "the pictures, captions or masks"),
        ({"model_dir": "other"}, "the model's weights"),
    ],
)
def test_a_changed_run_is_named_and_refused(shop: Workshop, options: dict[str, Any], fact: str, tmp_path: Path) -> None:
    name = "changed-" + "-".join(options)
    _interrupted(shop, name)
    if "dataset" in options:
        options = {"dataset": tiny.write_dataset(tmp_path / "data")}
    if "model_dir" in options:
        model = tiny.write_model_folder(tmp_path / "model")
        file = model / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors, metadata = safetensors.read(file)
        scaled = {k: type(t).of(t.read() * (1.001 if k.endswith("to_q.weight") else 1)) for k, t in tensors.items()}
        scaled = {k: type(t).of(t.read().astype("<f4")) for k, t in scaled.items()}
        safetensors.write(tmp_path / "changed.safetensors", scaled, metadata)
        shutil.move(tmp_path / "changed.safetensors", file)
        options = {"model_dir": model}
    given = {"steps": 4, "resume_every": 2, **options, "resume": True}
    with pytest.raises(ConfigError, match=fact + ".*`resume_anyway` continues it anyway"):
        shop.train(name, **given)
    if "targets" in options:
        with pytest.raises(ConfigError, match="the saved run has other layers or another rank"):
            shop.train(name, **given, resume_anyway=True)
    else:
        run = shop.train(name, **given, resume_anyway=True)
        assert run.of(Started)[0].step == 2 and run.of(Done)


def test_a_run_that_the_version_before_left_is_resumed(shop: Workshop) -> None:
    """Its state.json holds 0 and -1 for what the run decided, and the learning rate that this came to."""
    options = {"epochs": 1, "lr": None, "resume_every": 2}
    whole = shop.train("now", **options)
    events = train(shop.config("before", **options))
    while not isinstance(next(events), Checkpointed):
        pass
    events.close()
    file = RunFolder(shop.folder / "before.safetensors").path / "resume" / "step2" / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    former = {"steps": 0, "preview_size": 0, "preview_steps": 0, "preview_guidance": -1.0}
    assert [state["facts"]["config"][name] for name in former] == [None] * 4 and state["facts"]["config"]["lr"] > 1e-4
    state["facts"]["config"] |= former
    file.write_text(json.dumps(state, indent=1), encoding="utf-8")

    with pytest.raises(ConfigError, match="`steps` auto -> 9"):
        shop.train("before", **options, steps=9, resume=True)
    run = shop.train("before", **options, resume=True)
    assert run.of(Started) == [Started(2, len(whole.steps))] and "another" not in run.notices
    assert run.bytes == whole.bytes


def test_what_changes_no_result_may_change_on_resuming(shop: Workshop) -> None:
    _interrupted(shop, "free")
    options = {"save_every": 1, "keep_last": 1, "preview_prompt": "a fox", "preview_steps": 1, "resume": True}
    free = shop.train("free", steps=4, **options)
    assert free.bytes == shop.train("free-whole", steps=4).bytes


def test_resuming_with_nothing_saved_starts_at_the_first_step(shop: Workshop) -> None:
    run = shop.train("fresh", steps=2, resume=True)
    assert run.of(Started) == [Started(0, 2)] and "nothing to resume yet" in run.notices


def test_checkpoints_are_usable_files_and_only_the_last_are_kept(shop: Workshop) -> None:
    run = shop.train("steps", steps=7, save_every=2, keep_last=2)
    assert [path.name for path in run.saved] == [
        "steps.step2.safetensors", "steps.step4.safetensors", "steps.step6.safetensors", "steps.safetensors"
    ]  # fmt: skip
    assert {p.name for p in shop.folder.glob("steps.step*")} == {
        "steps.step4.safetensors", "steps.step4.lora.json", "steps.step6.safetensors", "steps.step6.lora.json"
    }  # fmt: skip
    step4 = shop.train("steps4", steps=4)
    assert (shop.folder / "steps.step4.safetensors").read_bytes() == step4.bytes


def test_two_runs_into_one_output_are_refused(shop: Workshop) -> None:
    with (
        RunFolder(shop.folder / "locked.safetensors").locked(),
        pytest.raises(TrainingError, match=r"locked\.safetensors: another run is writing it"),
    ):
        shop.train("locked", steps=1)
    assert shop.train("locked", steps=1).of(Done)


def test_a_full_disk_is_foreseen_and_leaves_the_last_state(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupted(shop, "full")
    monkeypatch.setattr(
        zimage_ref.training.run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 + 1000)
    )
    fact = r"full\.run: the disk is full: .* MB are missing: make room and go on with `resume`, from step 2"
    with pytest.raises(TrainingError, match=fact):
        shop.train("full", steps=4, resume=True)
    monkeypatch.undo()
    assert shop.train("full", steps=4, resume=True).bytes == shop.train("roomy", steps=4).bytes


def test_a_disk_that_fills_up_while_writing_leaves_the_last_state(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(shop, "filling")
    synced, fsync = [], os.fsync

    def fails(handle: int) -> None:
        synced.append(handle)
        if len(synced) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(TrainingError, match="the disk is full"):
        shop.train("filling", steps=4, resume=True)
    monkeypatch.undo()
    assert shop.train("filling", steps=4, resume=True).of(Done)
