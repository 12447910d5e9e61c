"""The single-stream diffusion transformer of Z-Image (S3-DiT).

    raw = final( layers( [ noise_refiner(x) ; context_refiner(caption) ], t ) )

For the letters in shape comments see `zimage_ref`. For the directions of time and noise see `zimage_ref.model.flow`.
Source: transformer_z_image.py of diffusers (ZImageTransformer2DModel); Z-Image, arXiv 2511.22699.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.checks import check_maps
from zimage_ref.model.config import QK_NORM_EPS, TIME_FREQUENCIES, TransformerConfig
from zimage_ref.model.positions import caption_ids, image_ids, padded, rope_angles
from zimage_ref.model.step_cache import StepCache

from .hints import Hints
from .layers import Layers
from .ops import attention, layer_norm, linear, rms_norm, silu
from .steering import Contrast, attend_in_contrast
from .weights import Weights


@dataclass(frozen=True)
class Conditioning:
    """The inputs of the denoiser besides noisy latents and time. They are the same for all steps of a picture."""

    caption: Array  # (B, T, D) refined caption tokens
    image_rotation: Array  # (B, L, K / 2) complex
    rotation: Array  # (B, S, K / 2) complex: image, then caption
    # Boolean, False for the filling after a shorter caption: (B, 1, 1, S), or (B, 1, S, S) with regions; None: all True
    mask: Array | Contrast | None
    control: Hints | None = None  # what a ControlNet adds
    cache: StepCache[Array] | None = None  # what stands for the layers in some steps

    @property
    def plain_mask(self) -> Array | None:
        """The mask, if there is no negative caption beside the prompt's."""
        return None if isinstance(self.mask, Contrast) else self.mask


class TimestepEmbedder:
    """Sinusoidal features of the time, then a two-layer perceptron."""

    def __init__(self, w: Weights) -> None:
        self.w = w

    def __call__(self, t: Array) -> Array:
        half = TIME_FREQUENCIES // 2
        exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
        frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)  # rounded once, as in torch's exp
        angle = t.astype(np.float32)[:, None] * frequency  # (B, 128), in float32 as in the official code
        features = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(self.w.dtype)
        hidden = silu(linear(features, self.w["mlp.0.weight"], self.w["mlp.0.bias"]))
        return linear(hidden, self.w["mlp.2.weight"], self.w["mlp.2.bias"])  # (B, adaln)


class Attention:
    """Self-attention. Queries and keys are RMS-normalized and rotated."""

    def __init__(self, w: Weights, config: TransformerConfig) -> None:
        self.w, self.heads = w, config.n_heads

    def __call__(self, x: Array, rotation: Array, mask: Array | Contrast | None) -> Array:
        B, S, _ = x.shape
        qkv = [linear(x, self.w[f"to_{p}.weight"]).reshape(B, S, self.heads, -1) for p in "qkv"]  # (B, S, H, K) each
        if isinstance(mask, Contrast):
            y = attend_in_contrast(qkv, rotation, mask, self._attend)
        else:
            y = self._attend(qkv, rotation, mask)
        return linear(y, self.w["to_out.0.weight"])

    def _attend(self, qkv: Sequence[Array], rotation: Array, mask: Array | None) -> Array:
        """Projected queries, keys and values (B, S, H, K) -> what the queries attend to, (B, S, D)."""
        y = attention(*self.norm_and_rotate(qkv, rotation), mask).transpose(0, 2, 1, 3)  # (B, S, H, K)
        return y.reshape(*y.shape[:2], -1)

    def norm_and_rotate(self, qkv: Sequence[Array], rotation: Array) -> tuple[Array, Array, Array]:
        """Projected queries, keys and values (B, S, H, K) -> the same as (B, H, S, K), q and k normed and rotated."""
        q, k, v = qkv
        q = rotate(rms_norm(q, self.w["norm_q.weight"], QK_NORM_EPS), rotation)
        k = rotate(rms_norm(k, self.w["norm_k.weight"], QK_NORM_EPS), rotation)
        return q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


