"""The loop from noise to latents: a sampler, guidance and what must be kept of a picture, around one network.

Source: pipeline_z_image.py, pipeline_z_image_img2img.py and pipeline_z_image_inpaint.py of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats.tensors import Array
from zimage_ref.model.flow import add_noise, sigmas

from .jobs import Request
from .samplers import SAMPLERS, Guidance, Predict


class Denoiser(Protocol):
    """What the loop needs of a `pipeline.Pipeline`."""

    folder: ModelFolder

    def condition(self, captions: Sequence[Any], h: int, w: int) -> Any:
        """See Pipeline."""

    def predict(self, x: Any, sigma: float, conditioning: Any, copies: int = 1) -> Any:
        """See Pipeline."""

    def to_backend(self, array: Array) -> Any:
        """See Pipeline."""

    def settle(self, array: Any) -> Any:
        """See Pipeline."""


@dataclass(frozen=True)
class Step:
    """A batch of pictures under way."""

    index: int  # from 1
    total: int
    sigma: float  # that it has come to
    x: Any  # (B, C, h, w) latents, the backend's own array
    x_0: Any  # (B, C, h, w) latents of the picture predicted from where the step began


def denoised(
    model: Denoiser, batch: Sequence[Request], captions: Mapping[str, Any], starts: Mapping[int, Any]
) -> Iterator[Step]:
    """Yields the steps of a batch of requests that batch with each other.

    captions: features by text. starts: latents (1, C, h, w) of pictures to start from, by the picture's id.
    """
    first, noise = batch[0], model.to_backend(np.stack([request.noise for request in batch]))  # (B, C, h, w)
    x_0 = starts.get(id(first.picture))
    x = noise if x_0 is None else add_noise(x_0, noise, first.sigmas[0])
    h, w = x.shape[2:]
    mask = first.latent_mask(h, w)
    painted = None if mask is None else model.to_backend(mask)

    def blend(x: Any, sigma: float) -> Any:
        if painted is not None:
            x = painted * x + (1 - painted) * add_noise(x_0, noise, sigma)
        return model.settle(x)

    positive = [captions[request.config.prompt] for request in batch]
    negative = [captions[request.config.negative_prompt] for request in batch] if first.guidance.scale else []
    predict = predictor(model, positive, negative, first.guidance, h, w)
    steps = SAMPLERS[first.config.sampler](x, first.sigmas, predict, blend)
    for i, (x, predicted) in enumerate(steps, start=1):
        yield Step(i, len(first.sigmas) - 1, first.sigmas[i], x, predicted)


def plain_steps(model: Denoiser, x: Any, captions: Sequence[Any], steps: int, guidance: float) -> Iterator[Any]:
    """Yields the latents after each Euler step from noise x (B, C, h, w), as `Pipeline.denoise`."""
    h, w = x.shape[2:]
    schedule = sigmas(steps, model.folder.scheduler, h * w // model.folder.transformer.patch_size**2)
    predict = predictor(model, captions[: len(x)], captions[len(x) :], Guidance(guidance), h, w)
    for x, _ in SAMPLERS["euler"](x, schedule, predict, lambda x, sigma: model.settle(x)):
        yield x


def predictor(
    model: Denoiser, positive: Sequence[Any], negative: Sequence[Any], guidance: Guidance, h: int, w: int
) -> Predict:
    """The network's guided raw output for the captions of a batch, as many negative as positive ones, or none."""

    @functools.cache
    def conditioning(guided: bool) -> Any:
        return model.condition([*positive, *negative] if guided else positive, h, w)

    def predict(x: Any, sigma: float) -> Any:
        if not guidance.active(sigma):
            return model.settle(model.predict(x, sigma, conditioning(False)))
        raw = model.predict(x, sigma, conditioning(True), copies=2)
        return model.settle(guidance(raw[: len(x)], raw[len(x) :]))

    return predict
