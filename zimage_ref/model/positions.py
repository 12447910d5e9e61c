"""Positions of tokens: padded lengths, and the position ids of RoPE on three axes (frame, row, column).

A caption of T tokens is padded to a multiple of 32. Its tokens, padding included, have the positions 1, 2, 3 ... on the
first axis. The picture follows: every image token has padded(T) + 1 on the first axis, then its row and its column.
The padding of the image has the position (0, 0, 0).
Source: patchify_and_embed and _pad_with_ids in transformer_z_image.py of diffusers.
"""

from __future__ import annotations

import numpy as np

from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array

from .config import TransformerConfig

SEQUENCE_MULTIPLE = 32  # image and caption are each padded to this; SEQ_MULTI_OF in the official file


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 32."""
    return -(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def caption_ids(length: int) -> Array:
    """Position ids (padded(length), 3) int32 of a caption of `length` tokens."""
    ids = np.zeros((padded(length), 3), np.int32)
    ids[:, 0] = np.arange(1, len(ids) + 1)
    return ids


def image_ids(rows: int, columns: int, caption_length: int) -> Array:
    """Position ids (padded(rows * columns), 3) int32 of a picture that follows a caption of `caption_length` tokens."""
    ids = np.zeros((padded(rows * columns), 3), np.int32)
    picture = ids[: rows * columns]
    picture[:, 0] = padded(caption_length) + 1
    picture[:, 1] = np.repeat(np.arange(rows), columns)
    picture[:, 2] = np.tile(np.arange(columns), rows)
    return ids


def rope_angles(ids: Array, config: TransformerConfig) -> Array:
    """Angles (n, K / 2) float32 by which RoPE rotates each pair of channels of a head, for ids (n, 3).

    The angle is rounded to float32 before its cosine is computed, as in the official tables.
    Raises ConfigError if a position is beyond axes_lens.
    """
    parts = []
    for axis, (width, length) in enumerate(zip(config.axes_dims, config.axes_lens, strict=True)):
        position = ids[:, axis]
        if position.max(initial=0) >= length:
            raise ConfigError(
                f"position {position.max()} on axis {axis} is beyond the model's {length}: use a shorter prompt "
                f"or a smaller picture"
            )
        frequency = 1.0 / config.rope_theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
        parts.append(np.outer(position, frequency).astype(np.float32))
    return np.concatenate(parts, axis=-1)  # (n, K / 2)
