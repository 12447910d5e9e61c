"""Estimates the memory for making pictures and for training, from headers and sizes, before anything is loaded.

The estimates help you to choose options, and let the program refuse work that cannot fit. Sizes of weights and
optimizer state are exact. Activations are multiples of tokens or pixels, fitted to the measurements in the table below.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .checkpoints.folder import ModelFolder
from .errors import ConfigError
from .formats.quantize import Quantization, QuantizedTensor, bytes_by_dtype
from .formats.tensors import Tensor
from .model import parameters
from .model.config import TransformerConfig
from .model.parameters import EMBEDDING, block_of
from .model.positions import padded
from .model.quantization import covers
from .model.tokenizer import MAX_TOKENS

Mode = Literal["fast", "lean", "stream"]  # a memory mode; `zimage_ref.streaming` says what each holds
CAPTION_TOKENS = 128  # the padded length of an ordinary caption
# Values of one block in memory at once, for each token, in widths of the stream and of the feed-forward
_STREAM_WIDTHS, _FFN_WIDTHS = 16, 6
_WIDE_WIDTHS = 6  # of them, those of the stream itself, its norms and sums; float32 beside matrices in float16
# Training: the number of blocks whose values are in memory at once, besides the values that are kept for the gradient
_LEAN_BLOCKS, _FAST_BLOCKS = 1.8, 8.2
_LEAN_UNPACKED = 1.2  # training on 4 or 8 bits: blocks with matrices unpacked at once
_LAYER_WIDTHS = 16  # values in two layers of the autoencoder, in the unit of `Footprint.pixel_widths`
_LATENT_BYTES, _PIXEL_BYTES = 8, 40  # of a picture made of tiles, for each pixel: latents and noise; the picture itself
_SIDES = "`width` and `height`"
_ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Footprint:
    """The memory for activations that an engine takes, in one mode."""

    mapped: bool  # whether weights stay on disk, except the one in use
    blocks: float  # number of blocks whose values are in memory at once
    text_blocks: float  # the same for the text encoder
    pixel_widths: int  # values that the autoencoder holds at once for each pixel, in widths of its first level
    unpacked: float = 0.0  # number of blocks whose matrices are unpacked at once, if they are stored in 4 or 8 bits
    strips: int = 0  # additional bytes for strips of the autoencoder's large layers
    streamed: int = 0  # blocks whose weights are in memory at once; 0: the weights of all blocks
    margin: float = 0.0  # share of the estimate to add, because nobody has measured on this engine

    def with_margin(self, weights: int, activations: float, lora: int = 0) -> int:
        """Bytes of activations, and the margin of a stage that also holds weights and a LoRA."""
        return round(activations + self.margin * (weights + activations + lora))


# The constants are fitted to the peaks in this table, in GB without the weights. They were measured on one H100 with
# MLX, on the official model in bfloat16 with random weights, by tests/bench/bench_speed.py; whole runs by
# bench_totals.py. The functions below give the estimates. tests/test_estimates.py compares them with the measurements.
# The numbers are in this package, not in the MLX engine, so that `zimage inspect` needs no MLX for its estimate.
#
#                                                           FAST                    LEAN
#                                                    measured   estimate     measured   estimate
#   transformer, 512 x 512                             0.4        0.4          0.2        0.2
#   transformer, 1024 x 1024                           1.3        1.5          0.7        0.7
#   transformer, 2048 x 2048                           5.2        5.7
#   transformer, 8 bits, more than at 16 bits        1.2 to 1.7   1.4
#   text encoder, 512 tokens                           0.8        0.8          0.8        0.8
#   autoencoder, decoding 1024 x 1024                  4.0        5.4          1.8        2.0
#   training step, rank 16, AdamW, 512 x 512           5.1        6.6          1.2        1.4
#   training step, rank 16, AdamW, 1024 x 1024        21.8       22.7          3.4        3.5   in chunks; fused 2.8
#   generation at 4 bits, whole run, 512 x 512                                 4.9        5.1   with weights
#   generation at 4 bits, whole run, 1024 x 1024                               5.7        5.7   with weights
#   training at 4 bits, whole run, 512 x 512                                   5.2        5.5   with weights
#   training at 4 bits, whole run, 1024 x 1024                                 6.5        7.6   with weights, fused
#
# FAST computes one block while the next is queued. It computes whole layers of the autoencoder up to 1024 x 1024, and
# strips of them above that; strips of half the size took a seventh longer. LEAN computes blocks in pieces, and layers
# in small strips.
FAST = Footprint(mapped=False, blocks=1.4, text_blocks=7.6, pixel_widths=4, unpacked=4, strips=4_840_000_000)
LEAN = Footprint(mapped=False, blocks=0.7, text_blocks=7.6, pixel_widths=4, unpacked=3.6, strips=900_000_000)
# STREAM is LEAN with the weights of three blocks: one is computed, one is read, one may not have been given back yet.
STREAM = replace(LEAN, streamed=3)
# Metal has not been measured. When lean, it leaves weights packed.
METAL_FAST, METAL_LEAN = replace(FAST, margin=0.15), replace(LEAN, margin=0.15, unpacked=0)
METAL_STREAM = replace(METAL_LEAN, streamed=STREAM.streamed)
# NumPy in float32 on a CPU: 57 MB for the transformer at 288 tokens, 199 MB for decoding 192 x 192
NUMPY = Footprint(mapped=True, blocks=0.5, text_blocks=0.5, pixel_widths=11)


def footprint_of_mlx(mode: Mode, metal: bool) -> Footprint:
    """That of MLX in one mode, on the GPU of a Mac (`metal`) or elsewhere."""
    if metal:
        return {"fast": METAL_FAST, "lean": METAL_LEAN, "stream": METAL_STREAM}[mode]
    return {"fast": FAST, "lean": LEAN, "stream": STREAM}[mode]


def on_apple_silicon() -> bool:
    """Whether MLX would compute on the GPU of a Mac here; asked without MLX."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


