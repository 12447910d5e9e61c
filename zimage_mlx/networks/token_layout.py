"""How pictures become tokens, and the places of tokens: rotations and masks for these captions and a picture."""

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


def patches(x: mx.array, p: int) -> mx.array:
    """(B, C, h, w) -> (B, h / p * w / p, p * p * C): squares of p x p, row by row."""
    B, C, h, w = x.shape
    return x.reshape(B, C, h // p, p, w // p, p).transpose(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def fill(tokens: mx.array, pad_token: mx.array, length: int) -> mx.array:
    """Tokens (..., n, D) followed by as many pad tokens (1, D) as `length` needs."""
    missing = length - tokens.shape[-2]
    if not missing:
        return tokens
    padding = mx.broadcast_to(pad_token, (*tokens.shape[:-2], missing, tokens.shape[-1]))
    return mx.concatenate([tokens, padding], axis=-2)
