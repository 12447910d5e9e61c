"""Opens and encodes picture files. The only file that calls Pillow's readers and writers.

Pillow has more than 40 readers, and one of them starts a program (Ghostscript, for EPS). Only those of the formats that
this program reads may look at a file, whatever its name. A damaged file can raise any exception in them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image, features

from zimage_ref.errors import BackendError, FormatError, ZImageError, reason
from zimage_ref.extras import optional_import
from zimage_ref.formats.reading import read_bytes

from .formats import AVIF, HEIF, READ_FORMATS


@cache
def missing_reader(format: str) -> str:
    """Why this installation cannot read `format`, one of READ_FORMATS, and the way out. "" if it can."""
    if format == HEIF:
        try:
            optional_import("pillow_heif", "HEIC pictures need the package pillow-heif").register_heif_opener()
        except BackendError as error:
            return str(error)
    if format == AVIF and not ("avif" in features.modules and features.check("avif")):
        return "AVIF pictures need a newer Pillow: pip install -U pillow"
    return ""


@contextmanager
def opened(path: Path, error: type[ZImageError] = FormatError, content: bytes | None = None) -> Iterator[Image.Image]:
    """A block with the picture file `path`, of a format that this installation reads. Its pixels are not read yet.

    content: of the file, if it was read before. Raises `error` naming the file if it cannot be opened, and for any
    exception of Pillow in the block.
    """
    readable = [format for format in READ_FORMATS if not missing_reader(format)]
    try:
        data = read_bytes(path) if content is None else content
        with Image.open(io.BytesIO(data), formats=readable) as file:
            yield file
    except ZImageError:
        raise
    except Exception as cause:
        raise error(f"{path}: cannot be read as a picture: {_fact(cause)}") from cause


def encoded(picture: Image.Image, format: str, **metadata: object) -> bytes:
    """The bytes of `picture` in Pillow's `format`. Raises FormatError if the format cannot hold it."""
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format, **metadata)
    except Exception as cause:
        raise FormatError(
            f"a picture of {picture.width} x {picture.height} cannot be written as {format}: {_fact(cause)}"
        ) from cause
    return buffer.getvalue()


def _fact(error: Exception) -> str:
    """The message of an exception. If it is empty, or only a key or a number, its class is named too."""
    text = reason(error)
    return text if len(text) > 8 else f"{type(error).__name__} {text}".strip()
