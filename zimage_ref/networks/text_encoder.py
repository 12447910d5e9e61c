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


class Past:
    """The keys and values of the tokens so far, of one layer: a new token needs no others."""

    def __init__(self) -> None:
        self._parts: list[tuple[Array, Array]] = []
        self.length = 0  # tokens

    def grown(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Adds those of the next tokens, (T, fewer H, K) each, and returns all."""
        self._parts.append((k, v))
        self.length += len(k)
        keys, values = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        self._parts = [(keys, values)]
        return keys, values


class Attention:
    """Causal self-attention with grouped keys and values. Queries and keys are RMS-normalized and rotated."""

    def __init__(self, w: Weights, config: TextEncoderConfig) -> None:
        self.w, self.config = w, config

    def __call__(self, x: Array, past: Past | None = None) -> Array:
        c = self.config
        T, start = len(x), past.length if past else 0
        q = linear(x, self.w["q_proj.weight"]).reshape(T, c.num_attention_heads, c.head_dim)  # (T, H, K)
        k = linear(x, self.w["k_proj.weight"]).reshape(T, c.num_key_value_heads, c.head_dim)
        v = linear(x, self.w["v_proj.weight"]).reshape(T, c.num_key_value_heads, c.head_dim)
        q = rotate(rms_norm(q, self.w["q_norm.weight"], c.rms_norm_eps), c.rope_theta, start)
        k = rotate(rms_norm(k, self.w["k_norm.weight"], c.rms_norm_eps), c.rope_theta, start)
        k, v = past.grown(k, v) if past else (k, v)  # (start + T, fewer H, K)
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = (np.repeat(a, group, axis=1) for a in (k, v))  # (start + T, H, K)
        q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))  # (1, H, T, K)
        causal = np.tri(T, start + T, start, dtype=bool)[None, None]
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

    def __call__(self, x: Array, past: Past | None = None) -> Array:
        x = x + self.self_attn(rms_norm(x, self.w["input_layernorm.weight"], self.eps), past)
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


def rotate(x: Array, theta: float, start: int = 0) -> Array:
    """RoPE on x (T, H, K) from place `start` on: channel i is paired with channel i + K / 2."""
    T, _, K = x.shape
    frequency = 1.0 / theta ** (np.arange(0, K, 2, dtype=np.float32) / K)
    angle = np.outer(np.arange(start, start + T, dtype=np.float32), frequency.astype(np.float32))  # (T, K / 2)
    turned = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle.astype(x.dtype))[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype, copy=False)
