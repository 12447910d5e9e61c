"""LoRA files in the namings that other tools read.

    comfy    diffusion_model.<layer>.lora_A.weight          alpha / rank multiplied into B
    peft     transformer.<layer>.lora_A.weight              alpha in the metadata `lora_adapter_metadata`
    kohya    lora_unet_<layer>.lora_down.weight, .alpha
    burn     <block>.attention.qkv.lora_a, fused            alpha in the sidecar `<stem>.lora.json`, one rank for all

comfy and kohya have keys for every kind of update; peft and burn know the low-rank kind alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import npz, safetensors_io
from .checkpoint import SUFFIXES
from .errors import ConfigError, WeightError, listing
from .files import atomic_write
from .lora import Dense, DoRA, Hadamard, LoRA, LowRank, Update
from .lora_alpha import PEFT_METADATA, sidecar
from .tensors import DTYPE_NAMES, Array, Tensor, cast, float_dtype

NAMINGS = ("comfy", "peft", "kohya", "burn")
_QKV = tuple(f".attention.to_{p}" for p in "qkv")
_BURN_MODULES = {
    ".attention.to_out.0": ".attention.to_out",
    **{f".feed_forward.{w}": f".feed_forward.{w}" for w in ("w1", "w2", "w3")}
}  # fmt: skip


@dataclass(frozen=True)
class _Spelled:
    """A LoRA under the names of one dialect."""

    arrays: dict[str, Array]  # float32
    facts: dict[str, Any]  # of the metadata and the sidecar


def write_lora(
    path: Path,
    lora: LoRA,
    record: Mapping[str, Any],
    naming: str = "comfy",
    dtype: str | None = "bf16",
    with_sidecar: bool = True,
) -> None:
    """Writes `lora` in one of NAMINGS, as .safetensors or .npz, with a sidecar beside it (burn: always).

    `record` (rank, alpha, targets, base model, ...) goes into the metadata and the sidecar. An alpha is float32
    whatever the `dtype`. Raises ConfigError for an unknown naming or suffix, WeightError for updates that the naming
    has no keys for.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a LoRA is written as {' or '.join(SUFFIXES)}")
    if naming not in NAMINGS:
        raise ConfigError(f"unknown naming {naming!r} of LoRA keys: known are {', '.join(NAMINGS)}")
    if not lora:
        raise ConfigError(f"{path}: not written: the LoRA changes nothing")
    spelled = {"comfy": _comfy, "peft": _peft, "kohya": _kohya, "burn": _burn}[naming](lora)
    facts = {**record, **spelled.facts}
    number = float_dtype(dtype or "f32")
    tensors = {
        name: Tensor.of(array if name.endswith(".alpha") else _cast(path, name, array, number))
        for name, array in spelled.arrays.items()
    }
    if with_sidecar or naming == "burn":
        beside = {key: value for key, value in facts.items() if key != PEFT_METADATA}
        with atomic_write(sidecar(path)) as file:
            file.write((json.dumps(beside, indent=2) + "\n").encode())
    if path.suffix == ".npz":
        npz.write(path, tensors, {"model_type": "lora", **facts})
    else:
        safetensors_io.write(path, tensors, {"format": "pt", **{k: _text(v) for k, v in facts.items()}})


def _comfy(lora: LoRA) -> _Spelled:
    arrays: dict[str, Array] = {}
    for name, update in lora.items():
        layer, _, kind = name.rpartition(".")
        parts = _parts(_folded(update), kind, ("lora_A", "lora_B"))
        arrays |= {f"diffusion_model.{layer}.{part}": m for part, m in parts.items() if part != "alpha"}
    return _Spelled(arrays, {"alpha_folded": True})


def _kohya(lora: LoRA) -> _Spelled:
    arrays: dict[str, Array] = {}
    for name, update in lora.items():
        layer, _, kind = name.rpartition(".")
        parts = _parts(update, kind, ("lora_down", "lora_up"))
        arrays |= {f"lora_unet_{layer.replace('.', '_')}.{part}": m for part, m in parts.items()}
    return _Spelled(arrays, {"alpha_folded": False})


def _parts(update: Update, kind: str, halves: tuple[str, str]) -> dict[str, Array]:
    """The tensors of any update under kohya's and LyCORIS's suffixes; a Kronecker or dense scale is multiplied in."""
    if isinstance(update, DoRA):
        return {**_parts(update.update, kind, halves), "dora_scale": update.magnitude}
    if isinstance(update, LowRank):
        return {f"{halves[0]}.weight": update.A, f"{halves[1]}.weight": update.B, "alpha": _alpha(update)}
    if isinstance(update, Hadamard):
        factors = {"w1_a": update.A1, "w1_b": update.B1, "w2_a": update.A2, "w2_b": update.B2}
        return {**{f"hada_{name}": factor for name, factor in factors.items()}, "alpha": _alpha(update)}
    scale = np.float32(update.scale)
    if isinstance(update, Dense):
        return {"diff" if kind == "weight" else "diff_b": update.D * scale}
    if update.stop is None:
        return {"lokr_w1": update.W1 * scale, "lokr_w2": update.W2}
    return {"diff": np.kron(update.W1 * scale, update.W2)[update.start : update.stop]}  # some rows: no such product


