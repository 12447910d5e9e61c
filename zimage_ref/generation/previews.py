"""Previews of unfinished pictures: from a quarter of their latents, or by a tiny decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.memory import Footprint, LoadedModel, Mode, Stage, generation_stages
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.checks import check_finite
from zimage_ref.pictures.images import Picture, fit, to_picture, to_unit

from .engine import ConditioningT
from .pipeline import Pipeline
from .upscale import TILE_SIZE


def averaged(x: Array) -> Array:
    """Latents (1, C, h, w) -> (1, C, ceil(h / 2), ceil(w / 2)): means of 2 x 2. An odd edge is repeated."""
    _, channels, h, w = x.shape
    even = np.pad(x, ((0, 0), (0, 0), (0, h % 2), (0, w % 2)), mode="edge")
    means: Array = even.reshape(1, channels, (h + 1) // 2, 2, (w + 1) // 2, 2).mean(axis=(3, 5))
    return means


def quick_picture(
    pipe: Pipeline[ArrayT, ConditioningT], x: ArrayT, decoder: Callable[[ArrayT], Array] | None = None
) -> Picture:
    """The picture of the latents x (1, C, h, w). It takes no more memory than a tile.

    decoder: from `Engine.tiny_decoder`. Without one, the latents are decoded at half the sides or less, and the result
    is enlarged. Raises ConfigError if the picture is not finite.
    """
    factor, (_, _, h, w) = pipe.folder.vae.factor, x.shape
    small = np.asarray(x, np.float32)
    if decoder is None:
        small = averaged(small)
    while factor**2 * small.shape[2] * small.shape[3] > TILE_SIZE**2:
        small = averaged(small)
    latents = pipe.to_backend(small)
    return fit(pipe.picture(latents) if decoder is None else _decoded(pipe, latents, decoder),
               factor * w, factor * h, "stretch")  # fmt: skip


def _decoded(pipe: Pipeline[ArrayT, ConditioningT], x: ArrayT, decoder: Callable[[ArrayT], Array]) -> Picture:
    with pipe.turn():
        pixels = decoder(x)
    check_finite("the pixels of this preview", pixels)
    return to_picture(to_unit(pixels))


def with_previews(
    stages: Sequence[Stage], model: LoadedModel, footprint: Footprint, size: tuple[int, int], mode: Mode
) -> list[Stage]:
    """The memory of each stage of making pictures of `size`, if the autoencoder makes previews.

    It comes beside the transformer, and decodes half the sides, or less, between two steps.
    """
    width, height = (side // 2 for side in size)
    while width * height > TILE_SIZE**2:
        width, height = width // 2, height // 2
    encode, denoise, decode = stages
    preview = generation_stages(model, footprint, (width, height))[2].activations
    weights = denoise.weights + (0 if mode == "fast" else decode.weights)  # fast holds all networks anyway
    return [encode, replace(denoise, weights=weights, activations=max(denoise.activations, preview)), decode]


def with_tiny_decoder(stages: Sequence[Stage], pixels: int) -> list[Stage]:
    """The same if TAEF1's decoder makes the previews: four arrays of its width at full size, float32."""
    encode, denoise, decode = stages
    more = min(pixels, TILE_SIZE**2) * 64 * 4 * 4
    return [encode, replace(denoise, activations=denoise.activations + more), decode]
