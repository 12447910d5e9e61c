"""The Flux autoencoder on MLX: pictures to 16-channel latents at an eighth of the size, and back.

    latents = (mean - shift_factor) * scaling_factor

Channels are last inside, second at the door. Source: AutoencoderKL, vae.py and unet_2d_blocks.py of diffusers; latent
scaling as in pipeline_z_image.py. Attribute names are the checkpoint's.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.config import VAEConfig

NORM_EPS = 1e-6  # of every group norm; resnet_eps in the official code


class Resnet(nn.Module):
    """Two normed 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = norm(inputs, config)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = norm(outputs, config)
        self.conv2 = conv3x3(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        if "conv_shortcut" in self:
            x = self.conv_shortcut(x)
        return x + h


class MidAttention(nn.Module):
    """One attention head over all positions, with a shortcut."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.group_norm = norm(width, config)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = [nn.Linear(width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        B, h, w, C = x.shape
        tokens = self.group_norm(x).reshape(B, 1, h * w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)  # (B, 1, hw, C)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=C**-0.5)
        return x + self.to_out[0](y).reshape(B, h, w, C)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = [Resnet(width, width, config) for _ in range(2)]
        self.attentions = [MidAttention(width, config)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


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

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        if "downsamplers" in self:  # padded on the right and below only
            x = self.downsamplers[0].conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))
        elif "upsamplers" in self:
            x = self.upsamplers[0].conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))
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
        self.conv_norm_out = norm(widths[-1], config)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


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
        self.conv_norm_out = norm(widths[-1], config)
        self.conv_out = conv3x3(widths[-1], config.in_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


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

    def encode(self, image: mx.array) -> mx.array:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 8, W / 8): the mode of the posterior, shifted and scaled."""
        moments = self.encoder(mx.array(image).astype(self.dtype).transpose(0, 2, 3, 1))
        mean = moments[..., : self.config.latent_channels].transpose(0, 3, 1, 2)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: mx.array) -> mx.array:
        """Latents (B, 16, h, w) -> (B, 3, 8 h, 8 w), about [-1, 1]."""
        x = mx.array(latents).astype(self.dtype).transpose(0, 2, 3, 1)
        return self.decoder(x / self.config.scaling_factor + self.config.shift_factor).transpose(0, 3, 1, 2)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def norm(width: int, config: VAEConfig) -> nn.GroupNorm:
    """A group norm with PyTorch's grouping of channels."""
    return nn.GroupNorm(config.norm_num_groups, width, eps=NORM_EPS, pytorch_compatible=True)
