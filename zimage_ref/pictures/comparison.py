"""Differences between two pictures: of their pixels, and of the records of how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from zimage_ref.errors import ConfigError

from .images import Picture

_VISIBLE = 8  # a difference of a channel, of 255, that people see in flat areas


@dataclass(frozen=True)
class PixelDifference:
    """How far the pixels of two pictures of one size are apart."""

    changed: float  # share of the pixels that differ at all
    visible: float  # share of the pixels that differ by at least 8 of 255 in a channel
    mean: float  # of the absolute differences of all channels, 0 to 255
    largest: int  # of them
    psnr: float  # peak signal to noise ratio in dB; infinite for equal pixels
    box: tuple[int, int, int, int] | None  # left, top, right, bottom of the part that differs; None if none does
    picture: Picture  # the absolute differences, scaled so that the largest is 255


def pixel_difference(first: Picture, second: Picture) -> PixelDifference:
    """Compares two RGB pictures. Raises ConfigError if their sizes differ.

    PSNR is 10 log10(255^2 / mean squared difference), over all channels.
    """
    if first.size != second.size:
        raise ConfigError(
            f"pictures of {first.width} x {first.height} and {second.width} x {second.height} pixels cannot be compared"
        )
    difference = np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16))  # (H, W, 3)
    worst = difference.max(axis=2)  # (H, W)
    rows, columns = (np.flatnonzero(worst.any(axis=axis)) for axis in (1, 0))
    square = float((difference.astype(np.float64) ** 2).mean())
    largest = int(worst.max())
    scaled = difference * (255 / max(1, largest))
    return PixelDifference(
        changed=float((worst > 0).mean()),
        visible=float((worst >= _VISIBLE).mean()),
        mean=float(difference.mean()),
        largest=largest,
        psnr=10 * math.log10(255**2 / square) if square else math.inf,
        box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if largest else None,
        picture=Image.fromarray(scaled.round().astype(np.uint8)),
    )


def record_changes(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The fields that differ between two records, with both values, in the order of the records. None: it is not there.

    LoRAs are compared file by file: "lora fox.safetensors" with its scales.
    """
    ours, theirs = _spread(first), _spread(second)
    return {
        name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)
    }


def _spread(record: Mapping[str, object]) -> dict[str, object]:
    """`record` with an entry for each LoRA instead of their list. LoRAs that another program wrote stay a list."""
    loras = record.get("loras")
    if not isinstance(loras, list) or not all(isinstance(lora, dict) and "file" in lora for lora in loras):
        return dict(record)
    spread: dict[str, object] = {name: value for name, value in record.items() if name != "loras"}
    for lora in loras:
        name = f"lora {lora['file']}"
        while name in spread:
            name += " again"
        spread[name] = f"{lora.get('scale')} ({lora.get('sha256')})"
    return spread
