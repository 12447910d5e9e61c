"""How much memory making pictures and training will take: from headers and sizes alone, before anything is loaded.

An estimate to choose options by and to refuse the hopeless, not a promise. Weights and optimizer state are exact
arithmetic; activations are measured multiples of tokens or pixels, all of them in the table below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .checkpoints.folder import ModelFolder
from .errors import ConfigError
from .formats.quantize import Quantization, QuantizedTensor
from .formats.tensors import Tensor
from .model import parameters
from .model.config import TransformerConfig
from .model.positions import padded
from .model.quantization import covers
from .model.tokenizer import MAX_TOKENS

CAPTION_TOKENS = 128  # of a caption of ordinary length, padded
# Values of one block that live at once, in widths of the stream and of the feed-forward for each token
_STREAM_WIDTHS, _FFN_WIDTHS = 16, 6
# Blocks' values that live at once beside what is kept for the gradient, lean (in pieces) and fast. Measured with this
# project's training on an H100, official transformer in bfloat16, rank 16, AdamW, over the base, LoRA and optimizer
# included, at 512 x 512 and 1024 x 1024: lean 1.4 and 4.6 GB, where this makes 1.6 and 4.5; fast 5.1 and 21.8 GB, where
# this makes 6.7 and 22.7
_LEAN_BLOCKS, _FAST_BLOCKS = 2.7, 8.2
_LEAN_UNPACKED = 1.7  # blocks' matrices at once in training on 4 or 8 bits: two feed-forwards and an attention
_LAYERS_MAKE = 16  # two layers of the autoencoder, on the way, in widths as of `Footprint.pixel_widths`
_SLOTS = {"adamw": 2, "adam": 2, "adamax": 2, "adadelta": 2, "adafactor": 0, "sgd": 0}  # others keep one
_SIDES = "`width` and `height`"
_ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Footprint:
    """How an engine, run in one way, uses memory for activations."""

    mapped: bool  # weights stay on disk but for the one in use
    blocks: float  # how many blocks' values live at once
    text_blocks: float  # the same of the text encoder
    pixel_widths: int  # values for each pixel on its way through the autoencoder, in widths of its first level
    unpacked: float = 0.0  # how many blocks' matrices live unpacked at once, where they are stored in 4 or 8 bits
    strips: int = 0  # bytes besides, that strips of the autoencoder's large layers make on their way


# MLX, official model in bfloat16 on an H100. FAST: one block computed while the next is queued, 0.4 GB at 1088 tokens,
# 1.3 GB at 4160, 5.2 GB at 16,448, where this makes 0.4, 1.5 and 5.7. LEAN: pieces of blocks, 0.2 and 0.7 GB, which
# this makes, too. The text encoder, as one: 0.8 GB at 512 tokens. The autoencoder's largest layer has an input of twice
# its width, one array between, and its output; the rest is strips: 4.0 and 1.8 GB at 1024 x 1024, where this makes 5.4
# (as of whole layers, which FAST cuts only from there on) and 2.0. Half of FAST's strips took a seventh longer
# Unpacked, FAST: 1.2 and 1.7 GB at 8 bits, where this makes 1.4; LEAN: whole runs at 4 bits took 4.9 and 5.7 GB, where
# this makes 5.1 and 5.6
FAST = Footprint(mapped=False, blocks=1.4, text_blocks=7.6, pixel_widths=4, unpacked=4, strips=4_840_000_000)
LEAN = Footprint(mapped=False, blocks=0.7, text_blocks=7.6, pixel_widths=4, unpacked=3.6, strips=900_000_000)
# NumPy in float32: 57 MB at 288 tokens; decoding 199 MB at 192 x 192
NUMPY = Footprint(mapped=True, blocks=0.5, text_blocks=0.5, pixel_widths=11)


@dataclass(frozen=True)
class Stage:
    """Bytes that one stage of making a picture, or of training, takes. Stages follow one another."""

    name: str  # encode, denoise, decode; encode captions, encode pictures, train
    weights: int
    activations: int
    lora: int = 0  # matrices, gradients, optimizer state, average

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations + self.lora


def generation(
    folder: ModelFolder,
    precision: str,
    footprint: Footprint,
    *,
    width: int,
    height: int,
    batch: int = 1,
    guided: bool = False,
    quantization: Quantization | None = None,
    one_at_a_time: bool = True,
) -> list[Stage]:
    """The memory of each stage of making `batch` pictures of width x height together.

    precision: the networks' dtype by name. quantization: of the big matrices. one_at_a_time: a network is freed before
    the next is loaded.
    """
    itemsize = _ITEMSIZES[precision]
    weights = {n: weight_bytes(t, itemsize, quantization, footprint.mapped) for n, t in folder.weights.items()}
    if not one_at_a_time:
        weights = dict.fromkeys(weights, sum(weights.values()))
    tokens = batch * (1 + guided) * (width * height // folder.size_multiple**2 + CAPTION_TOKENS)
    denoise = tokens * _block_values(folder.transformer) * footprint.blocks
    denoise += footprint.unpacked * _quantized_values(folder, quantization)
    return [
        Stage("encode", weights["text_encoder"], round(itemsize * _encode_values(folder, footprint))),
        Stage("denoise", weights["transformer"], round(itemsize * denoise)),
        Stage("decode", weights["vae"], _autoencoder_bytes(folder, width * height, footprint, itemsize)),
    ]


def training(
    folder: ModelFolder,
    precision: str,
    quantization: Quantization | None,
    *,
    trainable: int,
    image_tokens: int,
    batch: int = 1,
    optimizer: str = "adamw",
    ema: bool = False,
    lean: bool = True,
) -> list[Stage]:
    """The memory of each stage of training on batches of at most `batch` pictures of `image_tokens` tokens.

    precision, quantization: of the frozen base, and of the text encoder. trainable: LoRA parameters. lean: blocks keep
    only their input for the gradient and run twice; else they keep all that it needs.
    """
    itemsize, config = _ITEMSIZES[precision], folder.transformer
    base = weight_bytes(folder.weights["transformer"], itemsize, quantization)
    encoder, vae = (weight_bytes(folder.weights[name], itemsize, quantization) for name in ("text_encoder", "vae"))
    tokens = batch * (padded(image_tokens) + CAPTION_TOKENS)
    kept = config.dim if lean else kept_values(config)  # for each block: its input, or all that its gradient needs
    blocks = len(list(parameters.transformer_blocks(config)))
    activations = tokens * (kept * blocks + (_LEAN_BLOCKS if lean else _FAST_BLOCKS) * _block_values(config))
    activations += (_LEAN_UNPACKED if lean else FAST.unpacked) * _quantized_values(folder, quantization)
    pixels = image_tokens * folder.size_multiple**2
    copies = 2 + _SLOTS.get(optimizer, 1) + int(ema)  # matrices and gradients, and what the optimizer keeps of them
    return [
        Stage("encode captions", encoder, round(itemsize * _encode_values(folder, LEAN))),
        Stage("encode pictures", vae, _autoencoder_bytes(folder, pixels, LEAN, itemsize)),
        Stage("train", base, round(itemsize * activations), lora=4 * copies * trainable),
    ]


def kept_widths(config: TransformerConfig) -> list[tuple[str, int]]:
    """The arrays that a block keeps of its forward pass for its gradient, and how many values each has for a token.

    These are the fields of AttentionKept and FeedForwardKept in zimage_mlx.networks.transformer, in their order, except
    scale and gate, which have no tokens. A test compares names and bytes.
    """
    D, F = config.dim, config.ffn_dim
    attention = [("x", D), ("q", D), ("k", D), ("v", D), ("attended", D), ("out", D)]
    return [*attention, ("hidden_gate", F), ("hidden_value", F), ("out", D)]


def kept_values(config: TransformerConfig) -> int:
    """Values of each token that a block keeps for its gradient."""
    return sum(width for _, width in kept_widths(config))


def weight_bytes(
    tensors: Mapping[str, Tensor], itemsize: int, quantization: Quantization | None = None, mapped: bool = False
) -> int:
    """Memory of a network's weights: `itemsize` bytes each, or what those take that are stored or made quantized."""
    sizes = [_nbytes(name, tensor, itemsize, quantization) for name, tensor in tensors.items()]
    return max(sizes) if mapped else sum(sizes)


