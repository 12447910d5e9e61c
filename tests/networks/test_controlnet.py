"""The ControlNet: both engines against the official code, and each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import cases, controls, tiny
from support.controls import SCALE, SEED, TRANSFORMER, VARIANTS
from support.daily import daily
from support.networks import BACKENDS, PARAMETERS, control, mlx_only, native, network
from support.parity import assert_parity

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
KINDS = {"numpy": ("float64", "golden"), "mlx": ("float32", "golden")}


def denoised(backend: str, variant: str, inputs: cases.Arrays, dtype: str, scale: float | None, salt: str = "") -> Any:
    """The raw output of the transformer of `backend` with the ControlNet `variant`, or without it."""
    config = VARIANTS[variant]
    weights = tiny.random_weights(PARAMETERS["transformer"](TRANSFORMER), salt)
    model = network(backend, "transformer", TRANSFORMER, weights, dtype)
    captions = [native(backend, caption) for caption in cases.captions(inputs)]
    conditioning = model.condition(captions, *inputs["x"].shape[2:])
    if scale is not None:
        own = network(backend, "controlnet", config, tiny.random_weights(PARAMETERS["controlnet"](config), salt), dtype)
        conditioning = replace(conditioning, control=control(backend, own, inputs["context"], scale))
    return model.denoise(native(backend, inputs["x"]), native(backend, inputs["t"]), conditioning)


@every_backend
@every_variant
def test_golden(variant: str, backend: str) -> None:
    inputs, (dtype, kind) = controls.inputs(VARIANTS[variant], "padded", SEED), KINDS[backend]
    assert_parity(denoised(backend, variant, inputs, dtype, SCALE), cases.read("controlnet")[variant], kind, dtype)


@pytest.mark.parametrize("variant", daily(VARIANTS, "2.1", "lite"))
@mlx_only
def test_engines_agree(variant: str) -> None:
    inputs = controls.inputs(VARIANTS[variant], "batch", 5)
    expected = denoised("numpy", variant, inputs, "float64", SCALE)
    assert_parity(denoised("mlx", variant, inputs, "float32", SCALE), expected, "twin")


@every_backend
def test_the_hints_count_and_scale_zero_has_none(backend: str) -> None:
    inputs = controls.inputs(VARIANTS["2.1"], "padded", 2)
    plain = np.array(denoised(backend, "2.1", inputs, "float32", None))
    assert np.array_equal(denoised(backend, "2.1", inputs, "float32", 0.0), plain)
    assert np.abs(np.array(denoised(backend, "2.1", inputs, "float32", SCALE)) - plain).max() > 0.05


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@every_variant
@pytest.mark.parametrize("case", cases.CASES)
def test_official(case: str, variant: str) -> None:
    official = pytest.importorskip("support.official", reason="diffusers is not installed (extra `oracle`)")
    config, salt = VARIANTS[variant], f"{case} "
    inputs = controls.inputs(config, case, 3)
    theirs = official.transformer(TRANSFORMER, tiny.random_weights(PARAMETERS["transformer"](TRANSFORMER), salt))
    own = official.controlnet(config, tiny.random_weights(PARAMETERS["controlnet"](config), salt), theirs)
    expected = official.denoise_controlled(theirs, own, inputs, SCALE)
    for backend, (dtype, kind) in KINDS.items():
        if backend == "numpy" or not mlx_only.args[0]:
            assert_parity(denoised(backend, variant, inputs, dtype, SCALE, salt), expected, kind, dtype)
