"""The folder beside a run's output: a state that is whole is read, any other is named and passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zimage_ref.formats import files
from zimage_ref.formats.tensors import Tensor
from zimage_ref.training import run_folder
from zimage_ref.training.facts import SavedFacts
from zimage_ref.training.run_folder import RunFolder

FACTS: SavedFacts = {
    "config": {"rank": 2}, "total": 9, "batch": 1, "dataset": "d", "model": {"vae": "v"}, "adapter": None,
    "environment": {"mlx": "0"}, "smoothed": None, "failures": 0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """One with the states of two steps."""
    run = RunFolder(tmp_path / "x.safetensors")
    for step in (1, 2):
        arrays = {"lora": {"a": np.full(3, step, np.float32)}, "optimizer": {"m": np.zeros(3, np.float32)}}
        matrices = {part: {name: Tensor.of(array) for name, array in each.items()} for part, each in arrays.items()}
        run.save(step, matrices, {**FACTS, "smoothed": 0.5, "failures": step})
    return run


def test_a_state_is_read_as_it_was_saved(run: RunFolder) -> None:
    saved, faults = run.latest()
    assert saved is not None and saved.step == 2 and not faults
    assert saved.facts == {**FACTS, "smoothed": 0.5, "failures": 2}
    assert saved.tensors["lora"]["a"].tolist() == [2, 2, 2] and saved.tensors["optimizer"]["m"].dtype == np.float32
    assert run.unfinished() == 2


def test_the_latest_state_is_that_of_the_highest_step(run: RunFolder) -> None:
    for step in (9, 10):
        run.save(step, {"lora": {}, "optimizer": {}}, FACTS)
        saved, _ = run.latest()
        assert saved is not None and saved.step == step


def test_a_run_is_finished_when_its_lora_was_written_after_its_last_step(run: RunFolder) -> None:
    run.output.write_bytes(b"of an earlier run")
    os.utime(run.output, (1, 1))
    run.save(9, {"lora": {}, "optimizer": {}}, FACTS)
    assert run.unfinished() == 9
    run.output.unlink()
    assert run.unfinished() == 9
    run.output.write_bytes(b"of this run")
    assert run.unfinished() == 0


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda state: state.pop("facts"), "its state.json has no facts of its run"),
        (lambda state: state.update(facts=[1]), "its state.json has no facts of its run"),
        (lambda state: state["facts"].pop("total"), "total is missing or of another type"),
        (lambda state: state["facts"].update(smoothed="low"), "smoothed is missing or of another type"),
        (lambda state: state["facts"].update(environment=None), "environment is missing or of another type"),
        (lambda state: state["facts"].update(config=[]), "config is missing or of another type"),
        (lambda state: state.pop("files"), "must list the files lora.safetensors, optimizer.safetensors"),
        (lambda state: state["files"].pop("optimizer.safetensors"), "its state.json must list the files"),
        (lambda state: state["files"].update({"gone.safetensors": "0"}), "gone.safetensors: cannot be opened: No such"),
        (lambda state: state["files"].update({"lora.safetensors": 7}), "lora.safetensors: is damaged: its checksum"),
    ],
)
def test_a_state_of_another_shape_is_named_and_the_one_before_is_used(
    spoil: Callable[[dict[str, Any]], object], fact: str, run: RunFolder
) -> None:
    file = run.path / "resume" / "step2" / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    spoil(state)
    file.write_text(json.dumps(state), encoding="utf-8")
    saved, (fault,) = run.latest()
    assert saved is not None and saved.step == 1
    assert fault.startswith(f"{file.parent}: cannot be used to resume: ") and fact in fault and "\n" not in fault


@pytest.mark.parametrize("text", ["", "[]", "{", None])
def test_a_state_that_is_no_json_object_is_named(text: str | None, run: RunFolder) -> None:
    file = run.path / "resume" / "step2" / "state.json"
    file.unlink() if text is None else file.write_text(text, encoding="utf-8")
    saved, (fault,) = run.latest()
    assert saved is not None and saved.step == 1 and "state.json: " in fault


def test_the_folder_of_states_may_be_a_link_to_another_disk(run: RunFolder, tmp_path: Path) -> None:
    resume, disk = run.path / "resume", tmp_path / "disk"
    resume.rename(disk)
    resume.symlink_to(disk, target_is_directory=True)
    run.save(3, {"lora": {}, "optimizer": {}}, FACTS)
    assert sorted(path.name for path in disk.iterdir()) == ["step2", "step3"]
    run.clear()
    assert resume.is_symlink() and not list(disk.iterdir())
    run.save(4, {"lora": {}, "optimizer": {}}, FACTS)
    assert run.unfinished() == 4


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="folders cannot be synced here")
def test_a_state_is_on_disk_before_its_name_and_then_the_name(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def recorded(handle: int) -> None:
        done.append(str(os.fstat(handle).st_ino))

    rename = Path.rename
    monkeypatch.setattr(files, "sync", recorded)
    monkeypatch.setattr(run_folder, "sync", recorded)
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append("renamed") or rename(path, to))
    folder = run.save(3, {"lora": {}, "optimizer": {}}, FACTS)
    inode, parent = (str(path.stat().st_ino) for path in (folder, folder.parent))
    synced = [event for event in done if event != "renamed"]
    assert synced[-2:] == [inode, parent]
    assert done.index(inode) < done.index("renamed", done.index(inode)) < done.index(parent)
    assert {str(path.stat().st_ino) for path in folder.iterdir()} <= set(done[: done.index(inode)])
