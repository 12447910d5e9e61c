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
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.config import QK_NORM_EPS, TIME_FREQUENCIES, TIME_HIDDEN_DIM, TransformerConfig
from zimage_ref.model.positions import caption_ids, image_ids, padded, rope_angles

from .compiled import call
from .ops import Rotation, SiLU, attention, rms_norm, rotate, rotation_tables, silu


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand, and which of them are there."""

    image_rotation: Rotation  # of the L image tokens
    caption_rotation: Rotation  # of the T caption tokens
    rotation: Rotation  # of all S tokens, image then caption
    caption_mask: mx.array | None  # (B, 1, 1, T) boolean, False where a shorter caption was filled up; None: all True
    mask: mx.array | None  # (B, 1, 1, S), the same for all tokens


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser needs besides the noisy latents and the time: the same for all steps of a picture."""

    caption: mx.array  # (B, T, D) refined caption tokens
    layout: Layout


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
        exponents: Any = (-math.log(10000) * mx.arange(half, dtype=mx.float32) / half).tolist()
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

    def __call__(self, x: mx.array, rotation: Rotation, mask: mx.array | None) -> mx.array:
        q, k, v = self.project(x)
        return self.to_out[0](self.attend(q, k, v, rotation, mask))

    def project(self, x: mx.array) -> Sequence[mx.array]:
        """x (B, S, D) -> queries, keys, values (B, S, H, K), not yet normed."""
        B, S, _ = x.shape
        return [linear(x).reshape(B, S, self._heads, -1) for linear in (self.to_q, self.to_k, self.to_v)]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rotation: Rotation, mask: mx.array | None) -> mx.array:
        """Norm, rotation and attention of q, k, v (B, S, H, K) -> (B, S, D)."""
        q, k, v = self.prepare(q, k, v, rotation)
        return attention(q, k, v, mask).swapaxes(1, 2).flatten(2)  # (B, S, D)

    def prepare(self, q: mx.array, k: mx.array, v: mx.array, rotation: Rotation) -> Sequence[mx.array]:
        """q, k, v (B, S, H, K) -> the same as (B, H, S, K), q and k normed and rotated."""
        q, k = rotate(normed(self.norm_q, q), rotation), rotate(normed(self.norm_k, k), rotation)
        return [a.swapaxes(1, 2) for a in (q, k, v)]

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

    def __call__(self, x: mx.array) -> mx.array:
        gate, value = self.expand(x)
        return self.contract(gate, value)

    def expand(self, x: mx.array) -> Sequence[mx.array]:
        """(B, S, D) -> gate and value, (B, S, ffn_dim) each."""
        return self.w1(x), self.w3(x)

    def contract(self, gate: mx.array, value: mx.array) -> mx.array:
        """Gate and value -> (B, S, D)."""
        return self.w2(silu(gate) * value)


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
        self,
        x: mx.array,
        rotation: Rotation,
        mask: mx.array | None,
        adaln: mx.array | None = None,
        run: Callable[..., Any] = call,
    ) -> mx.array:
        """The output (B, S, D). run: how each half is run; see `compiled.Pieces`."""
        scale_a, gate_a, scale_f, gate_f = self.modulation(adaln)  # (B, 1, D) each
        x = run(Block.attend, self, x, rotation, mask, scale_a, gate_a)
        y: mx.array = run(Block.feed, self, x, scale_f, gate_f)
        return y

    def attend(self, x: mx.array, rotation: Rotation, mask: mx.array | None, scale: Any, gate: Any) -> mx.array:
        """The half with attention: (B, S, D) -> the same."""
        a = self.attention(normed(self.attention_norm1, x, scale), rotation, mask)
        return x + normed(self.attention_norm2, a, gate)

    def feed(self, x: mx.array, scale: Any, gate: Any) -> mx.array:
        """The half with the feed-forward: (B, S, D) -> the same."""
        f = self.feed_forward(normed(self.ffn_norm1, x, scale))
        return x + normed(self.ffn_norm2, f, gate)

    def modulation(self, adaln: mx.array | None) -> Sequence[mx.array | None]:
        """Scales and gates (B, 1, D) of attention and feed-forward; None for a block without modulation."""
        if adaln is None:
            return [None] * 4
        m = self.adaLN_modulation[0](adaln)[:, None]
        scale_a, gate_a, scale_f, gate_f = mx.split(m, 4, axis=-1)
        return 1 + scale_a, mx.tanh(gate_a), 1 + scale_f, mx.tanh(gate_f)


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
        self.run: Callable[..., mx.array] = Block.__call__  # how a block is run; see `compiled`

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
            tokens = self.run(block, tokens, layout.caption_rotation, layout.caption_mask)
        return Conditioning(tokens, layout)

    def layout(self, caption_lengths: Sequence[int], h: int, w: int) -> Layout:
        """Rotations and masks of a batch of captions of these lengths before latents of h x w."""
        config = self.config
        rows, columns = h // config.patch_size, w // config.patch_size
        lengths = [padded(n) for n in caption_lengths]
        T, L = max(lengths), padded(rows * columns)
        caption_angles = mx.array(rope_angles(caption_ids(T), config))
        caption = mx.broadcast_to(caption_angles, (len(lengths), *caption_angles.shape))  # (B, T, K / 2)
        image = mx.stack([mx.array(rope_angles(image_ids(rows, columns, n), config)) for n in lengths])
        mask = None
        if min(lengths) < T:
            ends = mx.array(lengths)[:, None, None, None] + L
            mask = mx.arange(L + T) < ends  # (B, 1, 1, S)
        both = mx.concatenate([image, caption], axis=1)
        return Layout(
            rotation_tables(image),
            rotation_tables(caption),
            rotation_tables(both),
            None if mask is None else mask[..., L:],
            mask,
        )

    def denoise(self, x: mx.array, t: mx.array, given: Conditioning) -> mx.array:
        """The raw output for conditioned latents; see `__call__`. t may be (1,), for the whole batch."""
        _, _, h, w = x.shape
        tokens = self.embed_image(x)  # (B, L, D)
        adaln = self.embed_time(t)

        for block in self.noise_refiner:
            tokens = self.run(block, tokens, given.layout.image_rotation, None, adaln)

        tokens = mx.concatenate([tokens, given.caption], axis=1)  # (B, S, D)
        for block in self.layers:
            tokens = self.run(block, tokens, given.layout.rotation, given.layout.mask, adaln)

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
        return linear(norm(caption.astype(self.dtype)))

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
