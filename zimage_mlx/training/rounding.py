"""Stochastic rounding of float32 to bfloat16: up or down at random, in proportion to the distances.

The mean of what is stored is right. A small learning rate changes a weight by less than half the distance between two
bfloat16 numbers, so rounding to the nearest one would lose every step.
Source: stochastic rounding in low-precision training, arXiv 2010.06192.
"""

from __future__ import annotations

import mlx.core as mx

_LOST = 16  # bits of a float32 that a bfloat16 has not


def stochastically(values: mx.array, key: mx.array) -> mx.array:
    """`values`, finite float32 of any shape, as bfloat16. key: decides which go up."""
    noise = mx.random.randint(0, 1 << _LOST, values.shape, mx.uint32, key=key)
    bits = (values.view(mx.uint32) + noise) >> _LOST
    return bits.astype(mx.uint16).view(mx.bfloat16)
