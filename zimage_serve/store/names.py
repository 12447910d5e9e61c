"""Names that come from requests. A name is checked, then looked up in a folder; it never is a path."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection
from pathlib import Path

from zimage_serve.refusals import RefusedError, UnknownError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")  # of LoRAs, datasets, their files and runs
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices of Windows
ID = re.compile(r"[0-9a-f-]{8,64}")  # of jobs, pictures, runs and uploads


def new_id() -> str:
    """An id that nobody can guess. Later ids sort after earlier ones."""
    return f"{time.time_ns() // 10**6:012x}-{secrets.token_hex(6)}"


def is_name(name: str) -> bool:
    """Whether `name` can be the name of a file on every system, and is not hidden."""
    return NAME.fullmatch(name) is not None and name[-1] not in " ." and not _RESERVED.fullmatch(name)


def checked_name(name: object, what: str) -> str:
    """`name`, if it is one by `is_name`. Raises RefusedError naming `what`."""
    if not isinstance(name, str) or not is_name(name):
        raise RefusedError(f"{what}: a name is 1 to 100 letters, digits and . _ + - and begins with a letter or digit")
    return name


def checked_id(value: object, what: str) -> str:
    """`value`, if it looks like an id. Raises UnknownError naming `what`."""
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise UnknownError(f"{what}: no such id")
    return value


def file_in(folder: Path, name: object, what: str, suffixes: Collection[str]) -> Path:
    """The file `name` directly in `folder` with one of `suffixes`, or UnknownError naming `what`.

    The file is found among those in the folder, so a name cannot lead out of it. Links are not followed.
    """
    wanted = checked_name(name, what)
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name == wanted and path.suffix.lower() in suffixes and path.is_file() and not path.is_symlink():
                return path
    raise UnknownError(f"{what} {wanted}: no such file")
