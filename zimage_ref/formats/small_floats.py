"""Floats of 8 and 4 bits: the value of every code.

    e4m3    sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7F and 0xFF are NaN, largest 448
    e5m2    the upper byte of a float16
    e8m0    a power of two without a sign, 2^(code - 127); 0xFF is NaN
    e2m1    4 bits: 0 0.5 1 1.5 2 3 4 6, and the same below zero

Sources: "FP8 Formats for Deep Learning", arXiv 2209.05433; OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

import numpy as np

from .packed import F32, PackedTensor
from .tensors import Array, Tensor, row_blocks


def _e4m3() -> Array:
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code >> 7, -1.0, 1.0), code >> 3 & 15, code & 7
    value = np.where(exponent > 0, (8 + mantissa) * np.exp2(exponent - 10.0), mantissa * np.exp2(-9.0))
    value[[0x7F, 0xFF]] = np.nan
    table: Array = (sign * value).astype(F32)
    return table


E4M3 = _e4m3()
E5M2 = (np.arange(256, dtype="<u2") << 8).view("<f2").astype(F32)
E8M0 = np.append(np.exp2(np.arange(255) - 127.0), np.nan).astype(F32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)

FLOAT8 = {"f8_e4m3": E4M3, "f8_e5m2": E5M2, "f8_e8m0": E8M0}  # by the short name that tables show


def decoded(codes: Array, table: Array) -> Array:
    """The value in `table` of every code; codes are bytes."""
    values = np.empty(codes.shape, F32)
    codes = codes.view(np.uint8) if codes.ndim else codes.astype(np.uint8)
    for rows in row_blocks(codes.shape):
        values[rows] = table[codes[rows]]
    return values


def float8(stored: Tensor, name: str) -> PackedTensor:
    """The tensor of the bytes `stored`, whose values are those of the table `name` in FLOAT8. bfloat16 holds each."""
    table = FLOAT8[name]
    return PackedTensor.of_values(stored.shape, name, lambda: decoded(stored.read(), table), {"weight": stored})
