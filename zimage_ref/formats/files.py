"""Files: written so that they are whole or absent, and read by mapping the part that is needed."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from zimage_ref.errors import ConfigError, FormatError, reason

from .tensors import Array, DType

_BLOCK = 1 << 20  # bytes read at a time


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes if the block raises.

    It is written under a temporary name in the same folder, synced to disk and renamed over `path`. Folders that had
    to be made for it vanish with it.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another file of the same run may be in there by now
            for folder in made:
                folder.rmdir()
        raise


def sha256(path: Path) -> str:
    """SHA-256 of the file `path` in hexadecimal, read a block at a time. Raises FormatError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened: {reason(error)}") from error
    return digest.hexdigest()


def check_writable(path: Path) -> None:
    """Raises ConfigError if no file `path` can be written: call it before hours of work."""
    home = existing_parent(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder: name a file")
    if not home.is_dir():
        raise ConfigError(f"{path}: cannot be written: {home} is a file, not a folder")
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: cannot be written: no permission to write in {home}")


def existing_parent(path: Path) -> Path:
    """The innermost folder of `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


class MappedFile:
    """A file held open, of which arrays are mapped when they are asked for.

    Only arrays in use keep pages in memory: going through a file of any size takes the memory of one tensor.
    """

    def __init__(self, path: Path) -> None:
        """Raises FormatError if `path` cannot be opened."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.size = os.fstat(self._descriptor).st_size
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

    def bytes(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`, fewer if the file ends before."""
        count = max(0, min(count, self.size - offset))
        return self.array(offset, (count,), np.dtype("u1")).tobytes()


def check_disjoint(path: Path, extents: Iterable[tuple[int, int, str]]) -> None:
    """Raises FormatError if two of the (start, end, name) byte ranges of a file overlap."""
    end, previous = 0, ""
    for start, stop, name in sorted(extents):
        if start < end and stop > start:
            raise FormatError(f"{path}: {name} overlaps {previous}")
        if stop > start:
            end, previous = stop, name


def disk_is_full(error: OSError) -> bool:
    """Whether `error` says that there is no room left, on the disk or in the user's share of it."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def remove_stale(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Deletes what `atomic_write` left under `folder` when its process was killed."""
    for temporary in folder.glob(pattern):
        owner = temporary.name.removesuffix(".tmp").rpartition(".")[2]
        if owner.isdecimal() and not _alive(int(owner)):
            temporary.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
