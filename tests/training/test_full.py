"""Training of the transformer itself: its gradient, its steps, its rounding, its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.networks import HAS_MLX, mlx_only, network
from support.parity import assert_parity
from support.tiny_loras import SHAPES
from support.training_runs import WholeShop, whole_workshop

from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.parameters import block_of, transformer_parameters
from zimage_ref.training.full import count, state_bytes, step_bytes
from zimage_ref.training.plan import TrainPlan, make_plan

if HAS_MLX:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from support.mlx_memory import measured_from

    import zimage_mlx
    from zimage_mlx.networks.transformer import Transformer
    from zimage_mlx.training import full, optimizer
    from zimage_mlx.training.feed import Feed
    from zimage_mlx.training.gradient import LossAndGradients
    from zimage_mlx.training.loss import NoisyBatch, flow_matching_loss
    from zimage_mlx.training.machines import group
    from zimage_mlx.training.rounding import stochastically

pytestmark = mlx_only


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> WholeShop:
    return whole_workshop(tmp_path_factory.mktemp("full"))


def base() -> Any:
    return network("mlx", "transformer", tiny.TRANSFORMER, tiny.random_weights(SHAPES), "float32")


def noisy(seed: int = 1) -> Any:
    """Pictures that are no multiple of 32 tokens and captions that are filled up, so that both pad tokens count."""
    rng = np.random.default_rng(seed)
    x_0, noise = (mx.array(rng.standard_normal((2, 16, 12, 20), dtype=np.float32)) for _ in range(2))
    captions = [mx.array(rng.standard_normal((n, 40), dtype=np.float32)) for n in (3, 40)]
    return NoisyBatch(x_0, noise, mx.array([0.3, 0.8]), captions)


@pytest.mark.parametrize("keep", [0, math.inf])
def test_every_parameter_gets_the_gradient_of_the_whole_network_a_block_at_a_time(keep: float) -> None:
    model, seen, parts = base(), {}, []

    def use(gradients: dict[str, Any]) -> None:
        parts.append({block_of(name) or name.partition(".")[0] for name in gradients})
        while gradients:
            name, gradient = gradients.popitem()
            seen[name] = gradient

    expected_loss, tree = nn.value_and_grad(model, flow_matching_loss)(model, noisy())
    expected = dict(tree_flatten(tree))
    loss, rest = LossAndGradients(model, keep, compiled=False, use=use)(noisy())
    _, together = LossAndGradients(model, keep, compiled=False)(noisy())
    assert not rest and seen.keys() == together.keys() == expected.keys() == SHAPES.keys()
    assert_parity(loss, expected_loss, "same", name="loss")
    for name, array in expected.items():
        assert mx.abs(array).max() > 0, name
        for actual in (seen[name], together[name]):
            assert_parity(actual, array, "same", name=name)
    assert all(len({each for each in part if "." in each}) <= 1 for part in parts)  # never two blocks
    assert [next(iter(part)) for part in parts][:3] == ["all_final_layer", "layers.1", "layers.0"]


@pytest.mark.parametrize(
    ("name", "clip"),
    daily(product(["adafactor", "adamw8bit", "sgd"], [0.0, 0.3]), ("adafactor", 0.0), ("sgd", 0.3)),
)
def test_a_step_is_that_of_the_same_optimizer_on_the_gradient_of_the_whole_network(
    name: str, clip: float, shop: WholeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(shop.config("step", optimizer=name, grad_clip=clip, seed=4, base_precision="f32"))
    fused, plain, batches = base(), base(), [noisy(1), noisy(2)]
    monkeypatch.setattr(Feed, "batch", lambda self, epoch, items: batches[items[0]])
    learner = full.WholeLearner(plan, fused, Feed(plan, None), group())  # type: ignore[arg-type]
    parts = {
        key: optimizer.make_optimizer(plan.config, min(*shape, 2) > 1 < len(shape)) for key, shape in SHAPES.items()
    }
    for step in range(2):
        outcome = learner.step(step, 0, [[step]])
        loss, tree = nn.value_and_grad(plain, flow_matching_loss)(plain, batches[step])
        gradients, squares = dict(tree_flatten(tree)), 0.0
        for key, gradient in gradients.items():
            norm = float(mx.linalg.norm(gradient.flatten()))
            squares += norm**2
            part = parts[key]
            part.learning_rate = optimizer.learning_rate(plan, step)
            limited = gradient * min(1.0, clip / norm) if clip else gradient
            path, _, last = key.rpartition(".")
            owner = full.find(plain, path)
            owner[last] = part.apply_gradients({"w": limited}, {"w": owner[last]})["w"]
        assert outcome.finite and outcome.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert outcome.loss == pytest.approx(float(loss), rel=1e-6)
    made, expected = (dict(tree_flatten(model.parameters())) for model in (fused, plain))
    for key, array in expected.items():
        far = np.abs(np.array(made[key] - array)) > 1e-6 * float(mx.abs(array).max())
        # 8 bits are rounded at random: a difference in the last digit of a gradient may lead to another code
        assert far.mean() <= (1e-3 if name == "adamw8bit" else 0), key


def test_rounding_is_right_on_average_and_gives_one_of_the_two_neighbours() -> None:
    rng = np.random.default_rng(3)
    values = mx.array(np.concatenate([rng.standard_normal(500), 1e-6 * rng.standard_normal(500)]).astype(np.float32))
    rounds = 4000
    drawn = mx.stack([stochastically(values, mx.random.key(i)).astype(mx.float32) for i in range(rounds)])
    low, high, mean = (np.array(f(drawn, axis=0), np.float64) for f in (mx.min, mx.max, mx.mean))
    exact, size = np.array(values, np.float64), np.array(high - low)
    assert (low <= exact).all() and (exact <= high).all() and (size <= np.abs(exact) * 2**-7).all()
    share = np.where(size > 0, (exact - low) / np.where(size > 0, size, 1), 0)
    error = (mean - exact) / (np.where(size > 0, size, 1) * np.sqrt(np.maximum(share * (1 - share), 1e-3) / rounds))
    assert abs(error.mean()) < 4 / math.sqrt(1000) and np.abs(error).max() < 6 and 0.8 < error.std() < 1.2
    whole = values.astype(mx.bfloat16)
    assert mx.array_equal(stochastically(whole.astype(mx.float32), mx.random.key(1)), whole)


def test_small_steps_are_kept_on_average_in_bfloat16_and_exactly_by_master_weights() -> None:
    def moved(**options: Any) -> float:
        """The mean change of a weight of 1 after 100 steps of 1e-4, where a bfloat16 step is 4e-3."""
        config = zimage_mlx.TrainConfig("m", "d", output="x.npz", kind="full", optimizer="sgd", **options)
        weight, gradient = mx.ones((64, 64), mx.bfloat16), mx.ones((64, 64))
        fused = full.FusedOptimizer(config, {"w.weight": weight})
        for step in range(100):
            weight = fused.change("w.weight", weight, gradient, step, 1e-4)
        assert weight.dtype == mx.bfloat16
        return float(mx.mean(fused.masters.get("w.weight", weight).astype(mx.float32))) - 1

    assert moved(weight_decay=0.0) == pytest.approx(-0.01, rel=0.05)
    assert moved(weight_decay=0.0, master_weights=True) == pytest.approx(-0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing_more(shop: WholeShop, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = make_plan(shop.config("nan")), base()
    batch = noisy()
    monkeypatch.setattr(Feed, "batch", lambda self, epoch, items: batch)
    learner = full.WholeLearner(plan, model, Feed(plan, None), group())  # type: ignore[arg-type]
    model.layers[0].feed_forward.w1.weight = model.layers[0].feed_forward.w1.weight * float("nan")
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    outcome = learner.step(0, 0, [[0]])
    assert not outcome.finite
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "adamw8bit"])
def test_a_step_takes_the_gradient_of_one_block_and_the_change_of_one_parameter(
    name: str, shop: WholeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of MLX's memory, on a model whose gradients of all blocks would take eight times as much."""
    config = replace(OFFICIAL_TRANSFORMER, dim=512, n_heads=4, n_layers=10, cap_feat_dim=64)
    shapes, model = transformer_parameters(config), Transformer(config)
    mx.eval(model.parameters())
    plan = make_plan(shop.config("memory", optimizer=name, base_precision="f32"))
    monkeypatch.setattr(TrainPlan, "parameters", shapes)
    rng = np.random.default_rng(0)
    x_0, noise = (mx.array(rng.standard_normal((1, 16, 8, 8), dtype=np.float32)) for _ in range(2))
    batch = NoisyBatch(x_0, noise, mx.array([0.5]), [mx.array(rng.standard_normal((20, 64), dtype=np.float32))])
    monkeypatch.setattr(Feed, "batch", lambda self, epoch, items: batch)

    def over(step: Callable[[], object]) -> float:
        before = measured_from()
        step()
        return float(mx.get_peak_memory() - before)

    every = over(lambda: LossAndGradients(model, 0, compiled=False)(batch))
    before = mx.get_active_memory()
    learner = full.WholeLearner(plan, model, Feed(plan, None), group(), 0)  # type: ignore[arg-type]
    made = over(lambda: learner.step(0, 0, [[0]]))
    kept = mx.get_active_memory() - before
    tokens = 32 + 32
    inputs = 4 * tokens * config.dim * 14
    rule = step_bytes(shapes, 4, name) + inputs + 2.7 * 4 * tokens * (16 * config.dim + 6 * config.ffn_dim)
    assert every > 4 * count(shapes) and kept < 1.02 * state_bytes(shapes, name, False) + 6e6
    assert 0.5 * rule < made < 1.1 * rule and made < every / 2.5, (made, rule, every)


def test_the_estimate_for_the_official_model_is_weights_plus_less_than_4_gb() -> None:
    shapes = transformer_parameters(OFFICIAL_TRANSFORMER)
    assert 2 * count(shapes) == pytest.approx(12.3e9, rel=0.01)
    assert state_bytes(shapes, "adafactor", False) < 0.03e9
    assert state_bytes(shapes, "adamw8bit", False) == pytest.approx(2 * count(shapes))
    assert state_bytes(shapes, "adafactor", True) == pytest.approx(4 * count(shapes), rel=0.01)
    block = count({name: shape for name, shape in shapes.items() if block_of(name) == "layers.0"})
    assert step_bytes(shapes, 2, "adafactor") == 2 * block + 24 * 3840 * 10240
    assert step_bytes(shapes, 2, "adafactor") < 1.4e9
