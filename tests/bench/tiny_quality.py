"""Measures a tiny Z-Image: do pictures of captions that were held out of training show what they say?

python tests/bench/tiny_quality.py [--model-dir tiny] [--captions 200] [--steps 8] [--guidance 0 3] [--sheet DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zimage_mlx import ZImagePipeline
from zimage_ref.pictures.images import Picture, to_array, to_picture, to_unit
from zimage_ref.tiny import drawings
from zimage_ref.tiny.judge import Seen, look, share_shown, shows

BATCH = 25


def main() -> None:
    """Prints the figures and writes contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-dir", default="tiny")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 3.0])
    parser.add_argument("--sheet", type=Path, help="folder for contact sheets of the first 40 pictures")
    options = parser.parse_args()

    pipeline = ZImagePipeline.from_pretrained(options.model_dir)
    rng = np.random.default_rng(20_000)
    stream = drawings.scenes(rng, held_out=True)
    scenes = [next(stream) for _ in range(options.captions)]
    captions = [drawings.describe(scene, rng) for scene in scenes]
    drawn = [drawings.draw(scene, rng) for scene in scenes]

    right = [shows(look(picture), scene) for picture, scene in zip(drawn, scenes, strict=True)]
    print(f"judge on drawings: {np.mean(right):.1%} read as drawn")
    decoded = list(reproduced(pipeline, drawn))
    psnr = np.mean([decibels(a, b) for a, b in zip(decoded, drawn, strict=True)])
    print(f"autoencoder: {psnr:.2f} dB, {share_shown(decoded, scenes):.1%} still read as drawn")
    for guidance in options.guidance:
        pictures = list(generate(pipeline, captions, options.steps, guidance))
        seen = [look(picture) for picture in pictures]
        report(f"guidance {guidance:g}, {options.steps} steps", scenes, seen)
        for i, (scene, what) in enumerate(zip(scenes, seen, strict=True)):
            if not shows(what, scene):
                print(f"    {i}: {captions[i]}: {what.ground}, {what.things}")
        if options.sheet:
            options.sheet.mkdir(parents=True, exist_ok=True)
            drawings.contact_sheet(pictures[:40], 8).save(options.sheet / f"guidance{guidance:g}.png")


def reproduced(pipeline: ZImagePipeline, pictures: list[Picture]) -> Iterator[Picture]:
    """Each picture after the autoencoder alone."""
    for picture in pictures:
        decoded = pipeline.decode(pipeline.vae.encode(pipeline.to_backend(to_array(picture)[None])))
        yield to_picture(to_unit(decoded))


def decibels(picture: Picture, original: Picture) -> float:
    """The PSNR of a picture."""
    return float(-10 * np.log10(np.mean(np.square((to_array(picture) - to_array(original)) / 2))))


def generate(pipeline: ZImagePipeline, captions: list[str], steps: int, guidance: float) -> Iterator[Picture]:
    """A picture a caption, each from its own seed."""
    for start in range(0, len(captions), BATCH):
        yield from pipeline(
            captions[start : start + BATCH], width=drawings.SIDE, height=drawings.SIDE, steps=steps,
            guidance=guidance, seed=start,
        )  # fmt: skip


def report(title: str, scenes: list[drawings.Scene], seen: list[Seen]) -> None:
    """One line for all captions, one for each kind of scene."""
    right = np.array([shows(what, scene) for what, scene in zip(seen, scenes, strict=True)])
    ground = np.mean([what.ground == scene.ground for what, scene in zip(seen, scenes, strict=True)])
    kinds = np.array([kind(scene) for scene in scenes])
    parts = ", ".join(
        f"{name} {right[kinds == name].mean():.1%} of {(kinds == name).sum()}" for name in sorted(set(kinds))
    )
    print(f"{title}: {right.mean():.1%} show exactly what the caption names ({parts}); background {ground:.1%}")


def kind(scene: drawings.Scene) -> str:
    """single, several (alike) or pair."""
    if len(scene.things) == 1:
        return "single"
    return "several" if len({(thing.shape, thing.colour) for thing in scene.things}) == 1 else "pair"


if __name__ == "__main__":
    main()
