"""Each example runs, on the built-in model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from support.errands import Errands
from support.networks import mlx_only
from support.pages import ROOT

EXAMPLES = ROOT / "examples"
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs an example as a script, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *argv: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *argv])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "batch.py", "merge.py", "preserve.txt", "stream.py", "train-character.toml", "train-datasets.toml",
        "train-object.toml", "train-style.toml",
    }  # fmt: skip


@mlx_only
def test_a_batch_of_prompts_becomes_a_file_each(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue ring\n", encoding="utf-8")
    run("batch.py", "prompts.txt", "--model-dir=tiny", "--side=64", "--steps=2")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["000.png", "001.png"]


@mlx_only
def test_a_stream_saves_a_picture_a_step(run: Run, tmp_path: Path) -> None:
    run("stream.py", "a red star", "--model-dir=tiny", "--side=64", "--steps=3")
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["01.png", "02.png", "03.png"]


def test_merging_keeps_every_layer_and_adds_ranks(run: Run, tmp_path: Path) -> None:
    errands = Errands(tmp_path)
    one, two = errands.lora(tmp_path / "one.safetensors", 2), errands.lora(tmp_path / "two.safetensors", 3)
    run("merge.py", f"{one.name}:0.5", two.name, "--output=both.safetensors")
    run("merge.py", one.name, two.name, "--output=small.safetensors", "--rank=2")
    ranks = {name: ranks_of(tmp_path / name) for name in ("one.safetensors", "both.safetensors", "small.safetensors")}
    assert [set(by_layer.values()) for by_layer in ranks.values()] == [{2}, {5}, {2}]
    assert len({frozenset(by_layer) for by_layer in ranks.values()}) == 1  # the same layers


def ranks_of(path: Path) -> dict[str, int]:
    """The rank of each layer's A in a LoRA file."""
    with safe_open(path, framework="np") as file:
        return {key: file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118


@mlx_only
def test_the_prompts_to_preserve_are_read_and_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = EXAMPLES / "preserve.txt"
    assert len(set(prompts.read_text(encoding="utf-8").splitlines())) == 100
    command = "zimage train --model-dir ~/Z-Image --dataset dog --output kept.safetensors --preserve-prompt-file"
    assert Errands(tmp_path).run(f"{command} {prompts.as_posix()}") == 0
    assert len([path for path in (tmp_path / "zimage-cache").rglob("*") if path.is_file()]) >= 100


@mlx_only
@pytest.mark.parametrize("kind", ["character", "datasets", "style", "object"])
@pytest.mark.slow
def test_the_options_of_each_kind_train_a_lora(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    errands = Errands(tmp_path)
    assert errands.run(f"zimage train --config {EXAMPLES.as_posix()}/train-{kind}.toml") == 0
    assert (tmp_path / f"{kind}.safetensors").is_file()
    assert len(list((tmp_path / f"{kind}.run" / "previews").iterdir())) >= 2
