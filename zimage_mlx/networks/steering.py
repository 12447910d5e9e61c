"""Attention of the transformer on MLX to a positive and a negative caption, by NAG.

For the formula see `zimage_ref.model.steering`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx

from .ops import QKV, Rotation

# For a sequence of image (L), positive caption (T) and negative caption (N): scale, tau and alpha; the mask of image
# and positive caption; rotation and mask of image and negative caption. A plain tuple, as compiled programs take it
Contrast: TypeAlias = tuple[tuple[float, float, float], "mx.array | None", Rotation, "mx.array | None"]
# Boolean, True is attended: (B, 1, 1, S), or (B, 1, S, S) with regions. None: all is attended
Mask: TypeAlias = "mx.array | Contrast | None"


def attend_in_contrast(qkv: QKV, rotation: Rotation, contrast: Contrast, attend: Callable[..., mx.array]) -> mx.array:
    """What all tokens attend to, (B, L + T + N, D). Each caption sees the image and itself, the image sees both.

    qkv: projected, (B, L + T + N, H, K) each. rotation: of image and positive caption.
    attend: (q, k, v, rotation, mask) -> (B, n, D).
    """
    numbers, own_mask, other_rotation, other_mask = contrast
    S = rotation[0].shape[1]
    L = S + other_rotation[0].shape[1] - qkv.q.shape[1]
    own = attend(*(a[:, :S] for a in qkv), rotation, own_mask)
    other = attend(*(mx.concatenate([a[:, :L], a[:, S:]], axis=1) for a in qkv), other_rotation, other_mask)
    return mx.concatenate([guide(own[:, :L], other[:, :L], numbers), own[:, L:], other[:, L:]], axis=1)


def guide(own: mx.array, other: mx.array, numbers: tuple[float, float, float]) -> mx.array:
    """NAG's result for tokens (B, L, D) that attended to the positive and to the negative caption; sums in float32."""
    scale, tau, alpha = numbers
    wide = own.astype(mx.float32)
    guided = wide + (scale - 1) * (wide - other.astype(mx.float32))
    lengths = [mx.sum(mx.abs(a), axis=-1, keepdims=True) for a in (wide, guided)]
    shrink = mx.minimum(1.0, tau * lengths[0] / lengths[1])
    return (wide + alpha * (guided * shrink - wide)).astype(own.dtype)
