"""The losses of the tiny model's autoencoder and denoiser.

Noise, latents and losses are float32. The networks compute in the dtype of their weights.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from zimage_mlx.networks.hints import Hints
from zimage_mlx.networks.text_encoder import TextEncoder
from zimage_mlx.networks.token_layout import TokenLayout
from zimage_mlx.networks.transformer import Conditioning, Transformer
from zimage_mlx.networks.vae import VAE
from zimage_ref.model.config import TextEncoderConfig, TransformerConfig
from zimage_ref.model.flow import add_noise, model_time, resolution_shift, shifted, training_target
from zimage_ref.tiny.data import TOKENS

KL = 5e-4  # the weight of the divergence; the reconstruction error is a mean over pixels


def vae_loss(vae: VAE, key: mx.array, pixels: mx.array) -> mx.array:
    """The loss for pixels (B, H, W, 3) uint8: reconstruction, and divergence from the normal distribution."""
    x, dtype = to_signed(pixels), vae.decoder.conv_in.weight.dtype
    mean, log_variance = mx.split(vae.encoder(x.astype(dtype)).astype(mx.float32), 2, axis=-1)
    log_variance = mx.clip(log_variance, -20, 10)
    z = mean + mx.exp(0.5 * log_variance) * mx.random.normal(mean.shape, key=key)
    error = vae.decoder(z.astype(dtype)).astype(mx.float32) - x
    divergence = 0.5 * (mx.square(mean) + mx.exp(log_variance) - 1 - log_variance)
    return mx.mean(mx.abs(error)) + mx.mean(mx.square(error)) + KL * mx.mean(divergence)


def to_signed(pixels: mx.array) -> mx.array:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.astype(mx.float32) / 127.5 - 1


class Denoiser(nn.Module):
    """Text encoder and transformer. They are trained together."""

    def __init__(self, transformer: TransformerConfig, text_encoder: TextEncoderConfig) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(text_encoder)
        self.transformer = Transformer(transformer)
        for token in ("x_pad_token", "cap_pad_token"):
            self.transformer[token] = 0.02 * mx.random.normal((1, transformer.dim))


def denoising_loss(
    model: Denoiser, key: mx.array, x_0: mx.array, ids: mx.array, lengths: mx.array, layout: TokenLayout,
    control: Hints | None = None,
) -> mx.array:  # fmt: skip
    """The flow-matching loss for x_0 (B, C, h, w) with captions ids (B, TOKENS) of lengths (B,).

    `layout` is made for one caption. It fits all captions, because all are padded to one length. control: a ControlNet
    with B maps.
    """
    B, _, h, w = x_0.shape
    for_noise, for_time = mx.random.split(key)
    transformer = model.transformer
    tokens = transformer.embed_caption(model.text_encoder(ids))  # (B, TOKENS, D)
    tokens = mx.where((mx.arange(TOKENS) < lengths[:, None])[..., None], tokens, transformer.cap_pad_token)
    for block in transformer.context_refiner:
        tokens = block(tokens, layout.caption_rotation, None)
    noise = mx.random.normal(x_0.shape, key=for_noise)
    shift = resolution_shift(h * w // transformer.config.patch_size**2)
    sigma = shifted(mx.random.uniform(shape=(B,), key=for_time), shift)
    x = add_noise(x_0, noise, sigma[:, None, None, None])
    raw = transformer.denoise(x, model_time(sigma), Conditioning(tokens, layout, control)).astype(mx.float32)
    return mx.mean(mx.square(raw - training_target(x_0, noise)))
