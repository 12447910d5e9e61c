"""Decodes picture files: which formats this installation reads, upright pictures, and what a file holds besides."""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from zimage_ref.errors import DatasetError

from .files import opened

Picture = Image.Image
FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)  # fmt: skip  what Pillow raises for damaged pictures
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip  EXIF 2.3, tag 274
_ONE_PICTURE = ("MPO",)  # a photograph of a phone, with a depth map or the like behind it
_WARNING = threading.Lock()  # what is done with warnings is the same for all threads
_DEEPEST = 65535  # the largest value of a pixel of 16 bits


@dataclass(frozen=True)
class Decoded:
    """A picture as it was stored, upright, and remarks on what of its file is not used."""

    picture: Picture
    remarks: tuple[str, ...] = ()


def decode(data: bytes, path: Path) -> Decoded:
    """The picture that the file `path` with the content `data` holds; the first, if it holds several.

    Raises DatasetError naming the file if it cannot be read completely.
    """
    with _told() as warned, opened(path, DatasetError, data) as file:
        frames = 1 if file.format in _ONE_PICTURE else getattr(file, "n_frames", 1)
        file.load()
        turn = _turn(file, warned)
        picture = file.transpose(turn) if turn is not None else file.copy()
    _check_depth(picture, path)
    remarks = ["its EXIF is broken and ignored: see whether the picture is upright"] if warned else []
    if frames > 1:
        remarks.append(f"holds {frames} pictures: only the first is used")
    return Decoded(picture, tuple(f"{path}: {text}" for text in remarks))


@contextmanager
def _told() -> Iterator[list[str]]:
    """A block in which Pillow's warnings, which are all of damaged metadata, are collected and not printed."""
    told: list[str] = []
    with _WARNING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # of a large picture; a too large one is an error
        yield told
        told += [str(warning.message) for warning in caught]


def _turn(file: Picture, warned: list[str]) -> Image.Transpose | None:
    """How to turn a picture upright, by its EXIF. If the EXIF is broken, that is added to `warned`."""
    try:
        return _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except FAULTS as error:
        warned.append(str(error))
        return None


def _check_depth(picture: Picture, path: Path) -> None:
    """Raises DatasetError if the values of pixels have no known range."""
    values = np.asarray(picture) if picture.mode == "I" else np.zeros(1)
    if picture.mode == "F" or values.min() < 0 or values.max() > _DEEPEST:
        raise DatasetError(f"{path}: its pixels have more than 16 bits, or are fractions: save it with 8 or 16 bits")
