"""Attention, rotary embedding and RMS norm: MLX's fused kernels forward, gradients that save memory and passes.

MLX's own gradient of its fused attention materializes all scores at once, unless it has a kernel for it; see
`fused_attention`. Without one the queries go through in chunks of rows here, so memory grows linearly with the
sequence. MLX's gradient of the RMS norm always makes that of the weight, too;
here that is left to lazy evaluation. Source: FlashAttention-2, arXiv 2307.08691, section 3.1 (backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, ParamSpec, cast

import mlx.core as mx
import mlx.nn as nn

from zimage_mlx import device

from . import fused_attention
from .compiled import fused
from .running import Run, run_directly

P = ParamSpec("P")
Rotation = tuple[mx.array, mx.array]  # cosines and sines (B, S, 1, K) float32, each twice; see `rotation_tables`

_QUERY_ROWS = 1536  # scores held at once by the backward pass: B x H x these x S
_FEWER_ROWS = 768  # the same in pieces: a step takes 3 % longer at 1024 x 1024, and 0.9 GB less
_MOST_SCORES = 1 << 32  # bytes, at most: offsets of 32 bits
_LONGEST_KERNEL = 1.5e12  # operations of one kernel on Metal: macOS ends a kernel that takes about 5 s


class QKV(NamedTuple):
    """Queries, keys and values (B, H, S, K) of all heads, or their gradients."""

    q: mx.array
    k: mx.array
    v: mx.array


def with_gradient(
    function: Callable[P, mx.array],
    gradient: Callable[[Sequence[mx.array], mx.array, mx.array], Sequence[mx.array]],
) -> Callable[P, mx.array]:
    """`function` of several arrays, differentiated by `gradient` instead of by MLX.

    gradient: (inputs, gradient of the output, output) -> gradients of the inputs.
    """
    custom = mx.custom_function(function)
    custom.vjp(gradient)
    return cast("Callable[P, mx.array]", custom)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """softmax(q k^T / sqrt(K)) v for q, k, v (B, H, S, K).

    mask: boolean, broadcast to (B, H, S, S), True is attended.
    """
    scale = q.shape[-1] ** -0.5

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        outputs = []
        for part in query_chunks(q.shape):
            allowed = mask[:, :, part] if mask is not None and mask.shape[2] > 1 else mask
            rows = q if part == slice(None) else q[:, :, part]
            if allowed is not None and device.on_gpu() and not device.on_metal():
                allowed = fused_attention.additive(allowed, q.dtype)  # a boolean one would be written out for all heads
            outputs.append(mx.fast.scaled_dot_product_attention(rows, k, v, scale=scale, mask=allowed))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    def backward(inputs: Sequence[mx.array], d_out: mx.array, out: mx.array) -> QKV:
        return attention_gradient(QKV(*inputs), d_out, out, mask)

    return with_gradient(forward, backward)(q, k, v)


def query_chunks(shape: Sequence[int]) -> list[slice]:
    """The rows of queries (B, H, S, K) that attention to as many keys takes at a time: all of them, save on Metal.

    There, a picture of 2048 x 2048 would be one kernel of 4e12 operations, 8e12 with guidance: seconds on an M1.
    """
    B, H, S, K = shape
    return _row_chunks(S, 4 * B * H * S * S * K)


def in_rows(layer: Callable[[mx.array], mx.array], x: mx.array, outputs: int) -> mx.array:
    """layer(x), for a Linear layer of `outputs` and x (B, S, D): of all tokens at once, save on Metal.

    There, the feed-forward of two pictures of 2048 x 2048 would be one kernel of 2.6e12 operations.
    """
    B, S, D = x.shape
    chunks = _row_chunks(S, 2 * B * S * D * outputs)
    return layer(x) if len(chunks) == 1 else mx.concatenate([layer(x[:, chunk]) for chunk in chunks], axis=1)


def _row_chunks(rows: int, operations: int) -> list[slice]:
    """All `rows` of a kernel of this many operations, or as many parts as it needs to be short enough on Metal."""
    return row_parts(rows, math.ceil(operations / _LONGEST_KERNEL) if device.on_metal() else 1)


def row_parts(rows: int, count: int) -> list[slice]:
    """`rows` in at most `count` parts, as equal as can be."""
    if count == 1:
        return [slice(None)]
    size = -(-rows // count)
    return [slice(start, start + size) for start in range(0, rows, size)]


def attention_gradient(
    inputs: QKV, d_out: mx.array, out: mx.array, mask: mx.array | None, run: Run = run_directly
) -> QKV:
    """Gradients of `inputs`. `attention` made `out` (B, H, S, K) from them; d_out is the gradient of `out`.

    run: how a chunk of rows is run; see `running.RunInPieces`.
    """
    q, k, v = inputs
    B, H, S, K = q.shape
    one_row = mask is None or mask.shape[2] == 1
    if one_row and fused_attention.fused_gradient_exists(H, K, q.dtype):
        return QKV(*run(fused_attention.fused_gradient, q, k, v, d_out, mask))
    most = _QUERY_ROWS if run is run_directly else min(_QUERY_ROWS, _FEWER_ROWS)
    chunks = max(-(-S // most), B * H * S * S * q.dtype.size // _MOST_SCORES + 1)
    d_wide, v_wide_t = run(_widened, d_out, out, v)
    if chunks == 1:
        return run(_chunk_gradient, q, k, v_wide_t, d_wide, mask)
    dq, sums = [], (mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32))
    for part in row_parts(S, chunks):
        allowed = mask[:, :, part] if mask is not None and mask.shape[2] > 1 else mask
        rows_dq, sums = run(_chunk_added, sums, q[:, :, part], k, v_wide_t, d_wide[:, :, part], allowed)
        dq.append(rows_dq)
    dk, dv = sums
    return QKV(mx.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype))


def _widened(d_out: mx.array, out: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """d_out (B, H, S, K + 8) and v^T (B, H, K + 8, S) whose product is d_out v^T - sum(d_out * out).

    The softmax's gradient subtracts that sum from every score of a row. As columns of the product it needs no pass of
    its own over the scores. It takes two columns, the sum in the dtype of v and the rounding error of that. Six columns
    of zeros make it eight, because products are slow on widths that are no multiple of eight.
    """
    delta = -mx.sum(d_out.astype(mx.float32) * out.astype(mx.float32), axis=-1, keepdims=True)  # (B, H, S, 1)
    coarse = delta.astype(v.dtype)
    columns = [coarse, (delta - coarse).astype(v.dtype), mx.zeros((*delta.shape[:-1], 6), v.dtype)]
    d_wide = mx.concatenate([d_out, *columns], axis=-1)
    return d_wide, mx.concatenate([v, mx.ones((*v.shape[:-1], 8), v.dtype)], axis=-1).swapaxes(-1, -2)


def _chunk_added(
    sums: tuple[mx.array, mx.array],
    q: mx.array,
    k: mx.array,
    v_wide_t: mx.array,
    d_wide: mx.array,
    mask: mx.array | None,
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """The gradient of some rows of q; and `sums`, float32, of k's and v's gradients, with what these rows add."""
    dq, dk, dv = _chunk_gradient(q, k, v_wide_t, d_wide, mask)
    return dq, (sums[0] + dk, sums[1] + dv)


def _chunk_gradient(q: mx.array, k: mx.array, v_wide_t: mx.array, d_wide: mx.array, mask: mx.array | None) -> QKV:
    """The gradients that come from some rows of q, of these and of all k and v. For the other inputs see `_widened`."""
    scale = q.shape[-1] ** -0.5
    q_scaled = q * scale
    scores = q_scaled @ k.swapaxes(-1, -2)  # (B, H, rows, S)
    if mask is not None:
        scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
    p = mx.softmax(scores, axis=-1, precise=True)
    d_scores = p * (d_wide @ v_wide_t)
    dv = p.swapaxes(-1, -2) @ d_wide[..., : q.shape[-1]]
    return QKV((d_scores @ k) * scale, d_scores.swapaxes(-1, -2) @ q_scaled, dv)


def rotation_tables(angles: mx.array) -> Rotation:
    """The tables that `rotate` takes, of angles (B, S, K / 2) float32; computed at once, since they are kept."""
    tables = tuple(mx.repeat(f(angles), 2, axis=-1)[:, :, None] for f in (mx.cos, mx.sin))
    mx.eval(tables)
    return tables[0], tables[1]


def rotate(x: mx.array, tables: Rotation) -> mx.array:
    """RoPE on neighbouring channels of x (B, S, H, K), in float32 whatever x is; the result has the dtype of x."""
    return _turn(x, *tables, _quarter_turn(x.shape[-1], x.dtype))


@cache
def _quarter_turn(width: int, dtype: mx.Dtype) -> mx.array:
    """The matrix (K, K) that takes each pair (a, b) to (-b, a). Exact in any dtype, and a product beats a shuffle."""
    rows = [[0.0] * width for _ in range(width)]
    for a in range(0, width, 2):
        rows[a][a + 1], rows[a + 1][a] = 1.0, -1.0
    return mx.array(rows, dtype)


def _turned(x: mx.array, cos: mx.array, sin: mx.array, quarter: mx.array) -> mx.array:
    return (x.astype(mx.float32) * cos + (x @ quarter).astype(mx.float32) * sin).astype(x.dtype)


def _turned_back(inputs: Sequence[mx.array], d: mx.array, _: mx.array) -> Sequence[mx.array]:
    """A rotation's transpose is the rotation the other way; the tables are constants."""
    _, cos, sin, quarter = inputs
    return _turn(d, cos, sin, quarter.T), *(mx.zeros_like(table) for table in (cos, sin, quarter))


_turn = with_gradient(_turned, _turned_back)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis."""

    def forward(x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, eps)

    def backward(inputs: Sequence[mx.array], d: mx.array, _: mx.array) -> Sequence[mx.array]:
        x, weight = inputs
        normed, (dx,) = mx.vjp(lambda x: [mx.fast.rms_norm(x, None, eps)], [x], [d * weight])
        d_weight = mx.sum(d.astype(mx.float32) * normed[0], axis=tuple(range(x.ndim - 1)))
        return dx, d_weight.astype(weight.dtype)

    return with_gradient(forward, backward)(x, weight)


@fused
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x). That of mlx.nn is compiled everywhere, which on a CPU needs a C++ compiler at run time."""
    return x * mx.sigmoid(x)


@fused
def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """silu(gate) * value, in one kernel."""
    return gate * mx.sigmoid(gate) * value


class SiLU(nn.Module):
    """`silu` as a layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return silu(x)
