"""Turns a LoRA into the tensors of a file. Tools expect alpha in different places: one function for each place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from zimage_ref.errors import WeightError
from zimage_ref.formats.tensors import Array
from zimage_ref.model.parameters import LORA_TARGETS

from .alpha import PEFT_METADATA
from .keys import OFFICIAL_PATCH_KEY, Spelled, Spelling
from .kinds import KINDS
from .low_rank import LowRank
from .updates import BIAS, LoRA, Update

_T = TypeVar("_T")


def with_alpha_folded(lora: LoRA, spelling: Spelling) -> Spelled:
    """alpha / rank is multiplied into the matrices. Readers use the scale 1.

    LoKr and LoHa keep an alpha key, which gives the scale 1 too: LyCORIS does not load them without one.
    """
    folded = {name: update.folded() for name, update in lora.items()}
    with_alpha = {name: update for name, update in folded.items() if update.alpha_is_read}
    alphas = {key: array for part, key, array in _keyed(with_alpha, spelling) if part == "alpha"}
    return _without_alpha(folded, spelling) | alphas, {"alpha_folded": True}


def with_alpha_keys(lora: LoRA, spelling: Spelling) -> Spelled:
    """Each module has its own alpha key."""
    return {key: array for _, key, array in _keyed(lora, spelling)}, {"alpha_folded": False}


def _without_alpha(lora: Mapping[str, Update], spelling: Spelling) -> dict[str, Array]:
    return {key: array for part, key, array in _keyed(lora, spelling) if part != "alpha"}


def _keyed(lora: Mapping[str, Update], spelling: Spelling) -> Iterator[tuple[str, str, Array]]:
    """Each part of each update: (part, key, numbers)."""
    suffixes: dict[str, str] = {}
    for table in (spelling.suffixes, *(kind.suffixes for kind in KINDS.values()), {".alpha": "alpha"}):
        for suffix, part in table.items():
            suffixes.setdefault(part, suffix)
    for name, update in lora.items():
        for part, array in update.tensors().items():
            if name.endswith(BIAS):
                part = _OF_BIASES[part]
            module = name.removesuffix(BIAS)
            if part in _SINGLE and spelling.separator == ".":
                module = _in_comfyui(module)
            yield part, f"{_prefix(spelling)}{module.replace('.', spelling.separator)}{suffixes[part]}", array


_OF_BIASES = {"D": "bias", "whole": "whole_bias"}  # a part of a weight -> the part of a bias of the same kind
_SINGLE = {"D", "bias", "whole", "whole_bias"}  # parts that mflux looks for under ComfyUI's own names only
_COMFYUI = {".attention.norm_q": ".attention.q_norm", ".attention.norm_k": ".attention.k_norm"}


def _in_comfyui(module: str) -> str:
    """The name of a norm, or of a layer outside the blocks, in ComfyUI's single file. Others keep theirs."""
    for official, name in _COMFYUI.items():
        module = module.replace(official, name)
    return re.sub(rf"^all_(x_embedder|final_layer)\.{OFFICIAL_PATCH_KEY}", r"\1", module)


def _prefix(spelling: Spelling) -> str:
    return spelling.prefixes[0] if spelling.prefixes else ""


def with_peft_config(lora: LoRA, spelling: Spelling) -> Spelled:
    """alpha / rank is multiplied into B, because ComfyUI and InvokeAI read no metadata.

    PEFT's config in the metadata, which diffusers and mflux read, has alpha = rank for every layer.
    """
    factors = {layer: update.folded() for layer, update in _low_rank(lora).items()}
    rank = _commonest([update.rank for update in factors.values()])
    others = {layer: update.rank for layer, update in factors.items() if update.rank != rank}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(factors),
        "rank_pattern": others, "alpha_pattern": others,
    }  # fmt: skip
    metadata = json.dumps({f"{_prefix(spelling)}{key}": value for key, value in config.items()})
    return _without_alpha(factors, spelling), {"alpha_folded": True, PEFT_METADATA: metadata}


def with_one_rank(lora: LoRA, spelling: Spelling) -> Spelled:
    """The form of z-image-train: modules are fused, all have one rank, and the sidecar holds one alpha for all."""
    factors = _low_rank(lora)
    scales = {update.scale for update in factors.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    modules = _fused({name: _rescaled(update, scale) for name, update in factors.items()}, spelling)
    rank = max(update.rank for update in modules.values())  # the tool requires the same rank in all modules
    padded: dict[str, Update] = {}
    for module, update in modules.items():
        missing = rank - update.rank
        padded[module] = LowRank(np.pad(update.A, ((0, missing), (0, 0))), np.pad(update.B, ((0, 0), (0, missing))))
    facts: dict[str, object] = {
        "rank": rank, "alpha": _short(scale * rank), "alpha_folded": False,
        "target_attention": any(".attention." in module for module in modules),
        "target_feed_forward": any(".feed_forward." in module for module in modules),
        "target_refiners": any("_refiner." in module for module in modules),
    }  # fmt: skip
    return _without_alpha(padded, spelling), facts


def _fused(factors: Mapping[str, LowRank], spelling: Spelling) -> dict[str, LowRank]:
    """The updates by the tool's own modules, which hold q, k and v as one. All must have the same scale."""
    places: dict[str, tuple[str, tuple[str, ...]]] = {
        layer: (layer, (layer,)) for layers in LORA_TARGETS.values() for layer in layers
    }
    places |= {layer: (module, layers) for module, layers in spelling.modules.items() for layer in layers}
    modules: dict[str, LowRank] = {}
    for name in factors:
        stack, index, layer = (*name.split(".", 2), "", "")[:3]
        if layer not in places:
            raise WeightError(f"the {spelling.naming} naming has no place for {name}: only attention and feed_forward")
        module, layers = places[layer]
        if f"{stack}.{index}.{module}" not in modules:
            parts = [factors.get(f"{stack}.{index}.{part}") for part in layers]
            modules[f"{stack}.{index}.{module}"] = _stacked(parts)
    return modules


def _stacked(parts: list[LowRank | None]) -> LowRank:
    """q, k and v as one update. It has their common A if all three are equal, else B is block-diagonal.

    A missing one is zero.
    """
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
    """The same update, written with the scale `scale`."""
    if update.scale == scale:
        return update
    return replace(update, B=update.B * np.float32(update.scale / scale), scale=scale)


def _low_rank(lora: LoRA) -> dict[str, LowRank]:
    """The updates by layer, for a LoRA that has low-rank updates only."""
    return {name: LowRank(*pair, scale=update.scale) for name, update in lora.items() if (pair := update.low_rank)}


def _commonest(values: list[_T]) -> _T:
    return max(set(values), key=lambda value: (values.count(value), value))


def _short(number: float) -> float | int:
    """`number` as an int if it is a whole number within rounding, as other tools write it."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1, abs(number)) else number
