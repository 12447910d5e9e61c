"""The gradient of a transformer's block in NumPy, written out by the chain rule: what MLX's is compared with.

It follows `transformer.Block` step by step. Nothing is saved or recomputed cleverly. For the letters in shape comments
see `zimage_ref`.
"""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import QK_NORM_EPS

from .ops import attention, linear, silu, softmax
from .transformer import Block, rotate

LinearGradients = dict[str, tuple[Array, Array]]  # by layer: its input (B, S, in), the gradient of its output


def block_gradient(
    block: Block, x: Array, rotation: Array, adaln: Array | None, d_out: Array
) -> tuple[Array, LinearGradients]:
    """The gradient of x (B, S, D), and what the gradient of each Linear layer's weight is made of.

    d_out: gradient of the block's output. That of a weight W (out, in) would be d^T x over all rows; a LoRA B A beside
    W has B^T d^T x and d^T x A^T.
    """
    scale_a, gate_a, scale_f, gate_f = block.modulation(adaln)
    layers = {name: block.w[f"{name}.weight"] for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}
    w1, w2, w3 = layers.values()
    out_weight = block.w["attention.to_out.0.weight"]
    scaled, (q, k, v), attended = _attended(block, x, rotation, scale_a)
    out = linear(attended, out_weight)
    middle = x + gate_a * block.norm("attention_norm2", out)

    expanded = block.norm("ffn_norm1", middle) * scale_f
    gate, value = linear(expanded, w1), linear(expanded, w3)  # (B, S, F)
    product = silu(gate) * value
    d_contracted = _norm_back(block, "ffn_norm2", linear(product, w2), gate_f * d_out)
    d_product = d_contracted @ w2
    sigmoid = 1 / (1 + np.exp(-gate))
    d_gate = d_product * value * sigmoid * (1 + gate * (1 - sigmoid))
    d_value = d_product * silu(gate)
    d_middle = d_out + _norm_back(block, "ffn_norm1", middle, scale_f * (d_gate @ w1 + d_value @ w3))

    d_attention = _norm_back(block, "attention_norm2", out, gate_a * d_middle)
    d_projected = _attention_back(block, (q, k, v), rotation, d_attention @ out_weight)
    names = [f"attention.to_{part}" for part in "qkv"]
    d_scaled = sum(d @ block.w[f"{name}.weight"] for name, d in zip(names, d_projected, strict=True))
    d_x = d_middle + _norm_back(block, "attention_norm1", x, scale_a * d_scaled)
    return d_x, {
        **{name: (scaled, d) for name, d in zip(names, d_projected, strict=True)},
        "attention.to_out.0": (attended, d_attention),
        "feed_forward.w1": (expanded, d_gate),
        "feed_forward.w2": (product, d_contracted),
        "feed_forward.w3": (expanded, d_value),
    }


def _attended(block: Block, x: Array, rotation: Array, scale: Array) -> tuple[Array, list[Array], Array]:
    """Input of the projections (B, S, D), what they make (B, S, H, K), and what the queries attend to (B, S, D)."""
    B, S, D = x.shape
    scaled = block.norm("attention_norm1", x) * scale
    projected = [
        linear(scaled, block.w[f"attention.to_{part}.weight"]).reshape(B, S, block.attention.heads, -1)
        for part in "qkv"
    ]
    ready = block.attention.norm_and_rotate(projected, rotation)
    return scaled, projected, attention(*ready).transpose(0, 2, 1, 3).reshape(B, S, D)


def _attention_back(
    block: Block, projected: tuple[Array, Array, Array], rotation: Array, d_attended: Array
) -> list[Array]:
    """Gradients (B, S, D) of the projections, of that of what the queries attend to (B, S, D)."""
    B, S, D = d_attended.shape
    d_heads = d_attended.reshape(B, S, block.attention.heads, -1).transpose(0, 2, 1, 3)
    q, k, v = block.attention.norm_and_rotate(projected, rotation)
    dq, dk, dv = (a.transpose(0, 2, 1, 3) for a in attention_gradient(q, k, v, d_heads))  # (B, S, H, K)
    back = np.conj(rotation)  # a rotation's transpose turns the other way
    for_norm = [
        (projected[0], block.w["attention.norm_q.weight"], rotate(dq, back)),
        (projected[1], block.w["attention.norm_k.weight"], rotate(dk, back)),
    ]
    d_q, d_k = (rms_norm_gradient(a, weight, QK_NORM_EPS, d) for a, weight, d in for_norm)
    return [np.ascontiguousarray(a).reshape(B, S, D) for a in (d_q, d_k, dv)]


def attention_gradient(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v (B, H, S, K), of that of softmax(q k^T / sqrt(K)) v."""
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    for head in np.ndindex(q.shape[:2]):  # one head's scores (S, S) at a time
        p = softmax((q[head] * scale) @ k[head].T)
        dv[head] = p.T @ d_out[head]
        d_p = d_out[head] @ v[head].T
        d_scores = p * (d_p - (d_p * p).sum(axis=-1, keepdims=True)) * scale
        dq[head], dk[head] = d_scores @ k[head], d_scores.T @ q[head]
    return dq, dk, dv


def rms_norm_gradient(x: Array, weight: Array, eps: float, d_out: Array) -> Array:
    """The gradient of x, of that of x / rms(x) * weight over the last axis."""
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    d = d_out * weight
    gradient: Array = inverse * (d - x * inverse**2 * np.mean(d * x, axis=-1, keepdims=True))
    return gradient


def _norm_back(block: Block, name: str, x: Array, d_out: Array) -> Array:
    return rms_norm_gradient(x, block.w[f"{name}.weight"], block.eps, d_out)
