"""What the small ControlNet learns from: edge maps of drawings, and captions that leave the shapes to the map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from zimage_ref.pictures.images import Picture, to_picture

from .drawings import Scene, describe, draw

_EDGE = 40.0  # RGB levels from one pixel to the next, less than half of the way from any colour to another


def edge_map(picture: Picture) -> Picture:
    """White lines on black, RGB of the same size, at the edges of a drawing.

    It needs no package more. On drawings it shows what `--control-kind canny` shows, with lines of one to two pixels.
    """
    pixels = np.asarray(picture.convert("RGB"), np.float32)  # (H, W, 3)
    right = np.linalg.norm(np.diff(pixels, axis=1, append=pixels[:, -1:]), axis=-1)
    down = np.linalg.norm(np.diff(pixels, axis=0, append=pixels[-1:]), axis=-1)
    lines = (np.maximum(right, down) > _EDGE).astype(np.float32)
    return to_picture(np.stack([lines] * 3, axis=-1))


def name_colours(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene that names its colours alone, such as "red and blue on a yellow background"."""
    colours = dict.fromkeys(thing.colour for thing in scene.things)
    return describe(replace(scene, subject=" and ".join(colours)), rng)


def outlined(scenes: Iterable[Scene], seed: int) -> Iterator[tuple[Picture, str]]:
    """The edge map of each scene, and a caption of its colours."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        yield edge_map(draw(scene, rng)), name_colours(scene, rng)
