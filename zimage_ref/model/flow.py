"""Time, noise and sign: the convention of flow matching. No other file repeats it.

    sigma in [0, 1]      1 is pure noise, 0 the picture
    x_sigma            = (1 - sigma) x_0 + sigma noise
    model time t       = 1 - sigma                       the transformer takes this
    raw                = transformer(x_sigma, t, ...)    it predicts x_0 - noise
    velocity           = d x_sigma / d sigma = noise - x_0 = -raw
    Euler step           x_sigma' = x_sigma + (sigma' - sigma) velocity

The functions take NumPy or MLX arrays (see `arrays`).
Sources: FlowMatchEulerDiscreteScheduler and pipeline_z_image.py of diffusers. For the sampling of training times:
Z-Image, arXiv 2511.22699, section 4.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array

from .arrays import ArrayT, NumberT
from .config import SchedulerConfig
from .spacings import SPACINGS

# The resolution shift is exp(mu); mu is linear in the image tokens. Source: calculate_shift of the official pipeline
_BASE_TOKENS, _MAX_TOKENS = 256, 4096
_BASE_MU, _MAX_MU = 0.5, 1.15
TRAINING_SHIFT_RANGE = (1.0, 3.2)  # above 1024 x 1024 the formula alone would draw almost no low noise
TIMESTEP_SAMPLINGS = ("auto", "uniform", "logit-normal", "sigmoid", "weighted", "content", "style", "beta")
_BETA, _BIAS = (2.0, 2.0), 3  # of the kinds beta, content and style
_NEAREST = 1e-5  # the smallest distance of a training sigma from 0 and from 1
# `weighted`: (sigma, weight), published points of a curve that ai-toolkit measured on a model of this kind
_WEIGHT_CURVE = ((0.0, 0.1, 0.3, 0.5, 0.875, 1.0), (0.72, 0.72, 0.72, 0.93, 1.52, 0.45))
_WEIGHT_MEAN = float(np.interp(np.linspace(0, 1, 10_001), *_WEIGHT_CURVE).mean())
VALIDATION_SIGMAS = (0.25, 0.5, 0.75, 1.0)  # where the held-out loss is measured
BASE_SHIFT = 4.5  # between Turbo's shift, 3, and the base model's, 6


def sigmas(
    steps: int, config: SchedulerConfig, image_tokens: int, strength: float = 1.0, spacing: str = "simple"
) -> list[float]:
    """The `steps + 1` sigmas of a sampling run, from 1 down to exactly 0.

    With a strength below 1, only those of the last steps. Strength is the share of steps, rounded up as in diffusers.
    spacing: one of SPACINGS.
    """
    spaced = np.linspace(1.0, 1.0 / steps, steps, dtype=np.float32)
    shift = resolution_shift(image_tokens) if config.use_dynamic_shifting else config.shift
    skipped = int(max(steps - steps * strength, 0))
    return [*(float(s) for s in SPACINGS[spacing](shifted(spaced, shift))), 0.0][skipped:]


def shifted(sigma: NumberT, shift: float) -> NumberT:
    """Moves sigmas towards noise if shift > 1. 0 and 1 do not move."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(image_tokens: int) -> float:
    """exp(mu): with this shift the noise is as visible in a large picture as in a small one."""
    slope = (_MAX_MU - _BASE_MU) / (_MAX_TOKENS - _BASE_TOKENS)
    return math.exp(_BASE_MU + slope * (image_tokens - _BASE_TOKENS))


