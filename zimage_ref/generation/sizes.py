"""Sizes: what is possible, and as people write them: 1024, 1024x768, 3:4. And seeds that nobody has chosen."""

from __future__ import annotations

import math
import re
import secrets

from zimage_ref.errors import ConfigError
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE, size_multiple

SIDE_MULTIPLE = size_multiple(OFFICIAL_TRANSFORMER, OFFICIAL_VAE)  # 16: 8 pixels a latent, 2 x 2 latents a token
DEFAULT_SIDE = 512
MAX_AREA = 2048 * 2048  # pixels
_FORMS = "give a side such as 1024, two such as 1024x768, or a shape such as 3:4"
_PIXELS = re.compile(r"(\d{1,6})(?:\s*[xX×]\s*(\d{1,6}))?")
_SHAPE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*:\s*(\d{1,6}(?:\.\d{1,6})?)")
_SEEDS = 2**32  # other programs take no larger seed


def parse_size(text: str, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of a size in words.

    A shape has about as many pixels as the default size, 512 x 512. With `width` or `height` it gives the other side.
    Sides of a shape are rounded to multiples of 16; sides in pixels are taken as they are.
    Raises ConfigError for another text, and for a width or height beside a size that has them.
    """
    if found := _PIXELS.fullmatch(text.strip()):
        if width is not None or height is not None:
            raise ConfigError(f"`size` {text} says width and height: leave `width` and `height` out")
        first = int(found[1])
        return first, int(found[2] or first)
    shape = _SHAPE.fullmatch(text.strip())
    if not shape or not all(float(part) for part in shape.groups()):
        raise ConfigError(f"`size` {text!r}: {_FORMS}")
    ratio = float(shape[1]) / float(shape[2])
    if width is not None and height is not None:
        raise ConfigError(f"`size` {text} leaves one of `width` and `height` free: give only one of them")
    if width is not None:
        return width, shrunk(width, width / ratio)[1]
    if height is not None:
        return shrunk(height * ratio, height)[0], height
    return shrunk(DEFAULT_SIDE * math.sqrt(ratio), DEFAULT_SIDE / math.sqrt(ratio))


def check_side(name: str, side: int) -> None:
    """Raises ConfigError unless `side` is a positive multiple of SIDE_MULTIPLE."""
    if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
        nearest = max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
        raise ConfigError(f"`{name}` {side} must be a multiple of {SIDE_MULTIPLE}: {nearest} is the nearest")


def check_area(width: int, height: int) -> None:
    """Raises ConfigError if width times height is above MAX_AREA."""
    if width * height > MAX_AREA:
        raise ConfigError(
            f"{width} x {height} is more than 2048 x 2048 pixels: {' x '.join(map(str, shrunk(width, height)))} fits"
        )


def shrunk(width: float, height: float) -> tuple[int, int]:
    """The largest size of the shape width : height, at most as asked and at most MAX_AREA, in whole SIDE_MULTIPLEs."""
    scale = min(1.0, math.sqrt(MAX_AREA / (width * height)))
    sides = (round(side * scale / SIDE_MULTIPLE) * SIDE_MULTIPLE for side in (width, height))
    w, h = (max(SIDE_MULTIPLE, side) for side in sides)
    while w * h > MAX_AREA:  # rounding up both sides can exceed it
        w, h = (w - SIDE_MULTIPLE, h) if w >= h else (w, h - SIDE_MULTIPLE)
    return w, h


def random_seed() -> int:
    """A seed below 2^32 from the system's random numbers."""
    return secrets.randbelow(_SEEDS)
