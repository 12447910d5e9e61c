"""The conditioning of pictures that are steered: captions of regions, and negative captions for NAG. In NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.positions import image_ids, rope_angles
from zimage_ref.model.steering import Box, Steering, region_ids, region_mask

from .steering import Contrast
from .transformer import Conditioning, Transformer


def condition_steered(
    model: Transformer, captions: Sequence[Array], h: int, w: int, steering: Steering[Array]
) -> Conditioning:
    """As `Transformer.condition`. captions: 1 + n for each picture, if there are n boxes."""
    own = _of_regions(model, captions, h, w, steering.boxes) if steering.boxes else model.condition(captions, h, w)
    if steering.nag is None:
        return own
    other = model.condition(steering.negatives, h, w)
    return replace(
        own,
        caption=np.concatenate([own.caption, other.caption], axis=1),  # (B, T + N, D)
        mask=Contrast(steering.nag, own.plain_mask, other.plain_mask, other.rotation),
    )


def _of_regions(model: Transformer, captions: Sequence[Array], h: int, w: int, boxes: Sequence[Box]) -> Conditioning:
    """Every caption has the frames from 1 on. The image follows the longest."""
    config = model.config
    rows, columns = h // config.patch_size, w // config.patch_size
    lengths = np.array([len(caption) for caption in captions]).reshape(-1, 1 + len(boxes))
    B, longest = len(lengths), int(lengths.max())
    refined = model.condition(captions, h, w).caption  # (B * (1 + n), T, D)
    caption = model.rotation(rope_angles(region_ids(boxes, longest, rows, columns), config))  # ((1 + n) * T, K / 2)
    image = model.rotation(rope_angles(image_ids(rows, columns, longest), config))  # (L, K / 2)
    every = np.concatenate([image, caption])  # (S, K / 2)
    return Conditioning(
        caption=refined.reshape(B, -1, config.dim),  # (B, (1 + n) * T, D)
        image_rotation=np.repeat(image[None], B, axis=0),
        rotation=np.repeat(every[None], B, axis=0),
        mask=region_mask(boxes, lengths, rows, columns),
    )
