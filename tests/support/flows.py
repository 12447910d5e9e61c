"""A model whose flow is known exactly, for the tests of samplers."""

from __future__ import annotations

from typing import Any


def curved(x: Any, sigma: float) -> Any:
    """The raw output of a model of one-dimensional Gaussian pictures, mean 1 and deviation 0.5: not a straight line."""
    spread = (1 - sigma) ** 2 * 0.25 + sigma**2
    x_0 = 1 + (1 - sigma) * 0.25 / spread * (x - (1 - sigma))
    return (x_0 - x) / sigma