@dataclass(frozen=True)
class LoadedModel:
    """A model in the form in which an engine would hold it in memory."""

    folder: ModelFolder
    precision: str  # the name of the networks' dtype
    quantization: Quantization | None = None  # that of the large matrices in transformer and text encoder

    @property
    def itemsize(self) -> int:
        """The bytes of a value that is not quantized."""
        return _ITEMSIZES[self.precision]

    def sizes(self, component: str) -> dict[str, int]:
        """The bytes of each parameter of one network, by name."""
        return {name: self._nbytes(name, tensor) for name, tensor in self.folder.weights[component].items()}

    def spare_bytes(self, component: str) -> int:
        """The bytes of the tensors that only writing needs."""
        return sum(self._nbytes(name, tensor) for name, tensor in self.folder.spare.get(component, {}).items())

    def weight_bytes(self, component: str, mapped: bool = False, streamed: int = 0) -> int:
        """The bytes of the weights of one network. If they are `mapped`, the bytes of its largest tensor.

        A value takes `itemsize` bytes unless it is quantized, by `quantization` or in the file. streamed: the number of
        blocks that are in memory at once, one of them as the file stores it if that is larger; 0 means all.
        """
        tensors, sizes = self.folder.weights[component], self.sizes(component)
        if mapped:
            return max(sizes.values())
        if not streamed:
            return sum(sizes.values())
        held, stored = Counter[str](), Counter[str]()
        for name, size in sizes.items():
            held[block_of(name)] += 0 if name == EMBEDDING else size
            stored[block_of(name)] += sum(bytes_by_dtype([tensors[name]]).values())
        blocks = [block for block in held if block]
        largest_block = max((held[block] for block in blocks), default=0)
        read = max((max(held[block], stored[block]) for block in blocks), default=0)
        return held[""] + (streamed - 1) * largest_block + (read if blocks else 0)

    def _nbytes(self, name: str, tensor: Tensor) -> int:
        quantization = self.quantization
        if isinstance(tensor, QuantizedTensor):
            quantization = tensor.quantization
        elif quantization is None or not covers(quantization, name, tensor.shape):
            return tensor.size * self.itemsize
        scales_and_offsets = 2 * self.itemsize * tensor.size // quantization.group_size  # every group has one of each
        return tensor.size * quantization.bits // 8 + scales_and_offsets


