"""The decoder of TAEF1 in NumPy, for previews. Source: DecoderTiny of diffusers."""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.tiny_decoder import BLOCK_CONVS, LIMIT, layers

from .ops import conv2d, pad_hw
from .weights import Weights


class TinyDecoder:
    """Convolutions and ReLUs."""

    def __init__(self, weights: Weights) -> None:
        self.w = weights

    def __call__(self, x: Array) -> Array:
        """Latents (B, C, h, w) as they are denoised -> pixels (B, 3, 8 h, 8 w), roughly in [-1, 1]."""
        x = np.tanh(x / LIMIT) * LIMIT
        for i, kind in enumerate(layers()):
            name = f"layers.{i}"
            if kind == "relu":
                x = np.maximum(x, 0)
            elif kind == "double":
                x = x.repeat(2, axis=2).repeat(2, axis=3)
            elif kind == "block":
                x = self._block(f"{name}.conv", x)
            else:
                x = self._convolved(name, x)
        return 2 * x - 1

    def _block(self, name: str, x: Array) -> Array:
        y = x
        for j in BLOCK_CONVS:
            y = self._convolved(f"{name}.{j}", np.maximum(y, 0) if j else y)
        return np.asarray(np.maximum(y + x, 0))

    def _convolved(self, name: str, x: Array) -> Array:
        weight = self.w[f"{name}.weight"]
        bias = self.w[f"{name}.bias"] if f"{name}.bias" in self.w else np.zeros(len(weight), weight.dtype)
        return conv2d(pad_hw(x, 1, 1), weight, bias)
