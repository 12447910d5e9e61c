"""Which parameters of the networks are quantized: the large matrices of blocks, if their rows are whole groups."""

from __future__ import annotations

from collections.abc import Mapping

from zimage_ref.formats.quantize import Quantization, QuantizedTensor, quantized
from zimage_ref.formats.tensors import Tensor

from .parameters import is_large_matrix


def covers(quantization: Quantization, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter `name`, by its official name, is quantized."""
    return is_large_matrix(name) and quantization.fits(shape)


def quantize_all(tensors: Mapping[str, Tensor], quantization: Quantization, keep: bool = False) -> dict[str, Tensor]:
    """The tensors of a model by official name, with those that are covered to be quantized when they are read.

    What is quantized already stays as it is. keep: the numbers stay in memory once they are computed.
    """
    return {
        name: quantized(tensor, quantization, keep)
        if covers(quantization, name, tensor.shape) and not isinstance(tensor, QuantizedTensor)
        else tensor
        for name, tensor in tensors.items()
    }
