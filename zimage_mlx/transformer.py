"""The single-stream diffusion transformer of Z-Image (S3-DiT) on MLX.

    raw = final( layers( [ noise_refiner(x) ; context_refiner(caption) ], t ) )

Source: transformer_z_image.py of diffusers (ZImageTransformer2DModel); Z-Image, arXiv 2511.22699. Attribute names are
the checkpoint's. For the letters in shape comments see `zimage_ref`. Which way time and noise run: `schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.config import QK_NORM_EPS, TIME_FREQUENCIES, TIME_HIDDEN_DIM, TransformerConfig
from zimage_ref.positions import caption_ids, image_ids, padded, rope_angles
from zimage_ref.tensors import Array

Rotation = tuple[mx.array, mx.array]  # cosines and sines, (B, S, 1, K / 2) float32


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser needs besides the noisy latents and the time: the same for all steps of a picture."""

    caption: mx.array  # (B, T, D) refined caption tokens
    image_rotation: Rotation  # of the L image tokens
    rotation: Rotation  # of all S tokens, image then caption
    mask: mx.array | None  # (B, 1, 1, S) boolean, False where a shorter caption was filled up; None: all True


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the time, then a two-layer perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = [
            nn.Linear(TIME_FREQUENCIES, TIME_HIDDEN_DIM),
            nn.SiLU(),
            nn.Linear(TIME_HIDDEN_DIM, config.adaln_dim),
        ]

    def __call__(self, t: mx.array) -> mx.array:
        half = TIME_FREQUENCIES // 2
        frequency = mx.exp(-math.log(10000) * mx.arange(half, dtype=mx.float32) / half)
        angle = t.astype(mx.float32)[:, None] * frequency  # (B, 128)
        x = mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1).astype(self.mlp[0].weight.dtype)
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

    def __call__(self, x: mx.array, rotation: Rotation, mask: mx.array | None) -> mx.array:
        B, S, D = x.shape
        q = self.norm_q(self.to_q(x).reshape(B, S, self._heads, -1))  # (B, S, H, K)
        k = self.norm_k(self.to_k(x).reshape(B, S, self._heads, -1))
        v = self.to_v(x).reshape(B, S, self._heads, -1)
        q, k, v = (a.swapaxes(1, 2) for a in (rotate(q, rotation), rotate(k, rotation), v))  # (B, H, S, K)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.to_out[0](y.swapaxes(1, 2).reshape(B, S, D))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(nn.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Sandwich-normed attention and feed-forward; scaled and gated by the time where it is modulated."""

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
        self, x: mx.array, rotation: Rotation, mask: mx.array | None, adaln: mx.array | None = None
    ) -> mx.array:
        scale_a, gate_a, scale_f, gate_f = self.modulation(adaln)  # (B, 1, D) each
        a = self.attention(self.attention_norm1(x) * scale_a, rotation, mask)
        x = x + gate_a * self.attention_norm2(a)
        f = self.feed_forward(self.ffn_norm1(x) * scale_f)
        return x + gate_f * self.ffn_norm2(f)

    def modulation(self, adaln: mx.array | None) -> Sequence[mx.array | float]:
        """Scales and gates of attention and feed-forward; ones for a block without modulation."""
        if adaln is None:
            return [1.0] * 4
        m = self.adaLN_modulation[0](adaln)[:, None]
        scale_a, gate_a, scale_f, gate_f = mx.split(m, 4, axis=-1)
        return 1 + scale_a, mx.tanh(gate_a), 1 + scale_f, mx.tanh(gate_f)


