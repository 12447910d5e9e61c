"""Facts about files that clients ask for again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from zimage_ref.errors import ZImageError

T = TypeVar("T")


class FileFacts(Generic[T]):
    """What `read` says about files. A file is read again only after it has changed."""

    def __init__(self, read: Callable[[Path], T]) -> None:
        self._read = read
        self._known: dict[Path, tuple[tuple[int, int], T]] = {}  # by file, with its stamp

    def of(self, path: Path) -> T:
        """The facts of the file `path`."""
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = (stamp, self._read(path))
        return known[1]

    def forget(self, path: Path) -> None:
        """The file `path` is gone."""
        self._known.pop(path, None)


def without_folder(folder: Path, error: ZImageError) -> str:
    """The message of an error without the path of a file that the client knows by another name."""
    return str(error).replace(f"{folder}/", "").replace(".incoming-", "")
