"""How much work is in a forward pass, a training step, a picture: operations and bytes, from sizes alone.

A product of (a, b) by (b, c) counts 2 a b c floating point operations. Norms, rotations and activations are counted as
the bytes that they read and write.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_ref.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_ref.model.parameters import LORA_TARGETS, text_encoder_parameters, text_encoder_unused, transformer_blocks

# Passes over arrays in a block's elementwise parts, forward, counted in zimage_mlx.networks.transformer: norms before
# and after each half with scale, gate and residual 14; norm and rotation of q and k 14, in widths of the stream;
# activation and product of the feed-forward 3, in its widths
_STREAM_PASSES, _FFN_PASSES = 28, 3
_BACKWARD_PASSES = 2.5  # times as many passes backward
_ATTENTION_BACKWARD = 2.5  # five products where the forward pass has two
_SCORE_PASSES = 12  # over the scores (B, H, S, S), by the unfused gradient of attention
_OPTIMIZER_PASSES = 16  # over the LoRA's parameters, float32: packing, moments, update
RANK = 16


@dataclass(frozen=True)
class Work:
    """Floating point operations by kind, and bytes that elementwise operations move."""

    products: float = 0.0
    attention: float = 0.0
    convolutions: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.convolutions + other.convolutions,
            self.moved + other.moved,
        )

    def __mul__(self, times: float) -> Work:
        return Work(times * self.products, times * self.attention, times * self.convolutions, times * self.moved)

    @property
    def flops(self) -> float:
        """Floating point operations in all."""
        return self.products + self.attention + self.convolutions


@dataclass(frozen=True)
class Tokens:
    """How many tokens a picture and its caption have, padded."""

    image: int
    caption: int = 64

    @classmethod
    def of(cls, side: int, caption: int = 64) -> Tokens:
        """Those of a square picture of `side` pixels."""
        return cls((side // 16) ** 2, caption)

    @property
    def both(self) -> int:
        """Of picture and caption."""
        return self.image + self.caption


def block(config: TransformerConfig, tokens: int, itemsize: int) -> Work:
    """One block, forward, on `tokens` tokens of values of `itemsize` bytes."""
    return Work(
        products=2 * tokens * block_weights(config),
        attention=4 * tokens**2 * config.dim,
        moved=itemsize * tokens * (_STREAM_PASSES * config.dim + _FFN_PASSES * config.ffn_dim),
    )


def block_weights(config: TransformerConfig) -> int:
    """Values of the matrices of one block, without the modulation."""
    return 4 * config.dim**2 + 3 * config.dim * config.ffn_dim


def block_backward(config: TransformerConfig, tokens: int, itemsize: int) -> Work:
    """The gradient of one block's input and of LoRAs on its layers."""
    forward = block(config, tokens, itemsize)
    scores = config.n_heads * tokens**2
    return Work(
        products=forward.products + 6 * tokens * lora_values(config),
        attention=_ATTENTION_BACKWARD * forward.attention,
        moved=_BACKWARD_PASSES * forward.moved + _SCORE_PASSES * itemsize * scores,
    )


def lora_values(config: TransformerConfig) -> int:
    """Values of the LoRAs on one block's layers, of rank RANK."""
    attention, feed_forward = (len(names) for names in LORA_TARGETS.values())
    return RANK * (attention * 2 * config.dim + feed_forward * (config.dim + config.ffn_dim))


def trained_values(config: TransformerConfig) -> int:
    """Values of the LoRAs on all blocks."""
    return len(list(transformer_blocks(config))) * lora_values(config)


def forward(config: TransformerConfig, tokens: Tokens, itemsize: int, layers: int | None = None) -> Work:
    """The transformer for one picture, as in each step of sampling. layers: how many there are, the config's if None.

    The context refiner is left out: it runs once for each prompt.
    """
    depth = config.n_layers if layers is None else layers
    refined = block(config, tokens.image, itemsize) * config.n_refiner_layers
    return refined + block(config, tokens.both, itemsize) * depth


def step(config: TransformerConfig, tokens: Tokens, itemsize: int, lean: bool, layers: int | None = None) -> Work:
    """The gradient of LoRAs on all blocks. lean: blocks run twice, since they keep only their input."""
    depth, passes = config.n_layers if layers is None else layers, 2 if lean else 1
    each = block(config, tokens.both, itemsize) * passes + block_backward(config, tokens.both, itemsize)
    return each * (depth + config.n_refiner_layers)  # two refiners, of picture and caption, count as one block


def optimizer(config: TransformerConfig) -> Work:
    """AdamW on the LoRAs of all blocks, in float32."""
    return Work(moved=4 * _OPTIMIZER_PASSES * trained_values(config))


def encode_text(config: TextEncoderConfig, tokens: int, itemsize: int) -> Work:
    """A prompt. Every weight is read once, which for a short prompt takes longer than the products."""
    unused, shapes = text_encoder_unused(config), text_encoder_parameters(config)
    weights = sum(
        shape[0] * shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and name not in unused and "embed_tokens" not in name
    )
    return Work(products=2 * tokens * weights, moved=itemsize * weights)


def decode(config: VAEConfig, pixels: int, itemsize: int) -> Work:
    """The autoencoder from latents to a picture of `pixels` pixels."""
    widths = config.block_out_channels[::-1]
    convolutions = _middle(config, pixels)
    low = pixels // config.factor**2
    convolutions += 18 * low * config.latent_channels * widths[0]
    values = 0.0
    for i, width in enumerate(widths):
        size = low * 4**i
        before = widths[max(i - 1, 0)]
        convolutions += _resnets(size, before, width, config.layers_per_block + 1)
        values += 2 * (config.layers_per_block + 1) * size * width
        if i < len(widths) - 1:
            convolutions += 18 * 4 * size * width**2
    convolutions += 18 * pixels * widths[-1] * config.in_channels
    return _autoencoder(config, pixels, convolutions, values, itemsize)


def encode(config: VAEConfig, pixels: int, itemsize: int) -> Work:
    """The autoencoder from a picture of `pixels` pixels to latents."""
    widths = config.block_out_channels
    convolutions = _middle(config, pixels) + 18 * pixels * config.in_channels * widths[0]
    values = 0.0
    for i, width in enumerate(widths):
        size = pixels // 4**i
        convolutions += _resnets(size, widths[max(i - 1, 0)], width, config.layers_per_block)
        values += 2 * config.layers_per_block * size * width
        if i < len(widths) - 1:
            convolutions += 18 * size / 4 * width**2
    convolutions += 18 * pixels / config.factor**2 * widths[-1] * 2 * config.latent_channels
    return _autoencoder(config, pixels, convolutions, values, itemsize)


def _resnets(pixels: float, before: int, width: int, count: int) -> float:
    first = 18 * pixels * width * (before + width) + (2 * pixels * width * before if before != width else 0)
    return first + (count - 1) * 36 * pixels * width**2


def _middle(config: VAEConfig, pixels: int) -> float:
    low, width = pixels // config.factor**2, config.block_out_channels[-1]
    return 2 * 36 * low * width**2


def _autoencoder(config: VAEConfig, pixels: int, convolutions: float, values: float, itemsize: int) -> Work:
    low, width = pixels // config.factor**2, config.block_out_channels[-1]
    return Work(
        products=8 * low * width**2 + 4 * low**2 * width,
        convolutions=convolutions,
        moved=4 * itemsize * values,  # statistics read each array once, the activation reads and writes it
    )
