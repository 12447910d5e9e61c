"""Pictures from strangers. Size and format are checked from the header, before any pixel is decoded."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from zimage_ref.errors import DatasetError, reason

from .formats import FORMATS
from .images import Picture, encoded, to_rgb

_ACCEPTED = tuple(dict.fromkeys(FORMATS.values()))  # Pillow tries these readers only


@dataclass(frozen=True)
class ReceivedPicture:
    """The pixels of a picture. Nothing else of its file is kept."""

    picture: Picture  # RGB, upright
    hole: Picture | None  # L, 255 for fully transparent pixels; None if there are none


def received(data: bytes, what: str, most_pixels: int) -> ReceivedPicture:
    """The picture in `data`, a PNG, JPEG or WEBP of at most `most_pixels`, whatever its name or type claims.

    Raises DatasetError naming `what` if it is not one, or is larger, or cannot be decoded completely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_ACCEPTED) as file:
                if file.width * file.height > most_pixels:
                    raise DatasetError(
                        f"{what}: has {file.width} x {file.height} pixels: this server takes at most {most_pixels:,}"
                    )
                file.load()
                upright = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise DatasetError(f"{what}: is not a picture: send a PNG, JPEG or WEBP") from None
    except (
        OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning
    ) as error:  # fmt: skip
        raise DatasetError(f"{what}: cannot be read as a picture: {reason(error)}") from error
    return ReceivedPicture(to_rgb(upright), _hole(upright))


def _hole(picture: Picture) -> Picture | None:
    if not picture.has_transparency_data:
        return None
    hole = picture.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha == 0))
    return hole if hole.getbbox() else None


def inverted(mask: Picture) -> Picture:
    """`mask` with black and white exchanged."""
    return ImageOps.invert(mask.convert("L"))


def reencoded(data: bytes, format: str) -> bytes:
    """The picture in `data`, made by this program, in Pillow's `format`."""
    with Image.open(io.BytesIO(data)) as file:
        return encoded(file.convert("RGB"), format)
