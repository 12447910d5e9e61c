"""The formats of picture files by suffix. This file does not import Pillow, so that it loads fast."""

from __future__ import annotations

from pathlib import Path

from zimage_ref.errors import DatasetError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix -> Pillow's name; written, too
_HEIF = {".heic": "HEIF", ".heif": "HEIF"}  # read with the extra `heif`
_READ = {
    **FORMATS, **_HEIF, ".jfif": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF",
}  # fmt: skip
PICTURE_SUFFIXES = tuple(_READ)
HEIF, AVIF = "HEIF", "AVIF"  # the formats that not every installation reads
READ_FORMATS = tuple(dict.fromkeys(_READ.values()))  # Pillow's names


def check_suffix(path: Path) -> str:
    """Pillow's name of the format to write, from the suffix of `path`. Raises DatasetError if it is unknown."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise DatasetError(f"{path}: unknown picture format: use one of {', '.join(FORMATS)}") from None


def format_of(path: Path) -> str | None:
    """Pillow's name of the format to read that the suffix of `path` stands for; None if it is no picture's."""
    return _READ.get(path.suffix.lower())
