"""Finds the files of a dataset: in its folder, its subfolders and folders that are linked into it.

Every file is found, or counted among those that are left out, with the reason. A folder is read once, however many
links lead to it. Files that systems make by themselves are left out without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zimage_ref.errors import DatasetError, listing, reason

RUN_SUFFIX = ".run"  # the suffix of the folder that a run keeps beside its output: see run_folder
_OF_SYSTEMS = (".ds_store", "thumbs.db", "desktop.ini")  # and ._*, in which macOS keeps attributes of files
_SHOWN = 5  # names in a notice


@dataclass
class DatasetFiles:
    """The files of a dataset."""

    folder: Path
    found: list[Path]  # regular files, sorted
    left_out: dict[str, list[Path]] = field(default_factory=dict)  # reason -> files and folders

    def leave_out(self, path: Path, reason: str) -> None:
        """Counts `path` among those that are left out."""
        self.left_out.setdefault(reason, []).append(path)

    def notices(self) -> Iterator[str]:
        """A notice for each reason."""
        for why, paths in self.left_out.items():
            names = [path.relative_to(self.folder).as_posix() for path in paths]
            yield f"{self.folder}: left out {len(names)} ({why}): {listing(names, _SHOWN)}"


def find_files(folder: Path) -> DatasetFiles:
    """Walks through `folder`. Raises DatasetError if a folder cannot be read."""
    files = DatasetFiles(folder, [])
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], list[Path]()  # links come last: a folder is found by its own name
    while waiting or links:
        inside = waiting.pop() if waiting else links.pop(0)
        if (identity := _identity(inside)) in seen:
            files.leave_out(inside, "a folder that is read already")
            continue
        seen.add(identity)
        for path in _children(inside):
            if path.is_dir() and not _is_left_out(path, files):
                (links if path.is_symlink() else waiting).append(path)
            elif not path.is_dir():
                _take(path, files)
    files.found.sort()
    return files


def _take(path: Path, files: DatasetFiles) -> None:
    name = path.name.lower()
    if name in _OF_SYSTEMS or name.startswith("._"):
        return
    if path.is_symlink() and not path.exists():
        files.leave_out(path, "links to nothing")
    elif not path.is_file():
        files.leave_out(path, "a pipe, a socket or a device")
    elif not _is_left_out(path, files):
        files.found.append(path)


def _is_left_out(path: Path, files: DatasetFiles) -> bool:
    """Leaves out hidden files and folders, and folders of runs, which hold previews."""
    if path.name.startswith("."):
        files.leave_out(path, "hidden")
    elif path.suffix == RUN_SUFFIX and path.is_dir():
        files.leave_out(path, "the folder of a run")
    else:
        return False
    return True


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {reason(error)}") from error


def _identity(folder: Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
