"""A file of arrays that change while a program runs: each is read and written in its place.

The file has no name, so nothing of it is left when the program ends, in any way.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np

from zimage_ref.errors import FormatError, reason

from .mapped_file import AT_ONCE, fill
from .temporary import create_locked
from .tensors import Array, Span, Tensor


class ScratchFile:
    """A nameless file in `folder`. Raises FormatError if the disk fails or is full."""

    def __init__(self, folder: Path) -> None:
        self.path, self._end = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        try:
            name, self._descriptor = create_locked(folder / "weights")
            name.unlink()
        except OSError as error:
            raise FormatError(f"{folder}: the file with the weights cannot be made: {reason(error)}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def add(self, array: Array) -> Tensor:
        """Writes `array` at the end. Returns it as a tensor that is read from the file each time."""
        offset, self._end = self._end, self._end + array.nbytes
        self._write(array, offset)
        shape, dtype = array.shape, array.dtype

        def read() -> Array:
            found = np.empty(shape, dtype)
            self.read_into(found.reshape(-1).view(np.uint8).data, offset)
            return found

        return Tensor(shape, dtype, read, span=Span(self, offset))

    def replace(self, tensor: Tensor, array: Array) -> None:
        """Writes `array` in the place of `tensor`, which `add` returned. Both have one shape and dtype."""
        assert tensor.span is not None
        self._write(array, tensor.span.offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes from `offset`."""
        try:
            if not fill(buffer.cast("B"), self._descriptor, offset):
                raise FormatError(f"{self.path}: the file with the weights has become shorter")
        except OSError as error:
            raise FormatError(f"{self.path}: the file with the weights cannot be read: {reason(error)}") from error

    def _write(self, array: Array, offset: int) -> None:
        flat, done = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
        try:
            while done < len(flat):
                done += os.pwrite(self._descriptor, flat[done : done + AT_ONCE], offset + done)
        except OSError as error:
            raise FormatError(f"{self.path}: the file with the weights cannot be written: {reason(error)}") from error
