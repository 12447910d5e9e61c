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
from zimage_ref.model.steering import Box
from zimage_ref.model.step_cache import StepCache

from .caching import cache_for
from .engine import ConditioningT, Engine
from .jobs import Request
from .samplers import SAMPLERS, Guidance, Predict
from .starts import Start, Steer, steering
from .steering import Words, words_of
from .tiles import Done, Place, Tiles


@dataclass(frozen=True)
class DenoisingStep(Generic[ArrayT]):
    """A batch of pictures after one step of the sampler."""

    index: int  # from 1
    total: int
    sigma: float  # after the step
    x: ArrayT  # (B, C, h, w) latents
    x_0: ArrayT  # (B, C, h, w) latents of the picture, predicted at the beginning of the step
    reused: float = 0.0  # the share of the passes so far that a step cache spared


class Caches(Generic[ArrayT]):
    """The step caches of one pass over a batch: one for each tile, if the pass has any."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._caches: dict[Place, StepCache[ArrayT]] = {}
        self._states: dict[Place, object] = {}  # of captions and control in the step before

    def at(self, place: Place, state: object) -> StepCache[ArrayT] | None:
        """That of a tile. It begins anew if the state of captions and control has changed. None: every step counts."""
        if place not in self._caches:
            cache = cache_for(self._request.config, self._request.sigmas)
            if cache is None:
                return None
            self._caches[place] = cache
        if self._states.get(place) != state:
            self._caches[place].restart()
            self._states[place] = state
        return self._caches[place]

    @property
    def reused(self) -> float:
        """The share of the passes through the layers that was spared so far."""
        shares = [cache.reused for cache in self._caches.values()]
        return sum(shares) / max(len(shares), 1)


def denoised(
    engine: Engine[ArrayT, ConditioningT],
    batch: Sequence[Request],
    captions: Mapping[str, ArrayT],
    begin: Start[ArrayT],
    tile_done: Done = lambda: None,
) -> Iterator[DenoisingStep[ArrayT]]:
    """Yields the steps of `batch`, requests that can be denoised together (see `Request.batches_with`).

    captions: features (T, cap_feat_dim) by text. begin: what was encoded for all requests. tile_done: is called after
    each tile of pictures that are computed in tiles.
    """
    start = begin.latents
    first, noise = batch[0], engine.to_backend(np.stack([request.noise for request in batch]))  # (B, C, h, w)
    x = noise if start is None else add_noise(start, noise, first.sigmas[0])
    mask = first.latent_mask(*x.shape[2:])
    painted = None if mask is None else engine.to_backend(mask)  # (h, w)

    def blend(x: ArrayT, sigma: float) -> ArrayT:
        if painted is not None and start is not None:
            x = painted * x + (1 - painted) * add_noise(start, noise, sigma)
        return engine.settle(x)

    words, caches = words_of(batch, captions, engine), Caches[ArrayT](first)
    steer = steering(engine, first, begin.context)
    predict = predictor(engine, words, first.guidance, first.tiles, steer, tile_done, caches)
    steps = SAMPLERS[first.config.sampler](x, first.sigmas, predict, blend)
    for i, (x, predicted) in enumerate(steps, start=1):
        yield DenoisingStep(i, len(first.sigmas) - 1, first.sigmas[i], x, predicted, caches.reused)


def plain_steps(
    engine: Engine[ArrayT, ConditioningT], x: ArrayT, captions: Sequence[ArrayT], steps: int, guidance: float
) -> Iterator[ArrayT]:
    """Yields the latents (B, C, h, w) after each Euler step from the noise x (B, C, h, w). See `Pipeline.denoise`."""
    h, w = x.shape[2:]
    schedule = sigmas(steps, engine.folder.scheduler, h * w // engine.folder.transformer.patch_size**2)
    words = Words(captions[: len(x)], captions[len(x) :])
    predict = predictor(engine, words, Guidance(guidance), Tiles.of(h, w, None))
    for x, _ in SAMPLERS["euler"](x, schedule, predict, lambda x, sigma: engine.settle(x)):
        yield x


def predictor(
    engine: Engine[ArrayT, ConditioningT],
    words: Words[ArrayT],
    guidance: Guidance,
    tiles: Tiles,
    steer: Steer[ConditioningT] = lambda conditioning, sigma, place: conditioning,
    tile_done: Done = lambda: None,
    caches: Caches[ArrayT] | None = None,
) -> Predict[ArrayT]:
    """A function that gives the network's guided raw output for a batch of latents, as a blend of `tiles`.

    steer: changes the conditioning of a noise level and a tile. tile_done: is called after each of several tiles.
    """

    @functools.lru_cache(maxsize=4)  # with a picture in one piece, these are all
    def conditioning(is_guided: bool, is_early: bool, tile: Box | None) -> ConditioningT:
        return words.conditioning(engine, (tiles.rows, tiles.columns), is_guided, is_early, tile)

    def raw_of(x: ArrayT, sigma: float, is_guided: bool, place: Place) -> ArrayT:
        """The raw output for one tile x (B, C, rows, columns); with guidance, (2 B, C, rows, columns)."""
        tile = tiles.box(place) if words.depends_on_place and not tiles.single else None
        plain = conditioning(is_guided, words.is_early(sigma), tile)
        own = steer(plain, sigma, place)
        if caches is not None and (cache := caches.at(place, (words.is_early(sigma), own is plain))):
            own = engine.cached(own, cache)
        return engine.predict(x, sigma, own, copies=1 + is_guided)

    def raw_of_all(x: ArrayT, sigma: float, is_guided: bool) -> ArrayT:
        if tiles.single:
            return raw_of(x, sigma, is_guided, tiles.places[0])
        return engine.to_backend(
            tiles.blend(lambda place: np.asarray(raw_of(x[place.index()], sigma, is_guided, place)), done=tile_done)
        )

    def predict(x: ArrayT, sigma: float) -> ArrayT:
        if not guidance.active(sigma):
            return engine.settle(raw_of_all(x, sigma, False))
        raw = raw_of_all(x, sigma, True)  # (2 B, C, h, w)
        return engine.settle(guidance(raw[: len(x)], raw[len(x) :]))

    return predict
