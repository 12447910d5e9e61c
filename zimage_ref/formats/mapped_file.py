"""A file mapped into memory. Its arrays are views; the system reads only the pages that you use."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from zimage_ref.errors import FormatError, reason

from .reading import open_descriptor
from .tensors import Array, DType, Span, Tensor

AT_ONCE = 1 << 26  # bytes asked of the system in one call; some systems give at most 2 GB


class MappedFile:
    """An open file. `array` maps a part of it into memory.

    Only arrays in use keep pages in memory. So reading a whole file, one tensor after the other, takes the memory of
    one tensor.
    """

    def __init__(self, path: Path) -> None:
        """Raises FormatError if `path` cannot be opened."""
        self.path = path
        try:
            self._descriptor = open_descriptor(path)
            status = os.fstat(self._descriptor)
            self.size, self._changed = status.st_size, status.st_mtime_ns
        except OSError as error:
            raise FormatError(f"{path}: cannot be opened: {reason(error)}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def array(self, offset: int, shape: tuple[int, ...], dtype: DType, order: Literal["C", "F"] = "C") -> Array:
        """The array that starts at byte `offset`, read-only. Raises FormatError if the file is too short for it."""
        nbytes = prod(shape) * dtype.itemsize
        if offset + nbytes > self.size:
            raise FormatError(f"{self.path}: is truncated: {offset + nbytes} bytes are needed, {self.size} are there")
        if not nbytes:
            return np.empty(shape, dtype)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._descriptor, offset - start + nbytes, access=mmap.ACCESS_READ, offset=start)
        except ValueError as error:
            raise FormatError(f"{self.path}: has become shorter since it was opened") from error
        return np.ndarray(shape, dtype, mapped, offset - start, order=order)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """The tensor that starts at byte `offset`, in C order."""
        return Tensor(shape, dtype, partial(self.array, offset, shape, dtype), span=Span(self, offset))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes from `offset`. They are read, not mapped, so no pages of the file stay.

        A file that fails while it is mapped ends the process. Here it raises FormatError, as does a file that was
        changed since it was opened.
        """
        flat = buffer.cast("B")
        try:
            status = os.fstat(self._descriptor)
            if status.st_size < offset + len(flat):
                raise FormatError(f"{self.path}: has become shorter since it was opened")
            if status.st_mtime_ns != self._changed:
                raise FormatError(f"{self.path}: was changed since it was opened: start again")
            if not fill(flat, self._descriptor, offset):
                raise FormatError(f"{self.path}: has become shorter since it was opened")
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {reason(error)}") from error

    def bytes(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`, fewer if the file ends earlier."""
        count = max(0, min(count, self.size - offset))
        return self.array(offset, (count,), np.dtype("u1")).tobytes()


def fill(flat: memoryview, descriptor: int, offset: int) -> bool:
    """Fills `flat`, of bytes, from `offset` of an open file. Returns False if the file ends before. Raises OSError."""
    done = 0
    while done < len(flat):
        count = os.preadv(descriptor, [flat[done : done + AT_ONCE]], offset + done)
        if not count:
            return False
        done += count
    return True


def check_disjoint(path: Path, extents: Iterable[tuple[int, int, str]]) -> None:
    """Raises FormatError if two of the (start, end, name) byte ranges of a file overlap."""
    end, previous = 0, ""
    for start, stop, name in sorted(extents):
        if start < end and stop > start:
            raise FormatError(f"{path}: {name} overlaps {previous}")
        if stop > start:
            end, previous = stop, name
