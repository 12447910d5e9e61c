"""Attention of the NumPy transformer to a positive and a negative caption, by NAG.

For the formula see `model.steering`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.steering import Nag

# Queries, keys and values (B, n, H, K) of some tokens, their rotation and mask -> what they attend to, (B, n, D)
Attend = Callable[[Sequence[Array], Array, "Array | None"], Array]


@dataclass(frozen=True)
class Contrast:
    """The mask of a sequence with two captions: image (L), positive caption (T), negative caption (N)."""

    nag: Nag
    positive: Array | None  # mask of image and positive caption, (B, 1, 1 or L + T, L + T)
    negative: Array | None  # mask of image and negative caption, (B, 1, 1, L + N)
    rotation: Array  # of image and negative caption, (B, L + N, K / 2) complex


def attend_in_contrast(qkv: Sequence[Array], rotation: Array, contrast: Contrast, attend: Attend) -> Array:
    """What all tokens attend to, (B, L + T + N, D). Each caption sees the image and itself, the image sees both.

    qkv: (B, L + T + N, H, K) each. rotation: of image and positive caption.
    """
    S, tokens = rotation.shape[1], qkv[0].shape[1]
    L = S + contrast.rotation.shape[1] - tokens
    image_and_negative = np.r_[0:L, S:tokens]
    positive = attend([a[:, :S] for a in qkv], rotation, contrast.positive)
    negative = attend([a[:, image_and_negative] for a in qkv], contrast.rotation, contrast.negative)
    guided = guide(positive[:, :L], negative[:, :L], contrast.nag)
    return np.concatenate([guided, positive[:, L:], negative[:, L:]], axis=1)


def guide(positive: Array, negative: Array, nag: Nag) -> Array:
    """NAG's result for tokens (B, L, D) that attended to the positive and to the negative caption."""
    away = nag.scale * positive + (1 - nag.scale) * negative
    growth = np.abs(away).sum(-1, keepdims=True) / np.abs(positive).sum(-1, keepdims=True)
    limited = np.where(growth > nag.tau, away * (nag.tau / growth), away)
    return np.asarray(nag.alpha * limited + (1 - nag.alpha) * positive, positive.dtype)
