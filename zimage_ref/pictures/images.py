"""Pictures in and out: the only file that knows Pillow's image operations."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zimage_ref.errors import DatasetError, reason
from zimage_ref.formats.files import atomic_write
from zimage_ref.formats.tensors import Array

from .formats import check_suffix
from .metadata import Record, metadata

Picture = Image.Image
PictureSource = str | Path | Picture  # a picture, or the file that it is in
RGB = tuple[int, int, int]


def read_picture(path: Path) -> Picture:
    """The picture in `path`, upright (EXIF orientation applied), RGB, transparency laid over white.

    Raises DatasetError naming the file where it cannot be read as a whole.
    """
    try:
        with Image.open(path) as file:
            file.load()
            picture = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot be read as a picture: {reason(error)}") from error
    return _flat(picture)


def to_rgb(source: PictureSource) -> Picture:
    """The RGB picture that `source` is or names. Raises DatasetError as `read_picture` does."""
    return _flat(source) if isinstance(source, Picture) else read_picture(Path(source))


def _flat(picture: Picture) -> Picture:
    if picture.mode.startswith("I;16") or picture.mode == "I":  # Pillow would clip 16 bits to 255
        picture = Image.fromarray((np.asarray(picture, np.uint32) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def cover(picture: Picture, width: int, height: int) -> Picture:
    """`picture` scaled to cover width x height (Lanczos), and cut around its centre: never stretched."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def mirror(picture: Picture) -> Picture:
    """`picture`, left and right exchanged."""
    return ImageOps.mirror(picture)


def thumbnail(path: Path, side: int) -> bytes:
    """The picture in `path` as a JPEG that fits a square of `side` pixels."""
    picture, buffer = read_picture(path), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


FITS = ("crop", "pad", "stretch")


def fit(picture: Picture, width: int, height: int, how: str) -> Picture:
    """`picture` at width x height: cropped to the shape, padded with black, or stretched (one of FITS)."""
    if picture.size == (width, height):
        return picture
    if how == "pad":
        return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS)
    if how == "stretch":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    return cover(picture, width, height)


def read_mask(source: PictureSource) -> Picture:
    """The mask in `source`, black and white: white where it is at least half bright. Raises DatasetError."""
    return to_rgb(source).convert("L").point(lambda value: 255 * (value > 127))


def fit_mask(mask: Picture, width: int, height: int, how: str) -> Array:
    """(height, width) boolean, True where `mask` is white, moved as `fit` moves its picture; True where that pads."""
    nearest = Image.Resampling.NEAREST
    if how == "pad":
        mask = ImageOps.pad(mask, (width, height), nearest, color=255)
    elif how == "stretch":
        mask = mask.resize((width, height), nearest)
    else:
        mask = ImageOps.fit(mask, (width, height), nearest)
    return np.asarray(mask) > 127


def half_blocks(picture: Picture, columns: int) -> list[list[tuple[RGB, RGB]]]:
    """`picture` at `columns` x an even number of pixels, as lines of pairs: the upper and the lower half of a cell."""
    rows = max(2, round(columns * picture.height / picture.width / 2) * 2)
    small = np.asarray(picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX)).tolist()
    lines = zip(small[::2], small[1::2], strict=True)
    return [[(tuple(a), tuple(b)) for a, b in zip(upper, lower, strict=True)] for upper, lower in lines]


def to_array(picture: Picture) -> Array:
    """(3, H, W) float32 in [-1, 1]."""
    pixels = np.asarray(picture, np.float32) / 127.5 - 1  # (H, W, 3)
    return pixels.transpose(2, 0, 1)  # (3, H, W)


def to_unit(decoded: Array) -> Array:
    """What the autoencoder decodes, (3, H, W) around [-1, 1], as (H, W, 3) float32 in 0..1."""
    return np.clip(decoded.transpose(1, 2, 0) / 2 + 0.5, 0, 1).astype(np.float32)


def to_picture(pixels: Array) -> Picture:
    """(H, W, 3) in 0..1 as an 8-bit RGB picture, rounded to nearest."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def encoded(picture: Picture, format: str, record: Record | None = None) -> bytes:
    """`picture` as a file of Pillow's `format`, with `record` in its metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, format, quality=95, **(metadata(format, record) if record else {}))
    return buffer.getvalue()


def save_picture(picture: Picture, path: Path, record: Record | None = None) -> None:
    """Writes `picture`, and `record` into it, in the format that the suffix names.

    Call `check_suffix` before hours of work.
    """
    data = encoded(picture, check_suffix(path), record)
    with atomic_write(path) as file:
        file.write(data)
