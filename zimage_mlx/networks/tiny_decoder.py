"""The decoder of TAEF1 on MLX, for previews. Source: DecoderTiny of diffusers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.tiny_decoder import LIMIT, layers


class Double(nn.Module):
    """(B, h, w, C) -> (B, 2 h, 2 w, C): each pixel four times."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


class Block(nn.Module):
    """Three convolutions beside the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = [first, nn.ReLU(), second, nn.ReLU(), third]

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for layer in self.conv:
            y = layer(y)
        return mx.maximum(y + x, 0)


class TinyDecoder(nn.Module):
    """Convolutions and ReLUs."""

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        make = {
            "conv": lambda: nn.Conv2d(latents, width, 3, padding=1), "relu": nn.ReLU, "double": Double,
            "block": lambda: Block(width), "bare": lambda: nn.Conv2d(width, width, 3, padding=1, bias=False),
            "last": lambda: nn.Conv2d(width, 3, 3, padding=1),
        }  # fmt: skip
        self.layers = [make[kind]() for kind in layers()]

    def __call__(self, x: mx.array) -> mx.array:
        """Latents (B, C, h, w) as they are denoised -> pixels (B, 3, 8 h, 8 w), roughly in [-1, 1]."""
        x = (mx.tanh(x / LIMIT) * LIMIT).transpose(0, 2, 3, 1)  # (B, h, w, C)
        for layer in self.layers:
            x = layer(x)
        return (2 * x - 1).transpose(0, 3, 1, 2)
