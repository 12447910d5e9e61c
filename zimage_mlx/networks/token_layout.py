"""The places of a batch's tokens: the rotations and masks that captions of these lengths and a picture need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.positions import caption_ids, image_ids, padded, rope_angles

from .ops import Rotation, rotation_tables
from .steering import Mask


@dataclass(frozen=True)
class TokenLayout:
    """The places of a batch's tokens, and which of them are there."""

    image_rotation: Rotation  # of the L image tokens
    caption_rotation: Rotation  # of the T caption tokens
    rotation: Rotation  # of all S tokens, image then caption
    caption_mask: mx.array | None  # (B, 1, 1, T) boolean, False where a shorter caption was filled up; None: all True
    mask: Mask  # (B, 1, 1, S), the same for all tokens; other forms if pictures are steered

    @property
    def plain_mask(self) -> mx.array | None:
        """The mask, if there is no negative caption beside the prompt's."""
        return None if isinstance(self.mask, tuple) else self.mask

    @classmethod
    def of(cls, config: TransformerConfig, caption_lengths: Sequence[int], h: int, w: int) -> TokenLayout:
        """That of a batch of captions of these lengths, each before latents of h x w."""
        rows, columns = h // config.patch_size, w // config.patch_size
        lengths = [padded(n) for n in caption_lengths]
        T, L = max(lengths), padded(rows * columns)
        caption_angles = mx.array(rope_angles(caption_ids(T), config))
        caption = mx.broadcast_to(caption_angles, (len(lengths), *caption_angles.shape))  # (B, T, K / 2)
        image = mx.stack([mx.array(rope_angles(image_ids(rows, columns, n), config)) for n in lengths])  # (B, L, K / 2)
        mask = None
        if min(lengths) < T:
            ends = mx.array(lengths)[:, None, None, None] + L
            mask = mx.arange(L + T) < ends  # (B, 1, 1, S)
        both = mx.concatenate([image, caption], axis=1)  # (B, S, K / 2)
        return cls(
            image_rotation=rotation_tables(image),
            caption_rotation=rotation_tables(caption),
            rotation=rotation_tables(both),
            caption_mask=None if mask is None else mask[..., L:],
            mask=mask,
        )
