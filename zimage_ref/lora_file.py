"""LoRA files: the matrices of each adapted layer, in the dialect that ComfyUI, diffusers and mflux all read.

    diffusion_model.<layer>.lora_A.weight   (rank, in)
    diffusion_model.<layer>.lora_B.weight   (out, rank)      W' = W + B A

There is no alpha in such a file: alpha / rank is multiplied into B when it is written. The sidecar `<stem>.lora.json`
says so (`alpha_folded`), for people and for the original Rust tool's readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .errors import WeightError, listing
from .files import atomic_write
from .names import Shapes
from .safetensors_io import write as write_safetensors
from .tensors import BFLOAT16, Array, Tensor, cast

PREFIX = "diffusion_model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoRAFactors:
    """W' = W + B A for one Linear layer."""

    A: Array  # (rank, in) float32
    B: Array  # (out, rank) float32


LoRA = dict[str, LoRAFactors]  # layer name -> factors


def read_lora(path: Path, parameters: Shapes) -> LoRA:
    """The LoRA in `path`, for a transformer with `parameters`.

    Raises WeightError unless every tensor of the file belongs to a complete pair that fits a Linear layer.
    """
    tensors = Checkpoint.open(path).tensors
    layers = sorted({name.removeprefix(PREFIX).removesuffix(_DOWN).removesuffix(_UP) for name in tensors})
    known = {f"{PREFIX}{layer}{suffix}" for layer in layers for suffix in (_DOWN, _UP)}
    strange = [name for name in tensors if name not in known]
    if strange or not layers:
        raise WeightError(f"{path}: not a LoRA of a known dialect: {listing(strange) or 'it holds no tensors'}")
    return {layer: _factors(path, layer, tensors, parameters) for layer in layers}


def _factors(path: Path, layer: str, tensors: Mapping[str, Tensor], parameters: Shapes) -> LoRAFactors:
    shape = parameters.get(f"{layer}.weight", ())
    if len(shape) != 2:
        raise WeightError(f"{path}: {layer} is not a Linear layer of this transformer")
    halves = [tensors.get(f"{PREFIX}{layer}{suffix}") for suffix in (_DOWN, _UP)]
    down, up = halves
    if down is None or up is None:
        raise WeightError(f"{path}: {layer} has lora_{'B' if down is None else 'A'} without its other half")
    if len(down.shape) != 2 or up.shape != (shape[0], down.shape[0]) or down.shape[1] != shape[1]:
        raise WeightError(f"{path}: {layer} has A {down.shape} and B {up.shape}, which do not fit a layer {shape}")
    return LoRAFactors(*(cast(half.read(), np.dtype("<f4")) for half in (down, up)))


def write_lora(path: Path, lora: Mapping[str, LoRAFactors], record: Mapping[str, Any]) -> None:
    """Writes `lora`, whose B already holds alpha / rank, as bfloat16, and the sidecar beside it.

    `record` (rank, alpha, targets, base model, ...) goes into the metadata and the sidecar.
    """
    tensors = {}
    for layer, factors in lora.items():
        tensors[f"{PREFIX}{layer}{_DOWN}"] = Tensor.of(cast(factors.A, BFLOAT16))
        tensors[f"{PREFIX}{layer}{_UP}"] = Tensor.of(cast(factors.B, BFLOAT16))
    facts = {**record, "alpha_folded": True}
    write_safetensors(path, tensors, {"format": "pt", **{k: _text(v) for k, v in facts.items()}})
    with atomic_write(path.with_suffix(".lora.json")) as file:
        file.write((json.dumps(facts, indent=2) + "\n").encode())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
