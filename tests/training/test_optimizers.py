"""Optimizers of our own, step by step against the implementations that others publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.training import optimizer as optimizer_module
from zimage_mlx.training.eight_bits import BLOCK, Quantized, dequantized, quantized
from zimage_mlx.training.optimizer import Optimizer, make_optimizer
from zimage_mlx.training.optimizers import AdamW8bit, Prodigy, ScheduleFreeAdamW
from zimage_mlx.training.packing import Packing
from zimage_ref import TrainConfig
from zimage_ref.formats.tensors import Array

STEPS = 60
RATES = [0.02 * min(1, (step + 1) / 5) for step in range(STEPS)]  # with a warmup


def problem(seed: int) -> tuple[dict[str, Array], Any]:
    """First parameters, and the gradient of a badly scaled least-squares problem at any: the target is far away."""
    rng = np.random.default_rng(seed)
    start = {"lora_A": rng.standard_normal((6, 40)) * 0.1, "lora_B": np.zeros((50, 6))}
    target = {name: rng.standard_normal(value.shape) * 2 for name, value in start.items()}
    scale = {name: np.exp(rng.standard_normal(value.shape)) for name, value in start.items()}
    noise = {name: rng.standard_normal((STEPS, *value.shape)) * 0.05 for name, value in start.items()}

    def gradient(parameters: dict[str, Array], step: int) -> dict[str, Array]:
        return {n: (scale[n] * (np.asarray(p) - target[n]) + noise[n][step]) for n, p in parameters.items()}

    return {name: value.astype(np.float32) for name, value in start.items()}, gradient


def ours(optimizer: Any, start: dict[str, Array], gradient: Any, rates: list[float]) -> list[dict[str, Array]]:
    """The parameters after each step of ours."""
    parameters, path = {name: mx.array(value) for name, value in start.items()}, []
    optimizer.init(parameters)
    for step, rate in enumerate(rates):
        optimizer.learning_rate = rate
        found = gradient({name: np.array(value) for name, value in parameters.items()}, step)
        parameters = optimizer.apply_gradients(
            {n: mx.array(g.astype(np.float32)) for n, g in found.items()}, parameters
        )
        mx.eval(parameters, optimizer.state)
        path.append({name: np.array(value) for name, value in parameters.items()})
    return path


def theirs(make: Any, start: dict[str, Array], gradient: Any, rates: list[float]) -> tuple[list[dict[str, Array]], Any]:
    """The parameters after each step of an optimizer of torch, and the optimizer."""
    import torch

    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer, path = make(list(tensors.values())), []
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = gradient({name: tensor.detach().numpy() for name, tensor in tensors.items()}, step)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(found[name].astype(np.float32))
        optimizer.step()
        path.append({name: tensor.detach().numpy().copy() for name, tensor in tensors.items()})
    return path, (optimizer, tensors)


def assert_same_path(mine: list[dict[str, Array]], other: list[dict[str, Array]], rtol: float = 2e-4) -> None:
    for step, (a, b) in enumerate(zip(mine, other, strict=True)):
        for name in a:
            scale = np.abs(b[name]).max()
            np.testing.assert_allclose(a[name], b[name], atol=rtol * scale, rtol=0, err_msg=f"{name}, step {step}")


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prodigy_is_prodigyopt_step_by_step(seed: int) -> None:
    from prodigyopt import Prodigy as Official

    start, gradient = problem(seed)
    rates = [50 * rate for rate in RATES]  # up to 1
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.01}
    path, (official, _) = theirs(
        lambda p: Official(p, use_bias_correction=True, safeguard_warmup=True, **settings), start, gradient, rates
    )
    mine = Prodigy(1.0, **settings)
    assert_same_path(ours(mine, start, gradient, rates), path, 2e-3)  # d is a float64 there
    found = official.param_groups[0]["d"]
    assert mine.state["d"].item() == pytest.approx(found, rel=1e-3) and found > 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [0, 1])
def test_schedulefree_is_the_published_one_step_by_step(seed: int) -> None:
    from schedulefree import AdamWScheduleFree

    start, gradient = problem(seed)
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.01}
    path, (official, tensors) = theirs(lambda p: AdamWScheduleFree(p, **settings), start, gradient, RATES)
    mine = ScheduleFreeAdamW(0.0, **settings)
    steps = ours(mine, start, gradient, RATES)
    assert_same_path(steps, path)
    official.eval()
    averages = mine.result({name: mx.array(value) for name, value in steps[-1].items()})
    for name, tensor in tensors.items():
        np.testing.assert_allclose(np.array(averages[name]), tensor.detach().numpy(), rtol=2e-3, atol=2e-4)
        assert np.abs(np.array(averages[name]) - steps[-1][name]).max() > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizers_of_mlx_are_those_that_trainers_use(name: str) -> None:
    import torch
    from transformers.optimization import Adafactor

    make = {
        "adamw": lambda p: torch.optim.AdamW(p, betas=(0.9, 0.99), weight_decay=0.01),
        "adafactor": lambda p: Adafactor(
            p, lr=1.0, relative_step=False, scale_parameter=False, warmup_init=False, weight_decay=0.01
        ),
    }[name]
    start, gradient = problem(3)
    path, _ = theirs(make, start, gradient, RATES)
    config = TrainConfig(Path("m"), Path("d"), optimizer=name)
    assert_same_path(ours(make_optimizer(config), start, gradient, RATES), path)


def test_eight_bits_of_adamw_stay_beside_those_of_float32() -> None:
    start, gradient = problem(4)
    full = make_optimizer(TrainConfig(Path("m"), Path("d"), optimizer="adamw", weight_decay=0.01))
    exact = ours(full, start, gradient, RATES)
    close = ours(AdamW8bit(0.0), start, gradient, RATES)
    for name, first in start.items():
        moved, apart = (np.linalg.norm(exact[-1][name] - other) for other in (first, close[-1][name]))
        assert 0 < apart < 0.1 * moved


def test_a_slow_decay_is_not_lost_in_rounding() -> None:
    """A gradient that ends: the second moment falls by a factor of 0.99 a step, less than the distance of two codes."""
    optimizer, parameters = AdamW8bit(0.0, weight_decay=0.0), {"p": mx.zeros(BLOCK)}
    optimizer.init(parameters)
    gradients = mx.concatenate([mx.full((BLOCK - 1,), 0.1), mx.array([1.0])])  # the last one keeps the scale
    for _ in range(20):
        parameters = optimizer.apply_gradients({"p": gradients}, parameters)
    before = float(mx.mean(_second_moment(optimizer)[:-1]))
    for _ in range(100):
        parameters = optimizer.apply_gradients({"p": mx.where(gradients == 1, 1.0, 0.0)}, parameters)
    after = float(mx.mean(_second_moment(optimizer)[:-1]))
    assert after / before == pytest.approx(0.99**100, rel=0.1)


def _second_moment(optimizer: AdamW8bit) -> mx.array:
    state = optimizer.state["p"]
    return dequantized(Quantized(state["v"], state["v_scale"]), BLOCK)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_close_and_right_in_the_mean(signed: bool) -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.uniform(-12, 0, 1000)).astype(np.float32) * (rng.choice([-1, 1], 1000) if signed else 1)
    values[5] = 0
    stored = quantized(mx.array(values), signed, mx.random.key(1))
    assert stored.codes.dtype == (mx.int8 if signed else mx.uint8) and stored.codes.shape == (4, BLOCK)
    found = np.array(dequantized(stored, 1000))
    scale = np.repeat(np.array(stored.scales)[:, 0], BLOCK)[:1000]
    gap = 3 * (np.abs(values) / scale) ** (2 / 3) / (127 if signed else 255) * scale  # of codes there
    assert (np.abs(found - values) <= 1.3 * gap + 3e-4 * scale).all() and found[5] == 0
    assert (found[:256] == values[:256]).sum() >= 1  # the largest of the block is exact
    if not signed:
        assert (found[values > 0] > 0).all()
    mean = np.mean([dequantized(quantized(mx.array(values), signed, mx.random.key(k)), 1000) for k in range(300)], 0)
    large = np.abs(values) > 1e-4 * scale
    np.testing.assert_allclose(mean[large], values[large], rtol=0.15)
    assert np.mean(mean[large] / values[large]) == pytest.approx(1, abs=0.01)


def test_blocks_without_numbers_stay_zero() -> None:
    stored = quantized(mx.zeros(300), True, mx.random.key(0))
    assert not np.array(dequantized(stored, 300)).any()


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "schedulefree", "adamw8bit"])
def test_an_optimizer_in_one_pass_as_on_a_gpu_makes_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, gradient = problem(5)
    config, packing = TrainConfig(Path("m"), Path("d"), optimizer=name, weight_decay=0.1), Packing(start)
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(optimizer_module, "on_gpu", lambda gpu=gpu: gpu)
        vectors = packing.pack({name: mx.array(value) for name, value in start.items()})
        optimizer = Optimizer(config, packing, vectors)
        for step, rate in enumerate(RATES[:10]):
            if step == 5:  # a run that goes on has the same program and another state
                optimizer.restore(optimizer.state())
            matrices = {name: np.array(value) for name, value in packing.unpack(vectors).items()}
            gradients = {name: mx.array(g.astype(np.float32)) for name, g in gradient(matrices, step).items()}
            vectors = optimizer.apply(vectors, packing.pack(gradients), rate)
        found.append(packing.unpack(vectors))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-5)
