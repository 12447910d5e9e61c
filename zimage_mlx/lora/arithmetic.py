"""The operations of `zimage_ref.lora.arithmetic` on MLX, in float32, and the sum of a weight and its updates."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zimage_ref.formats.tensors import Array
from zimage_ref.lora import updates as lora_updates
from zimage_ref.lora.updates import Update


class MLXArithmetic:
    """`Arithmetic` for MLX."""

    def array(self, values: Array, /) -> mx.array:
        """`values` in float32."""
        return mx.array(values)

    def kron(self, left: mx.array, right: mx.array, /) -> mx.array:
        """See `Arithmetic`."""
        return mx.kron(left, right)

    def with_norms(self, matrix: mx.array, norms: mx.array, axis: int, /) -> mx.array:
        """See `Arithmetic`. The quotient is computed as a vector, so that the matrix is read only once."""
        norm = mx.linalg.norm(matrix, axis=axis, keepdims=True)
        return mx.where(norm > 0, matrix * (norms / mx.maximum(norm, 1e-30)), 0)


def updated(weight: mx.array, updates: Sequence[tuple[Update, float]]) -> mx.array:
    """The weight plus the updates at their scales. Adds in float32; the result has the dtype of the weight."""
    return lora_updates.updated(weight.astype(mx.float32), updates, MLXArithmetic()).astype(weight.dtype)
