"""Writes files so that they are either complete or absent, and tries names before work starts."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from zimage_ref.errors import ConfigError, FormatError, reason

from .reading import open_file
from .temporary import create_locked, locked_folder, remove_stale

if sys.platform != "win32":
    import fcntl

FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform == "darwin" else None
_BLOCK = 1 << 20  # bytes read or written at a time


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that becomes `path` when the block ends. If the block raises, the file is deleted.

    The file is written under a temporary name in the same folder, synced to disk and renamed to `path`. If `path` is a
    link, the file that it points to is written, and the link stays. If the block raises, folders that were created for
    the file are deleted too. An OSError from writing names `path`.
    """
    target = real_path(path)
    made = [folder for folder in target.parents if not folder.exists()]  # innermost first
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = create_locked(target)
        with cast(BinaryIO, io.BufferedWriter(_NamedFile(descriptor, path), _BLOCK)) as file:
            yield file
            file.flush()
            with _named(path):
                sync(file.fileno())
                if sys.platform != "win32":  # while it is still locked
                    os.replace(temporary, target)
        if sys.platform == "win32":  # which does not rename open files
            os.replace(temporary, target)
    except BaseException as error:
        if isinstance(error, OSError) and temporary and error.filename == str(temporary):
            error.filename = str(path)
        if temporary:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another file of the same run may be in the folder now
            for folder in made:
                folder.rmdir()
        raise


class _NamedFile(io.FileIO):
    """A file open for writing. Its errors name `path`, not a descriptor."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "r+b")
        self._path = path

    def write(self, data: bytes, /) -> int | None:  # type: ignore[override]
        with _named(self._path):
            return super().write(data)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A block in which an OSError without the name of a file gets that of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def real_path(path: Path) -> Path:
    """The file that `path` stands for: the end of its links, if it is one. The folders before it stay as they are."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


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
        with open_file(path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be opened: {reason(error)}") from error
    return digest.hexdigest()


def check_writable(*paths: Path) -> None:
    """Raises ConfigError if you cannot write a file to one of `paths`. Call it before a long computation.

    Each name is created in a temporary folder on the same disk and deleted, so that a name that is too long, or that
    the disk does not allow, is found. Leftovers of killed programs are deleted from the folders, too.
    """
    homes: dict[Path, list[Path]] = {}
    for path in paths:
        _check_place(path)
        homes.setdefault(existing_parent(real_path(path)), []).append(path)
    for home, inside in homes.items():
        remove_stale(home)
        remove_stale(home.parent)  # `home` may have been new then, so that its names were tried beside it
        _try_names(home, inside)


def _check_place(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error
    else:
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{path}: is a folder: name a file")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path}: is a pipe, a socket or a device: name a file")
    home = existing_parent(real_path(path))
    if not home.is_dir():
        raise ConfigError(f"{path}: cannot be written: {home} is a file, not a folder")
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: cannot be written: no permission to write in {home}")
    if path.exists() and _of_another_user(real_path(path)):
        raise ConfigError(f"{path}: cannot be written: it is protected, or belongs to another user")


def _of_another_user(path: Path) -> bool:
    """Whether a file cannot be replaced although its folder can be written."""
    flags = getattr(path.stat(), "st_flags", 0)  # macOS: "Locked" in the Finder
    if flags & (stat.UF_IMMUTABLE | stat.SF_IMMUTABLE):
        return True
    shared = path.parent.stat().st_mode & stat.S_ISVTX  # a folder such as /tmp: each user replaces only his own files
    return bool(shared) and os.geteuid() not in (0, path.stat().st_uid, path.parent.stat().st_uid)


def _try_names(home: Path, paths: Iterable[Path]) -> None:
    """Creates each of `paths` in a temporary folder in `home`, which is their innermost folder that exists."""
    path = home
    try:
        with locked_folder(home / "names") as trial:
            for path in paths:
                name = real_path(path).absolute().relative_to(home)
                if ".." not in name.parts:  # else it would not be in the temporary folder
                    tried = trial / name
                    tried.parent.mkdir(parents=True, exist_ok=True)
                    tried.touch()
                    tried.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error


def existing_parent(path: Path) -> Path:
    """The innermost parent folder of `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def disk_is_full(error: OSError) -> bool:
    """Whether `error` says that the disk, or the user's quota on it, is full."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
