"""Batches for the loss: the pictures that the plan says come next, read from the cache and noised.

Everything random about a picture is drawn from (seed, epoch, item): batch size, number of machines and interruptions
do not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.flow import VALIDATION_SIGMAS, TimestepSampling
from zimage_ref.training.batches import DRAW, HELD_OUT, PRESERVED, rng_for
from zimage_ref.training.dataset import Example
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.variants import Variants

from .encode import EncodedDataset, preserving_caption
from .loss import Distance, NoisyBatch

_LEAST = 1e-6  # of a latent's weight: a crop may leave only black of a mask
_PROMPTS = 0.7  # share of pictures under a prompt to preserve; the others are under the class. See `docs/training.md`
_PROMPT_SIGMA = 0.6  # least noise under such a prompt: with less, the picture contradicts it


class _Drawn(NamedTuple):
    """One picture of a batch."""

    x_0: mx.array  # (C, h, w)
    noise: Array  # (C, h, w)
    sigma: Array  # (1,)
    caption: str
    mask: mx.array | None  # (h, w) in 0..1


class _Kept(NamedTuple):
    """What training should leave as the base makes it."""

    caption: str
    sigma: float = 0.0  # the noise is at least this


class Feed:
    """Training and held-out batches of a plan."""

    def __init__(self, plan: TrainPlan, data: EncodedDataset) -> None:
        config = plan.config
        self.data, self._plan, self._variants = data, plan, Variants(config)
        weighs = config.loss_weight != "none"
        self._sampling = TimestepSampling.parse(config.timesteps, config.min_sigma, config.max_sigma, weighs)
        self._distance = Distance(config.loss, config.huber_delta, config.differential_guidance)

    def batch(self, epoch: int, items: Sequence[int]) -> NoisyBatch:
        """The pictures of `items`, all of one size, as they are in `epoch`."""
        drawn = [self._draw(epoch, item) for item in items]
        sigma = np.concatenate([each.sigma for each in drawn])
        own = np.array([self._example(item).settings.weight for item in items], np.float32)
        masks = [each.mask for each in drawn]
        return NoisyBatch(
            x_0=mx.stack([each.x_0 for each in drawn]),
            noise=mx.array(np.stack([each.noise for each in drawn])),
            sigma=mx.array(sigma),
            weight=mx.array(self._sampling.weights(sigma) * own),
            captions=[self.data.caption(each.caption) for each in drawn],
            mask=self._weights(masks, drawn[0].x_0.shape[1:]) if any(m is not None for m in masks) else None,
            distance=self._distance,
        )

    def preserved(self, batch: NoisyBatch, epoch: int, items: Sequence[int], blank: bool) -> NoisyBatch | None:
        """The same pictures with the same noise under captions at which training should change nothing.

        These are none, if `blank`; else prompts to preserve, and the captions with the class in place of the trigger.
        None if no picture is left: one without a trigger has no such caption.
        """
        shown = {i: _Kept("") if blank else self._kept(epoch, item) for i, item in enumerate(items)}
        kept = {i: each for i, each in shown.items() if each}
        if not kept:
            return None
        chosen = mx.array(list(kept))
        return NoisyBatch(
            x_0=batch.x_0[chosen],
            noise=batch.noise[chosen],
            sigma=mx.maximum(batch.sigma[chosen], mx.array([each.sigma for each in kept.values()])),
            captions=[self.data.caption(each.caption) for each in kept.values()],
        )

    def held_out(self, index: int) -> list[tuple[float, NoisyBatch]]:
        """One batch, of one picture, for each sigma of the held-out loss; always the same noise."""
        plan = self._plan
        example, size = plan.held_out[index], plan.held_out_sizes[index]
        x_0, caption = (
            self.data.latents(example, size)[None],
            self.data.caption(self._variants.first(example.caption)),
        )
        batches = []
        for i, sigma in enumerate(VALIDATION_SIGMAS):
            noise = rng_for(plan.config.seed, HELD_OUT, index, i).standard_normal(x_0.shape, dtype=np.float32)
            batches.append((sigma, NoisyBatch(x_0, mx.array(noise), mx.array([sigma]), [caption])))
        return batches

    def _example(self, item: int) -> Example:
        return self._plan.examples[self._plan.batches.items[item].example]

    def _kept(self, epoch: int, item: int) -> _Kept | None:
        """The caption under which an item is shown again. None if the options give none for it."""
        config, example = self._plan.config, self._example(item)
        if not config.shows_words(example.settings.trigger):
            return None
        has_class, prompts = bool(config.preserve and example.settings.trigger), config.preserve_prompt
        if prompts:
            rng = rng_for(config.seed, PRESERVED, epoch, item)
            if rng.random() < _PROMPTS or not has_class:
                return _Kept(prompts[rng.integers(len(prompts))], _PROMPT_SIGMA)
        return _Kept(preserving_caption(config, example, self._variants.draw(example.caption, epoch, item)))

    def _draw(self, epoch: int, item: int) -> _Drawn:
        """An item as it is in an epoch."""
        config, size, example = self._plan.config, self._plan.batches.items[item].size, self._example(item)
        rng = rng_for(config.seed, DRAW, epoch, item)
        mirrored, unnamed = rng.random() < 0.5, rng.random() < example.settings.caption_dropout
        flip = example.settings.flip and mirrored
        x_0 = self.data.latents(example, size, flip)
        noise = rng.standard_normal(x_0.shape, dtype=np.float32)
        sigma = self._sampling.sigmas(rng, 1, self._plan.tokens(size))
        if config.noise_offset:
            noise += config.noise_offset * rng.standard_normal((len(noise), 1, 1), dtype=np.float32)
        caption = "" if unnamed else self._variants.draw(example.caption, epoch, item)
        return _Drawn(x_0, noise, sigma, caption, self.data.mask(example, size, flip) if example.mask else None)

    def _weights(self, masks: Sequence[mx.array | None], shape: tuple[int, ...]) -> mx.array:
        """(B, 1, h, w): the weight of each latent in the loss. A picture without a mask counts everywhere alike."""
        outside, whole = self._plan.config.mask_outside, mx.ones(shape)
        weights = [whole if mask is None else outside + (1 - outside) * mask for mask in masks]
        return mx.maximum(mx.stack(weights)[:, None], _LEAST)
