"""Grids: which pictures they make, on one sheet, with one encoding of each prompt and both engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.cases import random_lora
from support.networks import BACKENDS, pipeline

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.generation.grid import Grid, axes
from zimage_ref.generation.run import GenerationRun
from zimage_ref.lora.file import write_lora
from zimage_ref.pictures.metadata import read_record

SIZE: dict[str, Any] = {"width": 48, "height": 32, "steps": 2}
FOX = GenerateConfig("a fox", **SIZE)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "fox.safetensors"
    write_lora(path, random_lora(rank=4, seed=0), {"rank": 4})
    return path


def test_two_axes_make_columns_and_rows() -> None:
    grid = Grid.parse("lora=0,0.5,1 seed=3,4", [FOX])
    assert grid.columns == ("lora 0", "lora 0.5", "lora 1") and grid.rows == ("seed 3", "seed 4")
    assert [(c.lora_scale, c.seed) for c in grid.configs] == [(0, 3), (0, 4), (0.5, 3), (0.5, 4), (1, 3), (1, 4)]
    assert grid.cells == (0, 3, 1, 4, 2, 5)  # a LoRA is merged once: column by column
    assert Grid.parse("seed=3,4 sampler=euler,heun", [FOX]).cells == (0, 1, 2, 3)  # seeds share a batch


def test_several_pictures_are_the_rows_of_one_axis() -> None:
    grid = Grid.parse("steps=1,2", [FOX, GenerateConfig("waves", seed=7)])
    assert grid.rows == ("a fox, seed 0", "waves, seed 7")
    assert [(c.prompt, c.steps) for c in grid.configs] == [("a fox", 1), ("waves", 1), ("a fox", 2), ("waves", 2)]


def test_every_number_and_every_choice_can_be_an_axis() -> None:
    assert {"seed", "steps", "guidance", "width", "strength", "lora_scale", "sampler", "fit"} <= set(axes())
    assert not {"prompt", "negative_prompt", "init_image", "mask"} & set(axes())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "give one or two axes"), ("steps", "give one or two axes"), ("steps=1,", "give one or two axes"),
        ("a=1 b=2 c=3", "give one or two axes"), ("step=1,2", "is 'steps' meant"), ("prompt=a,b", "is not an axis"),
        ("steps=1,two", "not a whole number"), ("steps=4,04", "names a value twice"), ("steps=0,1", "at least 1"),
        ("lora=1 lora-scale=2", "twice"), ("sampler=euler,nothing", "known are euler"),
        (f"seed={','.join(map(str, range(10_001)))}", "must be at most 10000"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_one_line(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as raised:
        Grid.parse(text, [FOX])
    assert "\n" not in str(raised.value)


def test_rows_and_axes_do_not_repeat_a_picture() -> None:
    several = [FOX, GenerateConfig("a fox", seed=1, **SIZE)]
    with pytest.raises(ConfigError, match="takes one prompt"):
        Grid.parse("steps=1,2 guidance=0,1", several)
    with pytest.raises(ConfigError, match="has an axis of seeds"):
        Grid.parse("seed=1,2", several)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_is_the_picture_made_alone_and_each_prompt_is_encoded_once(
    backend: str, model_dir: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(backend, model_dir)
    texts: list[str] = []
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda text: texts.append(text) or encode(text))
    grid = Grid.parse("lora=0,0.5,1 seed=1,2", [FOX])
    run = GenerationRun(pipe, loras=[(lora, 2.0)])
    made = list(run.make(run.plan(grid.configs)))
    assert texts == ["a fox"]
    alone = GenerationRun(pipe, loras=[(lora, 1.0)])
    (half,) = alone.make(alone.plan([GenerateConfig("a fox", seed=2, **SIZE)]))
    cell = made[3]
    assert np.abs(np.asarray(cell.picture, int) - np.asarray(half.picture, int)).max() <= 1
    assert cell.record == half.record  # the record has the strength that was used, and no factor
    (none,) = GenerationRun(pipe).make(run.plan([GenerateConfig("a fox", seed=1, **SIZE)]))
    assert np.abs(np.asarray(made[0].picture, int) - np.asarray(none.picture, int)).max() <= 1
    assert np.abs(np.asarray(made[4].picture, int) - np.asarray(none.picture, int)).max() > 4


def test_the_command_writes_pictures_and_their_sheet(
    model_dir: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--width=48", "--height=32", "--steps=1"]
    argv = [*common, "--prompt=x", "--output=x.png", "--grid=lora=0,3 seed=4,5"]
    assert main(argv) == 1 and "--lora-scale needs --lora" in capfd.readouterr().err
    assert main([*argv, f"--lora={lora}:0.5"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"x-1.png", "x-2.png", "x-3.png", "x-4.png", "x.grid.png"}
    records = [read_record(tmp_path / f"x-{i}.png") for i in (1, 2, 3, 4)]
    assert [(r["loras"][0]["scale"], r["seed"]) for r in records] == [(0, 4), (0, 5), (1.5, 4), (1.5, 5)]
    sheet = np.asarray(Image.open("x.grid.png"), int)
    for i, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)], start=1):
        cell = np.asarray(Image.open(f"x-{i}.png"), int)  # 48 x 32, apart by a gap of 2
        top, left = sheet.shape[0] - (2 - row) * 34, sheet.shape[1] - (2 - column) * 50
        np.testing.assert_array_equal(sheet[top : top + 32, left : left + 48], cell)
    assert (sheet[:, :8] < 128).any() and (sheet[:12] < 128).any()  # labels
    assert main([*argv, f"--lora={lora}"]) == 1 and "x-1.png: exists" in capfd.readouterr().err
    assert main(["generate", "--from-image=x-3.png", "--output=again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("x-3.png").read_bytes()
    assert main([*common, "--prompt=x", "--output=-", "--grid=seed=1,2"]) == 1
    assert "--grid writes several files" in capfd.readouterr().err


def test_the_panel_shows_every_value_of_an_axis(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--size=32", "--prompt=x", "--guidance=0"]
    assert main([*common, "--grid=steps=1,2 nag=1,2.5", "--negative-prompt=snow"]) == 0
    shown = {" ".join(line.strip("│ ").split()) for line in capfd.readouterr().err.splitlines()}
    assert {"steps 1, 2", "NAG 1, 2.5", "guidance 0"} <= shown and not any(line.startswith("variety") for line in shown)
    assert any(re.search(r"it takes about \d+ MB", line) for line in shown), "the small model takes less than 0.1 GB"
