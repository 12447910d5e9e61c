"""Files: written so that they are whole or absent, and read by mapping the part that is needed."""

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
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another file of the same run may be in there by now
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
