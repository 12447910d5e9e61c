"""Batches for the loss: the pictures that the plan says come next, read from the cache and noised.

Everything random about a picture is drawn from (seed, epoch, item): batch size, number of machines and interruptions
do not change it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.flow import VALIDATION_SIGMAS, TimestepSampling
from zimage_ref.training.batches import DRAW, HELD_OUT, rng_for
from zimage_ref.training.plan import TrainPlan

from .encode import EncodedDataset
from .loss import NoisyBatch


class Feed:
    """Training and held-out batches of a plan."""

    def __init__(self, plan: TrainPlan, data: EncodedDataset) -> None:
        self._plan, self._data = plan, data
        self._sampling = TimestepSampling.parse(plan.config.timesteps)

    def batch(self, epoch: int, items: Sequence[int]) -> NoisyBatch:
        """The pictures of `items`, all of one size, as they are in `epoch`."""
        drawn = [self._draw(epoch, item) for item in items]
        sigma = np.concatenate([s for _, _, s, _ in drawn])
        return NoisyBatch(
            x_0=mx.stack([x_0 for x_0, _, _, _ in drawn]),
            noise=mx.array(np.stack([noise for _, noise, _, _ in drawn])),
            sigma=mx.array(sigma),
            weight=mx.array(self._sampling.weights(sigma)),
            captions=[self._data.caption(caption) for _, _, _, caption in drawn],
        )

    def held_out(self, index: int) -> list[tuple[float, NoisyBatch]]:
        """One batch, of one picture, for each sigma of the held-out loss; always the same noise."""
        plan = self._plan
        example, size = plan.held_out[index], plan.held_out_sizes[index]
        x_0, caption = self._data.latents(example, size)[None], self._data.caption(example.caption)
        batches = []
        for i, sigma in enumerate(VALIDATION_SIGMAS):
            noise = rng_for(plan.config.seed, HELD_OUT, index, i).standard_normal(x_0.shape, dtype=np.float32)
            batches.append((sigma, NoisyBatch(x_0, mx.array(noise), mx.array([sigma]), [caption])))
        return batches

    def _draw(self, epoch: int, item: int) -> tuple[mx.array, Array, Array, str]:
        """Latents (C, h, w), noise (C, h, w), sigma (1,) and caption of an item in an epoch."""
        config, showing = self._plan.config, self._plan.batches.items[item]
        example = self._plan.examples[showing.example]
        rng = rng_for(config.seed, DRAW, epoch, item)
        mirrored, unnamed = rng.random() < 0.5, rng.random() < config.caption_dropout
        x_0 = self._data.latents(example, showing.size, config.flip and mirrored)
        noise = rng.standard_normal(x_0.shape, dtype=np.float32)
        sigma = self._sampling.sigmas(rng, 1, self._plan.tokens(showing.size))
        return x_0, noise, sigma, "" if unnamed else example.caption
