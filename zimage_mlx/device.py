"""What MLX computes on, and how a result comes back from there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, Metal or CUDA."""
    return bool(mx.default_device().type == mx.gpu)


def number(scalar: mx.array) -> float:
    """A scalar array as a Python float."""
    return float(np.array(scalar))
