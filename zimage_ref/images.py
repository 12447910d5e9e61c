"""Pictures in and out: the only file that knows Pillow's image operations."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import DatasetError
from .files import atomic_write
from .tensors import Array

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PICTURE_SUFFIXES = tuple(_FORMATS)


def read_picture(path: Path) -> Image.Image:
    """The picture in `path`, upright (EXIF orientation applied), RGB, transparency laid over white.

    Raises DatasetError naming the file where it cannot be read as a whole.
    """
    try:
        with Image.open(path) as file:
            file.load()
            picture = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot be read as a picture: {error}") from error
    if picture.mode.startswith("I;16") or picture.mode == "I":  # Pillow would clip 16 bits to 255
        picture = Image.fromarray((np.asarray(picture, np.uint32) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`picture` scaled to cover width x height (Lanczos), and cut around its centre: never stretched."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def mirror(picture: Image.Image) -> Image.Image:
    """`picture`, left and right exchanged."""
    return ImageOps.mirror(picture)


def thumbnail(path: Path, side: int) -> bytes:
    """The picture in `path` as a JPEG that fits a square of `side` pixels."""
    picture, buffer = read_picture(path), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def to_array(picture: Image.Image) -> Array:
    """(3, H, W) float32 in [-1, 1]."""
    pixels = np.asarray(picture, np.float32) / 127.5 - 1  # (H, W, 3)
    return pixels.transpose(2, 0, 1)  # (3, H, W)


def to_unit(decoded: Array) -> Array:
    """What the autoencoder decodes, (3, H, W) around [-1, 1], as (H, W, 3) float32 in 0..1."""
    return np.clip(decoded.transpose(1, 2, 0) / 2 + 0.5, 0, 1).astype(np.float32)


def to_picture(pixels: Array) -> Image.Image:
    """(H, W, 3) in 0..1 as an 8-bit RGB picture, rounded to nearest."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes `picture` in the format that the suffix names. Call `check_suffix` before hours of work."""
    buffer = io.BytesIO()
    picture.save(buffer, check_suffix(path), quality=95)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def check_suffix(path: Path) -> str:
    """Pillow's name of the format that the suffix of `path` means. Raises DatasetError for an unknown one."""
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise DatasetError(f"{path}: unknown picture format: use one of {', '.join(_FORMATS)}") from None
