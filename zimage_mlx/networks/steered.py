"""The conditioning of pictures that are steered: captions of regions, and negative captions for NAG. On MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from zimage_ref.model.positions import image_ids, rope_angles
from zimage_ref.model.steering import Box, Steering, region_ids, region_mask

from .ops import Rotation, rotation_tables
from .transformer import Conditioning, Transformer


def condition_steered(
    model: Transformer, captions: Sequence[mx.array], h: int, w: int, steering: Steering[mx.array]
) -> Conditioning:
    """As `Transformer.condition`. captions: 1 + n for each picture, if there are n boxes."""
    own = _of_regions(model, captions, h, w, steering.boxes) if steering.boxes else model.condition(captions, h, w)
    if (nag := steering.nag) is None:
        return own
    other = model.condition(steering.negatives, h, w)
    numbers = (nag.scale, nag.tau, nag.alpha)
    contrast = numbers, own.layout.plain_mask, other.layout.rotation, other.layout.plain_mask
    tokens = mx.concatenate([own.caption, other.caption], axis=1)  # (B, T + N, D)
    return Conditioning(tokens, replace(own.layout, mask=contrast))


def _of_regions(model: Transformer, captions: Sequence[mx.array], h: int, w: int, boxes: Sequence[Box]) -> Conditioning:
    """Every caption has the frames from 1 on. The image follows the longest."""
    config = model.config
    rows, columns = h // config.patch_size, w // config.patch_size
    lengths = np.array([len(caption) for caption in captions]).reshape(-1, 1 + len(boxes))
    B, longest = len(lengths), int(lengths.max())
    refined = model.condition(captions, h, w)  # caption: (B * (1 + n), T, D)
    image = rope_angles(image_ids(rows, columns, longest), config)  # (L, K / 2)
    caption = rope_angles(region_ids(boxes, longest, rows, columns), config)  # ((1 + n) * T, K / 2)
    layout = replace(
        refined.layout,
        image_rotation=_tables(image, B),
        rotation=_tables(np.concatenate([image, caption]), B),
        mask=mx.array(region_mask(boxes, lengths, rows, columns)),
    )
    return Conditioning(refined.caption.reshape(B, -1, config.dim), layout)  # (B, (1 + n) * T, D)


def _tables(angles: np.ndarray, batch: int) -> Rotation:
    """Those of angles (S, K / 2), the same for each picture."""
    return rotation_tables(mx.broadcast_to(mx.array(angles), (batch, *angles.shape)))
