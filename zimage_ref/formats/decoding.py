"""How each packed layout of other programs becomes float32 weights: scales, tiles, rotations.

Sources: ComfyUI's comfy/ops.py and quant_ops.py, comfy-kitchen's tensor/ folder, MLX's fp_quantized.cpp.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .bits import nibbles
from .packed import F32, PackedTensor, as_float32
from .small_floats import E2M1, E4M3, E8M0, decoded
from .tensors import Array, Tensor

TILE_ROWS, TILE_COLUMNS = 128, 4  # cuBLAS stores scales of blocks in tiles of this size
_ROTATION = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], F32) / 2


def scaled(weight: Array, scale: Array) -> Array:
    """weight (out, in) times `scale`: one number, one for each row, or one for each block of rows and columns."""
    if scale.size == 1:
        return weight * scale.reshape(())
    grid = scale.reshape(len(scale), -1)  # (out, 1), (out, blocks) or (row blocks, column blocks)
    rows, columns = (n // m for n, m in zip(weight.shape, grid.shape, strict=True))
    blocks = weight.reshape(grid.shape[0], rows, grid.shape[1], columns)
    return (blocks * grid[:, None, :, None]).reshape(weight.shape)


def scale_fits(scale: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `scaled` can apply `scale` to a weight of `shape`."""
    if scale.size == 1:
        return True
    if not scale.shape or len(shape) != 2:
        return False
    rows, columns = scale.shape[0], scale.size // max(1, scale.shape[0])
    return bool(rows and columns) and shape[0] % rows == 0 and shape[1] % columns == 0


def untiled(scale: Array, rows: int, columns: int) -> Array:
    """Scales from cuBLAS's tiles of 128 x 4 to (rows, columns); each tile is stored as (32, 4, 4)."""
    tiles = scale.shape[0] // TILE_ROWS, scale.shape[1] // TILE_COLUMNS
    blocks = scale.reshape(*tiles, 32, 4, TILE_COLUMNS)  # (R, C, row in a quarter, quarter, column)
    plain = blocks.transpose(0, 3, 2, 1, 4).reshape(scale.shape)  # (R * 128, C * 4)
    return plain[:rows, :columns]


def unrotated(weight: Array, group: int) -> Array:
    """weight (out, in) with each group of columns multiplied by the regular Hadamard matrix, its own inverse."""
    groups = weight.reshape(len(weight), -1, group)
    product: Array = groups @ hadamard(group).T
    return product.reshape(weight.shape)


@cache
def hadamard(size: int) -> Array:
    """The regular Hadamard matrix of `size`, a power of 4, divided by the root of `size`."""
    matrix = np.ones((1, 1), F32)
    while len(matrix) < size:
        matrix = np.kron(matrix, _ROTATION)
    return matrix


def is_power_of_four(number: object) -> bool:
    """Whether `hadamard` has a matrix of this size."""
    return isinstance(number, int) and number in {4**n for n in range(1, 9)}


def codes(tensor: Tensor) -> Array:
    """The stored bytes of a tensor of one byte a value, whether its dtype is a float8, int8 or uint8."""
    stored = tensor.raw["weight"] if isinstance(tensor, PackedTensor) else tensor
    return np.ascontiguousarray(stored.read()).view(np.uint8)


def mx_scales(tensor: Tensor) -> Array:
    """Powers of two, stored as e8m0 or as their bytes."""
    return decoded(codes(tensor), E8M0)


def e4m3_scales(tensor: Tensor) -> Array:
    """Scales in e4m3, stored as such or as their bytes."""
    return decoded(codes(tensor), E4M3)


def fp4(packed: Array, scale: Array, high_first: bool) -> Array:
    """Bytes of two e2m1 numbers (out, in / 2), and scales (out, groups) -> (out, in)."""
    return scaled(decoded(nibbles(packed, high_first), E2M1), scale)


def signed_nibbles(packed: Array) -> Array:
    """Bytes of two numbers from -8 to 7, the first in the low half -> float32."""
    return ((nibbles(packed) ^ 8).astype(np.int8) - 8).astype(F32)


def centred_nibbles(packed: Array) -> Array:
    """Bytes of two numbers from 0 to 15, the first in the low half, less 8 -> float32."""
    return nibbles(packed).astype(F32) - 8


def awq(packed: Array, scale: Array, zeros: Array) -> Array:
    """(n - 8) * scale + zero; scale and zeros are (in / group, out)."""
    weight = centred_nibbles(packed)
    groups = weight.reshape(len(weight), len(scale), -1)  # (out, in / group, group)
    return (groups * scale.T[..., None] + zeros.T[..., None]).reshape(weight.shape)


def asym_w4a8(packed: Array, relative: Array, channel: Array, codebook: Array | None) -> Array:
    """clip(round(value * relative), -127, 127) * channel; the value is n - 8, or the n-th of `codebook`."""
    weight = centred_nibbles(packed) if codebook is None else codebook[nibbles(packed)]
    whole = np.clip(np.rint(scaled(weight, relative)), -127, 127)
    return whole * channel.reshape(-1, 1)


def columns_scaled(weight: Array, factor: Tensor | None) -> Array:
    """weight (out, in) with each column times `factor` (in,), which the layer would apply to its input."""
    return weight if factor is None else weight * as_float32(factor)
