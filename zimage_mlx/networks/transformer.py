"""The single-stream diffusion transformer of Z-Image (S3-DiT) on MLX.

    raw = final( layers( [ noise_refiner(x) ; context_refiner(caption) ], t ) )

Source: transformer_z_image.py of diffusers (ZImageTransformer2DModel); Z-Image, arXiv 2511.22699. Attribute names are
the checkpoint's. For the letters in shape comments see `zimage_ref`; for the direction of time and noise see
`zimage_ref.model.flow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.config import QK_NORM_EPS, TIME_FREQUENCIES, TIME_HIDDEN_DIM, TransformerConfig
from zimage_ref.model.positions import padded

from .ops import QKV, Rotation, SiLU, attention, rms_norm, rotate, silu
from .running import RESIDENT, RunHalf, Weights, output_of
from .token_layout import TokenLayout


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser needs besides the noisy latents and the time: the same for all steps of a picture."""

    caption: mx.array  # (B, T, D) refined caption tokens
    layout: TokenLayout


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the time, then a two-layer perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = [
            nn.Linear(TIME_FREQUENCIES, TIME_HIDDEN_DIM),
            SiLU(),
            nn.Linear(TIME_HIDDEN_DIM, config.adaln_dim),
        ]
        half = TIME_FREQUENCIES // 2
        exponents = cast(list[float], (-math.log(10000) * mx.arange(half, dtype=mx.float32) / half).tolist())
        # mx.exp is some units off in the last place, which times near 1000 turn into 5e-4 of an angle
        self._frequencies = mx.array([math.exp(exponent) for exponent in exponents])

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        angle = t.astype(mx.float32)[:, None] * self._frequencies  # (B, 128)
        x = mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1).astype(dtype)
        for layer in self.mlp:
            x = layer(x)
        return x  # (B, adaln)


class Attention(nn.Module):
    """Self-attention with RMS-normed, rotated queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self._heads = config.n_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim, QK_NORM_EPS)
        self.norm_k = nn.RMSNorm(config.head_dim, QK_NORM_EPS)
        self.to_out = [nn.Linear(dim, dim, bias=False)]

    def project(self, x: mx.array) -> QKV:
        """x (B, S, D) -> queries, keys, values (B, S, H, K), not yet normed."""
        B, S, _ = x.shape
        q, k, v = (linear(x).reshape(B, S, self._heads, -1) for linear in (self.to_q, self.to_k, self.to_v))
        return QKV(q, k, v)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rotation: Rotation, mask: mx.array | None) -> mx.array:
        """Projected q, k, v (B, S, H, K) -> what the queries attend to, (B, S, D)."""
        return attention(*self.norm_and_rotate(q, k, v, rotation), mask).swapaxes(1, 2).flatten(2)

    def norm_and_rotate(self, q: mx.array, k: mx.array, v: mx.array, rotation: Rotation) -> QKV:
        """Projected q, k, v (B, S, H, K) -> the same as (B, H, S, K), q and k normed and rotated."""
        q, k = rotate(normed(self.norm_q, q), rotation), rotate(normed(self.norm_k, k), rotation)
        return QKV(*(a.swapaxes(1, 2) for a in (q, k, v)))

    def heads(self, x: mx.array) -> mx.array:
        """(B, S, D) -> (B, H, S, K)."""
        return mx.unflatten(x, -1, (self._heads, -1)).swapaxes(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def expand(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(B, S, D) -> gate and value, (B, S, F) each."""
        return self.w1(x), self.w3(x)

    def contract(self, gate: mx.array, value: mx.array) -> mx.array:
        """Gate and value (B, S, F) -> (B, S, D)."""
        return self.w2(silu(gate) * value)


class AttentionKept(NamedTuple):
    """What a gradient needs of the half with attention."""

    x: mx.array  # (B, S, D), its input
    q: mx.array  # (B, S, H, K), not yet normed, like k and v
    k: mx.array
    v: mx.array
    attended: mx.array  # (B, S, D), attention before its last Linear layer
    out: mx.array  # (B, S, D), after it
    scale: mx.array | None  # (B, 1, D), like gate; None for a block without modulation
    gate: mx.array | None


class FeedForwardKept(NamedTuple):
    """What a gradient needs of the half with the feed-forward. Its input is made again from the other half's."""

    hidden_gate: mx.array  # (B, S, F)
    hidden_value: mx.array  # (B, S, F)
    out: mx.array  # (B, S, D)
    scale: mx.array | None  # (B, 1, D), like gate; None for a block without modulation
    gate: mx.array | None


