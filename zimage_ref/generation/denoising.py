"""The loop from noise to latents around one network: a sampler, guidance, and the kept part of a masked picture.

Source: pipeline_z_image.py, pipeline_z_image_img2img.py and pipeline_z_image_inpaint.py of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.flow import add_noise, sigmas
from zimage_ref.model.step_cache import StepCache

from .caching import cache_for
from .engine import ConditioningT, Engine
from .jobs import Request
from .samplers import SAMPLERS, Guidance, Predict
from .starts import Start, Steer, steering
from .steering import Words, words_of


@dataclass(frozen=True)
class DenoisingStep(Generic[ArrayT]):
    """A batch of pictures after one step of the sampler."""

    index: int  # from 1
    total: int
    sigma: float  # after the step
    x: ArrayT  # (B, C, h, w) latents
    x_0: ArrayT  # (B, C, h, w) latents of the picture, predicted at the beginning of the step
    reused: float = 0.0  # the share of the passes so far that a step cache spared


def denoised(
    engine: Engine[ArrayT, ConditioningT],
    batch: Sequence[Request],
    captions: Mapping[str, ArrayT],
    begin: Start[ArrayT],
) -> Iterator[DenoisingStep[ArrayT]]:
    """Yields the steps of `batch`, requests that can be denoised together (see `Request.batches_with`).

    captions: features (T, cap_feat_dim) by text. begin: what was encoded for all requests.
    """
    start = begin.latents
    first, noise = batch[0], engine.to_backend(np.stack([request.noise for request in batch]))  # (B, C, h, w)
    x = noise if start is None else add_noise(start, noise, first.sigmas[0])
    h, w = x.shape[2:]
    mask = first.latent_mask(h, w)
    painted = None if mask is None else engine.to_backend(mask)  # (h, w)

    def blend(x: ArrayT, sigma: float) -> ArrayT:
        if painted is not None and start is not None:
            x = painted * x + (1 - painted) * add_noise(start, noise, sigma)
        return engine.settle(x)

    words, cache = words_of(batch, captions, engine), cache_for(first.config, first.sigmas)
    predict = predictor(engine, words, first.guidance, (h, w), steering(engine, first, begin.context), cache)
    steps = SAMPLERS[first.config.sampler](x, first.sigmas, predict, blend)
    for i, (x, predicted) in enumerate(steps, start=1):
        yield DenoisingStep(i, len(first.sigmas) - 1, first.sigmas[i], x, predicted, cache.reused if cache else 0.0)


def plain_steps(
    engine: Engine[ArrayT, ConditioningT], x: ArrayT, captions: Sequence[ArrayT], steps: int, guidance: float
) -> Iterator[ArrayT]:
    """Yields the latents (B, C, h, w) after each Euler step from the noise x (B, C, h, w). See `Pipeline.denoise`."""
    h, w = x.shape[2:]
    schedule = sigmas(steps, engine.folder.scheduler, h * w // engine.folder.transformer.patch_size**2)
    predict = predictor(engine, Words(captions[: len(x)], captions[len(x) :]), Guidance(guidance), (h, w))
    for x, _ in SAMPLERS["euler"](x, schedule, predict, lambda x, sigma: engine.settle(x)):
        yield x


def predictor(
    engine: Engine[ArrayT, ConditioningT],
    words: Words[ArrayT],
    guidance: Guidance,
    size: tuple[int, int],
    steer: Steer[ConditioningT] = lambda conditioning, sigma: conditioning,
    cache: StepCache[ArrayT] | None = None,
) -> Predict[ArrayT]:
    """A function that gives the network's guided raw output for a batch of latents of `size` (h, w).

    steer: changes the conditioning of a noise level. cache: of this batch; it begins anew if captions or control do.
    """

    @functools.cache
    def conditioning(is_guided: bool, is_early: bool) -> ConditioningT:
        return words.conditioning(engine, size, is_guided, is_early)

    last: tuple[bool, bool] | None = None  # captions and control of the step before

    def steered(sigma: float) -> ConditioningT:
        nonlocal last
        plain = conditioning(guidance.active(sigma), words.is_early(sigma))
        own = steer(plain, sigma)
        if cache is None:
            return own
        now = words.is_early(sigma), own is plain
        if now != last:
            cache.restart()
        last = now
        return engine.cached(own, cache)

    def predict(x: ArrayT, sigma: float) -> ArrayT:
        if not guidance.active(sigma):
            return engine.settle(engine.predict(x, sigma, steered(sigma)))
        raw = engine.predict(x, sigma, steered(sigma), copies=2)  # (2 B, C, h, w)
        return engine.settle(guidance(raw[: len(x)], raw[len(x) :]))

    return predict
