"""Samplers: they go from noise to a picture along a list of sigmas, with any function that predicts.

    euler     x' = x + (sigma' - sigma) velocity                                    1 prediction a step, order 1
    heun      the same with the mean of the velocities at both ends                 2 predictions a step, order 2
    dpm++2m   exact if x_0 is linear in log-SNR; uses the last two predictions      1 prediction a step, order 2

The functions take NumPy or MLX arrays. For signs and times see `model.flow`. To add a sampler, write a function and add
an entry to `SAMPLERS`.
Sources: FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler and DPMSolverMultistepScheduler (midpoint) of
diffusers; DPM-Solver++, arXiv 2211.01095; guidance as in pipeline_z_image.py of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.flow import euler_step, guided, model_time, predicted_picture

Predict = Callable[[ArrayT, float], ArrayT]  # x (B, C, h, w) and its sigma -> the guided raw output, shaped as x
Blend = Callable[[ArrayT, float], ArrayT]  # x and its new sigma -> x with the kept part of a masked picture restored


class Sampler(Protocol):
    """A function that follows a list of sigmas from noise to a picture.

    x: (B, C, h, w) latents at the first sigma. sigmas: in descending order, the last is 0.
    predict: see `Predict`; a sampler calls it at least once in each step.
    blend: see `Blend`; a sampler applies it to the result of each step.
    Yields for each step its result, and the picture x_0 predicted at its beginning. Both are (B, C, h, w).
    """

    def __call__(
        self, x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT], /
    ) -> Iterator[tuple[ArrayT, ArrayT]]: ...


def euler(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """Follows the velocity at the start of each step. Arguments and results: see `Sampler`."""
    for sigma, next_sigma in pairwise(sigmas):
        raw = predict(x, sigma)
        x_0 = predicted_picture(x, raw, sigma)
        x = blend(euler_step(x, raw, sigma, next_sigma), next_sigma)
        yield x, x_0


def heun(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """Follows the mean of the velocities at both ends of each step. The last step, to sigma 0, is an Euler step."""
    for sigma, next_sigma in pairwise(sigmas):
        raw = predict(x, sigma)
        x_0 = predicted_picture(x, raw, sigma)
        if next_sigma > 0:
            raw = (raw + predict(euler_step(x, raw, sigma, next_sigma), next_sigma)) / 2
        x = blend(euler_step(x, raw, sigma, next_sigma), next_sigma)
        yield x, x_0


def dpmpp_2m(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """Follows a prediction of x_0 that is linear in log-SNR.

    Log-SNR is infinite at sigma 1 and 0: the steps from there and to there are Euler steps.
    """
    previous: ArrayT | None = None
    previous_width = math.inf
    for sigma, next_sigma in pairwise(sigmas):
        x_0 = predicted_picture(x, predict(x, sigma), sigma)
        width = _log_snr(next_sigma) - _log_snr(sigma)  # infinite in the first and the last step
        target = x_0
        if previous is not None and math.isfinite(width):
            target = x_0 + width / (2 * previous_width) * (x_0 - previous)  # second term: 0 after an infinite step
        ratio = next_sigma / sigma
        x = blend(ratio * x + (1 - ratio) * target, next_sigma)
        previous, previous_width = x_0, width
        yield x, x_0


def _log_snr(sigma: float) -> float:
    """log(alpha / sigma), alpha = 1 - sigma: the lambda of DPM-Solver++."""
    if sigma <= 0:
        return math.inf
    return math.log(model_time(sigma) / sigma) if sigma < 1 else -math.inf


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpm++2m": dpmpp_2m}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with the two limits of the official pipeline."""

    scale: float  # 0: no guidance
    normalization: float = 0.0  # the most that guidance may multiply a prediction's length by; 0: no limit
    truncation: float = 1.0  # the model time after which there is no guidance

    def active(self, sigma: float) -> bool:
        """Whether the prediction at `sigma` is guided."""
        return self.scale > 0 and model_time(sigma) <= self.truncation

    def __call__(self, positive: ArrayT, negative: ArrayT) -> ArrayT:
        """The guided raw output (B, C, h, w) of the raw outputs for the prompts and for the negative ones."""
        raw = guided(positive, negative, self.scale)
        if not self.normalization:
            return raw
        ratio = self.normalization * (_square_norm(positive) / _square_norm(raw)) ** 0.5  # (B, 1, 1, 1)
        too_long = ratio < 1
        return raw * (ratio * too_long + (1 - too_long))


def _square_norm(x: ArrayT) -> ArrayT:
    """(B, C, h, w) -> (B, 1, 1, 1)."""
    return (x * x).sum(axis=(1, 2, 3), keepdims=True)
