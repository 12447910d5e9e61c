"""One LoRA for the tiny transformer, its dialects as files, and what it adds to each weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support import lora_makers, tiny
from zimage_ref.lora.arithmetic import NumPyArithmetic
from zimage_ref.lora.updates import LoRA, Update, parameter
from zimage_ref.model import parameters

SHAPES = parameters.transformer_parameters(tiny.TRANSFORMER)
TARGETS = ("attention", "feed_forward", "refiners")
LAYERS = {layer: SHAPES[f"{layer}.weight"] for layer in parameters.lora_modules(tiny.TRANSFORMER, TARGETS)}
BASE = tiny.random_weights(SHAPES, "transformer")
RANK, ALPHA = 4, 3.0
FACTORS = lora_makers.factors(LAYERS, RANK)
EXACT = 1e-6  # relative, float32


def make(name: str, folder: Path, base: lora_makers.Weights = BASE) -> Path:
    """The file of dialect `name` in `folder`, for a transformer with the weights `base`."""
    path = folder / ("lora.npz" if name == "npz" else "lora.safetensors")
    lora_makers.MAKERS[name](path, FACTORS, ALPHA, base)
    return path


def delta(update: Update, weight: np.ndarray) -> np.ndarray:
    """What the update adds to `weight`, in the weight's dtype."""
    return update.added(weight, NumPyArithmetic(weight.dtype))


def difference(update: Update, name: str) -> np.ndarray:
    """What the update adds to the base weight `name`, in float64."""
    return delta(update, BASE[parameter(name)].astype(np.float64))


def assert_same(one: LoRA, other: LoRA, tolerance: float = EXACT) -> None:
    """The two change the same parameters in the same way."""
    assert one.keys() == other.keys()
    for name, update in one.items():
        wanted = difference(other[name], name)
        np.testing.assert_allclose(
            difference(update, name), wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name
        )
