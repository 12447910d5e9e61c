"""The operations that compute updates. Each engine supplies them for its own arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from zimage_ref.formats.tensors import Array

_T = TypeVar("_T")
FloatDType = np.dtype[np.float32 | np.float64]


class EngineArray(Protocol):
    """An array of NumPy or MLX, with the operators that both have. Shapes broadcast."""

    def __add__(self: _T, other: _T, /) -> _T: ...
    def __sub__(self: _T, other: _T, /) -> _T: ...
    def __mul__(self: _T, other: _T | float, /) -> _T: ...
    def __matmul__(self: _T, other: _T, /) -> _T: ...
    def __getitem__(self: _T, rows: slice, /) -> _T: ...


AnyArray = TypeVar("AnyArray", bound=EngineArray)


class Arithmetic(Protocol[AnyArray]):
    """The operations of an engine besides the operators of its arrays.

    If a kind of update needs another operation, add it here and to both engines.
    """

    def array(self, values: Array, /) -> AnyArray:
        """`values` as the engine's own array, in the precision that it computes in."""

    def kron(self, left: AnyArray, right: AnyArray, /) -> AnyArray:
        """The Kronecker product of two matrices."""

    def with_norms(self, matrix: AnyArray, norms: AnyArray, axis: int, /) -> AnyArray:
        """`matrix` with its vectors along `axis` scaled to the lengths `norms`. Vectors of zeros do not change."""


@dataclass(frozen=True)
class NumPyArithmetic:
    """`Arithmetic` for NumPy, in float32 or float64."""

    dtype: FloatDType

    def array(self, values: Array, /) -> Array:
        """`values` in `dtype`."""
        return values.astype(self.dtype)

    def kron(self, left: Array, right: Array, /) -> Array:
        """See `Arithmetic`."""
        return np.kron(left, right)

    def with_norms(self, matrix: Array, norms: Array, axis: int, /) -> Array:
        """See `Arithmetic`."""
        norm = np.sqrt(np.sum(matrix * matrix, axis=axis, keepdims=True))
        scaled: Array = np.where(norm > 0, matrix / np.where(norm > 0, norm, 1), 0) * norms
        return scaled
