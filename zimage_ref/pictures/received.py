"""Pictures from strangers. Size and format are checked from the header, before any pixel is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import ImageOps

from zimage_ref.errors import DatasetError

from .files import encoded, opened
from .images import Picture, alpha, flat
from .reading import decode


@dataclass(frozen=True)
class ReceivedPicture:
    """The pixels of a picture. Nothing else of its file is kept."""

    picture: Picture  # RGB, upright
    hole: Picture | None  # L, 255 for fully transparent pixels; None if there are none


def received(data: bytes, what: str, most_pixels: int) -> ReceivedPicture:
    """The picture in `data`, whatever its name says: of at most `most_pixels`, in a format that is read here.

    Raises DatasetError naming `what` if it is not one, or is larger, or cannot be decoded completely.
    """
    check_pixels(data, what, most_pixels)
    upright = decode(data, Path(what)).picture
    return ReceivedPicture(flat(upright), _hole(upright))


def check_pixels(data: bytes, what: str, most_pixels: int) -> None:
    """Raises DatasetError unless the header of `data` is that of a picture of at most `most_pixels`."""
    with opened(Path(what), DatasetError, data) as file:
        if file.width * file.height > most_pixels:
            raise DatasetError(
                f"{what}: has {file.width} x {file.height} pixels: this server takes at most {most_pixels:,}"
            )


def _hole(picture: Picture) -> Picture | None:
    if (opaque := alpha(picture)) is None:
        return None
    hole = opaque.point(lambda value: 255 * (value == 0))
    return hole if hole.getbbox() else None


def inverted(mask: Picture) -> Picture:
    """`mask` with black and white exchanged."""
    return ImageOps.invert(mask.convert("L"))


def reencoded(data: bytes, format: str) -> bytes:
    """The picture in `data`, made by this program, in Pillow's `format`."""
    with opened(Path("picture"), content=data) as file:
        return encoded(file.convert("RGB"), format)
