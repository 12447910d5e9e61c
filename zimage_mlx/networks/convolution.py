"""The 3x3 convolutions of the autoencoder, at once or in strips of rows. Arrays are (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .strips import Strips

Finish = Callable[[mx.array, int, int], mx.array]  # see `convolve`


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size.

    On Metal, MLX makes a large one by Winograd's method, F(6x6, 3x3), and stores its products in the network's dtype.
    In bfloat16 its error is ten times that of a plain sum, or more. So the weights are mirrored there as they are
    loaded, and MLX is asked for a flipped convolution: it makes these the direct way. The result is the same.
    Source: conv.cpp of MLX 0.31 to 0.32, `dispatch_conv_2D_gpu`.
    """

    _mirrored = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def mirror(self) -> None:
        """Turns the weights (O, 3, 3, I) by half a turn, and says so to each convolution from here on."""
        self.weight = mx.contiguous(self.weight[:, ::-1, ::-1])
        mx.eval(self.weight)
        self._mirrored = True

    def __call__(self, x: mx.array) -> mx.array:
        return self.padded(x, (1, 1))

    def padded(self, x: mx.array, padding: tuple[int, int]) -> mx.array:
        """The convolution of x (B, H, W, I) with `padding` rows and columns of zeros on either side."""
        if self._mirrored:
            y: mx.array = mx.conv_general(x, self.weight, padding=padding, flip=True)
        else:
            y = mx.conv2d(x, self.weight, padding=padding)
        return y + self.bias


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
    conv: Conv3x3, source: Source, strips: Strips | None, finish: Finish | None = None, norm_follows: bool = True
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
        y = conv.padded(part, (above * below, 1))
        return finish(y, top, bottom) if finish else y

    outputs = len(conv.weight)
    made = source.x.itemsize * (inputs + outputs)  # bytes for each pixel, for a while
    return strips.assemble(make, (B, H, W, outputs), made, norm_follows)


def doubled(x: mx.array) -> mx.array:
    """Each pixel of (B, H, W, C) four times: (B, 2 H, 2 W, C)."""
    B, H, W, C = x.shape
    return mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
