"""The quantized layouts that are read, one entry each in LAYOUTS. `folding.fold` makes one tensor of each layer.

A quantized layer X is several tensors of a file: X.weight, and others beside it such as X.scales or X.weight_scale.
An entry says which tensors these are, how to know the layout, and how to make a Tensor of the weights. MLX's affine
layout stays quantized (`quantize.QuantizedTensor`); the others are decoded when you read them (`PackedTensor`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from zimage_ref.errors import FormatError

from . import decoding
from .json_file import Json
from .packed import PackedTensor, as_float32
from .small_floats import E4M3, decoded
from .tensors import DTYPE_NAMES, FLOATS, Array, Tensor

_ROTATED = ("convrot_w4a4", "asym_w4a8_int8")  # their layers are rotated though no option says so
HINTS = ("input_scale", "comfy_quant", "weight_correction")  # parts that do not change the weights


@dataclass(frozen=True)
class Layer:
    """The tensors of one quantized layer."""

    name: str  # without `.weight`
    parts: Mapping[str, Tensor]  # by the last part of their names
    options: Json = field(default_factory=dict)  # what the file says about the layer

    @property
    def described(self) -> str:
        """The type and shape of each tensor, for people."""
        return ", ".join(f"{part} {kind_of(t)} {t.shape}" for part, t in self.parts.items() if part not in HINTS)

    def fits(self, kinds: Mapping[str, str]) -> bool:
        """Whether the layer has these parts in these types; kinds are separated by spaces."""
        return all(part in self.parts and kind_of(self.parts[part]) in kinds[part].split() for part in kinds)

    def values(self, part: str) -> Array:
        """The values of one part in float32."""
        return as_float32(self.parts[part])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store a quantized matrix."""

    name: str  # ComfyUI's name for it if there is one; tables show it
    parts: Mapping[str, str]  # parts that it must have -> their types, with spaces between
    more: tuple[str, ...] = ()  # parts that it may have
    named: bool = False  # whether a file must name it, because another layout has the same parts
    columns: int = 1  # weights in an element of a row of X.weight
    group: int = 1  # rows divide into groups of this size; 1: any shape will do
    padded: bool = False
    check: Callable[[Layer, tuple[int, ...]], bool] = lambda layer, shape: True
    decode: Callable[[Layer], Array]  # float32 (out, in)

    def tensor(self, layer: Layer, path: Path) -> Tensor:
        """The weights of `layer`. Raises FormatError if its tensors do not fit each other."""
        if not self._fits(layer):
            raise FormatError(f"{path}: {layer.name} has {layer.described}, which are not a layer of {self.name}")
        return PackedTensor.of_values(
            self.shape(layer), self.name, partial(self.decode, layer), layer.parts, padded=self.padded
        )

    def accepts(self, layer: Layer) -> bool:
        """Whether the tensors of `layer` are what this layout stores, all of them."""
        return layer.parts.keys() <= {*self.parts, *self.more, *HINTS} and self._fits(layer)

    def _fits(self, layer: Layer) -> bool:
        shape = self.shape(layer)
        return layer.fits(self.parts) and 0 not in shape and self.check(layer, shape)

    def shape(self, layer: Layer) -> tuple[int, ...]:
        """The shape of the weights; it holds 0 if X.weight cannot be of this layout."""
        stored = layer.parts["weight"].shape
        if self.group == 1:
            return stored
        shape = (*stored[:-1], stored[-1] * self.columns) if stored else ()
        return shape if len(shape) == 2 and shape[1] % self.group == 0 else (0,)


def kind_of(tensor: Tensor) -> str:
    """The type of the stored values, such as f8_e4m3, u8 or bf16."""
    return tensor.storage or DTYPE_NAMES[tensor.dtype]


def _scale_fits(layer: Layer, shape: tuple[int, ...]) -> bool:
    return "weight_scale" not in layer.parts or decoding.scale_fits(layer.parts["weight_scale"], shape)


def _group_of(layer: Layer) -> int:
    """The size of the rotation of a layer, 1 if it is not rotated."""
    rotated = layer.options.get("convrot", layer.options.get("format") in _ROTATED)
    size = layer.options.get("convrot_groupsize", 256)
    return size if rotated and isinstance(size, int) else 1


def _rotation_fits(layer: Layer, shape: tuple[int, ...]) -> bool:
    group = _group_of(layer)
    whole = group == 1 or (decoding.is_power_of_four(group) and len(shape) == 2 and shape[1] % group == 0)
    return whole and _scale_fits(layer, shape)


def _unrotated(layer: Layer, weight: Array) -> Array:
    group = _group_of(layer)
    return weight if group == 1 else decoding.unrotated(weight, group)


def _awq_fits(layer: Layer, shape: tuple[int, ...]) -> bool:
    scale, zeros = layer.parts["weight_scale"].shape, layer.parts["weight_zeros"].shape
    return scale == zeros and len(scale) == 2 and scale[1] == shape[0] and bool(scale[0]) and shape[1] % scale[0] == 0


def _w4a8_fits(layer: Layer, shape: tuple[int, ...]) -> bool:
    channel, codebook = layer.parts["weight_s_channel"], layer.parts.get("weight_codebook")
    whole = channel.size == shape[0] and (codebook is None or codebook.shape == (16,))
    return whole and decoding.scale_fits(layer.parts["weight_s_rel"], shape) and _rotation_fits(layer, shape)


def _float8(layer: Layer) -> Array:
    weight = layer.values("weight")
    return decoding.scaled(weight, layer.values("weight_scale")) if "weight_scale" in layer.parts else weight


def _int8(layer: Layer) -> Array:
    return _unrotated(layer, decoding.scaled(layer.values("weight"), layer.values("weight_scale")))