def _alpha(update: LowRank | Hadamard) -> Array:
    return np.array(update.scale * update.rank, np.float32)


def _folded(update: Update) -> Update:
    """The same update with a low-rank or Hadamard scale multiplied in."""
    if isinstance(update, DoRA):
        inner = _folded(update.update)
        return update if isinstance(inner, DoRA) else DoRA(inner, update.magnitude)
    if isinstance(update, LowRank):
        return replace(update, B=update.B * np.float32(update.scale), scale=1.0)
    if isinstance(update, Hadamard):
        return replace(update, A1=update.A1 * np.float32(update.scale), scale=1.0)
    return update


def _peft(lora: LoRA) -> _Spelled:
    factors = _low_rank(lora, "peft")
    arrays = {f"transformer.{layer}.lora_{x}.weight": getattr(u, x) for layer, u in factors.items() for x in "AB"}
    ranks = {layer: update.rank for layer, update in factors.items()}
    alphas = {layer: _short(update.scale * update.rank) for layer, update in factors.items()}
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(factors),
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {layer: a for layer, a in alphas.items() if a != alpha},
    }  # fmt: skip
    metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return _Spelled(arrays, {"alpha_folded": False, PEFT_METADATA: metadata})


def _burn(lora: LoRA) -> _Spelled:
    factors = _low_rank(lora, "burn")
    scales = {update.scale for update in factors.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    modules = _fused({name: _rescaled(update, scale) for name, update in factors.items()})
    rank = max(update.rank for update in modules.values())  # the tool builds all modules with one rank
    arrays = {}
    for module, update in modules.items():
        missing = rank - update.rank
        arrays[f"{module}.lora_a"] = np.pad(update.A, ((0, missing), (0, 0)))
        arrays[f"{module}.lora_b"] = np.pad(update.B, ((0, 0), (0, missing)))
    facts = {
        "rank": rank, "alpha": _short(scale * rank), "alpha_folded": False,
        "target_attention": any(".attention." in module for module in modules),
        "target_feed_forward": any(".feed_forward." in module for module in modules),
        "target_refiners": any("_refiner." in module for module in modules),
    }  # fmt: skip
    return _Spelled(arrays, facts)


def _fused(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """By the original tool's modules: q, k and v as one. All updates are of one scale."""
    modules: dict[str, LowRank] = {}
    for layer, update in factors.items():
        block = layer.split(".attention.")[0].split(".feed_forward.")[0]
        suffix = layer.removeprefix(block)
        if suffix in _BURN_MODULES:
            modules[block + _BURN_MODULES[suffix]] = update
        elif suffix in _QKV and f"{block}.attention.qkv" not in modules:
            modules[f"{block}.attention.qkv"] = _stacked([factors.get(block + part) for part in _QKV])
        elif suffix not in _QKV:
            raise WeightError(f"the burn naming has no place for {layer}: only attention and feed_forward")
    return modules


def _stacked(parts: list[LowRank | None]) -> LowRank:
    """q, k and v in one: with one A where all three have the same, else block-diagonal; an absent one is zero."""
    there = [part for part in parts if part is not None]
    first, height = there[0], there[0].shape[0]
    if all(np.array_equal(part.A, first.A) for part in there):
        blocks = [part.B if part else np.zeros_like(first.B) for part in parts]
        return replace(first, B=np.concatenate(blocks))
    rank = sum(part.rank for part in there)
    B = np.zeros((height * len(parts), rank), np.float32)
    column = 0
    for i, part in enumerate(parts):
        if part is not None:
            B[i * height : (i + 1) * height, column : column + part.rank] = part.B
            column += part.rank
    return replace(first, A=np.concatenate([part.A for part in there]), B=B)


def _rescaled(update: LowRank, scale: float) -> LowRank:
    """The same update with its own scale replaced by `scale`."""
    if update.scale == scale:
        return update
    return replace(update, B=update.B * np.float32(update.scale / scale), scale=scale)


def _low_rank(lora: LoRA, naming: str) -> dict[str, LowRank]:
    """By layer. Raises WeightError where there are other kinds of updates."""
    others = [f"{name} ({type(update).__name__})" for name, update in lora.items() if not isinstance(update, LowRank)]
    if others:
        raise WeightError(f"the {naming} naming has low-rank updates only, not {listing(others)}: use comfy or kohya")
    return {name.removesuffix(".weight"): update for name, update in lora.items() if isinstance(update, LowRank)}


def _commonest(values: list[Any]) -> Any:
    return max(set(values), key=lambda value: (values.count(value), value))


def _short(number: float) -> float | int:
    """An integer where it is one within rounding, as other tools write it."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1, abs(number)) else number


def _cast(path: Path, name: str, array: Array, dtype: np.dtype[Any]) -> Array:
    result = cast(array, dtype)
    if not np.isfinite(cast(result, array.dtype)).all():
        raise WeightError(f"{path}: {name} does not fit in {DTYPE_NAMES[dtype]}: choose bf16 or f32")
    return result


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
