"""The gradient of attention by MLX's fused kernel, on machines that have one.

MLX has such a kernel for NVIDIA GPUs, 16-bit numbers and lengths that are multiples of 128. So queries, keys and values
are filled up to such a length, and the keys that were added are masked. If only the queries are filled up, the kernel
reads beyond the keys. MLX reads an additive mask with one row as it is. It writes a boolean mask out for every head and
query. On other machines its own gradient holds all scores at once; `ops.attention_gradient` says what is done there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

_TILE = 128  # the fused gradient takes lengths that are multiples of this
_MASKED = -30000.0  # added to a score that must not count: finite in float16, and its exponential is 0
_left_out: list[bool] = []  # not empty within `without_fused_gradient`
_KERNEL = "ScaledDotProductAttentionVJP"  # MLX's name of the fused gradient


def fused_gradient_exists(heads: int, width: int, dtype: mx.Dtype) -> bool:
    """Whether MLX has a fused gradient of masked attention for this many heads of this width on this device."""
    return not _left_out and _asked(heads, width, dtype, str(mx.default_device()))


@contextmanager
def without_fused_gradient() -> Iterator[None]:
    """A block in which no fused gradient counts as there: cuDNN's sums in another order each time."""
    _left_out.append(True)
    try:
        yield
    finally:
        _left_out.pop()


@cache
def _asked(heads: int, width: int, dtype: mx.Dtype, _device: str) -> bool:
    """Looks into the graph that MLX makes for a short gradient, and computes nothing.

    _device: its name. Devices of MLX that are equal have unequal hashes, so they are no keys of a cache.
    """
    q = mx.zeros((1, heads, _TILE, width), dtype)
    dq = _vjp(q, q, q, q, mx.zeros((1, 1, 1, _TILE), dtype))[0]
    graph = io.StringIO()
    mx.export_to_dot(graph, dq)
    return _KERNEL in graph.getvalue()


def fused_gradient(
    q: mx.array, k: mx.array, v: mx.array, d_out: mx.array, mask: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q, k, v (B, H, S, K) of attention, whose output has the gradient d_out (B, H, S, K).

    mask: boolean (B or 1, 1, 1, S), True is attended, or None. The forward pass is computed again: MLX gives nobody
    the statistics of its softmax.
    """
    S = q.shape[2]
    more = -S % _TILE
    added = None if mask is None else additive(mask, q.dtype)
    if more:
        q, k, v, d_out = (mx.pad(a, [(0, 0), (0, 0), (0, more), (0, 0)]) for a in (q, k, v, d_out))
        added = mx.zeros((1, 1, 1, S), q.dtype) if added is None else added
        added = mx.pad(added, [(0, 0), (0, 0), (0, 0), (0, more)], constant_values=_MASKED)  # (B or 1, 1, 1, S + more)
    dq, dk, dv = _vjp(q, k, v, d_out, added)
    return dq[:, :, :S], dk[:, :, :S], dv[:, :, :S]


def additive(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """A boolean mask as numbers to add to scores, of the mask's shape: 0 if attended, else far below all scores."""
    return mx.where(mask, mx.array(0.0, dtype), mx.array(_MASKED, dtype))


def _vjp(q: mx.array, k: mx.array, v: mx.array, d_out: mx.array, added: mx.array | None) -> list[mx.array]:
    """MLX's gradients of q, k, v."""
    scale = q.shape[-1] ** -0.5

    def attention(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=added)]

    return mx.vjp(attention, [q, k, v], [d_out])[1]
