"""Previews: prompts with their own settings, with and without the LoRA, on one sheet of prompts by steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.training_runs import Run, Workshop, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_mlx import Previewed, ZImagePipeline
from zimage_ref import ConfigError
from zimage_ref.training.metrics_lines import read_lines
from zimage_ref.training.plan import make_plan
from zimage_ref.training.preview_prompts import PreviewPrompt
from zimage_ref.training.preview_sheet import WITHOUT, preview_rows, write_sheet
from zimage_ref.training.run_folder import RunFolder

WIDE = "waves --width 64 --height=32 --seed 7 --guidance 2 --negative-prompt dark, old --steps 3"
OPTIONS: dict[str, Any] = {
    "steps": 2, "lr": 3e-2, "preview_every": 1, "preview_steps": 1, "preview_size": 48,
    "preview_prompt": ("a fox", WIDE),
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("previews"))


@pytest.fixture(scope="module")
def run(shop: Workshop) -> Run:
    return shop.train("shown", **OPTIONS)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int16)


def test_a_prompt_is_split_from_its_settings() -> None:
    assert PreviewPrompt.parse(WIDE) == PreviewPrompt(WIDE, "waves", 64, 32, 3, 2.0, 7, "dark, old")
    plain = "a well-known fox -- red, 3:4"
    assert PreviewPrompt.parse(plain) == PreviewPrompt(plain, plain)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a fox --sede 3", "sede is unknown: known are width, height, steps, guidance, seed, negative-prompt"),
        ("a fox --seed", "seed: '' is not a whole number"),
        ("a fox --seed 1 --seed 2", "seed is given twice"),
        ("a fox --width 50", "`width` 50 must be a multiple of 16: 48 is the nearest"),
        ("a fox --steps 0", "`steps`"),
    ],
)
def test_a_wrong_setting_is_named(text: str, fact: str, shop: Workshop) -> None:
    with pytest.raises(ConfigError, match=f"`preview_prompt` '{text}': .*{fact}"):
        shop.config("refused", preview_prompt=text)


def test_a_picture_that_is_too_large_and_a_prompt_without_effect_are_named(shop: Workshop) -> None:
    with pytest.raises(ConfigError, match="4096 x 4096 is more than"):
        make_plan(shop.config("large", preview_prompt="a fox --width 4096 --height 4096"))
    plan = make_plan(shop.config("idle", preview_prompt="a fox --negative-prompt dark", preview_guidance=0))
    assert "`preview_prompt` 'a fox --negative-prompt dark': its negative prompt is not used" in "\n".join(plan.notices)


def test_a_preview_has_the_settings_of_its_prompt_else_those_of_the_run(shop: Workshop, run: Run) -> None:
    folder, pipeline = RunFolder(run.output), ZImagePipeline.from_pretrained(shop.model)
    how = {"width": 64, "height": 32, "seed": 7, "guidance": 2.0, "negative_prompt": "dark, old", "steps": 3}
    for step, loras in ((0, []), (2, [(run.output, 1.0)])):
        (alone,) = pipeline("waves", **how, loras=loras)
        assert np.abs(np.asarray(alone, np.int16) - pixels(folder.preview(step, 1))).max() <= 1
    (other,) = pipeline("waves", **{**how, "negative_prompt": ""})
    assert np.abs(np.asarray(other, np.int16) - pixels(folder.preview(0, 1))).max() > 1
    assert pixels(folder.preview(0, 0)).shape == (48, 48, 3)


def test_the_sheet_shows_every_prompt_without_the_lora_and_after_each_step(run: Run) -> None:
    folder = RunFolder(run.output)
    rows = preview_rows(folder, read_lines(folder))
    assert [row.prompt for row in rows] == ["a fox", WIDE]
    assert [list(row.pictures) for row in rows] == [[WITHOUT, "step 1", "step 2"]] * 2
    sheet = pixels(folder.sheet)
    assert sheet.shape[1] > 3 * 64 and sheet.shape[0] > 2 * 48
    for row in rows:
        for path in row.pictures.values():
            assert holds(sheet, pixels(path)), path.name


def holds(sheet: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` stands somewhere in `sheet`, pixel for pixel."""
    height, width, _ = part.shape
    first = (sheet[: sheet.shape[0] - height + 1, : sheet.shape[1] - width + 1] == part[0, 0]).all(-1)
    return any((sheet[y : y + height, x : x + width] == part).all() for y, x in np.argwhere(first))


def test_previews_change_nothing_in_the_lora_and_the_first_ones_can_be_left_out(shop: Workshop, run: Run) -> None:
    later = shop.train("later", **OPTIONS, preview_first=False)
    assert later.bytes == run.bytes
    assert [event.step for event in later.of(Previewed)] == [1, 1, 2, 2]
    folder = RunFolder(later.output)
    assert [list(row.pictures) for row in preview_rows(folder, read_lines(folder))] == [["step 1", "step 2"]] * 2


def test_a_run_that_goes_on_from_a_lora_shows_the_model_without_it_too(shop: Workshop, run: Run) -> None:
    second = shop.train("second", **{**OPTIONS, "steps": 1}, init_lora=run.output)
    folder, before = RunFolder(second.output), RunFolder(run.output)
    (row, _) = preview_rows(folder, read_lines(folder))
    assert list(row.pictures) == [WITHOUT, "step 0", "step 1"]
    np.testing.assert_array_equal(pixels(row.pictures[WITHOUT]), pixels(before.preview(0, 0)))
    assert np.abs(pixels(row.pictures["step 0"]) - pixels(before.preview(2, 0))).max() <= 1
    assert np.abs(pixels(row.pictures["step 0"]) - pixels(row.pictures[WITHOUT])).max() > 1


def test_a_long_run_shows_the_first_and_the_last_and_a_damaged_picture_does_not_end_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "long.safetensors")
    run.previews.mkdir(parents=True)
    lines: list[Any] = []
    for step in range(0, 4000, 100):
        path = run.preview(step, 0)
        Image.new("RGB", (400, 800), (step // 20, 0, 0)).save(path)
        lines.append({"step": step, "preview": f"previews/{path.name}", "index": 0, "prompt": "long"})
    run.preview(3900, 0).write_bytes(b"no picture")
    (row,) = preview_rows(run, lines)
    assert len(row.pictures) == 12 and list(row.pictures)[::11] == [WITHOUT, "step 3,900"]
    write_sheet(run, lines)
    sheet = pixels(run.sheet)
    assert 12 * 192 < sheet.shape[1] < 12 * 210 + 100 and 384 < sheet.shape[0] < 450
