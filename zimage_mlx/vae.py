"""The Flux autoencoder on MLX: pictures to 16-channel latents at an eighth of the size, and back.

    latents = (mean - shift_factor) * scaling_factor

Channels are last inside, second at the door. Source: AutoencoderKL, vae.py and unet_2d_blocks.py of diffusers; latent
scaling as in pipeline_z_image.py. Attribute names are the checkpoint's.

Memory: in `Strips`, every layer makes so many rows of its output at a time, each group norm keeping the statistics of
the whole picture. That is the same result, not an approximation by tiles, so there are no seams.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.config import VAEConfig

from .compiled import Settle, fused

NORM_EPS = 1e-6  # of every group norm; resnet_eps in the official code
_SCORES_AT_ONCE = 1 << 24  # of the mid block's attention, in strips


class Strips:
    """How many rows of a layer are made at a time; each strip is computed while the next is queued."""

    def __init__(self, rows: int) -> None:
        self.rows, self.settle = rows, Settle()


class GroupNorm(nn.Module):
    """Group norm over (B, H, W, C), in two steps: coefficients of the whole picture, then any part of it scaled."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self._groups = config.norm_num_groups
        self.weight = mx.ones(width)
        self.bias = mx.zeros(width)

    def __call__(self, x: mx.array) -> mx.array:
        return affine(x, *self.coefficients(x, None))

    def coefficients(self, x: mx.array, strips: Strips | None) -> tuple[mx.array, mx.array]:
        """Scale and shift (B, 1, 1, C) float32 that norm x."""
        B, H, W, C = x.shape
        count, rows = H * W * C // self._groups, strips.rows if strips else H
        pivot = self._groupwise(mx.mean(x[:, :1].astype(mx.float32), axis=1)) / (count // H)  # close to the mean
        sums: list[Any] = [0.0, 0.0]
        for top in range(0, H, rows):
            parts = _deviations(x[:, top : top + rows], mx.repeat(pivot, C // self._groups, axis=-1))
            sums = [total + self._groupwise(mx.sum(part, axis=1)) for total, part in zip(sums, parts, strict=True)]
            if strips:
                strips.settle(sums)
        deviation, square = (total / count for total in sums)
        scale = mx.rsqrt(square - mx.square(deviation) + NORM_EPS)
        scale, mean = (mx.repeat(a, C // self._groups, axis=-1) for a in (scale, pivot + deviation))
        scale = scale * self.weight
        return scale, self.bias - mean * scale

    def _groupwise(self, x: mx.array) -> mx.array:
        """(B, W, C) -> sums over each group of channels, (B, 1, 1, groups)."""
        return mx.sum(x.reshape(*x.shape[:2], self._groups, -1), axis=(1, 3))[:, None, None]


@fused
def _deviations(x: mx.array, pivot: mx.array) -> tuple[mx.array, mx.array]:
    """x - pivot and its square, float32: sums of these lose nothing to a large mean."""
    deviation = x.astype(mx.float32) - pivot
    return deviation, mx.square(deviation)


class Resnet(nn.Module):
    """Two normed 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, config)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = GroupNorm(outputs, config)
        self.conv2 = conv3x3(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        h = convolve(self.conv1, x, strips, self.norm1)
        return convolve(self.conv2, h, strips, self.norm2, beside=(x, self.get("conv_shortcut")))


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
        tokens = self.group_norm(x).reshape(B, 1, h * w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)  # (B, 1, hw, C)
        return x + self.to_out[0](attention(q, k, v, strips)).reshape(B, h, w, C)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = [Resnet(width, width, config) for _ in range(2)]
        self.attentions = [MidAttention(width, config)]

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, strips), strips), strips)


class Sampler(nn.Module):
    """The convolution beside which a picture is halved or doubled."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=0 if stride == 2 else 1)


class Level(nn.Module):
    """Resnets at one resolution, and the way to the next."""

    def __init__(self, inputs: int, outputs: int, count: int, sampler: str | None, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = [Resnet(outputs if j else inputs, outputs, config) for j in range(count)]
        if sampler == "down":
            self.downsamplers = [Sampler(outputs, stride=2)]
        elif sampler == "up":
            self.upsamplers = [Sampler(outputs, stride=1)]

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x, strips)
        if "downsamplers" in self:  # padded on the right and below only
            x = self.downsamplers[0].conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))
        elif "upsamplers" in self:
            x = convolve(self.upsamplers[0].conv, x, strips, double=True)
        return x


class Encoder(nn.Module):
    """Pictures to mean and log-variance of the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = conv3x3(config.in_channels, widths[0])
        self.down_blocks = [
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, "down" if i < last else None, config)
            for i, width in enumerate(widths)
        ]
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = GroupNorm(widths[-1], config)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, strips)
        return convolve(self.conv_out, self.mid_block(x, strips), strips, self.conv_norm_out)


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = [
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, "up" if i < last else None, config)
            for i, width in enumerate(widths)
        ]
        self.conv_norm_out = GroupNorm(widths[-1], config)
        self.conv_out = conv3x3(widths[-1], config.in_channels)

    def __call__(self, x: mx.array, strips: Strips | None = None) -> mx.array:
        x = self.mid_block(self.conv_in(x), strips)
        for block in self.up_blocks:
            x = block(x, strips)
        return convolve(self.conv_out, x, strips, self.conv_norm_out)


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

        strips: how many rows of a layer's output are made at a time, to save memory; None is all, left lazy.
        """
        moments = self.encoder(mx.array(image).astype(self.dtype).transpose(0, 2, 3, 1), strips)
        mean = moments[..., : self.config.latent_channels].transpose(0, 3, 1, 2)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: mx.array, strips: Strips | None = None) -> mx.array:
        """Latents (B, 16, h, w) -> (B, 3, 8 h, 8 w), about [-1, 1]; strips as in `encode`."""
        x = mx.array(latents).astype(self.dtype).transpose(0, 2, 3, 1)
        x = x / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(x, strips).transpose(0, 3, 1, 2)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def convolve(
    conv: nn.Conv2d,
    x: mx.array,
    strips: Strips | None,
    norm: GroupNorm | None = None,
    double: bool = False,
    beside: tuple[mx.array, nn.Module | None] | None = None,
) -> mx.array:
    """The 3x3 convolution of silu(norm(x)), or of x at double size, in strips of the output.

    beside: an array to add to the result, and the layer it goes through first.
    """
    factor = 2 if double else 1
    coefficients = norm.coefficients(x, strips) if norm else ()
    H = x.shape[1] * factor

    def prepared(part: mx.array) -> mx.array:
        if double:
            return mx.repeat(mx.repeat(part, 2, axis=1), 2, axis=2)
        return activate(part, *coefficients) if coefficients else part

    def finished(y: mx.array, top: int, bottom: int) -> mx.array:
        if beside is None:
            return y
        side, layer = beside[0][:, top:bottom], beside[1]
        return y + (layer(side) if layer else side)

    if strips is None or strips.rows >= H:
        y = finished(conv(prepared(x)), 0, H)
        if strips:
            strips.settle(y)
        return y
    parts = []
    for top in range(0, H, strips.rows):
        bottom = min(top + strips.rows, H)
        low, high = max(top - 1, 0), min(bottom + 1, H)  # the kernel reaches one row beyond
        part = prepared(x[:, low // factor : -(-high // factor)])
        part = part[:, low % factor :][:, : high - low]
        part = mx.pad(part, [(0, 0), (int(top == 0), int(bottom == H)), (0, 0), (0, 0)])
        y = mx.conv2d(part, conv.weight, padding=(0, 1)) + conv.bias
        parts.append(finished(y, top, bottom))
        strips.settle(parts[-1])
    return mx.concatenate(parts, axis=1)


def attention(q: mx.array, k: mx.array, v: mx.array, strips: Strips | None) -> mx.array:
    """Attention over (B, 1, hw, C); in strips some queries at a time, since heads this wide have no fused kernel."""
    step = max(1, _SCORES_AT_ONCE // k.shape[2]) if strips else q.shape[2]
    parts = []
    for start in range(0, q.shape[2], step):
        queries = q[:, :, start : start + step]
        parts.append(mx.fast.scaled_dot_product_attention(queries, k, v, scale=q.shape[-1] ** -0.5))
        if strips:
            strips.settle(parts[-1])
    return mx.concatenate(parts, axis=2)