@dataclass(frozen=True)
class Stage:
    """The bytes that one stage of making a picture, or of training, takes. Stages run one after the other."""

    name: str  # encode, denoise, decode; in training: encode captions, encode pictures, train
    weights: int
    activations: int
    lora: int = 0  # matrices, gradients, optimizer state, average

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return self.weights + self.activations + self.lora


def generation_stages(
    model: LoadedModel, footprint: Footprint, size: tuple[int, int], predictions: float = 1,
    one_at_a_time: bool = True, around: int = 0, kept: int = 0,
) -> list[Stage]:  # fmt: skip
    """The memory of each stage of making pictures of `size`, width and height in pixels.

    predictions: the number that the transformer makes at once: one for each picture of a batch, two with guidance. If
    pictures are steered, a prediction counts as more than one.
    one_at_a_time: a network is freed before the next is loaded. around: the pixels of the picture that is made of
    tiles of `size`; 0 is no tiles. kept: numbers that a step cache keeps.
    """
    folder, (width, height) = model.folder, size
    mapped, streamed = footprint.mapped, footprint.streamed
    weights = {name: model.weight_bytes(name, mapped, streamed * (name != "controlnet")) for name in folder.weights}
    weights["transformer"] += weights.pop("controlnet", 0)  # they compute together, and its blocks stay in memory
    if not one_at_a_time:
        weights = dict.fromkeys(weights, sum(weights.values()))
    tokens = predictions * (width * height // folder.size_multiple**2 + CAPTION_TOKENS)
    denoise = tokens * _block_values(folder.transformer, wide=model.precision == "float16") * footprint.blocks
    denoise += footprint.unpacked * _quantized_values(model) + kept * (1 + (model.precision == "float16"))
    stages = [
        ("encode", weights["text_encoder"], model.itemsize * _encode_values(folder, footprint)),
        ("denoise", weights["transformer"], model.itemsize * denoise + _LATENT_BYTES * around),
        ("decode", weights["vae"], _autoencoder_bytes(model, width * height, footprint) + _PIXEL_BYTES * around),
    ]
    return [Stage(name, held, footprint.with_margin(held, values)) for name, held, values in stages]


def writing_stage(model: LoadedModel, footprint: Footprint, held: int, tokens: int) -> Stage:
    """The memory of the text encoder while it writes a text of `tokens` tokens, what it was told included.

    held: the bytes of the weights that are in memory while it encodes.
    """
    config, name = model.folder.text_encoder, "text_encoder"
    held += 0 if footprint.mapped else model.spare_bytes(name)
    held += model.sizes(name)[EMBEDDING] if footprint.streamed else 0  # else the head is the embedding in memory
    past = 2 * config.num_hidden_layers * tokens * config.num_key_value_heads * config.head_dim
    values = past + _encode_values(model.folder, footprint) + config.vocab_size
    return Stage("write a prompt", held, footprint.with_margin(held, model.itemsize * values))


def training_stages(
    model: LoadedModel, image_tokens: int, lora: int, batch: int = 1, lean: bool = True, footprint: Footprint = LEAN
) -> list[Stage]:
    """The memory of each stage of training on batches of at most `batch` pictures of `image_tokens` tokens.

    lora: the bytes that `lora_bytes` gives. lean: a block keeps only its input for the gradient and runs twice; else it
    keeps all that its gradient needs. footprint: the engine's memory in lean mode.
    """
    folder, config = model.folder, model.folder.transformer
    tokens = batch * (padded(image_tokens) + CAPTION_TOKENS)
    kept = config.dim if lean else kept_values(config)  # for each block: its input, or all that its gradient needs
    blocks = len(list(parameters.transformer_blocks(config)))
    values = tokens * (kept * blocks + (_LEAN_BLOCKS if lean else _FAST_BLOCKS) * _block_values(config))
    values += (min(_LEAN_UNPACKED, footprint.unpacked) if lean else FAST.unpacked) * _quantized_values(model)
    pixels = image_tokens * folder.size_multiple**2
    stages = [
        ("encode captions", "text_encoder", model.itemsize * _encode_values(folder, footprint), 0),
        ("encode pictures", "vae", _autoencoder_bytes(model, pixels, footprint), 0),
        ("train", "transformer", model.itemsize * values, lora),
    ]
    return [
        Stage(
            name,
            held := model.weight_bytes(component, streamed=footprint.streamed),
            footprint.with_margin(held, made, own),
            own,
        )
        for name, component, made, own in stages
    ]


def lora_bytes(trainable: int, slots: float, ema: bool = False) -> int:
    """The bytes of `trainable` LoRA parameters in training: matrices, gradients, optimizer state, average; float32.

    slots: values that the optimizer keeps for each parameter. ema: whether the run keeps an average over steps.
    """
    return round(4 * (2 + slots + ema) * trainable)


def kept_widths(config: TransformerConfig) -> list[tuple[str, int]]:
    """The arrays that a block keeps from its forward pass for its gradient: (name, values for each token).

    They are the fields of AttentionKept and FeedForwardKept in zimage_mlx.networks.kept, in this order. scale
    and gate are left out, because they have no tokens. A test compares names and bytes.
    """
    D, F = config.dim, config.ffn_dim
    attention = [("x", D), ("q", D), ("k", D), ("v", D), ("attended", D), ("out", D)]
    return [*attention, ("hidden_gate", F), ("hidden_value", F), ("out", D)]


def kept_values(config: TransformerConfig) -> int:
    """The values that a block keeps for its gradient, for each token."""
    return sum(width for _, width in kept_widths(config))


def trainable_parameters(shapes: parameters.Shapes, layers: Iterable[str], rank: int) -> int:
    """The number of elements in A and B of LoRAs on `layers`."""
    return sum(rank * sum(shapes[f"{layer}.weight"]) for layer in layers)


def peak(stages: Iterable[Stage]) -> Stage:
    """The largest stage."""
    return max(stages, key=lambda stage: stage.total)


def largest(estimates: Iterable[Sequence[Stage]]) -> list[Stage]:
    """For each stage, the largest of all estimates."""
    return [peak(same) for same in zip(*estimates, strict=True)]


def physical_memory() -> int | None:
    """The bytes of memory of this machine. None if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def require_memory(stages: Sequence[Stage], limit: int | None, bits: str = "quantize", sides: str = _SIDES) -> None:
    """Raises ConfigError if a stage takes more than `limit` bytes. None means no limit.

    bits: the option that makes weights smaller. sides: the options that make pictures smaller, in words.
    """
    most = peak(stages)
    if limit is None or most.total <= limit:
        return
    if most.weights > most.activations:
        way_out = f"`{bits}` 8 or 4 makes the weights smaller"
    else:
        way_out = f"take a smaller {sides}, or `batch_size` 1"
    raise ConfigError(
        f"this takes about {most.total / 1e9:.1f} GB to {most.name}, {most.weights / 1e9:.1f} of it weights, and there "
        f"are {limit / 1e9:.1f} GB: {way_out}; `force` tries it anyway"
    )


def _block_values(config: TransformerConfig, wide: bool = False) -> int:
    """The values of a block for each token. wide: the stream is float32, and a value of it counts as two."""
    return (_STREAM_WIDTHS + wide * _WIDE_WIDTHS) * config.dim + _FFN_WIDTHS * config.ffn_dim


def _quantized_values(model: LoadedModel) -> int:
    """The number of values in the matrices of one block if they are stored in 4 or 8 bits, else 0."""
    config, tensors = model.folder.transformer, model.folder.weights["transformer"].values()
    quantized = model.quantization is not None or any(isinstance(tensor, QuantizedTensor) for tensor in tensors)
    return quantized * config.dim * (4 * config.dim + 3 * config.ffn_dim)


def _encode_values(folder: ModelFolder, footprint: Footprint) -> float:
    config = folder.text_encoder
    widths = _STREAM_WIDTHS * config.hidden_size + _FFN_WIDTHS * config.intermediate_size
    return MAX_TOKENS * widths * footprint.text_blocks


def _autoencoder_bytes(model: LoadedModel, pixels: int, footprint: Footprint) -> int:
    """The bytes of whole arrays and of strips. In a small picture, strips take at most its largest layers."""
    width = pixels * model.folder.vae.block_out_channels[0] * model.itemsize
    return width * footprint.pixel_widths + min(footprint.strips, _LAYER_WIDTHS * width)
