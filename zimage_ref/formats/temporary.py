"""Temporary files and folders: names that no other writer uses, and leftovers of programs that were killed.

    .NAME.zimage-<16 hexadecimal digits>.tmp

The writer locks its temporary file. The system removes the lock when the process ends in any way. So a file that is
not locked is a leftover, whichever machine its writer ran on. On a disk without locks, leftovers stay.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_PATTERN = re.compile(r"\..*\.zimage-[0-9a-f]{16}\.tmp", re.DOTALL)
_SHOWN = 64  # bytes of the name in a temporary name: the whole must fit where the name fits


def temporary_path(path: Path) -> Path:
    """A new name beside `path`. It begins with a part of the name, so that people see what it is of."""
    shown = os.fsencode(path.name)[:_SHOWN].decode("utf-8", "ignore")
    return path.with_name(f".{shown}.zimage-{secrets.token_hex(8)}.tmp")


def create_locked(path: Path) -> tuple[Path, int]:
    """Creates a temporary file for `path` and locks it. Returns its path and the descriptor that holds the lock."""
    while True:
        temporary = temporary_path(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another program took the new file for a leftover before it was locked


@contextmanager
def locked_folder(path: Path) -> Iterator[Path]:
    """A new temporary folder beside `path`, deleted at the end. Its lock keeps other programs from deleting it."""
    folder, descriptor = _create_locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _create_locked_folder(path: Path) -> tuple[Path, int | None]:
    while True:
        folder = temporary_path(path)
        folder.mkdir()
        if sys.platform == "win32":
            return folder, None
        with suppress(FileNotFoundError):  # another program took the new folder for a leftover
            descriptor = os.open(folder, os.O_RDONLY)
            if lock(descriptor) is not False and folder.exists():
                return folder, descriptor
            os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Locks an open file or folder. False if another process holds the lock, None if this disk has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_stale(folder: Path, deep: bool = False) -> None:
    """Deletes leftovers in `folder`, and with `deep` in its subfolders: temporary files that nobody writes any more."""
    for found in folder.rglob(".*.tmp") if deep else folder.glob(".*.tmp"):
        if _PATTERN.fullmatch(found.name):
            with suppress(OSError):  # it is gone already, or belongs to another user
                _remove_unlocked(found)


def _remove_unlocked(path: Path) -> None:
    if sys.platform == "win32":  # Windows refuses to delete a file that is open
        path.unlink()
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        if lock(descriptor):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(descriptor)