@dataclass(frozen=True)
class TimestepSampling:
    """How training draws noise levels, and how it weights the loss by them.

    auto           logit-normal, shifted by resolution within TRAINING_SHIFT_RANGE
    uniform        every level with the same probability
    logit-normal   the logistic function of a normal variable; `sigmoid` is another name for it
    weighted       uniform levels, and a larger loss weight for high noise
    shift=S        uniform levels, shifted by S
    content        more high noise, which decides the composition: 1 - u^3 of a uniform u
    style          more low noise, which decides the details: u^3
    beta           the beta distribution with both parameters 2: few levels near 0 and 1

    The levels are then moved into `low` to `high`, in proportion. Sources: content and style, ai-toolkit; beta, the
    beta schedule of SimpleTuner with its defaults.
    """

    kind: str
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0
    weighs: bool = False  # whether the loss is weighted as with `weighted`, for any kind

    @classmethod
    def parse(cls, text: str, low: float = 0.0, high: float = 1.0, weighs: bool = False) -> TimestepSampling:
        """The sampling that `text` names, between two levels. Raises ConfigError for an unknown one."""
        kind, _, value = text.partition("=")
        if kind == "shift":
            try:
                shift = float(value)
            except ValueError:
                shift = 0.0
            if not 0 < shift < math.inf:
                raise ConfigError(f"`timesteps` {text}: shift=S takes a number above 0, such as shift=3")
            return cls(kind, shift, low, high, weighs)
        if text not in TIMESTEP_SAMPLINGS:
            raise ConfigError(f"`timesteps` {text!r} is unknown: known are {', '.join(TIMESTEP_SAMPLINGS)} and shift=S")
        return cls(text, 1.0, low, high, weighs or text == "weighted")

    def sigmas(self, rng: np.random.Generator, count: int, image_tokens: int) -> Array:
        """Random sigmas (count,) float32 for pictures of `image_tokens` tokens, never 0 or 1."""
        if self.kind in ("auto", "logit-normal", "sigmoid"):
            plain = 1 / (1 + np.exp(-rng.standard_normal(count)))
        elif self.kind == "beta":
            plain = rng.beta(*_BETA, count)
        else:
            plain = rng.random(count)
        if self.kind in ("content", "style"):
            plain = 1 - plain**_BIAS if self.kind == "content" else plain**_BIAS
        shift = self.shift
        if self.kind == "auto":
            low, high = TRAINING_SHIFT_RANGE
            shift = min(max(resolution_shift(image_tokens), low), high)
        moved = shifted(plain, shift)
        if (self.low, self.high) != (0, 1):
            moved = self.low + (self.high - self.low) * moved
        return np.clip(moved, _NEAREST, 1 - _NEAREST).astype(np.float32)

    def weights(self, sigma: Array) -> Array:
        """Loss weights (count,) float32 of pictures at `sigma` (count,). Their average over uniform levels is 1."""
        if not self.weighs:
            return np.ones(len(sigma), np.float32)
        return (np.interp(sigma, *_WEIGHT_CURVE) / _WEIGHT_MEAN).astype(np.float32)


def is_turbo(config: SchedulerConfig) -> bool:
    """Whether the model is Turbo, the distilled one (few steps, no guidance). The shift of its scheduler tells."""
    return config.shift < BASE_SHIFT


def model_time(sigma: NumberT) -> NumberT:
    """The time that the transformer takes for `sigma`."""
    return 1 - sigma


def add_noise(x_0: ArrayT, noise: ArrayT, sigma: float | ArrayT) -> ArrayT:
    """x_sigma, a point on the straight line from the picture to the noise."""
    return (1 - sigma) * x_0 + sigma * noise


def training_target(x_0: ArrayT, noise: ArrayT) -> ArrayT:
    """The raw output that the transformer should learn to give."""
    return x_0 - noise


def guided(positive: ArrayT, negative: ArrayT, guidance: float) -> ArrayT:
    """Classifier-free guidance. As in the official pipeline, 0 means no guidance."""
    return positive + guidance * (positive - negative)


def predicted_picture(x: ArrayT, raw: ArrayT, sigma: float) -> ArrayT:
    """The picture x_0 that follows from x and the raw output `raw` at `sigma`."""
    return x + sigma * raw


def euler_step(x: ArrayT, raw: ArrayT, sigma: float, next_sigma: float) -> ArrayT:
    """x at `next_sigma`, after an Euler step along the velocity -raw."""
    return x + (next_sigma - sigma) * -raw


def starting_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """x at sigma = 1 for one picture: float32 from NumPy's generator, the same for every engine."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