class Block(nn.Module):
    """Sandwich-normed attention and feed-forward; scaled and gated by the time if it is modulated.

        x = x + gate_a norm(attention(scale_a norm(x)))
        x = x + gate_f norm(feed_forward(scale_f norm(x)))

    Each half returns its output and what a gradient needs. Generation drops the second, training keeps it.

    If you change a block, change these too; tests fail until they agree:
    - its twin in zimage_ref.networks.transformer;
    - its backward pass in zimage_mlx.training.gradient, written by hand: a step takes 0.44 to 0.6 of mflux's time;
    - `kept_widths` in zimage_ref.memory, if a half keeps other arrays.
    """

    def __init__(self, config: TransformerConfig, modulated: bool = True) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(config.dim, config.norm_eps)
        if modulated:
            self.adaLN_modulation = [nn.Linear(config.adaln_dim, 4 * config.dim)]

    def __call__(
        self,
        x: mx.array,
        rotation: Rotation,
        mask: mx.array | None,
        adaln: mx.array | None = None,
        run: RunHalf = output_of,
    ) -> mx.array:
        """The output (B, S, D). run: how each half is run, and what becomes of what it keeps."""
        scale_a, gate_a, scale_f, gate_f = [None] * 4 if adaln is None else self.modulation(adaln)
        x = run(Block.attention_half, self, x, rotation, mask, scale_a, gate_a)
        return run(Block.feed_forward_half, self, x, scale_f, gate_f)

    def attention_half(
        self, x: mx.array, rotation: Rotation, mask: mx.array | None, scale: mx.array | None, gate: mx.array | None
    ) -> tuple[mx.array, AttentionKept]:
        """(B, S, D) -> the same, and what a gradient needs."""
        q, k, v = self.attention.project(normed(self.attention_norm1, x, scale))  # (B, S, H, K) each
        attended = self.attention.attend(q, k, v, rotation, mask)  # (B, S, D)
        out = self.attention.to_out[0](attended)  # (B, S, D)
        y = x + normed(self.attention_norm2, out, gate)
        return y, AttentionKept(x, q, k, v, attended, out, scale, gate)

    def feed_forward_half(
        self, x: mx.array, scale: mx.array | None, gate: mx.array | None
    ) -> tuple[mx.array, FeedForwardKept]:
        """(B, S, D) -> the same, and what a gradient needs."""
        hidden_gate, hidden_value = self.feed_forward.expand(normed(self.ffn_norm1, x, scale))  # (B, S, F) each
        out = self.feed_forward.contract(hidden_gate, hidden_value)  # (B, S, D)
        y = x + normed(self.ffn_norm2, out, gate)
        return y, FeedForwardKept(hidden_gate, hidden_value, out, scale, gate)

    def modulation(self, adaln: mx.array) -> list[mx.array]:
        """(B, adaln) -> scale and gate of attention, then of the feed-forward, (B, 1, D) each."""
        scale_a, gate_a, scale_f, gate_f = mx.split(self.adaLN_modulation[0](adaln)[:, None], 4, axis=-1)
        return [1 + scale_a, mx.tanh(gate_a), 1 + scale_f, mx.tanh(gate_f)]


# How a block is run: (block, x, rotation, mask, adaln) -> its output. See `running` for other ways than this
RunBlock = Callable[[Block, mx.array, Rotation, "mx.array | None", "mx.array | None"], mx.array]


def normed(norm: nn.RMSNorm, x: mx.array, scale: mx.array | None = None) -> mx.array:
    """norm(x) * scale for scale (B, 1, D); None is 1.

    One scale for the whole batch, the rule in generation, goes into the norm's own weight and costs no pass over x.
    """
    if scale is None:
        return rms_norm(x, norm.weight, norm.eps)
    if len(scale) > 1:
        return rms_norm(x, norm.weight, norm.eps) * scale
    return rms_norm(x, norm.weight * scale.flatten(), norm.eps)


