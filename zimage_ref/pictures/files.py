"""Opens and encodes picture files. The only file that calls Pillow's readers and writers.

Pillow has more than 40 readers, and one of them starts a program (Ghostscript, for EPS). Only those of the formats that
this program reads may look at a file, whatever its name. A damaged file can raise any exception in them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from zimage_ref.errors import FormatError, ZImageError, reason

from .formats import FORMATS


@contextmanager
def opened(path: Path, error: type[ZImageError] = FormatError) -> Iterator[Image.Image]:
    """A block with the picture file `path`, one of FORMATS. Its pixels are not read yet.

    Raises `error` naming the file if it cannot be opened, and for any exception of Pillow in the block.
    """
    try:
        with Image.open(path, formats=tuple(dict.fromkeys(FORMATS.values()))) as file:
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
