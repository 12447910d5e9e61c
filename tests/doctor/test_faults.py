"""Faults planted in the device's kernels: each is found by the check that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.daily import daily

from zimage_mlx.doctor.catalogue import catalogue
from zimage_mlx.doctor.checking import Planned, verdict
from zimage_mlx.doctor.picture import repeated
from zimage_mlx.networks import fused_attention, ops
from zimage_ref.doctor.findings import Verdict
from zimage_ref.formats.tensors import BFLOAT16, Array, cast

CASES = {case.name: case for case in catalogue(packed=True)}
Patch = pytest.MonkeyPatch


def judged(name: str, dtype: str) -> Verdict:
    case = CASES[name]
    trial = case.prepare(case.sizes[-1])
    return verdict(Planned(case, case.sizes[-1], dtype, 0.0), trial, trial.expected())


def noisy(function: Callable[..., mx.array], part: float = 0.01) -> Callable[..., mx.array]:
    """`function` with noise of a hundredth of what it returns."""

    def with_noise(*args: object, **kwargs: object) -> mx.array:
        y = function(*args, **kwargs)
        return (y.astype(mx.float32) * (1 + part * mx.random.normal(y.shape))).astype(y.dtype)

    return with_noise


NOISY = [
    ("product", mx, "matmul"),
    ("attention", mx.fast, "scaled_dot_product_attention"),
    ("attention, masked", mx.fast, "scaled_dot_product_attention"),
    ("attention, causal", mx.fast, "scaled_dot_product_attention"),
    ("attention, long", mx.fast, "scaled_dot_product_attention"),
    ("norms", mx.fast, "rms_norm"),
    ("norms", mx.fast, "layer_norm"),
    ("convolution 128 to 128", mx, "conv2d"),
    ("convolution 512 to 512", mx, "conv2d"),
    ("product of 8 bits, unpacked", mx, "dequantize"),
    ("product of 4 bits, unpacked, gradient", mx, "dequantize"),
]


@pytest.mark.parametrize("seed", daily([0, 1, 2], 0))
@pytest.mark.parametrize(("name", "module", "kernel"), NOISY, ids=[f"{n}-{k}" for n, _, k in NOISY])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_noise_of_one_hundredth(
    name: str, module: object, kernel: str, dtype: str, seed: int, monkeypatch: Patch
) -> None:
    mx.random.seed(seed)
    for each in (kernel, "conv_general") if kernel == "conv2d" else (kernel,):  # whichever the layer calls
        monkeypatch.setattr(module, each, noisy(getattr(module, each)))
    assert not judged(name, dtype).right


@pytest.mark.parametrize(
    ("name", "kernel"),
    daily(
        product(
            ["block", "gradient of a block", "layer of the text encoder"], ["scaled_dot_product_attention", "rms_norm"]
        ),
        ("block", "scaled_dot_product_attention"),
        ("gradient of a block", "rms_norm"),
        ("layer of the text encoder", "rms_norm"),
    ),
)
def test_noise_within_a_layer(name: str, kernel: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(mx.fast, kernel, noisy(getattr(mx.fast, kernel)))
    assert not judged(name, "f32").right


@pytest.mark.parametrize("name", ["block", "gradient of a block", "layer of the text encoder"])
def test_noise_of_a_linear_layer(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(nn.Linear, "__call__", noisy(nn.Linear.__call__))
    assert not judged(name, "f32").right


@pytest.mark.parametrize(
    ("dtype", "fault"),
    daily(
        product(["bf16", "f16", "f32"], ["turned the wrong way", "sines shifted by one pair", "one head left out"]),
        ("bf16", "turned the wrong way"),
        ("f16", "sines shifted by one pair"),
        ("f32", "one head left out"),
    ),
)
def test_a_wrong_rotation(dtype: str, fault: str, monkeypatch: Patch) -> None:
    right = ops._turn

    def wrong(x: mx.array, cos: mx.array, sin: mx.array, quarter: mx.array) -> mx.array:
        if fault == "turned the wrong way":
            return right(x, cos, -sin, quarter)
        if fault == "sines shifted by one pair":
            return right(x, cos, mx.roll(sin, 2, axis=-1), quarter)
        y = right(x, cos, sin, quarter)
        return mx.concatenate([y[:, :, :-1], x[:, :, -1:]], axis=2)

    monkeypatch.setattr(ops, "_turn", wrong)
    assert not judged("rotation", dtype).right
    assert not judged("block", "f32").right


B_T = np.array([
    [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0], [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0], [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
    [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0], [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
    [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0], [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0], [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
])  # fmt: skip
G = np.array([
    [1, 0, 0], [-2 / 9, -2 / 9, -2 / 9], [-2 / 9, 2 / 9, -2 / 9], [1 / 90, 1 / 45, 2 / 45], [1 / 90, -1 / 45, 2 / 45],
    [32 / 45, 16 / 45, 8 / 45], [32 / 45, -16 / 45, 8 / 45], [0, 0, 1],
])  # fmt: skip
A_T = np.array([
    [1, 1, 1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 1 / 2, -1 / 2, 0], [0, 1, 1, 4, 4, 1 / 4, 1 / 4, 0],
    [0, 1, -1, 8, -8, 1 / 8, -1 / 8, 0], [0, 1, 1, 16, 16, 1 / 16, 1 / 16, 0],
    [0, 1, -1, 32, -32, 1 / 32, -1 / 32, 1],
])  # fmt: skip


def stored(array: Array, dtype: mx.Dtype) -> Array:
    """`array` as a kernel of `dtype` stores it for a while."""
    kind = {mx.bfloat16: BFLOAT16, mx.float16: np.dtype("<f2"), mx.float32: np.dtype("<f4")}[dtype]
    return cast(cast(array.astype(np.float32), kind), np.dtype("<f4"))


def winograd(x: mx.array, weight: mx.array, dtype: mx.Dtype) -> Array:
    """F(6x6, 3x3) of x (1, H, W, C), padded by 1, with everything in between stored in `dtype`. arXiv 1509.09308."""
    _, H, W, C = x.shape
    tiles = -(-H // 6), -(-W // 6)
    given, kernel = (np.array(a.astype(mx.float32)) for a in (x[0], weight))
    given = np.pad(given, [(1, 6 * tiles[0] - H + 1), (1, 6 * tiles[1] - W + 1), (0, 0)])
    u = stored(np.einsum("ij,ojkc,lk->ilco", G, kernel, G), dtype)  # (8, 8, C, O)
    out = np.zeros((6 * tiles[0], 6 * tiles[1], len(weight)), np.float32)
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            part = given[6 * i : 6 * i + 8, 6 * j : 6 * j + 8]
            v = stored(np.einsum("ij,jkc,lk->ilc", B_T, part, B_T), dtype)
            m = stored(np.einsum("ilc,ilco->ilo", v, u), dtype)
            out[6 * i : 6 * i + 6, 6 * j : 6 * j + 6] = np.einsum("ij,jko,lk->ilo", A_T, m, A_T)
    return out[None, :H, :W]


@pytest.mark.parametrize(("dtype", "right"), [("bf16", False), ("f16", False), ("f32", True)])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("convolution")])
def test_a_winograd_convolution(name: str, dtype: str, right: bool, monkeypatch: Patch) -> None:
    """In 16 bits it loses digits. In float32 it does not: so the simulation has no other fault."""

    def conv2d(x: mx.array, weight: mx.array, stride: int = 1, padding: int = 0, *rest: object) -> mx.array:
        return mx.array(winograd(x, weight, x.dtype)).astype(x.dtype)

    def conv_general(x: mx.array, weight: mx.array, *args: object, flip: bool = False, **kwargs: object) -> mx.array:
        return conv2d(x, weight[:, ::-1, ::-1] if flip else weight)

    monkeypatch.setattr(mx, "conv2d", conv2d)
    monkeypatch.setattr(mx, "conv_general", conv_general)
    found = judged(name, dtype)
    assert found.error <= 2 * found.limit if right else not found.right


def test_garbage_in_one_tile(monkeypatch: Patch) -> None:
    """A kernel that is wrong at one edge only, as quantized products were once."""
    matmul = mx.matmul

    def wrong(a: mx.array, b: mx.array) -> mx.array:
        y = matmul(a, b)
        return mx.concatenate([y[:, :-1], 2 * y[:, -1:]], axis=1)

    monkeypatch.setattr(mx, "matmul", wrong)
    assert not judged("product", "bf16").right


def test_products_of_ten_bits_in_float32(monkeypatch: Patch) -> None:
    matmul = mx.matmul

    def tf32(a: mx.array, b: mx.array) -> mx.array:
        return matmul(a.astype(mx.float16).astype(mx.float32), b.astype(mx.float16).astype(mx.float32)) * (1 + 2**-12)

    monkeypatch.setattr(mx, "matmul", tf32)
    found = judged("product", "f32")
    assert not found.right and "MLX_ENABLE_TF32=0" in found.remedy


def test_a_run_that_differs_from_the_one_before(monkeypatch: Patch) -> None:
    monkeypatch.setattr(mx.fast, "rms_norm", noisy(mx.fast.rms_norm, 1e-6))
    assert not repeated((8, 3), "f32").right


def test_only_the_fused_gradient_may_differ_from_run_to_run(monkeypatch: Patch) -> None:
    """On a machine that has one. Here MLX's own gradient of attention stands for it, with noise."""

    def unsteady(q: mx.array, k: mx.array, v: mx.array, d_out: mx.array, mask: mx.array | None) -> tuple[mx.array, ...]:
        attend = lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)  # noqa: E731
        return tuple(noisy(lambda d: d, 1e-6)(d) for d in mx.vjp(attend, [q, k, v], [d_out])[1])

    monkeypatch.setattr(fused_attention, "_asked", lambda *of: True)
    monkeypatch.setattr(fused_attention, "fused_gradient", unsteady)
    found = repeated((8, 3), "f32")
    assert found.right and "fused gradient of attention differs in the last bits" in found.remark
    monkeypatch.setattr(mx.fast, "rms_norm", noisy(mx.fast.rms_norm, 1e-6))
    found = repeated((8, 3), "f32")
    assert not found.right and not found.remark