class FinalLayer(nn.Module):
    """Layer norm, scaled by the time, then tokens to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = [SiLU(), nn.Linear(config.adaln_dim, config.dim)]

    def __call__(self, x: mx.array, adaln: mx.array) -> mx.array:
        activation, linear = self.adaLN_modulation
        scale = 1 + linear(activation(adaln))
        return self.linear(mx.fast.layer_norm(x, None, None, 1e-6) * scale[:, None])


class Transformer(nn.Module):
    """The whole denoiser."""

    def __init__(self, config: TransformerConfig, run: RunBlock = Block.__call__, weights: Weights = RESIDENT) -> None:
        """weights: for those that run blocks in another way than `run`."""
        super().__init__()
        self.config, self.run, self.weights = config, run, weights
        self.all_x_embedder = {config.patch_key: nn.Linear(config.patch_dim, config.dim)}
        self.all_final_layer = {config.patch_key: FinalLayer(config)}
        self.t_embedder = TimestepEmbedder(config)
        self.cap_embedder = [
            nn.RMSNorm(config.cap_feat_dim, config.norm_eps),
            nn.Linear(config.cap_feat_dim, config.dim),
        ]
        self.x_pad_token = mx.zeros((1, config.dim))
        self.cap_pad_token = mx.zeros((1, config.dim))
        self.noise_refiner = [Block(config) for _ in range(config.n_refiner_layers)]
        self.context_refiner = [Block(config, modulated=False) for _ in range(config.n_refiner_layers)]
        self.layers = [Block(config) for _ in range(config.n_layers)]

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the residual stream, and of the output."""
        dtype: mx.Dtype = self.x_pad_token.dtype
        return dtype

    def __call__(self, x: mx.array, t: mx.array, captions: Sequence[mx.array]) -> mx.array:
        """The raw output, x_0 - noise, (B, C, h, w) in the model's dtype.

        x: (B, C, h, w) noisy latents, t: (B,) = 1 - sigma, captions: B arrays (T_i, cap_feat_dim).
        """
        return self.denoise(x, t, self.condition(captions, x.shape[2], x.shape[3]))

    def condition(self, captions: Sequence[mx.array], h: int, w: int) -> Conditioning:
        """All that does not depend on the time: caption tokens, rotations, mask, for latents of h x w."""
        layout = self.layout([len(c) for c in captions], h, w)
        tokens = self.embed_captions(captions)
        for block in self.context_refiner:
            tokens = self.run(block, tokens, layout.caption_rotation, layout.caption_mask, None)
        return Conditioning(tokens, layout)

    def layout(self, caption_lengths: Sequence[int], h: int, w: int) -> TokenLayout:
        """The places of the tokens, for captions of these lengths and latents of h x w."""
        return TokenLayout.of(self.config, caption_lengths, h, w)

    def denoise(self, x: mx.array, t: mx.array, conditioning: Conditioning) -> mx.array:
        """The raw output for conditioned latents; see `__call__`. t may be (1,), for the whole batch."""
        _, _, h, w = x.shape
        layout = conditioning.layout
        tokens = self.embed_image(x)  # (B, L, D)
        adaln = self.embed_time(t)

        for block in self.noise_refiner:
            tokens = self.run(block, tokens, layout.image_rotation, None, adaln)

        tokens = mx.concatenate([tokens, conditioning.caption], axis=1)  # (B, S, D)
        for block in self.layers:
            tokens = self.run(block, tokens, layout.rotation, layout.mask, adaln)

        return self.finish(tokens, adaln, h, w)

    def embed_time(self, t: mx.array) -> mx.array:
        """(B,) -> (B, adaln)."""
        return self.t_embedder(t.astype(mx.float32) * self.config.t_scale, self.dtype)

    def embed_captions(self, captions: Sequence[mx.array]) -> mx.array:
        """B captions (T_i, cap_feat_dim) -> (B, T, D), all filled up to the longest's padded length."""
        T = max(padded(len(caption)) for caption in captions)
        return mx.stack([fill(self.embed_caption(c), self.cap_pad_token, T) for c in captions])

    def embed_caption(self, caption: mx.array) -> mx.array:
        """(T, cap_feat_dim) -> (T, D)."""
        norm, linear = self.cap_embedder
        embedded: mx.array = linear(norm(caption.astype(self.dtype)))
        return embedded

    def embed_image(self, x: mx.array) -> mx.array:
        """(B, C, h, w) -> (B, L, D): patches embedded, then filled up with x_pad_token."""
        x = x.astype(self.dtype)
        B, C, h, w = x.shape
        p = self.config.patch_size
        patches = x.reshape(B, C, h // p, p, w // p, p).transpose(0, 2, 4, 3, 5, 1)  # (B, h/p, w/p, p, p, C)
        tokens = self.all_x_embedder[self.config.patch_key](patches.reshape(B, -1, self.config.patch_dim))
        return fill(tokens, self.x_pad_token, padded(tokens.shape[1]))

    def finish(self, tokens: mx.array, adaln: mx.array, h: int, w: int) -> mx.array:
        """(B, S, D) -> (B, C, h, w): the image's tokens come first, the rest is dropped."""
        p, C = self.config.patch_size, self.config.in_channels
        rows, columns = h // p, w // p
        patches = self.all_final_layer[self.config.patch_key](tokens[:, : rows * columns], adaln)
        grid = patches.reshape(-1, rows, columns, p, p, C)
        return grid.transpose(0, 5, 1, 3, 2, 4).reshape(-1, C, h, w)


def fill(tokens: mx.array, pad_token: mx.array, length: int) -> mx.array:
    """Tokens (..., n, D) followed by as many pad tokens (1, D) as `length` needs."""
    missing = length - tokens.shape[-2]
    if not missing:
        return tokens
    padding = mx.broadcast_to(pad_token, (*tokens.shape[:-2], missing, tokens.shape[-1]))
    return mx.concatenate([tokens, padding], axis=-2)
