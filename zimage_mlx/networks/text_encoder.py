"""Qwen3 as a text encoder on MLX: token ids to the hidden states before the last layer.

Source: modeling_qwen3.py of transformers; `hidden_states[-2]` of the official pipeline is the output of the last
layer but one, before any final norm. Attribute names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.config import TextEncoderConfig

from .ops import swiglu
from .running import RESIDENT, RunInPieces, Weights

_ROOM = 256  # tokens


class Past:
    """The keys and values of the tokens so far, of one layer: a new token needs no others."""

    def __init__(self) -> None:
        self._keys: mx.array | None = None  # (B, fewer H, room, K), like the values
        self._values: mx.array | None = None
        self.length = 0  # tokens

    def grown(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Adds those of the next tokens, (B, fewer H, T, K) each, and returns all."""
        start, end = self.length, self.length + k.shape[2]
        self._keys, self._values = _with_room(self._keys, k, end), _with_room(self._values, v, end)
        self._keys[:, :, start:end], self._values[:, :, start:end] = k, v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def _with_room(kept: mx.array | None, new: mx.array, end: int) -> mx.array:
    """`kept` with room for `end` tokens. Room is made for many at once: else every token would copy all others."""
    have = 0 if kept is None else kept.shape[2]
    if kept is not None and have >= end:
        return kept
    B, H, _, K = new.shape
    more = mx.zeros((B, H, -(-end // _ROOM) * _ROOM - have, K), new.dtype)
    return more if kept is None else mx.concatenate([kept, more], axis=2)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values, RMS-normed and rotated queries and keys."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, past: Past | None = None) -> mx.array:
        B, T, _ = x.shape
        start = past.length if past else 0
        K, theta = self.config.head_dim, self.config.rope_theta
        q = self.q_norm(self.q_proj(x).reshape(B, T, -1, K)).swapaxes(1, 2)  # (B, H, T, K)
        k = self.k_norm(self.k_proj(x).reshape(B, T, -1, K)).swapaxes(1, 2)  # (B, fewer H, T, K)
        v = self.v_proj(x).reshape(B, T, -1, K).swapaxes(1, 2)
        q, k = (mx.fast.rope(a, K, traditional=False, base=theta, scale=1.0, offset=start) for a in (q, k))
        k, v = past.grown(k, v) if past else (k, v)  # (B, fewer H, start + T, K)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=K**-0.5, mask="causal" if T > 1 else None)
        return self.o_proj(y.swapaxes(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """Pre-normed attention and feed-forward."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, past: Past | None = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Embedding and all layers but the last."""

    def __init__(self, config: TextEncoderConfig, weights: Weights) -> None:
        super().__init__()
        self.run = _run_layer(weights)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config) for _ in range(config.used_layers)]

    def __call__(self, ids: mx.array, past: Sequence[Past] = ()) -> mx.array:
        """ids (B, T) -> (B, T, hidden_size). past: of each layer, if these tokens follow others."""
        x: mx.array = self.embed_tokens(ids)  # (B, T, hidden_size)
        for i, layer in enumerate(self.layers):
            x = self.run(layer, x, past[i] if past else None)
        return x


def _run_layer(weights: Weights) -> Callable[[Layer, mx.array, Past | None], mx.array]:
    """How a layer is run: lazily, or evaluated one ahead if weights come and go."""
    if weights is RESIDENT:
        return Layer.__call__
    pieces = RunInPieces(compiled=False, then=weights.read_ahead)

    def run(layer: Layer, x: mx.array, past: Past | None) -> mx.array:
        return pieces(Layer.__call__, layer, x, past)

    return weights.around(run)


class TextEncoder(nn.Module):
    """The encoder, its parameters under `model.` as in the checkpoint."""

    def __init__(self, config: TextEncoderConfig, weights: Weights = RESIDENT) -> None:
        super().__init__()
        self.model = Model(config, weights)

    def __call__(self, ids: mx.array) -> mx.array:
        """ids (T,) -> (T, hidden_size), or a batch (B, T) -> (B, T, hidden_size)."""
        return self.model(ids[None])[0] if ids.ndim == 1 else self.model(ids)
