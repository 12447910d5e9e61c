"""Decides which parameters are quantized: the large matrices of blocks, if their rows divide into whole groups."""

from __future__ import annotations

from collections.abc import Mapping

from zimage_ref.formats.quantize import Quantization, QuantizedTensor, quantized
from zimage_ref.formats.tensors import Tensor

from .parameters import is_large_matrix


def covers(quantization: Quantization, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter with the official name `name` is to be quantized."""
    return is_large_matrix(name) and quantization.fits(shape)


def quantize_all(tensors: Mapping[str, Tensor], quantization: Quantization, keep: bool = False) -> dict[str, Tensor]:
    """The tensors of a model by official name. Those that `covers` selects are quantized when you read them.

    A tensor that is quantized already does not change. keep: quantized numbers stay in memory after the first read.
    """
    return {
        name: quantized(tensor, quantization, keep)
        if covers(quantization, name, tensor.shape) and not isinstance(tensor, QuantizedTensor)
        else tensor
        for name, tensor in tensors.items()
    }
