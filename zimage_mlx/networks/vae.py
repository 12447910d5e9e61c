"""The Flux autoencoder on MLX: pictures to 16-channel latents at an eighth of the size, and back.

    latents = (mean - shift_factor) * scaling_factor

Layers use (B, H, W, C); `encode` and `decode` take and return (B, C, H, W). Source: AutoencoderKL, vae.py and
unet_2d_blocks.py of diffusers; latent scaling as in pipeline_z_image.py. Attribute names are the checkpoint's.

With `Strips`, a large layer makes a few rows of its output at a time, to save memory. The next group norm needs the
mean and variance of the whole picture, so these are summed up while the rows are made. The result is the same as at
once. It has no seams, which decoding tile by tile would leave.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.checks import check_maps
from zimage_ref.model.config import VAEConfig

from .compiled import fused
from .convolution import Conv3x3, Source, convolve, doubled
from .strips import Moments, Strips

NORM_EPS = 1e-6  # of every group norm; resnet_eps in the official code
_SCORES_AT_ONCE = 1 << 24  # of the mid block's attention, in strips
VAELayer = Callable[[mx.array, "Strips | None"], mx.array]


class GroupNorm(nn.Module):
    """Group norm over (B, H, W, C), in two steps: coefficients of the whole picture, then any part of it scaled."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self._groups = config.norm_num_groups
        self.weight = mx.ones(width)
        self.bias = mx.zeros(width)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        return affine(x, *self.coefficients(x, strips))

    def coefficients(self, x: mx.array, strips: Strips | None) -> tuple[mx.array, mx.array]:
        """Scale and shift (B, 1, 1, C) float32 that norm x."""
        moments = strips.take(x) if strips else None
        if not moments:
            moments = Moments()
            moments.add(x)
        means, variances = moments.result()
        if strips and strips.shared:
            means, variances = strips.shared.of(means, variances)
        mean = self._group_means(means)
        scale = mx.rsqrt(self._group_means(variances + mx.square(means - mean)) + NORM_EPS) * self.weight
        return scale, self.bias - mean * scale

    def _group_means(self, x: mx.array) -> mx.array:
        """(B, 1, 1, C) -> the mean over each group of channels, for all of them."""
        means = mx.mean(x.reshape(*x.shape[:3], self._groups, -1), axis=-1)
        return mx.repeat(means, x.shape[-1] // self._groups, axis=-1)


class Resnet(nn.Module):
    """Two normed 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, config)
        self.conv1 = Conv3x3(inputs, outputs)
        self.norm2 = GroupNorm(outputs, config)
        self.conv2 = Conv3x3(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        def add_shortcut(y: mx.array, top: int, bottom: int) -> mx.array:
            beside = x[:, top:bottom]
            return y + (self.conv_shortcut(beside) if "conv_shortcut" in self else beside)

        h = convolve(self.conv1, activated(x, self.norm1, strips), strips)
        return convolve(self.conv2, activated(h, self.norm2, strips), strips, add_shortcut)


@fused
def affine(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x * scale + shift in float32, in the dtype of x."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@fused
def activate(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """silu(x * scale + shift) in float32, in the dtype of x."""
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


class MidAttention(nn.Module):
    """One attention head over all positions, with a shortcut."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.group_norm = GroupNorm(width, config)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = [nn.Linear(width, width)]

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        B, h, w, C = x.shape
        tokens = self.group_norm(x, strips).reshape(B, 1, h * w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)  # (B, 1, hw, C)
        return x + self.to_out[0](attention_in_strips(q, k, v, strips)).reshape(B, h, w, C)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = [Resnet(width, width, config) for _ in range(2)]
        self.attentions = [MidAttention(width, config)]

    @property
    def layers(self) -> list[VAELayer]:
        """What a picture goes through, one after the other."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class Downsampler(nn.Module):
    """A convolution that halves a picture, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        y: mx.array = self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))
        return y


