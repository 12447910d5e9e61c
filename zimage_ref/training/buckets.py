"""Aspect-ratio buckets: the size at which a picture is trained.

The sides of a bucket are multiples of a number of pixels that the model requires. Its area is about resolution^2. Its
shape is as close to that of the picture as the multiples allow. It is at most `max_upscale` times as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

Size = tuple[int, int]  # width, height in pixels


def bucket(size: Size, resolution: int, multiple: int, max_upscale: float = 1.0) -> Size:
    """The size at which a picture of `size` is trained.

    It is the size next to the ideal one that cuts off least of the picture; of equals, the largest. A side that is
    shorter than `multiple` is enlarged to `multiple`, whatever `max_upscale` says.
    """
    width, height = size
    scale = min(resolution / math.sqrt(width * height), max_upscale)
    widths, heights = _around(width * scale, multiple), _around(height * scale, multiple)
    smallest = (widths[0], heights[0])
    fitting = [s for s in product(widths, heights) if max(s[0] / width, s[1] / height) <= max_upscale] or [smallest]
    return min(fitting, key=lambda s: (_cut(size, s), -s[0] * s[1]))


def buckets(size: Size, resolutions: Sequence[int], multiple: int, max_upscale: float, square: bool) -> list[Size]:
    """The different sizes at which a picture of `size` is trained, at most one for each of `resolutions`."""
    if square:
        chosen = [(side, side) for side in resolutions]
    else:
        chosen = [bucket(size, side, multiple, max_upscale) for side in resolutions]
    return list(dict.fromkeys(chosen))


def _around(side: float, multiple: int) -> list[int]:
    """The nearest multiples below and above `side`, at least `multiple`."""
    low = max(multiple, math.floor(side / multiple) * multiple)
    high = max(multiple, math.ceil(side / multiple) * multiple)
    return [low, high]


def _cut(size: Size, bucket: Size) -> float:
    """The share of a picture of `size` that is cut off to get the shape of `bucket`, rounded to a hundredth."""
    shape, wanted = size[0] / size[1], bucket[0] / bucket[1]
    return round(1 - min(shape / wanted, wanted / shape), 2)
