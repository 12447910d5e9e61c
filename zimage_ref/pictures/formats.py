"""The formats of picture files by suffix. This file does not import Pillow, so that it loads fast."""

from __future__ import annotations

from pathlib import Path

from zimage_ref.errors import DatasetError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix -> Pillow's name
PICTURE_SUFFIXES = tuple(FORMATS)


def check_suffix(path: Path) -> str:
    """Pillow's name of the format that the suffix of `path` stands for. Raises DatasetError if it is unknown."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise DatasetError(f"{path}: unknown picture format: use one of {', '.join(FORMATS)}") from None
