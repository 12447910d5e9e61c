"""Numbers in 8 bits, in blocks with a scale each: for the moments of an optimizer.

A code c stands for scale (c / most)^3, so small numbers have small steps. Rounding is random, in proportion to the
distances: the mean of what is stored is right. With rounding to the nearest code a slow change, such as the decay of a
moment, would be lost in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

BLOCK = 256  # numbers that share a scale
_POWER = 3


class Quantized(NamedTuple):
    """Numbers in 8 bits."""

    codes: mx.array  # (blocks, BLOCK): int8 in -127..127 if they are signed, else uint8
    scales: mx.array  # (blocks, 1) float32: the largest size in each block


def quantized(values: mx.array, signed: bool, key: mx.array) -> Quantized:
    """`values` (N,) in blocks, the last one filled with zeros. key: for the rounding.

    Unsigned numbers above 0 get a code above 0: a second moment of 0 would make a step too long.
    """
    most = _most(signed)
    blocks = mx.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    size = mx.abs(blocks)
    scales = mx.max(size, axis=1, keepdims=True)
    ratio = size / mx.where(scales > 0, scales, 1.0)
    below = mx.clip(mx.floor(most * ratio ** (1 / _POWER)), 0, most - 1)
    low, high = (below / most) ** _POWER, ((below + 1) / most) ** _POWER
    up = mx.random.uniform(shape=ratio.shape, key=key) < (ratio - low) / (high - low)
    codes = below + up
    if signed:
        return Quantized((mx.sign(blocks) * codes).astype(mx.int8), scales)
    return Quantized(mx.where(ratio > 0, mx.maximum(codes, 1), 0).astype(mx.uint8), scales)


def dequantized(stored: Quantized, count: int) -> mx.array:
    """The first `count` numbers, (count,) float32."""
    codes = stored.codes.astype(mx.float32) / _most(stored.codes.dtype == mx.int8)
    return (stored.scales * codes**_POWER).flatten()[:count]


def _most(signed: bool) -> int:
    return 127 if signed else 255
