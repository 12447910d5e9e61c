"""Finds the quantized layers of a file, and makes one tensor of each.

A file names the layouts of its layers in tensors X.comfy_quant or in its metadata. If nothing is said, the types and
shapes of the tensors decide.
Source: ComfyUI's comfy/utils.py, convert_old_quants and detect_layer_quantization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from zimage_ref.errors import FormatError

from . import decoding
from .affine import affine_layers
from .json_file import Json, JsonObject
from .layouts import HINTS, LAYOUTS, Layer, kind_of, layout_of
from .tensors import Tensor

MARKER = "scaled_fp8"  # an empty tensor, alone or under a prefix
METADATA = "_quantization_metadata"  # JSON in the metadata of a safetensors file
_OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
_AFFINE = ("scales", "biases")
_PARTS = {part for layout in LAYOUTS for part in (*layout.parts, *layout.more)} - {"weight"} | {*HINTS, *_AFFINE}
_LONGEST = 1 << 16  # bytes of a comfy_quant tensor


def fold(tensors: Mapping[str, Tensor], metadata: Json, record: Json, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, with those of each quantized layer as one tensor.

    Raises FormatError if the tensors of a layer do not fit each other.
    """
    layers = _layers(tensors, path)
    triples = {
        name: (parts["weight"], parts["scales"], parts["biases"])
        for name, parts in layers.items()
        if {*_AFFINE} <= parts.keys()
    }
    affine = affine_layers(triples, tensors, record, path)
    said = _in_metadata(metadata, path)
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if name == MARKER or name.endswith(f".{MARKER}"):
            continue
        if layer not in layers:
            folded[name] = tensor
        elif part == "weight":
            parts = layers[layer]
            options = _options(layer, parts, said, path)
            folded[name] = affine.get(layer) or _decoded(Layer(layer, parts, options), path)
        elif _OLD_NAMES.get(part, part) not in _PARTS:  # the bias
            folded[name] = tensor
    return folded


def _layers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The layers that have more than a weight and a bias: their tensors by the last part of their names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        part = _OLD_NAMES.get(part, part)
        if layer and part in _PARTS:
            layers.setdefault(layer, {})[part] = tensor
    for layer, parts in layers.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is not None:
            parts["weight"] = weight
        affine = "biases" in parts or ("scales" in parts and kind_of(parts["scales"]) != "u8")
        if weight is None or (affine and not {*_AFFINE} <= parts.keys()):
            raise FormatError(
                f"{path}: {layer} lacks one of weight, scales and biases of a quantized layer: "
                f"it has {', '.join(sorted(parts))}"
            )
    return layers


def _decoded(layer: Layer, path: Path) -> Tensor:
    """The weights of a layer that is not affine."""
    layout = layout_of(layer)
    if layout is not None:
        return layout.tensor(layer, path)
    said = layer.options.get("format")
    if said is None and layer.parts.keys() <= {"weight", *HINTS}:
        return layer.parts["weight"]
    raise FormatError(
        f"{path}: {layer.name} is quantized as {said or 'nothing that this program knows'} ({layer.described}): "
        f"known are {', '.join(layout.name for layout in LAYOUTS)}"
    )


def _options(layer: str, parts: Mapping[str, Tensor], said: Json, path: Path) -> JsonObject:
    """What the file says about one layer: its own tensor first, then the metadata."""
    tensor = parts.get("comfy_quant")
    if tensor is not None:
        if tensor.nbytes > _LONGEST:
            raise FormatError(
                f"{path}: {layer}.comfy_quant has {tensor.nbytes} bytes, which is not a note about a layer"
            )
        return _object(decoding.codes(tensor).tobytes(), f"{path}: {layer}.comfy_quant")
    # the names in the metadata lack the prefix of the file
    own: object = next((said[name] for name in _shortened(layer) if name in said), {})
    return _with_params(own, f"{path}: {METADATA}")


def _shortened(layer: str) -> list[str]:
    """The name of a layer, and what remains of it without its first parts."""
    words = layer.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def _in_metadata(metadata: Json, path: Path) -> JsonObject:
    text = metadata.get(METADATA)
    if text is None:
        return {}
    layers = _object(text, f"{path}: {METADATA}").get("layers", {})
    if not isinstance(layers, dict):
        raise FormatError(f"{path}: {METADATA}: its layers are no JSON object")
    return layers


def _object(text: object, where: str) -> JsonObject:
    try:
        data = json.loads(text) if isinstance(text, (str, bytes)) else text
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is damaged: {error}") from error
    return _with_params(data, where)


def _with_params(data: object, where: str) -> JsonObject:
    """The object `data`, with the options that it nests under `params`."""
    if not isinstance(data, dict):
        raise FormatError(f"{where}: is damaged: it is no JSON object")
    nested = data.get("params")
    return {**data, **nested} if isinstance(nested, dict) else data
