"""The files of a folder, without those that systems leave there: `._name` and .DS_Store of macOS, Thumbs.db of Windows.

macOS writes `._name` beside every file on a disk that is not its own (exFAT, network): it ends as the file does, and
holds something else.
"""

from __future__ import annotations

from pathlib import Path

_LEFT_BY_SYSTEMS = (".ds_store", "thumbs.db", "desktop.ini")


def is_left_by_system(path: Path) -> bool:
    """Whether a system wrote `path` for itself."""
    return path.name.startswith("._") or path.name.lower() in _LEFT_BY_SYSTEMS


def own_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The files and folders in `folder` that match `pattern` and that people put there, sorted by name."""
    return sorted(path for path in folder.glob(pattern) if not is_left_by_system(path))
