"""How much memory making pictures will take: from headers and sizes alone, before anything is loaded.

An estimate to refuse the hopeless by, not a promise. Weights are exact arithmetic. Activations are a measured multiple
of the tokens or pixels: of the transformer and the autoencoder at full size, bfloat16, 512 x 512 and 1024 x 1024.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .model_folder import ModelFolder
from .quantize import Quantization, QuantizedTensor
from .tensors import Tensor
from .tokenizer import MAX_TOKENS

# Values of one block that live at once, in widths of the stream and of the feed-forward for each token. Measured 0.29
# GB at 1088 tokens and 1.06 GB at 4160, where this makes 0.27 and 1.02
_STREAM_WIDTHS, _FFN_WIDTHS = 16, 6
_ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Footprint:
    """How an engine, run in one way, uses memory."""

    mapped: bool  # weights stay on disk but for the one in use
    blocks: float  # how many blocks' values live at once
    pixel_widths: int  # values for each pixel on its way out of the autoencoder, in widths of its first level
    whole_scores: bool  # the autoencoder's attention makes all its scores at once


# MLX, nothing evaluated within a network. Measured: blocks 3.4 GB at 1088 tokens and 10 GB at 4160; decoding 2.3 GB at
# 512 x 512 and 9.5 GB at 1024 x 1024, where this makes 3.2 and 12, and 2.1 and 9.1
LAZY = Footprint(mapped=False, blocks=12, pixel_widths=30, whole_scores=True)
# MLX, each block evaluated on its own, and some rows of the autoencoder's layers at a time: those of a layer's input,
# its output and what is kept for the shortcut are whole
FRUGAL = Footprint(mapped=False, blocks=1, pixel_widths=6, whole_scores=False)
# NumPy. Measured: 57 MB at 288 tokens; decoding 199 MB at 192 x 192
NUMPY = Footprint(mapped=True, blocks=0.5, pixel_widths=11, whole_scores=False)


@dataclass(frozen=True)
class Stage:
    """Bytes that one stage of making a picture takes."""

    name: str  # encode, denoise or decode
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations


def estimate(
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
    weights = {n: _weights(tensors, itemsize, quantization, footprint.mapped) for n, tensors in folder.weights.items()}
    if not one_at_a_time:
        weights = dict.fromkeys(weights, sum(weights.values()))

    config, text = folder.transformer, folder.text_encoder
    tokens = batch * (1 + guided) * (width * height // folder.size_multiple**2 + MAX_TOKENS // 4)
    denoise = tokens * (_STREAM_WIDTHS * config.dim + _FFN_WIDTHS * config.ffn_dim) * footprint.blocks
    widths = _STREAM_WIDTHS * text.hidden_size + _FFN_WIDTHS * text.intermediate_size
    encode = MAX_TOKENS * widths * footprint.blocks
    pixels = width * height
    scores = (pixels // folder.vae.factor**2) ** 2 if footprint.whole_scores else 0
    decode = pixels * footprint.pixel_widths * folder.vae.block_out_channels[0] + 2 * scores
    return [
        Stage("encode", weights["text_encoder"], round(itemsize * encode)),
        Stage("denoise", weights["transformer"], round(itemsize * denoise)),
        Stage("decode", weights["vae"], itemsize * decode),
    ]


def physical_memory() -> int | None:
    """Bytes of memory that this machine has, None where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def largest(estimates: Iterable[Sequence[Stage]]) -> list[Stage]:
    """Of each stage the largest that occurs."""
    return [max(same, key=lambda stage: stage.total) for same in zip(*estimates, strict=True)]


def require_memory(stages: Sequence[Stage], limit: int | None) -> None:
    """Raises ConfigError where a stage takes more than `limit` bytes; None is no limit."""
    peak = max(stages, key=lambda stage: stage.total)
    if limit is None or peak.total <= limit:
        return
    if peak.weights > peak.activations:
        way_out = "--quantize 8 or 4 makes the weights smaller"
    else:
        way_out = "take a smaller --width and --height, or --batch-size 1"
    raise ConfigError(
        f"this takes about {peak.total / 1e9:.1f} GB to {peak.name}, {peak.weights / 1e9:.1f} of it weights, and there "
        f"are {limit / 1e9:.1f} GB: {way_out}; --force tries it all the same"
    )


def _weights(tensors: Mapping[str, Tensor], itemsize: int, how: Quantization | None, mapped: bool) -> int:
    sizes = [_nbytes(name, tensor, itemsize, how) for name, tensor in tensors.items()]
    return round(max(sizes) if mapped else sum(sizes))


def _nbytes(name: str, tensor: Tensor, itemsize: int, how: Quantization | None) -> float:
    if isinstance(tensor, QuantizedTensor):
        how = tensor.quantization
    elif how is None or not how.covers(name, tensor.shape):
        return tensor.size * itemsize
    return tensor.size * (how.bits / 8 + 2 * itemsize / how.group_size)  # scale and offset of each group
