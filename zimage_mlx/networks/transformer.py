"""The single-stream diffusion transformer of Z-Image (S3-DiT) on MLX.

    raw = final( layers( [ noise_refiner(x) ; context_refiner(caption) ], t ) )

Source: transformer_z_image.py of diffusers (ZImageTransformer2DModel); Z-Image, arXiv 2511.22699. Attribute names are
the checkpoint's. For the letters in shapes see `zimage_ref`; for time and noise see `zimage_ref.model.flow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.checks import check_maps
from zimage_ref.model.config import QK_NORM_EPS, TIME_FREQUENCIES, TIME_HIDDEN_DIM, TransformerConfig
from zimage_ref.model.positions import padded
from zimage_ref.model.step_cache import StepCache

from .half import attention_factor, feed_forward_factor, narrowed, stream_dtype
from .hints import Hints
from .kept import AttentionKept, FeedForwardKept
from .layers import Layers
from .ops import QKV, Rotation, SiLU, attention, in_rows, rms_norm, rotate, silu
from .running import RESIDENT, RunHalf, Weights, output_of
from .steering import Mask, attend_in_contrast
from .token_layout import TokenLayout, fill, patches


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser needs besides the noisy latents and the time: the same for all steps of a picture."""

    caption: mx.array  # (B, T, D) refined caption tokens
    layout: TokenLayout
    control: Hints | None = None  # what a ControlNet adds
    cache: StepCache[mx.array] | None = None  # what stands for the layers in some steps


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the time, then a two-layer perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.adaln_dim
        self.mlp = [nn.Linear(TIME_FREQUENCIES, TIME_HIDDEN_DIM), SiLU(), nn.Linear(TIME_HIDDEN_DIM, width)]
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
        B, S, D = x.shape
        return QKV(*(in_rows(f, x, D).reshape(B, S, self._heads, -1) for f in (self.to_q, self.to_k, self.to_v)))

    def output(self, attended: mx.array) -> mx.array:
        """The last Linear layer, (B, S, D) -> (B, S, D)."""
        return in_rows(self.to_out[0], attended, attended.shape[-1])

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rotation: Rotation, mask: Mask) -> mx.array:
        """Projected q, k, v (B, S, H, K) -> what the queries attend to, (B, S, D)."""
        if isinstance(mask, tuple):
            return attend_in_contrast(QKV(q, k, v), rotation, mask, self.attend)
        return attention(*self.norm_and_rotate(q, k, v, rotation), mask).swapaxes(1, 2).flatten(2)

    def norm_and_rotate(self, q: mx.array, k: mx.array, v: mx.array, rotation: Rotation) -> QKV:
        """Projected q, k, v (B, S, H, K) -> the same as (B, H, S, K), q and k normed and rotated."""
        factor = attention_factor(q.dtype)
        q = rotate(normed(self.norm_q, q, factor=factor), rotation)
        k = rotate(normed(self.norm_k, k, factor=factor), rotation)
        return QKV(*(a.swapaxes(1, 2) for a in (q, k, v)))

    def heads(self, x: mx.array) -> mx.array:
        """(B, S, D) -> (B, H, S, K)."""
        return mx.unflatten(x, -1, (self._heads, -1)).swapaxes(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._widths = config.dim, config.ffn_dim
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def expand(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(B, S, D) -> gate and value, (B, S, F) each; the value times `half.feed_forward_factor`."""
        F, scaled = self._widths[1], narrowed(x, x.dtype, feed_forward_factor(x.dtype))
        return in_rows(self.w1, x, F), in_rows(self.w3, scaled, F)

    def contract(self, gate: mx.array, value: mx.array) -> mx.array:
        """Gate and value (B, S, F) -> (B, S, D)."""
        return in_rows(self.w2, silu(gate) * value, self._widths[0])


class Block(nn.Module):
    """Sandwich-normed attention and feed-forward; scaled and gated by the time if it is modulated.

        x = x + gate_a norm(attention(scale_a norm(x)))
        x = x + gate_f norm(feed_forward(scale_f norm(x)))

    Each half returns its output and what a gradient needs. Generation drops the second, training keeps it.

    If you change a block, change these too; tests fail until they agree:
    - its twin in zimage_ref.networks.transformer;
    - its backward pass in zimage_mlx.training.block_gradient, by hand: a step takes 0.44 to 0.6 of mflux's time;
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
        mask: Mask,
        adaln: mx.array | None = None,
        run: RunHalf = output_of,
    ) -> mx.array:
        """The output (B, S, D). run: how each half is run, and what becomes of what it keeps."""
        scale_a, gate_a, scale_f, gate_f = self.scales_and_gates(adaln)
        x = run(Block.attention_half, self, x, rotation, mask, scale_a, gate_a)
        return run(Block.feed_forward_half, self, x, scale_f, gate_f)

    def attention_half(
        self, x: mx.array, rotation: Rotation, mask: Mask, scale: mx.array | None, gate: mx.array | None
    ) -> tuple[mx.array, AttentionKept]:
        """(B, S, D) -> the same, and what a gradient needs."""
        q, k, v = self.attention.project(self.attention_input(x, scale))  # (B, S, H, K) each
        attended = self.attention.attend(q, k, v, rotation, mask)  # (B, S, D)
        out = self.attention.output(attended)  # (B, S, D)
        y = x + self.attention_added(out, gate)
        return y, AttentionKept(x, q, k, v, attended, out, scale, gate)

    def feed_forward_half(
        self, x: mx.array, scale: mx.array | None, gate: mx.array | None
    ) -> tuple[mx.array, FeedForwardKept]:
        """(B, S, D) -> the same, and what a gradient needs."""
        hidden_gate, hidden_value = self.feed_forward.expand(self.feed_forward_input(x, scale))  # (B, S, F) each
        out = self.feed_forward.contract(hidden_gate, hidden_value)  # (B, S, D)
        y = x + self.feed_forward_added(out, gate)
        return y, FeedForwardKept(hidden_gate, hidden_value, out, scale, gate)

    def attention_input(self, x: mx.array, scale: mx.array | None = None) -> mx.array:
        """The input of attention, of the stream x (B, S, D), in the dtype of its matrices; see `half`."""
        dtype = self.attention_norm1.weight.dtype
        return narrowed(normed(self.attention_norm1, x, scale), dtype, attention_factor(dtype))

    def attention_added(self, out: mx.array, gate: mx.array | None = None) -> mx.array:
        """The update of the stream by attention; `out` (B, S, D) comes from its last Linear layer."""
        return normed(self.attention_norm2, out, gate, attention_factor(out.dtype))

    def feed_forward_input(self, x: mx.array, scale: mx.array | None = None) -> mx.array:
        """The input of the feed-forward, of the stream x (B, S, D), in the dtype of its matrices."""
        return narrowed(normed(self.ffn_norm1, x, scale), self.ffn_norm1.weight.dtype)

    def feed_forward_added(self, out: mx.array, gate: mx.array | None = None) -> mx.array:
        """The update of the stream by the feed-forward; `out` (B, S, D) is its output."""
        return normed(self.ffn_norm2, out, gate, feed_forward_factor(out.dtype))

    def scales_and_gates(self, adaln: mx.array | None) -> Sequence[mx.array | None]:
        """The `modulation` by adaln (B, adaln), or four times None for a block without one."""
        return [None] * 4 if adaln is None else self.modulation(adaln)

    def modulation(self, adaln: mx.array) -> list[mx.array]:
        """(B, adaln) -> scale and gate of attention, then of the feed-forward, (B, 1, D) each."""
        scale_a, gate_a, scale_f, gate_f = mx.split(self.adaLN_modulation[0](adaln)[:, None], 4, axis=-1)
        return [1 + scale_a, mx.tanh(gate_a), 1 + scale_f, mx.tanh(gate_f)]


# How a block is run: (block, x, rotation, mask, adaln) -> its output. See `running` for other ways than this
RunBlock = Callable[[Block, mx.array, Rotation, Mask, "mx.array | None"], mx.array]


def normed(norm: nn.RMSNorm, x: mx.array, scale: mx.array | None = None, factor: float = 1.0) -> mx.array:
    """norm(x / factor) * scale for scale (B, 1, D); None is 1.

    One scale for the whole batch, the rule in generation, goes into the norm's own weight and costs no pass over x.
    """
    eps = norm.eps * factor**2
    if scale is None:
        return rms_norm(x, norm.weight, eps)
    if len(scale) > 1:
        return rms_norm(x, norm.weight, eps) * scale
    return rms_norm(x, (norm.weight * scale).flatten(), eps)


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
        return stream_dtype(self.x_pad_token.dtype)

    def __call__(self, x: mx.array, t: mx.array, captions: Sequence[mx.array]) -> mx.array:
        """The raw output, x_0 - noise, (B, C, h, w) in the dtype of the stream.

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
        check_maps("latents", x.shape, self.config.in_channels, self.config.patch_size)
        _, _, h, w = x.shape
        adaln = self.embed_time(t)
        layers = Layers(self, x, adaln, conditioning)
        tokens = conditioning.cache(layers) if conditioning.cache else layers.output()  # (B, S, D)
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
        return self.embed_patches(x, self.all_x_embedder[self.config.patch_key])

    def embed_patches(self, x: mx.array, embedder: nn.Linear) -> mx.array:
        """As `embed_image`, with any Linear layer `embedder`."""
        tokens = embedder(patches(x.astype(self.dtype), self.config.patch_size))
        return fill(tokens, self.x_pad_token, padded(tokens.shape[1]))

    def finish(self, tokens: mx.array, adaln: mx.array, h: int, w: int) -> mx.array:
        """(B, S, D) -> (B, C, h, w): the image's tokens come first, the rest is dropped."""
        p, C = self.config.patch_size, self.config.in_channels
        rows, columns = h // p, w // p
        made = self.all_final_layer[self.config.patch_key](tokens[:, : rows * columns], adaln)
        grid = made.reshape(-1, rows, columns, p, p, C)
        return grid.transpose(0, 5, 1, 3, 2, 4).reshape(-1, C, h, w)
