"""Draws the pictures of docs/generation.md with the built-in model: python docs/pictures.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from zimage_mlx import ZImagePipeline
from zimage_ref import GenerateConfig
from zimage_ref.generation.denoising import DenoisingStep
from zimage_ref.generation.previews import quick_picture
from zimage_ref.pictures.images import Picture, fit
from zimage_ref.tiny.drawings import SIDE

IMAGES = Path(__file__).parent / "images"
_HOW = {"width": SIDE, "height": SIDE, "steps": 8, "guidance": 0.0, "output": "pil"}
_SHOWN = (1, 2, 4, 8)  # steps
_HALVES = ("0,0,0.5,1: a red circle on a white background", "0.5,0,0.5,1: a blue star on a white background")
# Name of a sheet -> prompt, and the options of each row; each column is a seed
_SCENE = "a big red star left of a small blue ring on a yellow background"
SHEETS: dict[str, tuple[str, list[dict[str, object]]]] = {
    "longer": ("a red star", [{}, {"prompt": _SCENE}]),
    "nag": ("a red circle", [{}, {"nag": 8.0, "negative_prompt": "red"}]),
    "variety": ("a big green heart on a white background", [{}, {"variety": 1.0}]),
    "regions": ("a white background", [{"region": _HALVES}]),
    "cache": (
        _SCENE,
        [{"steps": 50, "guidance": 4.0, **cache} for cache in ({}, {"cache": "taylor"}, {"cache": "first-block"})],
    ),
}


def sheet(pipe: ZImagePipeline, prompt: str, rows: Sequence[dict[str, object]], seeds: int = 6) -> Picture:
    """The pictures of a prompt, a row for each set of options and a column for each seed."""
    given = [_HOW | {"prompt": prompt} | options for options in rows]
    pictures = [pipe([own.pop("prompt")] * seeds, seed=0, **own) for own in given]
    whole = pictures[0][0].resize((SIDE * seeds, SIDE * len(rows)))
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            whole.paste(picture, (SIDE * j, SIDE * i))
    return whole


def upscaled(pipe: ZImagePipeline) -> Picture:
    """A picture enlarged by Lanczos, and beside it the one with a second pass."""
    (small,) = pipe(_SCENE, seed=3, **_HOW | {"guidance": 3.0})
    large = fit(small, 2 * SIDE, 2 * SIDE, "crop")
    (finished,) = pipe(
        _SCENE, seed=3, init_image=small, upscale=2, tile_size=SIDE, upscale_strength=0.2, **_HOW | {"steps": 10}
    )
    whole = large.resize((4 * SIDE + 4, 2 * SIDE))
    whole.paste((255, 255, 255), (0, 0, *whole.size))
    whole.paste(large, (0, 0))
    whole.paste(finished, (2 * SIDE + 4, 0))
    return whole


def previews(pipe: ZImagePipeline) -> Picture:
    """The previews of one picture after some of its steps, and below them the same latents decoded whole."""
    shown: dict[int, tuple[Picture, Picture]] = {}

    def watch(_: range, step: DenoisingStep[mx.array]) -> None:
        if step.index in _SHOWN:
            shown[step.index] = quick_picture(pipe, step.x_0), pipe.picture(step.x_0)

    requests = pipe.plan([GenerateConfig(_SCENE, seed=3, width=SIDE, height=SIDE, steps=8, guidance=0.0)])
    list(pipe.generate(requests, watch=watch))
    whole = shown[1][0].resize((SIDE * len(_SHOWN), 2 * SIDE))
    for i, pair in enumerate(shown.values()):
        for j, picture in enumerate(pair):
            whole.paste(picture, (SIDE * i, SIDE * j))
    return whole


if __name__ == "__main__":
    model = ZImagePipeline.from_pretrained("tiny")
    for name, (prompt, rows) in SHEETS.items():
        sheet(model, prompt, rows).quantize(128).save(IMAGES / f"{name}.png", optimize=True)
    previews(model).quantize(128).save(IMAGES / "previews.png", optimize=True)
    upscaled(model).quantize(128).save(IMAGES / "upscale.png", optimize=True)
