"""The diffusion transformer: NumPy against the official code, MLX against NumPy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from support import cases, tiny
from support.daily import daily
from support.networks import BACKENDS, HAS_MLX, mlx_only, native, network, stored
from support.parity import assert_parity, dtype_name

from zimage_ref.model import parameters
from zimage_ref.model.positions import rope_angles

if HAS_MLX:
    import mlx.core as mx

    from zimage_mlx.networks.ops import rotation_tables

BLOCKS = ("noise_refiner.0", "context_refiner.0")


def weights_of(name: str) -> dict[str, np.ndarray]:
    return tiny.random_weights(parameters.transformer_parameters(tiny.TRANSFORMERS[name]))


def denoise(backend: str, config: str, weights: dict[str, np.ndarray], inputs: cases.Arrays, dtype: str) -> Any:
    model = network(backend, "transformer", tiny.TRANSFORMERS[config], weights, dtype)
    captions = [native(backend, caption) for caption in cases.captions(inputs)]
    return model(native(backend, inputs["x"]), native(backend, inputs["t"]), captions)


@pytest.mark.parametrize(
    ("config", "case", "dtype"),
    daily(
        product(tiny.TRANSFORMERS, cases.CASES, ["float64", "float32"]),
        *product(tiny.TRANSFORMERS, ["padded", "batch"], ["float64"]),
        ("tiny", "exact", "float64"), ("tiny", "batch", "float32"), ("wide", "padded", "float32"),
    ),
)  # fmt: skip
def test_numpy_matches_the_official_transformer(config: str, case: str, dtype: str) -> None:
    inputs = cases.read(f"transformer_{config}", case)
    actual = denoise("numpy", config, weights_of(config), inputs, dtype)
    assert_parity(actual, inputs["out"], "golden", dtype)


@mlx_only
@pytest.mark.parametrize(
    ("config", "case", "dtype"),
    daily(
        product(tiny.TRANSFORMERS, cases.CASES, ["float32", "float16", "bfloat16"]),
        *product(["tiny", "narrow"], cases.CASES, ["float32"]),
        ("wide", "padded", "float32"), ("tiny", "batch", "float16"), ("narrow", "padded", "float16"),
        ("tiny", "batch", "bfloat16"), ("wide", "exact", "bfloat16"),
    ),
)  # fmt: skip
def test_mlx_matches_numpy_and_keeps_the_dtype_of_its_stream(config: str, case: str, dtype: str) -> None:
    inputs, weights = cases.read(f"transformer_{config}", case), stored(weights_of(config), dtype)
    expected = denoise("numpy", config, weights, inputs, "float64")
    actual = denoise("mlx", config, weights, inputs, dtype)
    if dtype == "float16":  # its matrices are, its stream is float32
        assert dtype_name(actual) == "float32"
        actual = actual.astype(mx.float16)
    assert_parity(actual, expected, "twin", dtype)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("config", tiny.TRANSFORMERS)
def test_numpy_blocks_match_the_official_ones(config: str, name: str) -> None:
    inputs = cases.read(f"transformer_{config}", "block")
    assert_parity(run_block("numpy", config, name, inputs, "float64"), inputs[name], "golden", "float64")


@mlx_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("config", tiny.TRANSFORMERS)
def test_mlx_blocks_match_numpy(config: str, name: str, dtype: str) -> None:
    inputs = cases.read(f"transformer_{config}", "block")
    expected = run_block("numpy", config, name, inputs, "float64")
    assert_parity(run_block("mlx", config, name, inputs, dtype), expected, "twin", dtype)


@mlx_only
def test_the_final_norm_has_its_own_epsilon() -> None:
    """Shown on a stream so small that the epsilon counts."""
    rng, weights = np.random.RandomState(0), weights_of("tiny")
    x, adaln = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 96), (2, 96)))
    ref, mlx = (
        network(b, "transformer", tiny.TRANSFORMER, weights, t) for b, t in (("numpy", "float64"), ("mlx", "float32"))
    )
    expected = ref.final_layer(1e-3 * x, adaln.astype(np.float64))
    assert_parity(mlx.all_final_layer["2-1"](native("mlx", 1e-3 * x), native("mlx", adaln)), expected, "twin")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_two_prompts_equals_two_batches_of_one(backend: str) -> None:
    inputs, weights = cases.read("transformer_tiny", "batch"), weights_of("tiny")
    both = denoise(backend, "tiny", weights, inputs, "float32")
    for i in range(2):
        alone = {key: inputs[key][i : i + 1] for key in ("x", "t")} | {"caption0": inputs[f"caption{i}"]}
        assert_parity(both[i : i + 1], denoise(backend, "tiny", weights, alone, "float32"), "same")


def run_block(backend: str, config: str, name: str, inputs: cases.Arrays, dtype: str) -> Any:
    model = network(backend, "transformer", tiny.TRANSFORMERS[config], weights_of(config), dtype)
    group, index = name.split(".")
    block = getattr(model, group)[int(index)]
    angles = np.stack([rope_angles(inputs["ids"], tiny.TRANSFORMERS[config])] * 2)
    x, mask, adaln = (native(backend, inputs[key]) for key in ("x", "mask", "adaln"))
    if backend == "numpy":
        x, adaln, rotation = x.astype(dtype), adaln.astype(dtype), model.rotation(angles)
    else:
        x, adaln, rotation = x.astype(model.dtype), adaln.astype(model.dtype), rotation_tables(native(backend, angles))
    given = adaln if group == "noise_refiner" else None
    return block(x, rotation, mask[:, None, None], given)