class FeedForward:
    """SwiGLU."""

    def __init__(self, w: Weights) -> None:
        self.w = w

    def __call__(self, x: Array) -> Array:
        return linear(silu(linear(x, self.w["w1.weight"])) * linear(x, self.w["w3.weight"]), self.w["w2.weight"])


class Block:
    """Attention and feed-forward, each between two norms. If it is modulated, the time scales and gates both."""

    def __init__(self, w: Weights, config: TransformerConfig) -> None:
        self.w, self.eps = w, config.norm_eps
        self.attention = Attention(w.at("attention"), config)
        self.feed_forward = FeedForward(w.at("feed_forward"))

    def __call__(self, x: Array, rotation: Array, mask: Array | Contrast | None, adaln: Array | None = None) -> Array:
        scale_a, gate_a, scale_f, gate_f = self.modulation(adaln)  # (B, 1, D) each
        a = self.attention(self.norm("attention_norm1", x) * scale_a, rotation, mask)
        x = x + gate_a * self.norm("attention_norm2", a)
        f = self.feed_forward(self.norm("ffn_norm1", x) * scale_f)
        y: Array = x + gate_f * self.norm("ffn_norm2", f)
        return y

    def norm(self, name: str, x: Array) -> Array:
        """One of the block's four RMS norms."""
        return rms_norm(x, self.w[f"{name}.weight"], self.eps)

    def modulation(self, adaln: Array | None) -> Sequence[Array]:
        """Scales and gates of attention and feed-forward; ones for a block without modulation."""
        if adaln is None:
            return [np.ones((), self.w.dtype)] * 4
        m = linear(adaln, self.w["adaLN_modulation.0.weight"], self.w["adaLN_modulation.0.bias"])[:, None]
        scale_a, gate_a, scale_f, gate_f = np.split(m, 4, axis=-1)
        return 1 + scale_a, np.tanh(gate_a), 1 + scale_f, np.tanh(gate_f)


class FinalLayer:
    """A layer norm, scaled by the time, then a Linear layer from tokens to patches."""

    def __init__(self, w: Weights) -> None:
        self.w = w

    def __call__(self, x: Array, adaln: Array) -> Array:
        scale = 1 + linear(silu(adaln), self.w["adaLN_modulation.1.weight"], self.w["adaLN_modulation.1.bias"])
        return linear(layer_norm(x, 1e-6) * scale[:, None], self.w["linear.weight"], self.w["linear.bias"])


