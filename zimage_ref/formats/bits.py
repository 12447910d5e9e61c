"""Unsigned numbers of 3 to 8 bits in a row of uint32 words, the first number in the lowest bits, without gaps.

Numbers of 3, 5 and 6 bits may cross from one word into the next. Source: mlx/backend/cpu/quantized.cpp.
"""

from __future__ import annotations

import numpy as np

from .tensors import Array


def packed_bits(q: Array, bits: int) -> Array:
    """q (rows, n) uint8, each below 2 ** bits -> (rows, n * bits / 32) uint32."""
    if bits == 4:
        q = q[:, ::2] | q[:, 1::2] << 4
    elif bits != 8:
        single = np.unpackbits(q[..., None], axis=-1, count=bits, bitorder="little")  # (rows, n, bits)
        q = np.packbits(single.reshape(len(q), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(q).view("<u4")


def unpacked_bits(words: Array, bits: int) -> Array:
    """The way back: words (rows, n * bits / 32) uint32 -> (rows, n) uint8."""
    if bits == 4:
        return nibbles(words)
    q = np.ascontiguousarray(words).view(np.uint8)
    if bits != 8:
        single = np.unpackbits(q, axis=-1, bitorder="little").reshape(len(q), -1, bits)
        return np.packbits(single, axis=-1, bitorder="little")[..., 0]
    return q


def nibbles(codes: Array, high_first: bool = False) -> Array:
    """The two numbers of 4 bits in each byte: codes (rows, n / 2) -> (rows, n) uint8."""
    q = np.ascontiguousarray(codes).view(np.uint8)
    pair = (q >> 4, q & 0xF) if high_first else (q & 0xF, q >> 4)
    return np.stack(pair, axis=-1).reshape(*q.shape[:-1], -1)
