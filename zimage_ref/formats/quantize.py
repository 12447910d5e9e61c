"""Affine quantization in MLX's layout: 4 or 8 bits for each weight, one scale and one bias for each group of a row.

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

from .json_file import Json, JsonObject
from .tensors import DTYPE_NAMES, FLOATS, Array, Tensor, cast, float_dtype, row_blocks

BITS = (4, 8)
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

    def cast(self, name: str | None) -> Tensor:
        """The same tensor with scales and biases in another float dtype. The dequantized weights get it too."""
        return self.of_parts(self.packed, self.scales.cast(name), self.biases.cast(name), self.quantization)

    def plain(self, name: str | None = None) -> Tensor:
        """An ordinary tensor of the dequantized weights, computed in the dtype `name`."""
        tensor = self.cast(name)
        return Tensor(tensor.shape, tensor.dtype, tensor.read)


def fold(tensors: Mapping[str, Tensor], record: Json, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, with the three of each quantized layer as one QuantizedTensor.

    Raises FormatError if the three do not fit each other.
    """
    if "quantization" not in record:
        return dict(tensors)
    how = Quantization.from_json(record["quantization"], path)
    folded = dict(tensors)
    for name in [name for name in tensors if name.endswith(".scales")]:
        layer = name.removesuffix(".scales")
        parts = [folded.pop(f"{layer}.{part}", None) for part in ("scales", "biases")]
        packed = tensors.get(f"{layer}.weight")
        scales, biases = parts
        if packed is None or scales is None or biases is None:
            raise FormatError(f"{path}: {layer} lacks one of weight, scales and biases of a quantized layer")
        groups = packed.shape[-1] * 32 // (how.bits * how.group_size) if packed.shape else 0
        if (
            len(packed.shape) != 2
            or DTYPE_NAMES[packed.dtype] != "u32"
            or not scales.shape == biases.shape == (packed.shape[0], groups)
            or packed.shape[1] * 32 != groups * how.group_size * how.bits
            or scales.dtype != biases.dtype
            or DTYPE_NAMES[scales.dtype] not in FLOATS
        ):
            raise FormatError(
                f"{path}: {layer} has weight {packed.shape}, scales {scales.shape}, biases {biases.shape}, "
                f"which are not {how.bits} bits in groups of {how.group_size}"
            )
        folded[f"{layer}.weight"] = QuantizedTensor.of_parts(packed, scales, biases, how)
    return folded


def unfold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fold`: the tensors as a file stores them, three for each quantized one."""
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
    if how.bits == 4:
        q = q[:, ::2] | q[:, 1::2] << 4
    return np.ascontiguousarray(q).view("<u4"), step[..., 0], bias[..., 0]


def dequantized(packed: Array, scales: Array, biases: Array, how: Quantization) -> Array:
    """The weights (out, in) in the dtype of `scales`. The product and the sum are each rounded to this dtype."""
    dtype = scales.dtype
    wide = dtype if DTYPE_NAMES[dtype] in ("f32", "f64") else float_dtype("f32")
    weight = np.empty((len(packed), scales.shape[1] * how.group_size), dtype)
    for block in row_blocks(weight.shape):
        q = np.ascontiguousarray(packed[block]).view(np.uint8)
        if how.bits == 4:
            q = np.stack([q & 0xF, q >> 4], axis=-1)
        q = q.reshape(len(q), -1, how.group_size).astype(wide)
        scale, bias = (cast(part[block], wide)[..., None] for part in (scales, biases))
        product = cast(cast(q * scale, dtype), wide)
        weight[block] = cast(product + bias, dtype).reshape(len(q), -1)
    return weight


def bytes_by_dtype(tensors: Iterable[Tensor]) -> Counter[str]:
    """The bytes that the tensors take in a file, by dtype or quantized format."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        parts = tensor.parts.values() if isinstance(tensor, QuantizedTensor) else (tensor,)
        sizes[tensor.stored_as] += sum(part.nbytes for part in parts)
    return sizes


def without_quantization(tensors: Mapping[str, Tensor], dtype: str | None = None) -> dict[str, Tensor]:
    """The tensors without QuantizedTensors: each of those is dequantized, in the dtype `dtype`, when you read it."""
    return {n: t.plain(dtype) if isinstance(t, QuantizedTensor) else t for n, t in tensors.items()}
