"""Time, noise and sign: the one place where the flow-matching convention is written down.

    sigma in [0, 1]      1 is pure noise, 0 the picture
    x_sigma            = (1 - sigma) x_0 + sigma noise
    model time t       = 1 - sigma                       what the transformer is given
    raw                = transformer(x_sigma, t, ...)    it predicts x_0 - noise
    velocity           = d x_sigma / d sigma = noise - x_0 = -raw
    Euler step           x_sigma' = x_sigma + (sigma' - sigma) velocity

Sources: FlowMatchEulerDiscreteScheduler and pipeline_z_image.py of diffusers; Z-Image, arXiv 2511.22699, section 4.3
for the sampling of training times. The functions take NumPy or MLX arrays alike and only do arithmetic on them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .config import SchedulerConfig
from .tensors import Array

# Resolution shift, exp(mu) with mu linear in the image tokens: calculate_shift of the official pipeline
_BASE_TOKENS, _MAX_TOKENS = 256, 4096
_BASE_MU, _MAX_MU = 0.5, 1.15
TRAINING_SHIFT_RANGE = (1.0, 3.2)  # beyond 1024 x 1024 the formula would leave hardly any low noise


def sigmas(steps: int, config: SchedulerConfig, image_tokens: int) -> list[float]:
    """The `steps + 1` sigmas of a sampling run, from 1 down to exactly 0."""
    spaced = np.linspace(1.0, 1.0 / steps, steps, dtype=np.float32)
    shift = resolution_shift(image_tokens) if config.use_dynamic_shifting else config.shift
    return [*(float(s) for s in shifted(spaced, shift)), 0.0]


def shifted(sigma: Any, shift: float) -> Any:
    """Moves sigmas towards noise (shift > 1), keeping 0 and 1 where they are."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(image_tokens: int) -> float:
    """exp(mu): the shift that keeps the noise as visible in a large picture as in a small one."""
    slope = (_MAX_MU - _BASE_MU) / (_MAX_TOKENS - _BASE_TOKENS)
    return math.exp(_BASE_MU + slope * (image_tokens - _BASE_TOKENS))


def training_sigmas(rng: np.random.Generator, count: int, image_tokens: int) -> Array:
    """Random sigmas (count,) float32 for training: logit-normal, shifted by resolution, never 0 or 1."""
    low, high = TRAINING_SHIFT_RANGE
    shift = min(max(resolution_shift(image_tokens), low), high)
    plain = 1 / (1 + np.exp(-rng.standard_normal(count)))
    return np.asarray(shifted(plain, shift), dtype=np.float32)


def model_time(sigma: Any) -> Any:
    """What the transformer is told for `sigma`."""
    return 1 - sigma


def add_noise(x_0: Any, noise: Any, sigma: Any) -> Any:
    """x_sigma, on the straight line from picture to noise."""
    return (1 - sigma) * x_0 + sigma * noise


def training_target(x_0: Any, noise: Any) -> Any:
    """What the transformer's raw output should be."""
    return x_0 - noise


def guided(positive: Any, negative: Any, guidance: float) -> Any:
    """Classifier-free guidance as the official pipeline counts it: 0 is none."""
    return positive + guidance * (positive - negative)


def euler_step(x: Any, raw: Any, sigma: float, next_sigma: float) -> Any:
    """x at `next_sigma`, following the velocity -raw."""
    return x + (next_sigma - sigma) * -raw


def starting_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """x at sigma = 1 for one picture: float32 from NumPy's generator, the same on every backend."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
