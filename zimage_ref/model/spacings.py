"""How noise levels are spaced between the first and the last one of a schedule, after the shift.

    simple        as the model was trained: equal steps of time, shifted
    beta          quantiles of the beta distribution with both parameters 0.6: more levels near both ends
    karras        equal steps of sigma^(1/7): more low levels
    exponential   equal ratios

Sources: FlowMatchEulerDiscreteScheduler of diffusers (use_beta_sigmas, use_karras_sigmas, use_exponential_sigmas);
Karras et al., arXiv 2206.00364, equation 5; beta: arXiv 2407.12173.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from zimage_ref.formats.tensors import Array

_RHO = 7.0
_BETA = 0.6  # alpha and beta of the beta distribution
_TERMS = 60  # of the series: its ratio is at most 1/2
_HALVINGS = 60  # of the interval in which a quantile lies


def _simple(levels: Array) -> Array:
    return levels


def _beta(levels: Array) -> Array:
    levels = levels.astype(np.float64)  # so that the first level stays 1
    shares = np.array([beta_quantile(1 - share) for share in np.linspace(0, 1, len(levels))])
    between: Array = levels[-1] + shares * (levels[0] - levels[-1])
    return between


def _karras(levels: Array) -> Array:
    first, last = (float(level) ** (1 / _RHO) for level in (levels[0], levels[-1]))
    powers: Array = (first + np.linspace(0, 1, len(levels)) * (last - first)) ** _RHO
    return powers


def _exponential(levels: Array) -> Array:
    logs: Array = np.exp(np.linspace(math.log(levels[0]), math.log(levels[-1]), len(levels)))
    return logs


SPACINGS: dict[str, Callable[[Array], Array]] = {
    "simple": _simple, "beta": _beta, "karras": _karras, "exponential": _exponential,
}  # fmt: skip


def beta_quantile(probability: float) -> float:
    """The value below which a beta variable (0.6, 0.6) lies with this probability, by bisection."""
    if probability > 0.5:  # the distribution is symmetric, and the series needs values up to 1/2
        return 1 - beta_quantile(1 - probability)
    low, high = 0.0, 0.5
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_probability(middle) < probability else (low, middle)
    return (low + high) / 2


def _beta_probability(value: float) -> float:
    """The regularized incomplete beta function at `value`, 0 to 1/2, from its power series."""
    term, total = 1.0, 0.0
    for n in range(_TERMS):
        total += term / (_BETA + n)
        term *= (1 - _BETA + n) / (n + 1) * value
    return math.pow(value, _BETA) * total * math.gamma(2 * _BETA) / math.gamma(_BETA) ** 2
