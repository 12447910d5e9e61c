"""Previews of unfinished pictures, from a quarter of their latents: they cost a quarter of a decoding."""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.arrays import ArrayT
from zimage_ref.pictures.images import Picture, fit

from .engine import ConditioningT
from .pipeline import Pipeline


def averaged(x: Array) -> Array:
    """Latents (1, C, h, w) -> (1, C, ceil(h / 2), ceil(w / 2)): means of 2 x 2. An odd edge is repeated."""
    _, channels, h, w = x.shape
    even = np.pad(x, ((0, 0), (0, 0), (0, h % 2), (0, w % 2)), mode="edge")
    means: Array = even.reshape(1, channels, (h + 1) // 2, 2, (w + 1) // 2, 2).mean(axis=(3, 5))
    return means


def quick_picture(pipe: Pipeline[ArrayT, ConditioningT], x: ArrayT, width: int, height: int) -> Picture:
    """The picture of the latents x (1, C, h, w), decoded at half the sides and enlarged to width x height pixels.

    Raises ConfigError if the picture is not finite.
    """
    small = pipe.picture(pipe.to_backend(averaged(np.asarray(x, np.float32))))
    return fit(small, width, height, "stretch")
