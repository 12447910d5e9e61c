"""Previews: from a quarter of the latents, at the size of the picture, shown under the progress bar."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import rich.console
from PIL import Image
from support.networks import BACKENDS, pipeline

from zimage_cli.terminal.console import Console
from zimage_ref import GenerateConfig
from zimage_ref.generation.previews import averaged, quick_picture
from zimage_ref.generation.run import GenerationRun, RunSettings
from zimage_ref.pictures.images import half_blocks


def test_latents_are_averaged_two_by_two_and_an_odd_edge_is_repeated() -> None:
    x = np.arange(15, dtype=np.float32).reshape(1, 1, 3, 5)
    np.testing.assert_array_equal(averaged(x)[0, 0], [[3, 5, 6.5], [10.5, 12.5, 14]])
    assert averaged(np.zeros((1, 16, 6, 4), np.float32)).shape == (1, 16, 3, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_preview_decodes_a_quarter_and_has_the_size_of_the_picture(
    backend: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(backend, model_dir)
    shapes, decode = [], pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda x, tiles=None: shapes.append(tuple(x.shape[2:])) or decode(x, tiles))
    run = GenerationRun(pipe, RunSettings(preview_steps=1))
    seen: list[Image.Image] = []
    config = GenerateConfig("x", width=64, height=48, steps=3)
    (made,) = run.make(run.plan([config]), preview=lambda index, picture: seen.append(picture))
    assert shapes == [(3, 4), (3, 4), (6, 8)] and {picture.size for picture in seen} == {(64, 48)}
    latents = pipe.to_backend(np.random.default_rng(0).standard_normal((1, 16, 6, 8)).astype(np.float32))
    quick = np.asarray(quick_picture(pipe, latents), int)
    numpy = pipeline("numpy", model_dir)
    same = quick_picture(numpy, np.asarray(latents))
    assert np.abs(quick - np.asarray(same, int)).max() <= 1


def test_the_picture_grows_under_the_bar_and_goes() -> None:
    file = io.StringIO()
    console = Console(err=rich.console.Console(file=file, force_terminal=True, color_system="truecolor", width=80))
    red = half_blocks(Image.new("RGB", (8, 8), "red"), 8)
    with console.progress() as bars:
        bars.update("denoise", 1, 2)
        before = file.tell()
        bars.picture(red)
        shown = file.getvalue()[before:]
        before = file.tell()
        bars.picture([])
        bars.update("denoise", 2, 2)
    assert shown.count("\u2580") == 32 and shown.index("denoise") < shown.index("\u2580")
    assert "\u2580" not in file.getvalue()[before:]
