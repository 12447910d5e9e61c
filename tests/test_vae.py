"""The autoencoder both ways: NumPy against diffusers, MLX against NumPy."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import tiny
from networks import mlx_only, native, network, stored
from parity import assert_parity

from zimage_ref import names

WAYS = {"encode": ("image", "encoded"), "decode": ("latents", "decoded")}


def weights_of(name: str) -> dict[str, np.ndarray]:
    return tiny.random_weights(names.vae_parameters(tiny.VAES[name]))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", tiny.VAES)
def test_numpy_matches_the_official_autoencoder(config: str, way: str, dtype: str) -> None:
    golden, (given, out) = cases.read(f"vae_{config}"), WAYS[way]
    model = network("numpy", "vae", tiny.VAES[config], weights_of(config), dtype)
    assert_parity(getattr(model, way)(golden[given]), golden[out], "golden", dtype)


@mlx_only
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", tiny.VAES)
def test_mlx_matches_numpy_and_keeps_its_dtype(config: str, way: str, dtype: str) -> None:
    given, weights = cases.read(f"vae_{config}")[WAYS[way][0]], stored(weights_of(config), dtype)
    expected = getattr(network("numpy", "vae", tiny.VAES[config], weights, "float64"), way)(given)
    model = network("mlx", "vae", tiny.VAES[config], weights, dtype)
    assert_parity(getattr(model, way)(native("mlx", given)), expected, "twin", dtype)
