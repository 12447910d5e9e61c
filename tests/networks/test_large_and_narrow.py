"""Paths that only many rows, bfloat16 or several scales take: they give the numbers of the plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import HAS_MLX, pipeline

if not HAS_MLX:
    pytest.skip("mlx is not installed", allow_module_level=True)

import mlx.core as mx
import mlx.nn as nn

from zimage_mlx.lora.layers import LoRALinear
from zimage_mlx.networks import ops
from zimage_mlx.networks.compiled import PerBlock
from zimage_mlx.networks.quantized import QuantizedLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_are_multiplied_as_one_by_one(bits: int, bias: bool) -> None:
    layer = QuantizedLinear(64, 96, bias=bias, group_size=32, bits=bits)
    if bias:
        layer.bias = mx.random.normal((96,), key=mx.random.key(2))
    x = mx.random.normal((257, 64), key=mx.random.key(1))
    rows = mx.concatenate([layer(row[None]) for row in x])
    together = layer(x)
    assert together.shape == (257, 96)
    np.testing.assert_allclose(np.array(together), np.array(rows), rtol=1e-4, atol=1e-5)
    layer.keep_packed()
    np.testing.assert_allclose(np.array(layer(x)), np.array(rows), rtol=1e-4, atol=1e-5)


def test_layers_of_two_scales_share_no_program() -> None:
    base = nn.Linear(6, 5, bias=False)
    factors = {"lora_A": np.ones((2, 6), np.float32), "lora_B": np.ones((5, 2), np.float32)}
    layers = [LoRALinear(base, factors, scale) for scale in (1.0, 3.0)]
    x = mx.random.normal((4, 6), key=mx.random.key(3))
    run: Any = PerBlock(lambda layer, x: layer(x))
    for layer in (*layers, *layers):
        np.testing.assert_allclose(np.array(run(layer, x)), np.array(layer(x)), rtol=1e-5, atol=1e-6)
    assert run.programs == 2


def test_gradients_of_many_chunks_in_bfloat16_are_as_exact_as_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [mx.random.normal((1, 1, 512, 8), key=mx.random.key(i)) for i in range(4)]
    narrow = [array.astype(mx.bfloat16) for array in wide]

    def gradients(arrays: list[mx.array]) -> list[Any]:
        q, k, v, d = arrays
        found = mx.vjp(lambda q, k, v: [ops.attention(q, k, v)], [q, k, v], [d])[1]
        return [np.array(g.astype(mx.float32)) for g in found]

    exact = gradients([array.astype(mx.float32) for array in narrow])
    errors = []
    for rows in (512, 8):
        monkeypatch.setattr(ops, "_QUERY_ROWS", rows)
        errors.append([np.abs(a - b).mean() for a, b in zip(gradients(narrow), exact, strict=True)])
    for name, whole, chunked in zip("qkv", *errors, strict=True):
        assert chunked < 1.2 * whole, name


def test_the_state_of_sampling_is_float32_whatever_the_networks_are(model_dir: Path) -> None:
    pipe = pipeline("mlx", model_dir, "bfloat16")
    x = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)
    there = pipe.to_backend(x)
    assert there.dtype == mx.float32 and np.array_equal(np.array(there), x)
    caption = pipe.encode_prompt("a fox")
    assert caption.dtype == mx.bfloat16
    raw = pipe.predict(there, 0.5, pipe.condition([caption], 4, 4))
    assert raw.dtype == mx.float32
