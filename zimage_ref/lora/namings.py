"""LoRAs under the names that other tools read.

    comfy    diffusion_model.<layer>.lora_A.weight          alpha / rank multiplied into B
    peft     transformer.<layer>.lora_A.weight              alpha in the metadata `lora_adapter_metadata`
    kohya    lora_unet_<layer>.lora_down.weight, .alpha
    burn     <block>.attention.qkv.lora_a, fused            alpha in the sidecar `<stem>.lora.json`, one rank for all

comfy and kohya have keys for every kind of update; peft and burn know the low-rank kind alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from zimage_ref.errors import ConfigError, WeightError, listing
from zimage_ref.formats.tensors import Array

from .alpha import PEFT_METADATA
from .updates import BIAS, Dense, DoRA, Hadamard, LoRA, LowRank, Update

NAMINGS = ("comfy", "peft", "kohya", "burn")
_QKV = tuple(f".attention.to_{p}" for p in "qkv")
_BURN_MODULES = {
    ".attention.to_out.0": ".attention.to_out",
    **{f".feed_forward.{w}": f".feed_forward.{w}" for w in ("w1", "w2", "w3")}
}  # fmt: skip


Spelled = tuple[dict[str, Array], dict[str, Any]]  # float32 arrays by key; facts for metadata and sidecar


def spelled(lora: LoRA, naming: str) -> Spelled:
    """`lora` under the names of one of NAMINGS.

    Raises ConfigError for another, WeightError for updates that the naming has no keys for.
    """
    if naming not in NAMINGS:
        raise ConfigError(f"unknown naming {naming!r} of LoRA keys: known are {', '.join(NAMINGS)}")
    return {"comfy": _comfy, "peft": _peft, "kohya": _kohya, "burn": _burn}[naming](lora)


def _comfy(lora: LoRA) -> Spelled:
    arrays: dict[str, Array] = {}
    for name, update in lora.items():
        layer, parts = name.removesuffix(BIAS), _parts(_folded(update), name, ("lora_A", "lora_B"))
        arrays |= {f"diffusion_model.{layer}.{part}": m for part, m in parts.items() if part != "alpha"}
    return arrays, {"alpha_folded": True}


def _kohya(lora: LoRA) -> Spelled:
    arrays: dict[str, Array] = {}
    for name, update in lora.items():
        parts = _parts(update, name, ("lora_down", "lora_up"))
        arrays |= {f"lora_unet_{name.removesuffix(BIAS).replace('.', '_')}.{part}": m for part, m in parts.items()}
    return arrays, {"alpha_folded": False}


def _parts(update: Update, name: str, halves: tuple[str, str]) -> dict[str, Array]:
    """The tensors of any update under kohya's and LyCORIS's suffixes; a Kronecker or dense scale is multiplied in."""
    if isinstance(update, DoRA):
        return {**_parts(update.update, name, halves), "dora_scale": update.magnitude}
    if isinstance(update, LowRank):
        return {f"{halves[0]}.weight": update.A, f"{halves[1]}.weight": update.B, "alpha": _alpha(update)}
    if isinstance(update, Hadamard):
        factors = {"w1_a": update.A1, "w1_b": update.B1, "w2_a": update.A2, "w2_b": update.B2}
        return {**{f"hada_{name}": factor for name, factor in factors.items()}, "alpha": _alpha(update)}
    scale = np.float32(update.scale)
    if isinstance(update, Dense):
        return {"diff_b" if name.endswith(BIAS) else "diff": update.D * scale}
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


def _peft(lora: LoRA) -> Spelled:
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
    return arrays, {"alpha_folded": False, PEFT_METADATA: metadata}


def _burn(lora: LoRA) -> Spelled:
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
    return arrays, facts


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
    return {name: update for name, update in lora.items() if isinstance(update, LowRank)}


def _commonest(values: list[Any]) -> Any:
    return max(set(values), key=lambda value: (values.count(value), value))


def _short(number: float) -> float | int:
    """An integer where it is one within rounding, as other tools write it."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1, abs(number)) else number