def trainable_parameters(shapes: parameters.Shapes, layers: Iterable[str], rank: int) -> int:
    """Elements of A and B of LoRAs on `layers`."""
    return sum(rank * sum(shapes[f"{layer}.weight"]) for layer in layers)


def peak(stages: Iterable[Stage]) -> Stage:
    """The largest stage."""
    return max(stages, key=lambda stage: stage.total)


def largest(estimates: Iterable[Sequence[Stage]]) -> list[Stage]:
    """Of each stage the largest that occurs."""
    return [peak(same) for same in zip(*estimates, strict=True)]


def physical_memory() -> int | None:
    """Bytes of memory that this machine has, None where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def require_memory(stages: Sequence[Stage], limit: int | None, bits: str = "quantize", sides: str = _SIDES) -> None:
    """Raises ConfigError where a stage takes more than `limit` bytes; None is no limit.

    bits: the option that makes weights smaller. sides: those that make pictures smaller, in words.
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
        f"are {limit / 1e9:.1f} GB: {way_out}; `force` tries it all the same"
    )


def _block_values(config: TransformerConfig) -> int:
    return _STREAM_WIDTHS * config.dim + _FFN_WIDTHS * config.ffn_dim


def _quantized_values(folder: ModelFolder, quantization: Quantization | None) -> int:
    """Values of one block's matrices, if they are stored in 4 or 8 bits."""
    config, tensors = folder.transformer, folder.weights["transformer"].values()
    quantized = quantization is not None or any(isinstance(tensor, QuantizedTensor) for tensor in tensors)
    return quantized * config.dim * (4 * config.dim + 3 * config.ffn_dim)


def _encode_values(folder: ModelFolder, footprint: Footprint) -> float:
    config = folder.text_encoder
    widths = _STREAM_WIDTHS * config.hidden_size + _FFN_WIDTHS * config.intermediate_size
    return MAX_TOKENS * widths * footprint.text_blocks


def _autoencoder_bytes(folder: ModelFolder, pixels: int, footprint: Footprint, itemsize: int) -> int:
    """Whole arrays and strips, which in a small picture are no more than its largest layers make."""
    width = pixels * folder.vae.block_out_channels[0] * itemsize
    return width * footprint.pixel_widths + min(footprint.strips, _LAYERS_MAKE * width)


def _nbytes(name: str, tensor: Tensor, itemsize: int, quantization: Quantization | None) -> int:
    if isinstance(tensor, QuantizedTensor):
        quantization = tensor.quantization
    elif quantization is None or not covers(quantization, name, tensor.shape):
        return tensor.size * itemsize
    groups = tensor.size // quantization.group_size
    return tensor.size * quantization.bits // 8 + 2 * itemsize * groups  # a scale and an offset for each group
