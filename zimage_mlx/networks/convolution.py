"""The 3x3 convolutions of the autoencoder, at once or in strips of rows. Arrays are (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .strips import Strips

Finish = Callable[[mx.array, int, int], mx.array]  # see `convolve`


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


@dataclass(frozen=True)
class Source:
    """What a convolution takes, made of x some rows at a time: x itself, activated, or at double size."""

    x: mx.array  # (B, h, w, C)
    prepare: Callable[[mx.array], mx.array] | None = None  # makes it of some rows of x
    factor: int = 1  # how many rows, and columns, `prepare` makes of one

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, W, C) of all that can be made."""
        B, h, w, C = self.x.shape
        return B, self.factor * h, self.factor * w, C

    def rows(self, low: int, high: int) -> mx.array:
        """The rows from `low` to before `high`, (B, high - low, W, C)."""
        part = self.x[:, low // self.factor : -(-high // self.factor)]
        if self.prepare:
            part = self.prepare(part)
        return part[:, low % self.factor :][:, : high - low]


def convolve(
    conv: nn.Conv2d, source: Source, strips: Strips | None, finish: Finish | None = None, norm_follows: bool = True
) -> mx.array:
    """The 3x3 convolution of `source`, (B, H, W, C), with strips some rows at a time.

    finish: (y, top, bottom) -> what becomes of y, the rows from `top` to before `bottom` of the convolution.
    """
    B, H, W, inputs = source.shape
    if strips is None:
        whole: mx.array = conv(source.rows(0, H))
        return finish(whole, 0, H) if finish else whole

    def make(top: int, bottom: int) -> mx.array:
        part = source.rows(max(top - 1, 0), min(bottom + 1, H))  # the kernel reaches one row beyond
        above, below = int(top == 0), int(bottom == H)
        if above != below:
            part = mx.pad(part, [(0, 0), (above, below), (0, 0), (0, 0)])
        y: mx.array = mx.conv2d(part, conv.weight, padding=(above * below, 1)) + conv.bias
        return finish(y, top, bottom) if finish else y

    outputs = len(conv.weight)
    made = source.x.itemsize * (inputs + outputs)  # bytes for each pixel, for a while
    return strips.assemble(make, (B, H, W, outputs), made, norm_follows)


def doubled(x: mx.array) -> mx.array:
    """Each pixel of (B, H, W, C) four times: (B, 2 H, 2 W, C)."""
    B, H, W, C = x.shape
    return mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
