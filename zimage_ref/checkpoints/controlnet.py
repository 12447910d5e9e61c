"""The ControlNet: its Component. It is given for a picture, so no model folder needs one.

    diffusers   the official names: `model.control`; alibaba-pai's single files have them, too
    comfy       q, k and v are one matrix

Which of the variants a file holds follows from its names alone, and for 2.0 from one tensor, which is zero or missing.
Sources: infer_diffusers_model_type in diffusers' single_file_utils.py; config/z_image of VideoX-Fun.
"""

from __future__ import annotations

import re
from dataclasses import replace

from zimage_ref.formats.tensors import Tensors
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.control import (
    CONTROLNET_1_0,
    CONTROLNET_2_1,
    OWN,
    PLAIN,
    SHARED,
    ControlNetConfig,
    controlnet_parameters,
    controlnet_unused,
)

from .component import Component, count_numbered
from .dialects import OFFICIAL, Dialect
from .transformer import COMFY

_BEFORE, _AFTER = f"{OWN}.0.before_proj.weight", f"{OWN}.0.after_proj.weight"
_LAST_OF_2 = f"{SHARED}.{len(CONTROLNET_2_1.control_layers_places) - 1}."


def _refiner(tensors: Tensors, config: ControlNetConfig) -> str:
    """The kind of refiner: 2.0 has that of 2.1 without `before_proj`, or with zeros there, and does not use it."""
    before = tensors.get(_BEFORE)
    if before is not None:
        return OWN if before.read().any() else SHARED
    plain = f"{OWN}.0.attention_norm1.weight" in tensors and _AFTER not in tensors
    return PLAIN if plain and not any(name.startswith(_LAST_OF_2) for name in tensors) else SHARED


def _sizes(dialect: Dialect[ControlNetConfig], tensors: Tensors) -> ControlNetConfig:
    layers = count_numbered(tensors, SHARED + r"\.(\d{1,3})\.", len(CONTROLNET_1_0.control_layers_places))
    places = range(0, OFFICIAL_TRANSFORMER.n_layers, max(1, OFFICIAL_TRANSFORMER.n_layers // layers))[:layers]
    keys = {int(m[1]) for name in tensors if (m := re.match(r"control_all_x_embedder\.(\d{1,3})-1\.", name))}
    patch = keys.pop() if len(keys) == 1 else OFFICIAL_TRANSFORMER.patch_size
    refiner = _refiner(tensors, CONTROLNET_1_0)
    refiners = count_numbered(tensors, OWN + r"\.(\d{1,3})\.", CONTROLNET_1_0.n_refiner_layers)
    counted = replace(
        CONTROLNET_1_0,
        n_refiner_layers=refiners,
        patch_size=patch,
        control_layers_places=tuple(places),
        control_refiner_layers_places=() if refiner == PLAIN else tuple(range(refiners)),
        refiner=refiner,
    )
    embedder = f"control_all_x_embedder.{patch}-1.weight"
    dim, patch_dim = dialect.official_shape(tensors, embedder, 2, counted)
    (head_dim,) = dialect.official_shape(tensors, f"{SHARED}.0.attention.norm_q.weight", 1, counted)
    return replace(counted, dim=dim, n_heads=dim // head_dim, control_in_dim=patch_dim // patch**2)


CONTROLNET = Component(
    name="controlnet",
    title="ControlNet",
    optional=True,
    apart=True,
    variant=lambda config: config.variant,
    official=CONTROLNET_2_1,
    config_key="control_layers_places",
    parameters=controlnet_parameters,
    unused=controlnet_unused,
    sizes=_sizes,
    dialects=(OFFICIAL, COMFY),
    namings={"diffusers": OFFICIAL, "comfy": COMFY},
    library=("diffusers", "ZImageControlNetModel"),
    comfy_folders=("model_patches", "controlnet"),
    model_types=("controlnet",),
)
