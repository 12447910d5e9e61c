"""The autoencoder both ways: NumPy against diffusers, MLX against NumPy."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import numpy as np
import pytest
from support import cases, tiny
from support.daily import daily
from support.networks import HAS_MLX, mlx_only, native, network, stored
from support.parity import assert_parity

from zimage_ref.model import parameters

if HAS_MLX:
    import mlx.core as mx
    from support.mlx_memory import measured_from

    import zimage_mlx.networks.strips
    import zimage_mlx.networks.vae

WAYS = {"encode": ("image", "encoded"), "decode": ("latents", "decoded")}


def weights_of(name: str) -> dict[str, np.ndarray]:
    return tiny.random_weights(parameters.vae_parameters(tiny.VAES[name]))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", tiny.VAES)
def test_numpy_matches_the_official_autoencoder(config: str, way: str, dtype: str) -> None:
    golden, (given, out) = cases.read(f"vae_{config}"), WAYS[way]
    model = network("numpy", "vae", tiny.VAES[config], weights_of(config), dtype)
    assert_parity(getattr(model, way)(golden[given]), golden[out], "golden", dtype)


@mlx_only
@pytest.mark.parametrize(
    ("config", "way", "dtype"),
    daily(
        product(tiny.VAES, WAYS, ["float32", "float16", "bfloat16"]),
        *product(tiny.VAES, WAYS, ["float32"]),
        ("tiny", "decode", "float16"), ("odd", "encode", "bfloat16"),
    ),
)  # fmt: skip
def test_mlx_matches_numpy_and_keeps_its_dtype(config: str, way: str, dtype: str) -> None:
    given, weights = cases.read(f"vae_{config}")[WAYS[way][0]], stored(weights_of(config), dtype)
    expected = getattr(network("numpy", "vae", tiny.VAES[config], weights, "float64"), way)(given)
    model = network("mlx", "vae", tiny.VAES[config], weights, dtype)
    assert_parity(getattr(model, way)(native("mlx", given)), expected, "twin", dtype)


@mlx_only
@pytest.mark.parametrize(
    ("config", "way", "nbytes"),
    daily(
        product(tiny.VAES, WAYS, [1, 100_000, 1_000_000, 100_000_000]),
        ("tiny", "encode", 100_000), ("tiny", "decode", 1_000_000), ("odd", "encode", 100_000_000),
        ("odd", "encode", 1), ("odd", "decode", 100_000),
    ),
)  # fmt: skip
def test_strips_give_the_same_without_seams(
    config: str, way: str, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zimage_mlx.networks.vae, "_SCORES_AT_ONCE", 64)  # so that the attention takes several turns
    given = native("mlx", cases.read(f"vae_{config}")[WAYS[way][0]])
    run = getattr(network("mlx", "vae", tiny.VAES[config], weights_of(config), "float32"), way)
    assert_parity(run(given, zimage_mlx.networks.strips.Strips(nbytes)), run(given), "same")


@mlx_only
def test_strips_bound_the_memory_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is that of the last level's first resnet: an input twice as wide, what is between, and the output."""
    config = dataclasses.replace(tiny.VAE, block_out_channels=(8, 16, 32, 32), norm_num_groups=4)
    weights = tiny.random_weights(parameters.vae_parameters(config))
    model, latents = network("mlx", "vae", config, weights, "float32"), mx.zeros((1, 16, 16, 16))
    layer = 128 * 128 * 8 * 4  # bytes at full size

    def peak(strips: Any) -> float:
        before = measured_from()
        mx.eval(model.decode(latents, strips))
        return (mx.get_peak_memory() - before) / layer

    assert peak(None) > 20
    strips, calls, waits, wait = zimage_mlx.networks.strips.Strips(layer // 100), [0], [0], mx.eval
    eval_ahead = strips.eval_ahead

    def counted(*arrays: Any) -> None:
        waits[0] += 1
        wait(*arrays)

    def settled(*arrays: Any) -> None:
        """`eval_ahead`; then MLX's thread, late on a busy machine, gives back what nobody holds any more."""
        eval_ahead(*arrays)
        assert waits[0] == calls[0]  # one strip is computed while the next is queued
        calls[0] += 1
        mx.synchronize()

    monkeypatch.setattr(mx, "eval", counted)
    monkeypatch.setattr(strips, "eval_ahead", settled)
    assert peak(strips) < 5 and calls[0] > 100


@mlx_only
def test_small_layers_are_not_cut_and_large_ones_evenly() -> None:
    strips = zimage_mlx.networks.strips.Strips(3000)
    assert strips.spans(10, 100) == [(0, 10)]
    assert strips.spans(10, 101) == [(0, 5), (5, 10)]
    assert strips.spans(10, 300) == [(0, 4), (4, 8), (8, 10)]
    assert strips.spans(3, 1 << 30) == [(0, 1), (1, 2), (2, 3)]
