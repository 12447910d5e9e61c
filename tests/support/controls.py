"""Small ControlNets of all variants, and the transformer and the inputs that they are compared on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from support import cases, tiny
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Tensor
from zimage_ref.model.control import (
    OWN,
    PLAIN,
    SHARED,
    ControlNetConfig,
    controlnet_parameters,
    controlnet_unused,
)

SEED, SCALE = 0, 0.7  # of the inputs of the golden file, and of its hints
TRANSFORMER = replace(tiny.TRANSFORMER, n_layers=5, n_refiner_layers=2)
_BASE = ControlNetConfig(
    dim=96, n_heads=3, n_refiner_layers=2, norm_eps=1e-5, patch_size=2, control_in_dim=33,
    control_layers_places=(0, 2, 4), control_refiner_layers_places=(0, 1), refiner=OWN,
)  # fmt: skip
VARIANTS = {
    "1.0": replace(
        _BASE, control_in_dim=16, refiner=PLAIN, control_layers_places=(0, 1, 3), control_refiner_layers_places=()
    ),
    "2.0": replace(_BASE, refiner=SHARED),
    "2.1": _BASE,
    "lite": replace(_BASE, control_layers_places=(0, 3)),
    "tile": replace(_BASE, control_in_dim=16, control_layers_places=(0, 3)),  # 2.1 with pictures alone
}


def inputs(config: ControlNetConfig, case: str, seed: int) -> cases.Arrays:
    """As `cases.transformer_inputs`, with the control picture `context` (1, control_in_dim, h, w)."""
    arrays = cases.transformer_inputs(TRANSFORMER, case, seed)
    shape = (1, config.control_in_dim, *arrays["x"].shape[2:])
    return arrays | {"context": np.random.RandomState(seed + 1).standard_normal(shape).astype(np.float32)}


# the same for the model of `tiny.write_model_folder`
SMALL = {
    name: replace(
        config, n_refiner_layers=1, control_layers_places=(0,) if name == "lite" else (0, 1),
        control_refiner_layers_places=config.control_refiner_layers_places[:1],
    )
    for name, config in VARIANTS.items()
}  # fmt: skip


def write(folder: Path, config: ControlNetConfig, salt: str = "") -> Path:
    """A diffusers folder with a ControlNet and its config."""
    arrays = tiny.random_weights(controlnet_parameters(config), salt)
    used = {name: Tensor.of(array) for name, array in arrays.items() if name not in controlnet_unused(config)}
    safetensors.write(folder / "diffusion_pytorch_model.safetensors", used, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    return folder
