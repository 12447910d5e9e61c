"""How much memory a training run will take: from the headers alone, before anything is loaded.

An estimate to choose options by, not a promise. Resident weights and optimizer state are exact arithmetic; activations
are a measured multiple of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from . import names
from .model_folder import ModelFolder
from .positions import padded

# Bytes a weight: 8 and 4 bits carry a bfloat16 scale and offset for every 64 weights
_BYTES = {"f32": 4.0, "bf16": 2.0, "8": 1.0625, "4": 0.5625}
# Activations kept for the gradient, in widths of the residual stream for each token and block: measured, 32 to 38 on
# 1088 and 4160 tokens at full size, without gradient checkpointing
_WIDTHS = 38
_CAPTION_TOKENS = 128  # of a caption of ordinary length, padded
_SLOTS = {"adamw": 2, "adam": 2, "adamax": 2, "adadelta": 2, "adafactor": 0, "sgd": 0}  # others keep one


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for. The stages follow one another; the largest is the peak."""

    text_encoder: int
    vae: int
    base: int
    lora: int  # matrices, gradients, optimizer state, average
    activations: int

    @property
    def training(self) -> int:
        """Bytes while steps are made."""
        return self.base + self.lora + self.activations

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(self.text_encoder, self.vae, self.training)


def estimate(
    model: ModelFolder, trainable: int, precision: str, optimizer: str, ema: bool, batch_tokens: int, batch_size: int
) -> MemoryEstimate:
    """The memory of a run whose largest batch has `batch_size` pictures of `batch_tokens` image tokens each.

    trainable: LoRA parameters. precision: bf16, f32, 8 or 4, of the frozen base.
    """
    config = model.transformer
    width = _BYTES["f32" if precision == "f32" else "bf16"]
    copies = 2 + _SLOTS.get(optimizer, 1) + int(ema)
    tokens = batch_size * (padded(batch_tokens) + _CAPTION_TOKENS)
    blocks = len(list(names.transformer_blocks(config)))
    return MemoryEstimate(
        text_encoder=round(width * _parameters(names.text_encoder_parameters(model.text_encoder))),
        vae=round(width * _parameters(names.vae_parameters(model.vae))),
        base=round(_BYTES[precision] * _parameters(names.transformer_parameters(config))),
        lora=4 * copies * trainable,
        activations=round(_WIDTHS * tokens * blocks * config.dim * width),
    )


def trainable_parameters(shapes: names.Shapes, layers: Iterable[str], rank: int) -> int:
    """Elements of A and B of LoRAs on `layers`."""
    return sum(rank * sum(shapes[f"{layer}.weight"]) for layer in layers)


def _parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes.values())
