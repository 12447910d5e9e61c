"""Samplers: they go from noise to a picture along a list of sigmas, with any function that predicts.

    euler     x' = x + (sigma' - sigma) velocity                                    1 prediction a step, order 1
    heun      the same with the mean of the velocities at both ends                 2 predictions a step, order 2
    dpm++2m   exact if x_0 is linear in log-SNR; uses the last two predictions      1 prediction a step, order 2
    unipc     the same, and each prediction also corrects the step before           1 prediction a step, order 2
    res_multistep   exact if x_0 is linear in log sigma, from the last two          1 prediction a step, order 2
    res_2s    the same from a prediction in the middle of the step                  2 predictions a step, order 2

The functions take NumPy or MLX arrays. For signs and times see `model.flow`. To add a sampler, write a function and add
an entry to `SAMPLERS`.
Sources: FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler (midpoint) and
UniPCMultistepScheduler (bh2, order 2) of diffusers; DPM-Solver++, arXiv 2211.01095; UniPC, arXiv 2302.04867; refined
exponential solvers, arXiv 2308.02157, equations as in ComfyUI; guidance as in pipeline_z_image.py of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol

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


@dataclass(frozen=True)
class _Step(Generic[ArrayT]):
    """A step of UniPC as it began."""

    x: ArrayT
    sigma: float
    x_0: ArrayT  # predicted there
    slope: ArrayT | None  # of x_0 per unit of log-SNR, from this prediction and the one before; None: of order 1
    back: float  # log-SNR from the prediction before to this one

    def to(self, sigma: float, term: ArrayT) -> ArrayT:
        """x at `sigma` if x_0 stays as it is, and `term` is added to it."""
        ratio = sigma / self.sigma
        return ratio * self.x + (1 - ratio) * (self.x_0 + term)

    def predicted(self, sigma: float, width: float) -> ArrayT:
        """x at `sigma`, which is `width` in log-SNR away."""
        return self.to(sigma, 0 * self.x_0 if self.slope is None else width / 2 * self.slope)

    def corrected(self, sigma: float, width: float, x_0: ArrayT) -> ArrayT:
        """The same with the prediction `x_0` at its end."""
        if self.slope is None:
            return self.to(sigma, 0.5 * (x_0 - self.x_0))
        grown = math.expm1(-width)
        phi_2 = -grown / width - 1
        phi_3 = -phi_2 / width - 0.5
        first, second = phi_2 / grown, 2 * phi_3 / grown  # the sums that the two weights must have
        weight = (first - second) / (self.back / width + 1)
        return self.to(sigma, weight * width * self.slope + (first - weight) * (x_0 - self.x_0))


def unipc(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """Predicts each step as dpm++2m does, and corrects it when the prediction at its end is known.

    The first and the last step are of order 1, and so is the one after sigma 1, where log-SNR is infinite.
    """
    before: _Step[ArrayT] | None = None
    width = math.inf
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        x_0 = predicted_picture(x, predict(x, sigma), sigma)
        slope: ArrayT | None = None
        if before is not None:
            x = blend(before.corrected(sigma, width, x_0), sigma)
            if math.isfinite(width) and i < len(sigmas) - 2:
                slope = (x_0 - before.x_0) / width
        before = _Step(x, sigma, x_0, slope, width)
        width = _log_snr(next_sigma) - _log_snr(sigma)
        x = blend(before.predicted(next_sigma, width), next_sigma)
        yield x, x_0


def _phis(width: float) -> tuple[float, float]:
    """phi_1 and phi_2 of exponential integrators at -width."""
    phi_1 = -math.expm1(-width) / width
    return phi_1, (1 - phi_1) / width


def res_multistep(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """Follows a prediction of x_0 that is linear in log sigma. The first and the last step are Euler steps."""
    previous: ArrayT | None = None
    previous_width = 0.0
    for sigma, next_sigma in pairwise(sigmas):
        x_0 = predicted_picture(x, predict(x, sigma), sigma)
        ratio = next_sigma / sigma
        width = -math.log(ratio) if ratio else math.inf
        if previous is None or not ratio:
            moved = ratio * x + (1 - ratio) * x_0
        else:
            phi_1, phi_2 = _phis(width)
            rest = phi_2 * width / previous_width
            moved = ratio * x + width * ((phi_1 + rest) * x_0 - rest * previous)
        x = blend(moved, next_sigma)
        previous, previous_width = x_0, width
        yield x, x_0


def res_2s(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """The same with a second prediction in the middle of each step in log sigma. The last step is an Euler step."""
    for sigma, next_sigma in pairwise(sigmas):
        x_0 = predicted_picture(x, predict(x, sigma), sigma)
        ratio = next_sigma / sigma
        moved = ratio * x + (1 - ratio) * x_0
        if ratio:
            width, half = -math.log(ratio), math.sqrt(ratio)
            middle = half * sigma
            inside = half * x + (1 - half) * x_0
            x_0_inside = predicted_picture(inside, predict(inside, middle), middle)
            phi_1, phi_2 = _phis(width)
            moved = ratio * x + width * ((phi_1 - 2 * phi_2) * x_0 + 2 * phi_2 * x_0_inside)
        x = blend(moved, next_sigma)
        yield x, x_0


SAMPLERS: dict[str, Sampler] = {
    "euler": euler, "heun": heun, "dpm++2m": dpmpp_2m, "unipc": unipc, "res_multistep": res_multistep, "res_2s": res_2s,
}  # fmt: skip
TWICE = ("heun", "res_2s")  # samplers that predict twice in each step but the last


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