class Upsampler(nn.Module):
    """A picture at double size, and a convolution of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv3x3(width, width)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        return convolve(self.conv, Source(x, doubled, 2), strips)


class Level(nn.Module):
    """Resnets at one resolution, and the way to the next."""

    def __init__(self, inputs: int, outputs: int, count: int, sampler: str | None, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = [Resnet(outputs if j else inputs, outputs, config) for j in range(count)]
        if sampler == "down":
            self.downsamplers = [Downsampler(outputs)]
        elif sampler == "up":
            self.upsamplers = [Upsampler(outputs)]

    @property
    def layers(self) -> list[VAELayer]:
        """What a picture goes through, one after the other."""
        return [*self.resnets, *self.get("downsamplers", []), *self.get("upsamplers", [])]


class Encoder(nn.Module):
    """Pictures to mean and log-variance of the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        self.down_blocks = [
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, "down" if i < last else None, config)
            for i, width in enumerate(widths)
        ]
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = GroupNorm(widths[-1], config)
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        x = convolve(self.conv_in, Source(x), strips)
        for layer in layers_of(*self.down_blocks, self.mid_block):
            x = layer(x, strips)
        return convolve(self.conv_out, activated(x, self.conv_norm_out, strips), strips, norm_follows=False)


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = Conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = [
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, "up" if i < last else None, config)
            for i, width in enumerate(widths)
        ]
        self.conv_norm_out = GroupNorm(widths[-1], config)
        self.conv_out = Conv3x3(widths[-1], config.in_channels)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        x = convolve(self.conv_in, Source(x), strips)
        for layer in layers_of(self.mid_block, *self.up_blocks):
            x = layer(x, strips)
        return convolve(self.conv_out, activated(x, self.conv_norm_out, strips), strips, norm_follows=False)


class VAE(nn.Module):
    """Encoder and decoder, with the scaling between what they make and what the transformer sees."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that it computes in, and of what it returns."""
        dtype: mx.Dtype = self.encoder.conv_in.weight.dtype
        return dtype

    def encode(self, image: mx.array, strips: Strips | None = None) -> mx.array:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 8, W / 8): the mode of the posterior, shifted and scaled.

        strips: to save memory; None is everything at once, left lazy.
        """
        check_maps("pixels", image.shape, self.config.in_channels, self.config.factor)
        moments = self.encoder(mx.array(image).astype(self.dtype).transpose(0, 2, 3, 1), strips)
        mean = moments[..., : self.config.latent_channels].transpose(0, 3, 1, 2)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: mx.array, strips: Strips | None = None) -> mx.array:
        """Latents (B, 16, h, w) -> (B, 3, 8 h, 8 w), about [-1, 1]; strips as in `encode`."""
        check_maps("latents", latents.shape, self.config.latent_channels, 1)
        x = mx.array(latents).astype(self.dtype).transpose(0, 2, 3, 1)
        x = x / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(x, strips).transpose(0, 3, 1, 2)


def layers_of(*blocks: MidBlock | Level) -> list[VAELayer]:
    """The layers of all blocks. One loop goes through them, so that nothing else holds what was made before."""
    return [layer for block in blocks for layer in block.layers]


def activated(x: mx.array, norm: GroupNorm, strips: Strips | None) -> Source:
    """silu(norm(x)), normed by the statistics of the whole x."""
    scale, shift = norm.coefficients(x, strips)
    return Source(x, lambda part: activate(part, scale, shift))


def attention_in_strips(q: mx.array, k: mx.array, v: mx.array, strips: Strips | None) -> mx.array:
    """Attention over (B, 1, hw, C), with strips some queries at a time, since heads this wide have no fused kernel."""
    step = max(1, _SCORES_AT_ONCE // k.shape[2]) if strips else q.shape[2]
    parts = []
    for start in range(0, q.shape[2], step):
        queries = q[:, :, start : start + step]
        parts.append(mx.fast.scaled_dot_product_attention(queries, k, v, scale=q.shape[-1] ** -0.5))
        if strips:
            strips.eval_ahead(parts[-1])
    return mx.concatenate(parts, axis=2)
