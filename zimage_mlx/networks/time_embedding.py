"""The embedding of the time, which modulates the blocks of the transformer."""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.config import TIME_FREQUENCIES, TIME_HIDDEN_DIM, TransformerConfig

from .ops import SiLU


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the time, then a two-layer perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = [
            nn.Linear(TIME_FREQUENCIES, TIME_HIDDEN_DIM),
            SiLU(),
            nn.Linear(TIME_HIDDEN_DIM, config.adaln_dim),
        ]
        half = TIME_FREQUENCIES // 2
        exponents = cast(list[float], (-math.log(10000) * mx.arange(half, dtype=mx.float32) / half).tolist())
        # mx.exp is some units off in the last place, which times near 1000 turn into 5e-4 of an angle
        self._frequencies = mx.array([math.exp(exponent) for exponent in exponents])

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        angle = t.astype(mx.float32)[:, None] * self._frequencies  # (B, 128)
        x = mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1).astype(dtype)
        for layer in self.mlp:
            x = layer(x)
        return x  # (B, adaln)
