"""How large an error may be, by reasoning: what roundings add up to, not what was seen.

A value rounded to a format whose numbers near 1 are `eps` apart is off by 0.2123 eps (root mean square, relative;
sqrt((1 - 1/4) / (2 ln 2) / 12) for values spread evenly over a binade's logarithm). n roundings one after the other
are off by sqrt(n) of that. A sum of K products in float32, one by one, adds sqrt(K / 2) roundings of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from zimage_ref.formats.tensors import Array

EPS = {"bf16": 2.0**-7, "f16": 2.0**-10, "f32": 2.0**-23}
_ROUNDING = math.sqrt((1 - 1 / 4) / (2 * math.log(2)) / 12)  # 0.2123
_SAFETY = 2.0  # of the limit over the error that is expected
_WORST = 4.0  # of the largest error, relative to the largest value, over the limit of the mean one


def limit(dtype: str, roundings: int, longest_sum: int) -> float:
    """The largest relative error (root mean square) of a computation on `dtype`.

    roundings: how many values in a row are rounded to `dtype`. longest_sum: K of its longest sum.
    """
    stored = roundings * EPS[dtype] ** 2
    summed = (longest_sum / 2 + roundings) * EPS["f32"] ** 2
    return _SAFETY * _ROUNDING * math.sqrt(stored + summed)


def worst_limit(limit: float) -> float:
    """The largest difference of any element, relative to the largest expected value.

    A value of n standard deviations is rounded n times as coarsely, so the largest is rounded the most.
    """
    return _WORST * limit


@dataclass(frozen=True)
class Errors:
    """How far computed arrays are from expected ones."""

    error: float  # root mean square of the difference, relative to that of what is expected
    worst: float  # largest difference, relative to the largest that is expected

    @classmethod
    def of(cls, actual: Array, expected: Array) -> Errors:
        """Those of one array; infinite if there is a value that is not finite."""
        if actual.shape != expected.shape or not np.isfinite(actual).all():
            return cls(math.inf, math.inf)
        difference = actual - expected
        error = float(np.linalg.norm(difference)) / (float(np.linalg.norm(expected)) or 1.0)
        return cls(error, float(np.abs(difference).max()) / (float(np.abs(expected).max()) or 1.0))

    def __or__(self, other: Errors) -> Errors:
        """The larger ones."""
        return Errors(max(self.error, other.error), max(self.worst, other.worst))


def as_float32(array: mx.array) -> Array:
    """An array of the device as NumPy float32."""
    return np.array(array.astype(mx.float32))
