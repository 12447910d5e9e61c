"""Reads, scales, converts and writes pictures. The only file that uses Pillow's image operations."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zimage_ref.errors import DatasetError, reason
from zimage_ref.formats.files import atomic_write
from zimage_ref.formats.reading import read_bytes
from zimage_ref.formats.tensors import Array

from . import files
from .formats import check_suffix
from .metadata import Record, metadata
from .reading import decode

Picture = Image.Image
PictureSource = str | Path | Picture  # a picture, or its file
RGB = tuple[int, int, int]


def read_picture(path: Path) -> Picture:
    """The picture in `path` as RGB, upright (EXIF orientation applied), with white behind transparent pixels.

    Raises DatasetError naming the file if it cannot be read completely.
    """
    return flat(decode(picture_bytes(path), path).picture)


def picture_bytes(path: Path) -> bytes:
    """The content of the file `path`. Raises DatasetError if it cannot be read."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read as a picture: {reason(error)}") from error


@dataclass(frozen=True)
class GivenPicture:
    """A picture as it was given."""

    picture: Picture  # upright, in any mode
    digest: str = ""  # SHA-256 of its file; "" for a picture in memory
    remarks: tuple[str, ...] = ()  # on what of the file is not used


def read_given(source: PictureSource) -> GivenPicture:
    """The picture `source`, or that in the file. The file is read once. Raises DatasetError as `read_picture` does."""
    if isinstance(source, Picture):
        if not all(source.size):
            raise DatasetError(f"(a picture in memory): has {source.width} x {source.height} pixels: it is empty")
        return GivenPicture(source)
    path = Path(source)
    data = picture_bytes(path)
    decoded = decode(data, path)
    return GivenPicture(decoded.picture, hashlib.sha256(data).hexdigest(), decoded.remarks)


def flat(picture: Picture, behind: str = "white") -> Picture:
    """`picture` as RGB, with the colour `behind` its transparent parts."""
    if picture.mode.startswith("I;16") or picture.mode == "I":  # Pillow would clip 16-bit values at 255
        picture = Image.fromarray((np.asarray(picture, np.uint32) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, behind), picture)
    return picture.convert("RGB")


def cover(picture: Picture, width: int, height: int) -> Picture:
    """`picture` scaled (Lanczos) until it covers width x height, then cropped at its centre. It is never stretched."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def mirror(picture: Picture) -> Picture:
    """`picture` with left and right exchanged."""
    return ImageOps.mirror(picture)


def thumbnail(path: Path, side: int) -> bytes:
    """The picture in `path` as the bytes of a JPEG that fits into a square of `side` pixels."""
    picture = read_picture(path)
    picture.thumbnail((side, side))
    return files.encoded(picture, "JPEG", quality=85)


FITS = ("crop", "pad", "stretch")


def fit(picture: Picture, width: int, height: int, how: str) -> Picture:
    """`picture` at width x height. `how` is one of FITS: crop it to the shape, pad it with black, or stretch it."""
    if picture.size == (width, height):
        return picture
    if how == "pad":
        return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS)
    if how == "stretch":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    return cover(picture, width, height)


def black_and_white(picture: Picture) -> Picture:
    """A mask in black and white: pixels of at least half brightness are white.

    Transparent parts are black: a mask painted on an empty layer shows only what was painted.
    """
    return brightness(picture).point(lambda value: 255 * (value > 127))


def fit_mask(mask: Picture, width: int, height: int, how: str) -> Array:
    """`mask` as (height, width) boolean, True for white, fitted as `fit` fits its picture. Padding is True."""
    nearest = Image.Resampling.NEAREST
    if how == "pad":
        mask = ImageOps.pad(mask, (width, height), nearest, color=255)
    elif how == "stretch":
        mask = mask.resize((width, height), nearest)
    else:
        mask = ImageOps.fit(mask, (width, height), nearest)
    return np.asarray(mask) > 127


def brightness(picture: Picture) -> Picture:
    """`picture` in grey. Transparent parts are black."""
    return flat(picture, behind="black").convert("L")


def alpha(picture: Picture) -> Picture | None:
    """How opaque each pixel is, in grey; None if the picture has no transparency."""
    return picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None


def mask_array(mask: Picture, width: int, height: int) -> Array:
    """A grey `mask` as (height, width) float32 in 0..1, cropped as `cover` crops its picture, scaled by area."""
    return np.asarray(ImageOps.fit(mask, (width, height), Image.Resampling.BOX), np.float32) / 255


def half_blocks(picture: Picture, columns: int) -> list[list[tuple[RGB, RGB]]]:
    """`picture`, `columns` pixels wide, as lines of cells of a terminal. A cell is two pixels, (upper, lower)."""
    rows = max(2, round(columns * picture.height / picture.width / 2) * 2)
    small = np.asarray(picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX)).tolist()
    lines = zip(small[::2], small[1::2], strict=True)
    return [[(tuple(a), tuple(b)) for a, b in zip(upper, lower, strict=True)] for upper, lower in lines]


def to_array(picture: Picture) -> Array:
    """`picture` as (3, H, W) float32 in [-1, 1]."""
    pixels = np.asarray(picture, np.float32) / 127.5 - 1  # (H, W, 3)
    return pixels.transpose(2, 0, 1)  # (3, H, W)


def to_unit(decoded: Array) -> Array:
    """An output of the autoencoder, (3, H, W) around [-1, 1], as (H, W, 3) float32 clipped to 0..1."""
    return np.clip(decoded.transpose(1, 2, 0) / 2 + 0.5, 0, 1).astype(np.float32)


def to_picture(pixels: Array) -> Picture:
    """`pixels`, (H, W, 3) in 0..1, as an 8-bit RGB picture, rounded to nearest."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def encoded(picture: Picture, format: str, record: Record | None = None) -> bytes:
    """The bytes of `picture` in Pillow's `format`, with `record` in the metadata."""
    return files.encoded(picture, format, quality=95, **(metadata(format, record) if record else {}))


def save_picture(picture: Picture, path: Path, record: Record | None = None) -> None:
    """Writes `picture`, with `record` in its metadata, in the format that the suffix stands for.

    Call `check_suffix` first if the picture takes long to make.
    """
    data = encoded(picture, check_suffix(path), record)
    with atomic_write(path) as file:
        file.write(data)
