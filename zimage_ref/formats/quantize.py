"""Affine quantization in MLX's layout: 3 to 8 bits for each weight, one scale and one bias for each group of a row.

    w = scale * q + bias          q: unsigned, packed into uint32, the first in the lowest bits

A quantized Linear layer is three tensors: X.weight (out, in * bits / 32) uint32, X.scales and X.biases
(out, in / group).
The results are bit for bit those of `mx.quantize` and `mx.dequantize` on a CPU.
Source: mlx/backend/cpu/quantized.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from zimage_ref.errors import ConfigError, FormatError

from .bits import packed_bits, unpacked_bits
from .json_file import JsonObject
from .packed import PackedTensor
from .tensors import DTYPE_NAMES, Array, Tensor, cast, float_dtype, row_blocks, values_as_stored

BITS = (3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64  # the default, the same as in MLX


@dataclass(frozen=True)
class Quantization:
    """How a file is quantized. Raises ConfigError for bits or group sizes that MLX does not offer."""

    bits: int
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        for name, value, known in (("bits", self.bits, BITS), ("group size", self.group_size, GROUP_SIZES)):
            if value not in known:
                raise ConfigError(f"quantization: {name} {value!r} must be one of {', '.join(map(str, known))}")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of `shape` can be quantized: a matrix whose rows divide into whole groups."""
        return len(shape) == 2 and shape[1] % self.group_size == 0

    def to_json(self) -> JsonObject:
        """As JSON, for the record of a file."""
        return {"mode": "affine", "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def from_json(cls, data: object, source: Path) -> Quantization:
        """Reads it from the record of a file. Raises FormatError naming `source`."""
        if not isinstance(data, dict) or data.get("mode", "affine") != "affine":
            raise FormatError(f"{source}: its record has a quantization this program does not know: {data!r}")
        try:
            return cls(data.get("bits", 0), data.get("group_size", 0))
        except ConfigError as error:
            raise FormatError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(Tensor):
    """A matrix that is stored quantized. `shape` and `dtype` are those of the dequantized weights, as `read` gives."""

    packed: Tensor
    scales: Tensor
    biases: Tensor
    quantization: Quantization

    @classmethod
    def of_parts(cls, packed: Tensor, scales: Tensor, biases: Tensor, how: Quantization) -> QuantizedTensor:
        """The tensor that is stored as these three parts."""

        def read() -> Array:
            return dequantized(packed.read(), scales.read(), biases.read(), how)

        shape = (packed.shape[0], packed.shape[1] * 32 // how.bits)
        label, dtype = f"q{how.bits}", scales.dtype
        return cls(shape, dtype, read, label, packed=packed, scales=scales, biases=biases, quantization=how)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names: weight, scales, biases."""
        return {"weight": self.packed, "scales": self.scales, "biases": self.biases}

    @property
    def streamable(self) -> bool:
        """As that of a Tensor: all three parts are stored as they are."""
        return all(part.streamable for part in self.parts.values())

    @property
    def stored_nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, indices: Array) -> Array:
        """Dequantizes the rows `indices` only."""
        packed, scales, biases = (part.read()[indices] for part in self.parts.values())
        return dequantized(packed, scales, biases, self.quantization)

    def block(self, start: int, stop: int) -> QuantizedTensor:
        """The rows from `start` to `stop`, still quantized. Groups do not cross rows."""
        packed, scales, biases = (part.block(start, stop) for part in self.parts.values())
        return self.of_parts(packed, scales, biases, self.quantization)

    def fitted(self, shape: tuple[int, ...]) -> Tensor:
        """Its bits and group follow from the columns of `shape`: 4 bits in groups of 64 look as 8 in groups of 32."""
        words, groups = self.packed.shape[1], self.scales.shape[1]
        if len(shape) != 2 or shape == self.shape or not shape[1] or not groups:
            return self
        bits, group_size = words * 32 / shape[1], shape[1] / groups
        if bits not in BITS or group_size not in GROUP_SIZES:
            return self
        return self.of_parts(self.packed, self.scales, self.biases, Quantization(int(bits), int(group_size)))

    def cast(self, name: str | None) -> Tensor:
        """The same tensor with scales and biases in another float dtype. The dequantized weights get it too."""
        return self.of_parts(self.packed, self.scales.cast(name), self.biases.cast(name), self.quantization)

    def plain(self, name: str | None = None) -> Tensor:
        """An ordinary tensor of the dequantized weights, computed in the dtype `name`."""
        tensor = self.cast(name)
        return Tensor(tensor.shape, tensor.dtype, tensor.read)


def unfold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `folding.fold` for these layers: the tensors as a file stores them, three for each."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            stored.update({f"{name.removesuffix('weight')}{part}": t for part, t in tensor.parts.items()})
        else:
            stored[name] = tensor
    return stored


def quantized(tensor: Tensor, how: Quantization, keep: bool = False) -> QuantizedTensor:
    """`tensor` (out, in) as one that is quantized when you read it. Scales and biases get its dtype.

    All three parts are computed when you read the first. Each is kept until you read it; with `keep`, for ever.
    """
    rows, columns = tensor.shape
    memory: dict[str, Array] = {}

    def part(name: str) -> Array:
        if name not in memory:
            memory.update(zip(("weight", "scales", "biases"), quantize(tensor.read(), how), strict=True))
        return memory[name] if keep else memory.pop(name)

    words, groups = columns * how.bits // 32, columns // how.group_size
    packed = Tensor((rows, words), np.dtype("<u4"), partial(part, "weight"))
    scales = Tensor((rows, groups), tensor.dtype, partial(part, "scales"))
    biases = Tensor((rows, groups), tensor.dtype, partial(part, "biases"))
    return QuantizedTensor.of_parts(packed, scales, biases, how)


def quantize(weight: Array, how: Quantization) -> tuple[Array, Array, Array]:
    """Packed weights, scales and biases of `weight` (out, in)."""
    rows, columns = weight.shape
    packed = np.empty((rows, columns * how.bits // 32), "<u4")
    scales = np.empty((rows, columns // how.group_size), weight.dtype)
    biases = np.empty_like(scales)
    for block in row_blocks(weight.shape):
        packed[block], scale, bias = _quantize(cast(weight[block], np.dtype("<f4")), how)
        scales[block], biases[block] = cast(scale, weight.dtype), cast(bias, weight.dtype)
    return packed, scales, biases


def _quantize(weight: Array, how: Quantization) -> tuple[Array, Array, Array]:
    groups = weight.reshape(len(weight), -1, how.group_size)  # (out, in / group, group)
    levels = np.float32(2**how.bits - 1)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    below = np.abs(low) > np.abs(high)
    step = np.maximum((high - low) / levels, np.float32(1e-7))
    step = np.where(below, step, -step)
    edge = np.where(below, low, high)  # the value of largest magnitude: it is stored exactly
    level = np.rint(edge / step)
    step = np.where(level != 0, edge / np.where(level != 0, level, 1), step)
    bias = np.where(level == 0, np.float32(0), edge)
    q = np.clip(np.rint((groups - bias) / step), 0, levels).astype(np.uint8).reshape(len(weight), -1)
    return packed_bits(q, how.bits), step[..., 0], bias[..., 0]


def dequantized(packed: Array, scales: Array, biases: Array, how: Quantization) -> Array:
    """The weights (out, in) in the dtype of `scales`. The product and the sum are each rounded to this dtype."""
    dtype = scales.dtype
    wide = dtype if DTYPE_NAMES[dtype] in ("f32", "f64") else float_dtype("f32")
    weight = np.empty((len(packed), scales.shape[1] * how.group_size), dtype)
    for block in row_blocks(weight.shape):
        q = unpacked_bits(packed[block], how.bits)
        q = q.reshape(len(q), -1, how.group_size).astype(wide)
        scale, bias = (cast(part[block], wide)[..., None] for part in (scales, biases))
        with values_as_stored():
            product = cast(cast(q * scale, dtype), wide)
            weight[block] = cast(product + bias, dtype).reshape(len(q), -1)
    return weight


def stored_bits(tensors: Iterable[Tensor]) -> list[int]:
    """The bits of those that a file holds quantized, each number once."""
    return sorted({tensor.quantization.bits for tensor in tensors if isinstance(tensor, QuantizedTensor)})


def bytes_by_dtype(tensors: Iterable[Tensor]) -> Counter[str]:
    """The bytes that the tensors take in a file, by dtype or quantized format."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.stored_as] += tensor.stored_nbytes
    return sizes


def without_quantization(tensors: Mapping[str, Tensor], dtype: str | None = None) -> dict[str, Tensor]:
    """The tensors without QuantizedTensors: each of those is dequantized, in the dtype `dtype`, when you read it.

    With a dtype, packed tensors become float32, so that the cast to `dtype` is the only rounding.
    """

    def plain(tensor: Tensor) -> Tensor:
        if isinstance(tensor, QuantizedTensor):
            return tensor.plain(dtype)
        return tensor.cast("f32") if dtype and isinstance(tensor, PackedTensor) else tensor

    return {name: plain(tensor) for name, tensor in tensors.items()}