class Transformer:
    """The whole denoiser."""

    def __init__(self, config: TransformerConfig, weights: Weights) -> None:
        self.config, self.w = config, weights
        self.t_embedder = TimestepEmbedder(weights.at("t_embedder"))
        self.noise_refiner = self._blocks("noise_refiner", config.n_refiner_layers)
        self.context_refiner = self._blocks("context_refiner", config.n_refiner_layers)
        self.layers = self._blocks("layers", config.n_layers)
        self.final_layer = FinalLayer(weights.at(f"all_final_layer.{config.patch_key}"))

    def _blocks(self, name: str, count: int) -> list[Block]:
        return [Block(self.w.at(f"{name}.{i}"), self.config) for i in range(count)]

    def __call__(self, x: Array, t: Array, captions: Sequence[Array]) -> Array:
        """The raw output, x_0 - noise, (B, C, h, w).

        x: (B, C, h, w) noisy latents, t: (B,) = 1 - sigma, captions: B arrays (T_i, cap_feat_dim).
        """
        return self.denoise(x, t, self.condition(captions, x.shape[2], x.shape[3]))

    def condition(self, captions: Sequence[Array], h: int, w: int) -> Conditioning:
        """The inputs that do not depend on the time: caption tokens, rotations and mask, for latents of h x w.

        captions: B arrays (T_i, cap_feat_dim).
        """
        config = self.config
        rows, columns = h // config.patch_size, w // config.patch_size
        lengths = [padded(len(c)) for c in captions]
        T, L = max(lengths), padded(rows * columns)

        tokens = np.zeros((len(captions), T, config.dim), self.w.dtype)
        caption_angles = np.zeros((len(captions), T, config.head_dim // 2), np.float32)
        image_angles = np.zeros((len(captions), L, config.head_dim // 2), np.float32)
        for i, caption in enumerate(captions):
            tokens[i, : lengths[i]] = self.w["cap_pad_token"]
            tokens[i, : len(caption)] = self.embed_caption(caption)
            caption_angles[i, : lengths[i]] = rope_angles(caption_ids(len(caption)), config)
            image_angles[i] = rope_angles(image_ids(rows, columns, len(caption)), config)

        mask = None
        if min(lengths) < T:
            positions = np.arange(L + T)
            mask = np.stack([positions < L + n for n in lengths])[:, None, None]  # (B, 1, 1, S)
        image_rotation, caption_rotation = self.rotation(image_angles), self.rotation(caption_angles)
        for block in self.context_refiner:
            tokens = block(tokens, caption_rotation, None if mask is None else mask[..., L:])
        rotation = np.concatenate([image_rotation, caption_rotation], axis=1)
        return Conditioning(tokens, image_rotation, rotation, mask)

    def denoise(self, x: Array, t: Array, conditioning: Conditioning) -> Array:
        """The raw output (B, C, h, w) for latents x and time t; see `__call__`."""
        check_maps("latents", x.shape, self.config.in_channels, self.config.patch_size)
        _, _, h, w = x.shape
        adaln = self.t_embedder(t * self.config.t_scale)
        layers = Layers(self, x.astype(self.w.dtype), adaln, conditioning)
        tokens = conditioning.cache(layers) if conditioning.cache else layers.output()  # (B, S, D)
        return self.unpatchify(self.final_layer(tokens, adaln), h, w)

    def embed_caption(self, caption: Array) -> Array:
        """(T, cap_feat_dim) -> (T, D)."""
        normed = rms_norm(caption.astype(self.w.dtype), self.w["cap_embedder.0.weight"], self.config.norm_eps)
        return linear(normed, self.w["cap_embedder.1.weight"], self.w["cap_embedder.1.bias"])

    def embed_image(self, x: Array) -> Array:
        """(B, C, h, w) -> (B, L, D): the patches are embedded, then x_pad_token fills the sequence up."""
        return self.embed_patches(x, self.w.at(f"all_x_embedder.{self.config.patch_key}"))

    def embed_patches(self, x: Array, embedder: Weights) -> Array:
        """As `embed_image`, with any Linear layer `embedder`."""
        B, C, h, w = x.shape
        p = self.config.patch_size
        patches = x.reshape(B, C, h // p, p, w // p, p).transpose(0, 2, 4, 3, 5, 1)  # (B, h/p, w/p, p, p, C)
        patches = patches.reshape(B, -1, p * p * C)
        tokens = linear(patches, embedder["weight"], embedder["bias"])
        missing = padded(tokens.shape[1]) - tokens.shape[1]
        fill = np.broadcast_to(self.w["x_pad_token"], (B, missing, self.config.dim))
        return np.concatenate([tokens, fill], axis=1)

    def unpatchify(self, patches: Array, h: int, w: int) -> Array:
        """(B, S, patch_dim) -> (B, C, h, w). The tokens of the image come first; the others are dropped."""
        p = self.config.patch_size
        rows, columns = h // p, w // p
        grid = patches[:, : rows * columns].reshape(-1, rows, columns, p, p, self.config.in_channels)
        return grid.transpose(0, 5, 1, 3, 2, 4).reshape(-1, self.config.in_channels, h, w)

    def rotation(self, angles: Array) -> Array:
        """exp(i angle), in the complex dtype that matches the working precision."""
        rotation: Array = np.exp(1j * angles.astype(self.w.dtype))
        return rotation


def rotate(x: Array, rotation: Array) -> Array:
    """RoPE on neighbouring channels: x (B, S, H, K), as complex pairs, is multiplied by rotation (B, S, K / 2)."""
    turned = np.ascontiguousarray(x).view(rotation.dtype) * rotation[:, :, None]
    return turned.view(x.dtype)