class FinalLayer(nn.Module):
    """Layer norm, scaled by the time, then tokens to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(config.adaln_dim, config.dim)]

    def __call__(self, x: mx.array, adaln: mx.array) -> mx.array:
        silu, linear = self.adaLN_modulation
        scale = 1 + linear(silu(adaln))
        return self.linear(mx.fast.layer_norm(x, None, None, 1e-6) * scale[:, None])


class Transformer(nn.Module):
    """The whole denoiser."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
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
        config = self.config
        rows, columns = h // config.patch_size, w // config.patch_size
        lengths = [padded(len(c)) for c in captions]
        T, L = max(lengths), padded(rows * columns)

        tokens = mx.stack([fill(self.embed_caption(c), self.cap_pad_token, T) for c in captions])  # (B, T, D)
        caption_angles = [rope_angles(caption_ids(T), config)] * len(captions)
        image_angles = [rope_angles(image_ids(rows, columns, n), config) for n in lengths]
        caption_rotation, image_rotation = table(caption_angles), table(image_angles)

        mask = None
        if min(lengths) < T:
            ends = mx.array(lengths)[:, None, None, None] + L
            mask = mx.arange(L + T) < ends  # (B, 1, 1, S)
        for block in self.context_refiner:
            tokens = block(tokens, caption_rotation, None if mask is None else mask[..., L:])
        cos, sin = (mx.concatenate([i, c], axis=1) for i, c in zip(image_rotation, caption_rotation, strict=True))
        return Conditioning(tokens, image_rotation, (cos, sin), mask)

    def denoise(self, x: mx.array, t: mx.array, given: Conditioning) -> mx.array:
        """The raw output for conditioned latents; see `__call__`."""
        _, _, h, w = x.shape
        tokens = self.embed_image(x.astype(self.dtype))  # (B, L, D)
        adaln = self.t_embedder(t.astype(mx.float32) * self.config.t_scale)

        for block in self.noise_refiner:
            tokens = block(tokens, given.image_rotation, None, adaln)

        tokens = mx.concatenate([tokens, given.caption], axis=1)  # (B, S, D)
        for block in self.layers:
            tokens = block(tokens, given.rotation, given.mask, adaln)

        return self.unpatchify(self.all_final_layer[self.config.patch_key](tokens, adaln), h, w)

    def embed_caption(self, caption: mx.array) -> mx.array:
        """(T, cap_feat_dim) -> (T, D)."""
        norm, linear = self.cap_embedder
        return linear(norm(caption.astype(self.dtype)))

    def embed_image(self, x: mx.array) -> mx.array:
        """(B, C, h, w) -> (B, L, D): patches embedded, then filled up with x_pad_token."""
        B, C, h, w = x.shape
        p = self.config.patch_size
        patches = x.reshape(B, C, h // p, p, w // p, p).transpose(0, 2, 4, 3, 5, 1)  # (B, h/p, w/p, p, p, C)
        tokens = self.all_x_embedder[self.config.patch_key](patches.reshape(B, -1, self.config.patch_dim))
        return fill(tokens, self.x_pad_token, padded(tokens.shape[1]))

    def unpatchify(self, patches: mx.array, h: int, w: int) -> mx.array:
        """(B, S, patch_dim) -> (B, C, h, w): the image's tokens come first, the rest is dropped."""
        p, C = self.config.patch_size, self.config.in_channels
        rows, columns = h // p, w // p
        grid = patches[:, : rows * columns].reshape(-1, rows, columns, p, p, C)
        return grid.transpose(0, 5, 1, 3, 2, 4).reshape(-1, C, h, w)


def fill(tokens: mx.array, pad_token: mx.array, length: int) -> mx.array:
    """Tokens (..., n, D) followed by as many pad tokens (1, D) as `length` needs."""
    missing = length - tokens.shape[-2]
    if not missing:
        return tokens
    padding = mx.broadcast_to(pad_token, (*tokens.shape[:-2], missing, tokens.shape[-1]))
    return mx.concatenate([tokens, padding], axis=-2)


def table(angles: Sequence[Array]) -> Rotation:
    """Cosines and sines (B, S, 1, K / 2) of a batch of angles (S, K / 2), computed at once and kept."""
    stacked = mx.stack([mx.array(a) for a in angles])[:, :, None]
    cos, sin = mx.cos(stacked), mx.sin(stacked)
    mx.eval(cos, sin)
    return cos, sin


def rotate(x: mx.array, rotation: Rotation) -> mx.array:
    """RoPE on neighbouring channels of x (B, S, H, K), in float32 whatever x is; the result has the dtype of x."""
    cos, sin = rotation
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
