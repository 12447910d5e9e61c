"""Writes files so that they are either complete or absent, and checks paths before work starts."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zimage_ref.errors import ConfigError, FormatError, reason

if sys.platform != "win32":
    import fcntl

FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform == "darwin" else None
_BLOCK = 1 << 20  # bytes read at a time


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that becomes `path` when the block ends. If the block raises, the file is deleted.

    The file is written under a temporary name in the same folder, synced to disk and renamed to `path`. If the block
    raises, folders that were created for the file are deleted too.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another file of the same run may be in the folder now
            for folder in made:
                folder.rmdir()
        raise


def sync(handle: int) -> None:
    """Waits until what was written to an open file, or the names in a folder, would survive a power cut.

    On macOS, fsync leaves it in the drive's own memory, and another call has to write that out. Some network disks
    do not know the call: there fsync is all that can be done. Source: man fsync of macOS.
    """
    if FULL_SYNC is not None:
        with suppress(OSError):
            fcntl.fcntl(handle, FULL_SYNC)
            return
    os.fsync(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of the file `path` in hexadecimal. Raises FormatError if the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be opened: {reason(error)}") from error
    return digest.hexdigest()


def check_writable(path: Path) -> None:
    """Raises ConfigError if you cannot write a file to `path`. Call it before a long computation."""
    home = existing_parent(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder: name a file")
    if not home.is_dir():
        raise ConfigError(f"{path}: cannot be written: {home} is a file, not a folder")
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: cannot be written: no permission to write in {home}")


def existing_parent(path: Path) -> Path:
    """The innermost parent folder of `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def disk_is_full(error: OSError) -> bool:
    """Whether `error` says that the disk, or the user's quota on it, is full."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def remove_stale(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Deletes temporary files under `folder` that `atomic_write` left because its process was killed."""
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
    except OSError:  # the process exists and belongs to another user
        return True
    return True
