"""The Flux autoencoder: pictures to latents of 16 channels and an eighth of the size, and back.

    latents = (mean - shift_factor) * scaling_factor

Source: AutoencoderKL, vae.py and unet_2d_blocks.py of diffusers; latent scaling as in pipeline_z_image.py.
"""

from __future__ import annotations

from zimage_ref.formats.tensors import Array
from zimage_ref.model.checks import check_maps
from zimage_ref.model.config import VAEConfig
from zimage_ref.model.shared_moments import SharedMoments

from .ops import attention, conv2d, group_norm, linear, pad_hw, silu
from .weights import Weights

NORM_EPS = 1e-6  # of every group norm; resnet_eps in the official code
Shared = SharedMoments[Array] | None  # the statistics of the whole picture, if a tile of it is computed


class Resnet:
    """Two 3x3 convolutions, each after a norm, with a shortcut."""

    def __init__(self, w: Weights, config: VAEConfig) -> None:
        self.w, self.config = w, config

    def __call__(self, x: Array, shared: Shared = None) -> Array:
        h = conv3x3(self.w, "conv1", silu(norm(self.w, "norm1", x, self.config, shared)))
        h = conv3x3(self.w, "conv2", silu(norm(self.w, "norm2", h, self.config, shared)))
        if "conv_shortcut.weight" in self.w:
            x = conv2d(x, self.w["conv_shortcut.weight"], self.w["conv_shortcut.bias"])
        return x + h


class MidAttention:
    """One attention head over all positions, with a shortcut."""

    def __init__(self, w: Weights, config: VAEConfig) -> None:
        self.w, self.config = w, config

    def __call__(self, x: Array, shared: Shared = None) -> Array:
        B, C, h, w = x.shape
        tokens = norm(self.w, "group_norm", x, self.config, shared).reshape(B, C, h * w).swapaxes(1, 2)  # (B, hw, C)
        q, k, v = (self.project(f"to_{p}", tokens)[:, None] for p in "qkv")  # (B, 1, hw, C)
        y = self.project("to_out.0", attention(q, k, v)[:, 0])
        return x + y.swapaxes(1, 2).reshape(B, C, h, w)

    def project(self, name: str, x: Array) -> Array:
        """One of the four Linear layers."""
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])


class MidBlock:
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, w: Weights, config: VAEConfig) -> None:
        self.resnets = [Resnet(w.at(f"resnets.{i}"), config) for i in range(2)]
        self.attention = MidAttention(w.at("attentions.0"), config)

    def __call__(self, x: Array, shared: Shared = None) -> Array:
        return self.resnets[1](self.attention(self.resnets[0](x, shared), shared), shared)


class Encoder:
    """Pictures to the mean and the log-variance of the latents."""

    def __init__(self, w: Weights, config: VAEConfig) -> None:
        self.w, self.config = w, config
        self.levels = len(config.block_out_channels)
        self.mid_block = MidBlock(w.at("mid_block"), config)

    def __call__(self, x: Array, shared: Shared = None) -> Array:
        x = conv3x3(self.w, "conv_in", x)
        for i in range(self.levels):
            block = self.w.at(f"down_blocks.{i}")
            for j in range(self.config.layers_per_block):
                x = Resnet(block.at(f"resnets.{j}"), self.config)(x, shared)
            if i < self.levels - 1:  # pads only on the right and at the bottom
                down = block.at("downsamplers.0.conv")
                x = conv2d(pad_hw(x, 0, 1), down["weight"], down["bias"], stride=2)
        x = self.mid_block(x, shared)
        return conv3x3(self.w, "conv_out", silu(norm(self.w, "conv_norm_out", x, self.config, shared)))


class Decoder:
    """Latents to pictures."""

    def __init__(self, w: Weights, config: VAEConfig) -> None:
        self.w, self.config = w, config
        self.levels = len(config.block_out_channels)
        self.mid_block = MidBlock(w.at("mid_block"), config)

    def __call__(self, x: Array, shared: Shared = None) -> Array:
        x = self.mid_block(conv3x3(self.w, "conv_in", x), shared)
        for i in range(self.levels):
            block = self.w.at(f"up_blocks.{i}")
            for j in range(self.config.layers_per_block + 1):
                x = Resnet(block.at(f"resnets.{j}"), self.config)(x, shared)
            if i < self.levels - 1:
                x = conv3x3(block, "upsamplers.0.conv", x.repeat(2, axis=2).repeat(2, axis=3))
        return conv3x3(self.w, "conv_out", silu(norm(self.w, "conv_norm_out", x, self.config, shared)))


class VAE:
    """Encoder and decoder. It scales between their latents and those of the transformer."""

    def __init__(self, config: VAEConfig, weights: Weights) -> None:
        self.config, self.w = config, weights
        self.encoder = Encoder(weights.at("encoder"), config)
        self.decoder = Decoder(weights.at("decoder"), config)

    def encode(self, image: Array, shared: Shared = None) -> Array:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 8, W / 8): the mean of the posterior, shifted and scaled.

        shared: the statistics of a picture that this is a tile of.
        """
        check_maps("pixels", image.shape, self.config.in_channels, self.config.factor)
        mean = self.encoder(image.astype(self.w.dtype), shared)[:, : self.config.latent_channels]
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Array, shared: Shared = None) -> Array:
        """Latents (B, 16, h, w) -> (B, 3, 8 h, 8 w), about [-1, 1]; shared as in `encode`."""
        check_maps("latents", latents.shape, self.config.latent_channels, 1)
        scaled = latents.astype(self.w.dtype) / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(scaled, shared)


def conv3x3(w: Weights, name: str, x: Array) -> Array:
    """The 3x3 convolution `name`. The size does not change."""
    return conv2d(pad_hw(x, 1, 1), w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Array, config: VAEConfig, shared: Shared) -> Array:
    """The group norm `name`."""
    return group_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], config.norm_num_groups, NORM_EPS, shared)
