"""Qwen3 up to hidden_states[-2]: NumPy against transformers, MLX against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from support import cases, tiny
from support.networks import mlx_only, native, network, stored
from support.parity import assert_parity

from zimage_ref.model import parameters

LENGTHS = ("13", "1")


def weights_of(name: str) -> dict[str, np.ndarray]:
    return tiny.random_weights(parameters.text_encoder_parameters(tiny.TEXT_ENCODERS[name]))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", tiny.TEXT_ENCODERS)
def test_numpy_matches_the_official_encoder(config: str, length: str, dtype: str) -> None:
    golden = cases.read(f"text_encoder_{config}", length)
    model = network("numpy", "text_encoder", tiny.TEXT_ENCODERS[config], weights_of(config), dtype)
    assert_parity(model(golden["ids"]), golden["out"], "golden", dtype)


@mlx_only
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", tiny.TEXT_ENCODERS)
def test_mlx_matches_numpy_and_keeps_its_dtype(config: str, length: str, dtype: str) -> None:
    ids, weights = cases.read(f"text_encoder_{config}", length)["ids"], stored(weights_of(config), dtype)
    expected = network("numpy", "text_encoder", tiny.TEXT_ENCODERS[config], weights, "float64")(ids)
    model = network("mlx", "text_encoder", tiny.TEXT_ENCODERS[config], weights, dtype)
    assert_parity(model(native("mlx", ids)), expected, "twin", dtype)
