"""Qwen3 as a text encoder: token ids to the hidden states before the last layer.

The official pipeline takes `hidden_states[-2]`: the output of the second-last layer, without the final norm.
Source: modeling_qwen3.py of transformers.
"""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import TextEncoderConfig

from .ops import attention, linear, rms_norm, silu
from .weights import Weights


class Attention:
    """Causal self-attention with grouped keys and values. Queries and keys are RMS-normalized and rotated."""

    def __init__(self, w: Weights, config: TextEncoderConfig) -> None:
        self.w, self.config = w, config

    def __call__(self, x: Array) -> Array:
        c = self.config
        T = len(x)
        q = linear(x, self.w["q_proj.weight"]).reshape(T, c.num_attention_heads, c.head_dim)  # (T, H, K)
        k = linear(x, self.w["k_proj.weight"]).reshape(T, c.num_key_value_heads, c.head_dim)
        v = linear(x, self.w["v_proj.weight"]).reshape(T, c.num_key_value_heads, c.head_dim)
        q = rotate(rms_norm(q, self.w["q_norm.weight"], c.rms_norm_eps), c.rope_theta)
        k = rotate(rms_norm(k, self.w["k_norm.weight"], c.rms_norm_eps), c.rope_theta)
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = (np.repeat(a, group, axis=1) for a in (k, v))  # (T, H, K)
        q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))  # (1, H, T, K)
        causal = np.tri(T, dtype=bool)[None, None]
        y = attention(q, k, v, causal)[0].transpose(1, 0, 2).reshape(T, -1)
        return linear(y, self.w["o_proj.weight"])


class MLP:
    """SwiGLU."""

    def __init__(self, w: Weights) -> None:
        self.w = w

    def __call__(self, x: Array) -> Array:
        gate = silu(linear(x, self.w["gate_proj.weight"]))
        return linear(gate * linear(x, self.w["up_proj.weight"]), self.w["down_proj.weight"])


class Layer:
    """Attention and feed-forward, each after a norm."""

    def __init__(self, w: Weights, config: TextEncoderConfig) -> None:
        self.w, self.eps = w, config.rms_norm_eps
        self.self_attn = Attention(w.at("self_attn"), config)
        self.mlp = MLP(w.at("mlp"))

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(rms_norm(x, self.w["input_layernorm.weight"], self.eps))
        return x + self.mlp(rms_norm(x, self.w["post_attention_layernorm.weight"], self.eps))


class TextEncoder:
    """All layers except the last one."""

    def __init__(self, config: TextEncoderConfig, weights: Weights) -> None:
        self.w = weights.at("model")
        self.layers = [Layer(self.w.at(f"layers.{i}"), config) for i in range(config.used_layers)]

    def __call__(self, ids: Array) -> Array:
        """ids (T,) -> (T, hidden_size)."""
        x = self.w.rows("embed_tokens.weight", ids)
        for layer in self.layers:
            x = layer(x)
        return x


def rotate(x: Array, theta: float) -> Array:
    """RoPE on x (T, H, K): channel i is paired with channel i + K / 2."""
    T, _, K = x.shape
    frequency = 1.0 / theta ** (np.arange(0, K, 2, dtype=np.float32) / K)
    angle = np.outer(np.arange(T, dtype=np.float32), frequency.astype(np.float32))  # (T, K / 2)
    turned = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle.astype(x.dtype))[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype, copy=False)
