"""MLX's affine layers in a file: X.weight, X.scales and X.biases. Bits and group follow from the shapes.

A row of X.weight has in * bits / 32 words, a row of X.scales in / group values. So the shapes give bits * group, and
`in` decides which: 256 is 4 bits in groups of 64, or 8 in groups of 32. `in` is a width that other tensors of the file
have, too. `QuantizedTensor.fitted` decides again as soon as the model's own shapes are known.
Source: mlx-lm, mflux, Z-Image.swift and mlx-gen all write these three tensors, and record different things beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from zimage_ref.errors import FormatError

from .json_file import Json
from .quantize import BITS, GROUP_SIZE, GROUP_SIZES, Quantization, QuantizedTensor
from .tensors import DTYPE_NAMES, FLOATS, Tensor

Triple = tuple[Tensor, Tensor, Tensor]  # weight, scales, biases


def affine_layers(
    layers: Mapping[str, Triple], tensors: Mapping[str, Tensor], record: Json, path: Path
) -> dict[str, QuantizedTensor]:
    """The weights of `layers`, by the names of the layers. tensors: all tensors of the file.

    Raises FormatError if the three tensors of a layer do not fit each other, or the record has another mode.
    """
    own = Quantization.from_json(record["quantization"], path) if "quantization" in record else None
    choices = {name: _choices(name, triple, path) for name, triple in layers.items()}
    widths = {tensor.shape[0] for tensor in tensors.values() if tensor.shape}
    votes = Counter(how for name, some in choices.items() for how in some if columns(layers[name], how) in widths)

    def likeliest(name: str) -> Quantization:
        def likelihood(how: Quantization) -> tuple[bool, bool, int, bool]:
            known = columns(layers[name], how) in widths
            return how == own, known, votes[how], how.group_size == GROUP_SIZE

        return max(choices[name], key=likelihood)

    return {name: QuantizedTensor.of_parts(*triple, likeliest(name)) for name, triple in layers.items()}


def columns(triple: Triple, how: Quantization) -> int:
    """The columns that the weights have if they are quantized so."""
    return triple[0].shape[1] * 32 // how.bits


def _choices(name: str, triple: Triple, path: Path) -> list[Quantization]:
    """Every quantization that the shapes allow; at least one."""
    weight, scales, biases = triple
    fits = (
        len(weight.shape) == len(scales.shape) == 2
        and DTYPE_NAMES[weight.dtype] == "u32"
        and scales.shape == biases.shape
        and weight.shape[0] == scales.shape[0]
        and scales.dtype == biases.dtype
        and DTYPE_NAMES[scales.dtype] in FLOATS
    )
    known = [Quantization(bits, group) for bits in BITS for group in GROUP_SIZES] if fits else []
    found = [how for how in known if weight.shape[1] * 32 == scales.shape[1] * how.bits * how.group_size]
    if not found or not weight.shape[1]:
        raise FormatError(
            f"{path}: {name} has weight {weight.shape}, scales {scales.shape}, biases {biases.shape}, "
            f"which are not {', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}"
        )
    return found
