"""A tensor in a file: its shape, its dtype and how to read it.

NumPy has no bfloat16. In this project an array of dtype '|V2' *is* bfloat16, as in the .npz files that MLX writes.
Each value is two bytes, the upper half of a float32. Only this file converts them to numbers and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from zimage_ref.errors import ConfigError

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]
Rows: TypeAlias = slice | tuple[()]  # an index into the first axis; () for an array without axes

BFLOAT16 = np.dtype("V2")

# Every dtype a weight may have, by the short name that files, options and tables use
DTYPES: dict[str, DType] = {
    "f64": np.dtype("<f8"),
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": BFLOAT16,
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "i16": np.dtype("<i2"),
    "i8": np.dtype("i1"),
    "u64": np.dtype("<u8"),
    "u32": np.dtype("<u4"),
    "u16": np.dtype("<u2"),
    "u8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("f64", "f32", "f16", "bf16")


class ReadableFile(Protocol):
    """A file whose parts can be read into memory of the caller, see `mapped_file.MappedFile`."""

    @property
    def path(self) -> Path:
        """The path of the file."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from byte `offset`. Raises FormatError if that fails."""


@dataclass(frozen=True)
class Span:
    """The part of a file that holds the data of a tensor as it is: in C order, not compressed."""

    file: ReadableFile
    offset: int  # bytes

    def after(self, skip: int) -> Span:
        """The part that begins `skip` bytes later."""
        return Span(self.file, self.offset + skip)

    def read_into(self, buffer: memoryview, skip: int = 0) -> None:
        """Fills `buffer` with the bytes after the first `skip`. Raises FormatError if that fails."""
        self.file.read_into(buffer, self.offset + skip)


@dataclass(frozen=True)
class Tensor:
    """The shape and dtype of a tensor, known before its data is read. `read()` gives the data.

    The array that `read` returns may be a read-only view of a memory-mapped file.
    """

    shape: tuple[int, ...]
    dtype: DType
    read: Callable[[], Array]
    storage: str = ""  # the file's own format if it is not `dtype`, such as a quantized one
    span: Span | None = None  # where the data of `read` lies in a file; None if `read` computes it

    @property
    def stored_as(self) -> str:
        """The dtype's short name, or the quantized format that the file holds."""
        return self.storage or DTYPE_NAMES.get(self.dtype, str(self.dtype))

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of data in `dtype`."""
        return self.size * self.dtype.itemsize

    @property
    def stored_nbytes(self) -> int:
        """The bytes that the file holds."""
        return self.nbytes

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """An array in memory as a Tensor."""
        return cls(array.shape, array.dtype, lambda: array)

    def cast(self, name: str | None) -> Tensor:
        """The same tensor in the float dtype `name` (f32, f16, bf16, f64). Integers, and any if None, do not change."""
        if name is None:
            return self
        dtype = float_dtype(name)
        if DTYPE_NAMES.get(self.dtype) not in FLOATS or dtype == self.dtype:
            return self
        return Tensor(self.shape, dtype, lambda: cast(self.read(), dtype))

    def view(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Tensor:
        """A tensor of `shape`. When you read it, `change` makes its data from this tensor's data."""
        return Tensor(shape, self.dtype, lambda: change(self.read()))

    def block(self, start: int, stop: int) -> Tensor:
        """The rows from `start` to `stop`. They lie together in a file, so a streamable tensor stays streamable."""
        part = self.view((stop - start, *self.shape[1:]), lambda array: array[start:stop])
        if self.span is None:
            return part
        return replace(part, span=self.span.after(start * prod(self.shape[1:]) * self.dtype.itemsize))

    @property
    def streamable(self) -> bool:
        """Whether a file holds the data as it is, so that it can be read again and again at no cost but the reading."""
        return self.span is not None

    def fitted(self, shape: tuple[int, ...]) -> Tensor:
        """The same data as a tensor of `shape`, if its stored form leaves a choice and allows this one; else itself."""
        return self

    def rows(self, indices: Array) -> Array:
        """The data of the rows `indices` of a matrix."""
        found: Array = self.read()[indices]
        return found


Tensors = Mapping[str, Tensor]


def float_dtype(name: str) -> DType:
    """The dtype that `name` (f64, f32, f16, bf16) stands for. Raises ConfigError for any other name."""
    if name not in FLOATS:
        raise ConfigError(f"unknown dtype {name!r}: known are {', '.join(FLOATS)}")
    return DTYPES[name]


_CHUNK = 1 << 20  # bytes
_BLOCK = 1 << 18  # elements converted at a time, so that temporary arrays fit in the processor's cache


def cast(array: Array, dtype: DType) -> Array:
    """`array` in another float dtype. To bfloat16 it rounds to nearest, ties to even; NaN stays NaN."""
    if array.dtype == dtype or not array.ndim or array.size <= _BLOCK:
        return _cast(array, dtype)
    result = np.empty(array.shape, dtype)
    for rows in row_blocks(array.shape):
        result[rows] = _cast(array[rows], dtype)
    return result


def row_blocks(shape: tuple[int, ...]) -> Iterator[Rows]:
    """Slices of the first axis that divide an array of `shape` into blocks of about _BLOCK elements."""
    if not shape:
        return iter(((),))
    step = max(1, _BLOCK * shape[0] // max(1, prod(shape)))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def count_nonfinite(array: Array) -> tuple[int, int]:
    """How many values are NaN, and how many infinite."""
    nans = infinite = 0
    for rows in row_blocks(array.shape):
        values = cast(array[rows], np.dtype("<f4")) if array.dtype == BFLOAT16 else array[rows]
        if not np.isfinite(values).all():
            nans += int(np.isnan(values).sum())
            infinite += int(np.isinf(values).sum())
    return nans, infinite


def write_data(tensor: Tensor, write: Callable[[memoryview], int], progress: Callable[[int], None]) -> None:
    """Gives the bytes of `tensor`, in C order, to `write`, _CHUNK bytes at a time, and their number to `progress`."""
    flat = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data
    for start in range(0, len(flat), _CHUNK):
        progress(write(flat[start : start + _CHUNK]))


def _cast(array: Array, dtype: DType) -> Array:
    if array.dtype == dtype:
        return array
    if array.dtype == BFLOAT16:
        bits = np.ascontiguousarray(array).view("<u2").astype("<u4")
        return (bits << 16).view("<f4").reshape(array.shape).astype(dtype, copy=False)
    if dtype == BFLOAT16:
        return _round_to_bfloat16(array)
    with np.errstate(over="ignore"):  # large values become infinity in float16, as in other tools
        return array.astype(dtype)


def values_as_stored() -> np.errstate:
    """A block without NumPy's warnings: scales in a file may be NaN or infinite, as any of its weights."""
    return np.errstate(over="ignore", invalid="ignore")


def _round_to_bfloat16(array: Array) -> Array:
    values = np.ascontiguousarray(array, dtype="<f4")
    bits = values.view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x0040, rounded)  # else rounding could turn NaN into infinity
    return rounded.astype("<u2").view(BFLOAT16).reshape(array.shape)
