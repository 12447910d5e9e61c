"""What may steer a picture beside its prompt: a negative prompt without guidance (NAG), and prompts for regions.

NAG, for the tokens of the picture in every main block, with z the result of attention:

    g = s z_positive + (1 - s) z_negative
    g = g tau / r          for tokens with r = |g|_1 / |z_positive|_1 above tau
    z = alpha g + (1 - alpha) z_positive

Sources: Normalized Attention Guidance, arXiv 2505.21179, with its defaults of tau and alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np

from zimage_ref.formats.tensors import Array

from .arrays import ArrayT
from .positions import caption_ids, padded

NAG_OFF = 1.0  # the scale at which g is z_positive


@dataclass(frozen=True)
class Nag:
    """The three numbers of NAG."""

    scale: float
    tau: float = 3.5  # the most that guidance may multiply the length of a token by
    alpha: float = 0.5  # the share of what is guided


@dataclass(frozen=True)
class Box:
    """A part of a picture, in shares of its width and height."""

    left: float
    top: float
    width: float
    height: float

    def cells(self, rows: int, columns: int) -> Array:
        """(rows, columns) boolean: the cells of a grid whose middle is in the box."""
        down, right = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
        inside_rows = (down >= self.top) & (down < self.top + self.height)
        inside_columns = (right >= self.left) & (right < self.left + self.width)
        return np.asarray(inside_rows[:, None] & inside_columns)

    def seen_from(self, other: Box) -> Box:
        """The same part in shares of `other`. It may lie outside."""
        return Box(
            (self.left - other.left) / other.width, (self.top - other.top) / other.height,
            self.width / other.width, self.height / other.height,
        )  # fmt: skip

    def shift(self, rows: int, columns: int) -> tuple[float, float]:
        """How far the middle of the box is from that of the picture, in rows and columns of a grid."""
        return (self.top + self.height / 2 - 0.5) * rows, (self.left + self.width / 2 - 0.5) * columns


@dataclass(frozen=True)
class Steering(Generic[ArrayT]):
    """How a batch of pictures is steered.

    With boxes, a picture has 1 + n captions: its own, then one for each box. `nag` needs one negative caption for each
    picture.
    """

    boxes: tuple[Box, ...] = ()
    nag: Nag | None = None
    negatives: Sequence[ArrayT] = ()  # features (T_i, cap_feat_dim)

    def seen_from(self, tile: Box) -> Steering[ArrayT]:
        """That of a tile of the pictures."""
        return replace(self, boxes=tuple(box.seen_from(tile) for box in self.boxes))


def region_ids(boxes: Sequence[Box], length: int, rows: int, columns: int) -> Array:
    """Position ids ((1 + n) * T, 3) float32 of 1 + n captions of at most `length` tokens; T is the padded length.

    The caption of a box is moved by the shift of its box. So its tokens see the box as a picture's middle, and a model
    that puts one thing into the middle puts it into the middle of the box.
    """
    own = caption_ids(length).astype(np.float32)  # (T, 3)
    moved = [own + np.array([0, *box.shift(rows, columns)], np.float32) for box in boxes]
    return np.concatenate([own, *moved])


def region_mask(boxes: Sequence[Box], lengths: Array, rows: int, columns: int) -> Array:
    """Which tokens attend to which, (B, 1, S, S) boolean, for S = L image tokens and then 1 + n captions of T tokens.

    All image tokens attend to each other. An image token and the captions of the boxes that it is in attend to each
    other. The first caption belongs to the image tokens that are in no box. A caption attends to itself.
    lengths: (B, 1 + n) tokens of the captions. T is the padded length of the longest; the rest is left out.
    """
    L, B, captions = padded(rows * columns), *lengths.shape
    T = padded(int(lengths.max()))
    members = np.zeros((captions, L), bool)  # which image tokens a caption belongs to
    for i, box in enumerate(boxes, start=1):
        members[i, : rows * columns] = box.cells(rows, columns).ravel()
    members[0] = ~members[1:].any(axis=0)
    mask = np.zeros((B, L + captions * T, L + captions * T), bool)
    mask[:, :L, :L] = True
    for i in range(captions):
        own = slice(L + i * T, L + (i + 1) * T)
        present = np.arange(T) < np.vectorize(padded)(lengths[:, i])[:, None]  # (B, T)
        mask[:, own, own] = present[:, None]
        mask[:, own, :L] = members[i]
        mask[:, :L, own] = members[i][:, None] & present[:, None]
    return mask[:, None]