def _w4a4(layer: Layer) -> Array:
    weight = decoding.signed_nibbles(layer.parts["weight"].read())
    return _unrotated(layer, decoding.scaled(weight, layer.values("weight_scale")))


def _w4a8(layer: Layer) -> Array:
    relative = decoding.e4m3_scales(layer.parts["weight_s_rel"])
    codebook = layer.values("weight_codebook") if "weight_codebook" in layer.parts else None
    weight = decoding.asym_w4a8(layer.parts["weight"].read(), relative, layer.values("weight_s_channel"), codebook)
    return _unrotated(layer, weight)


def _awq(layer: Layer) -> Array:
    return decoding.awq(layer.parts["weight"].read(), layer.values("weight_scale"), layer.values("weight_zeros"))


def _mxfp8(layer: Layer) -> Array:
    rows, columns = layer.parts["weight"].shape
    scale = decoding.untiled(decoding.mx_scales(layer.parts["weight_scale"]), rows, columns // 32)
    return decoding.scaled(layer.values("weight"), scale)


def _nvfp4(layer: Layer) -> Array:
    rows, columns = layer.parts["weight"].shape  # two weights in a byte
    scale = decoding.untiled(decoding.e4m3_scales(layer.parts["weight_scale"]), rows, columns // 8)
    weight = decoding.fp4(layer.parts["weight"].read(), scale * layer.values("weight_scale_2"), high_first=True)
    return decoding.columns_scaled(weight, layer.parts.get("pre_quant_scale"))


def _tiles_fit(group: int) -> Callable[[Layer, tuple[int, ...]], bool]:
    def check(layer: Layer, shape: tuple[int, ...]) -> bool:
        tiles = (-(-shape[0] // decoding.TILE_ROWS), -(-shape[1] // group // decoding.TILE_COLUMNS))
        own = tiles[0] * decoding.TILE_ROWS, tiles[1] * decoding.TILE_COLUMNS
        factor = layer.parts.get("pre_quant_scale")
        return layer.parts["weight_scale"].shape == own and (factor is None or factor.shape == (shape[1],))

    return check


def _mlx_mxfp4(layer: Layer) -> Array:
    return decoding.fp4(decoding.codes(layer.parts["weight"]), decoding.mx_scales(layer.parts["scales"]), False)


def _mlx_mxfp8(layer: Layer) -> Array:
    weight = decoded(decoding.codes(layer.parts["weight"]), E4M3)
    return decoding.scaled(weight, decoding.mx_scales(layer.parts["scales"]))


def _mlx_nvfp4(layer: Layer) -> Array:
    return decoding.fp4(decoding.codes(layer.parts["weight"]), decoding.e4m3_scales(layer.parts["scales"]), False)


def _groups_fit(group: int) -> Callable[[Layer, tuple[int, ...]], bool]:
    return lambda layer, shape: layer.parts["scales"].shape == (shape[0], shape[1] // group)


_FLOATS = " ".join(FLOATS)
_MX = {"weight": "f8_e4m3", "weight_scale": "f8_e8m0 u8"}

# The order matters if a file does not name its layouts: the first that fits is taken
LAYOUTS = (
    Layout(
        name="nvfp4", columns=2, group=16, padded=True, more=("pre_quant_scale",),
        parts={"weight": "u8", "weight_scale": "f8_e4m3 u8", "weight_scale_2": "f32"},
        check=_tiles_fit(16), decode=_nvfp4,
    ),
    Layout(name="mxfp8", group=32, padded=True, parts=_MX, check=_tiles_fit(32), decode=_mxfp8),
    Layout(
        name="float8_e4m3fn", parts={"weight": "f8_e4m3"}, more=("weight_scale",), check=_scale_fits, decode=_float8,
    ),
    Layout(
        name="float8_e5m2", parts={"weight": "f8_e5m2"}, more=("weight_scale",), check=_scale_fits, decode=_float8,
    ),
    Layout(
        name="awq_w4a16", columns=2, group=2,
        parts={"weight": "i8 u8", "weight_scale": _FLOATS, "weight_zeros": _FLOATS}, check=_awq_fits, decode=_awq,
    ),
    Layout(
        name="asym_w4a8_int8", columns=2, group=2, more=("weight_codebook",),
        parts={"weight": "i8 u8", "weight_s_rel": "f8_e4m3 u8", "weight_s_channel": _FLOATS},
        check=_w4a8_fits, decode=_w4a8,
    ),
    Layout(
        name="convrot_w4a4", columns=2, group=2, named=True,
        parts={"weight": "i8", "weight_scale": _FLOATS}, check=_rotation_fits, decode=_w4a4,
    ),
    Layout(
        name="int8_tensorwise", parts={"weight": "i8", "weight_scale": _FLOATS}, check=_rotation_fits, decode=_int8,
    ),
    Layout(
        name="mlx mxfp8", columns=4, group=32, parts={"weight": "u32", "scales": "u8"},
        check=_groups_fit(32), decode=_mlx_mxfp8,
    ),
    Layout(
        name="mlx mxfp4", columns=8, group=32, parts={"weight": "u32", "scales": "u8"},
        check=_groups_fit(32), decode=_mlx_mxfp4,
    ),
    Layout(
        name="mlx nvfp4", columns=8, group=16, parts={"weight": "u32", "scales": "u8"},
        check=_groups_fit(16), decode=_mlx_nvfp4,
    ),
)  # fmt: skip
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def layout_of(layer: Layer) -> Layout | None:
    """The layout that the file names for `layer`, else the first that its tensors fit. None if it is none of these."""
    named = layer.options.get("format")
    if named is not None:
        return BY_NAME.get(str(named))
    return next((layout for layout in LAYOUTS if not layout.named and layout.accepts(layer)), None)
