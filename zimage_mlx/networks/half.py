"""Blocks in float16: factors that keep the values of the real model within its range, which ends at 65504.

In bfloat16 the attention of Z-Image puts out up to 1.4e5, the product inside its feed-forward reaches 3e5, and the
feed-forward puts out up to 1e6 (comments in mflux's Z-Image transformer). So a block in float16 computes with smaller
numbers, and only its matrices are float16. The stream between the blocks is float32.

    attention(c h) = c attention(h)                    queries and keys are normed, values are linear
    w2(silu(w1 h) * (w3 c h)) = c feed_forward(h)      c is a power of two: it rounds nothing

An RMS norm follows each of them and takes the factor out again: norm(c y) with c^2 eps is norm(y) with eps.
In other dtypes the factor is 1, and nothing is computed for it.
"""

from __future__ import annotations

import mlx.core as mx

_ATTENTION, _FEED_FORWARD = 1 / 8, 1 / 64  # of mflux's 1/4 and 1/32, a half: prompts and LoRAs differ


def stream_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of the stream between blocks whose matrices are of `dtype`."""
    return mx.float32 if dtype == mx.float16 else dtype


def attention_factor(dtype: mx.Dtype) -> float:
    """The factor of the input of attention, and so of its values and its output."""
    return _ATTENTION if dtype == mx.float16 else 1.0


def feed_forward_factor(dtype: mx.Dtype) -> float:
    """The factor of the input of w3, and so of the product inside the feed-forward and of its output."""
    return _FEED_FORWARD if dtype == mx.float16 else 1.0


def narrowed(x: mx.array, dtype: mx.Dtype, factor: float = 1.0) -> mx.array:
    """x * factor in `dtype`, which is x itself unless the matrices are narrower than the stream."""
    scaled = x if factor == 1 else x * factor
    return scaled if scaled.dtype == dtype else scaled.astype(dtype)
