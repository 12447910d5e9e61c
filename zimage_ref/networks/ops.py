"""The tensor operations of the three networks by their definitions, in the float dtype of the input."""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.shared_moments import SharedMoments

_QUERY_CHUNK = 512  # rows of attention scores in memory at once, so that memory grows linearly with the sequence


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + b over the last axis; weight (out, in)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        e = np.exp(-x)
    e += 1
    return np.divide(x, e, out=e)


def softmax(x: Array) -> Array:
    """Softmax along the last axis, in place."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def layer_norm(x: Array, eps: float) -> Array:
    """(x - mean) / std over the last axis, without weights."""
    normed: Array = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return normed


def group_norm(
    x: Array, weight: Array, bias: Array, groups: int, eps: float, shared: SharedMoments[Array] | None = None
) -> Array:
    """x (B, C, h, w), normalized over each of `groups` groups of neighbouring channels.

    shared: the statistics of a picture that x is a tile of.
    """
    B, C, h, w = x.shape
    parts = x.reshape(B, groups, -1)
    if shared is None:
        y = layer_norm(parts, eps)
    else:
        mean, variance = shared.of(parts.mean(axis=-1, keepdims=True), parts.var(axis=-1, keepdims=True))
        y = (parts - mean) / np.sqrt(variance + eps)
    return y.reshape(B, C, h, w) * weight[:, None, None] + bias[:, None, None]


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(K)) v for q (B, H, S, K) and k, v (B, H, T, K).

    mask: boolean, broadcast to (B, H, S, T). A key with False is left out.
    """
    B, H, S, K = q.shape
    out, scale = np.empty_like(q), q.dtype.type(K**-0.5)
    allowed = None if mask is None else np.broadcast_to(mask, (B, H, S, k.shape[2]))
    for b, h in np.ndindex(B, H):  # the scores of one head fit in the processor's cache
        for start in range(0, S, _QUERY_CHUNK):
            rows = (b, h, slice(start, start + _QUERY_CHUNK))
            scores = (q[rows] * scale) @ k[b, h].T  # (rows, T)
            if allowed is not None:
                scores[~allowed[rows]] = -np.inf
            out[rows] = softmax(scores) @ v[b, h]
    return out


def conv2d(x: Array, weight: Array, bias: Array, stride: int = 1) -> Array:
    """x (B, C, h, w) convolved with weight (O, C, kh, kw), without padding: one matrix product per kernel element."""
    B, C = x.shape[:2]
    outputs, _, kh, kw = weight.shape
    rows, columns = (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    y: Array = bias[:, None]
    for i in range(kh):
        for j in range(kw):
            tap = x[:, :, i : i + rows * stride : stride, j : j + columns * stride : stride]
            y = y + weight[:, :, i, j] @ tap.reshape(B, C, rows * columns)
    return np.asarray(y.reshape(B, outputs, rows, columns))


def pad_hw(x: Array, top_left: int, bottom_right: int) -> Array:
    """x with zeros added around its last two axes."""
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + [(top_left, bottom_right)] * 2)
