"""Previews of unfinished pictures, from a quarter of their latents: they cost a quarter of a decoding."""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.arrays import ArrayT
from zimage_ref.pictures.images import Picture, fit

from .engine import ConditioningT
from .pipeline import Pipeline
from .upscale import TILE_SIZE


def averaged(x: Array) -> Array:
    """Latents (1, C, h, w) -> (1, C, ceil(h / 2), ceil(w / 2)): means of 2 x 2. An odd edge is repeated."""
    _, channels, h, w = x.shape
    even = np.pad(x, ((0, 0), (0, 0), (0, h % 2), (0, w % 2)), mode="edge")
    means: Array = even.reshape(1, channels, (h + 1) // 2, 2, (w + 1) // 2, 2).mean(axis=(3, 5))
    return means


def quick_picture(pipe: Pipeline[ArrayT, ConditioningT], x: ArrayT) -> Picture:
    """The picture of the latents x (1, C, h, w), decoded at half the sides or less, and enlarged.

    It takes no more memory than a tile. Raises ConfigError if the picture is not finite.
    """
    factor, (_, _, h, w) = pipe.folder.vae.factor, x.shape
    small = averaged(np.asarray(x, np.float32))
    while factor**2 * small.shape[2] * small.shape[3] > TILE_SIZE**2:
        small = averaged(small)
    return fit(pipe.picture(pipe.to_backend(small)), factor * w, factor * h, "stretch")
