"""Losses, noise levels, noise, dropouts and preservation: each test fails if its option does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training_runs import PLAIN, Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.training.dropout import dropout
from zimage_mlx.training.feed import Feed
from zimage_mlx.training.loss import Distance
from zimage_ref import ConfigError, TrainConfig
from zimage_ref.lora.trained import TRAINED
from zimage_ref.model.flow import TimestepSampling
from zimage_ref.training.dataset_options import DatasetOptions


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("losses"))


def one_step(shop: Workshop, name: str, **options: Any) -> Any:
    """A step of plain descent, so that B is a multiple of the gradient."""
    return shop.train(name, **{**PLAIN, "steps": 1, **options})


def test_distances_have_the_values_and_slopes_of_their_definition() -> None:
    error = mx.array([-2.0, -0.5, -0.1, 0.2, 0.5, 3.0])
    expected = {
        "mse": error**2, "mae": mx.abs(error),
        "huber": mx.array([0.5 * (4 - 0.5), 0.25, 0.01, 0.04, 0.25, 0.5 * (6 - 0.5)]),
    }  # fmt: skip
    for kind, values in expected.items():
        distance = Distance(kind, 0.5)
        np.testing.assert_allclose(distance(error, mx.zeros(6)), values, rtol=1e-6)
    slopes = mx.grad(lambda raw: Distance("huber", 0.5)(raw, mx.zeros(6)).sum())(error)
    np.testing.assert_allclose(slopes, [-1, -1, -0.2, 0.4, 1, 1], rtol=1e-6)


def test_differential_guidance_multiplies_error_and_gradient() -> None:
    raw, target = mx.array([1.0, -2.0]), mx.array([0.5, 1.0])
    np.testing.assert_allclose(Distance(guidance=3.0)(raw, target), 9 * (raw - target) ** 2)
    slope = mx.grad(lambda x: Distance(guidance=3.0)(x, target).sum())(raw)
    np.testing.assert_allclose(slope, 3 * 2 * (raw - target))


def test_guidance_and_losses_reach_the_training(shop: Workshop) -> None:
    plain = one_step(shop, "plain")
    guided = one_step(shop, "guided", differential_guidance=3.0)
    np.testing.assert_allclose(guided.vector("B"), 3 * plain.vector("B"), rtol=2e-2, atol=1e-9)
    assert guided.losses[0] == pytest.approx(9 * plain.losses[0], rel=1e-5)
    losses = {"mse": plain.losses[0]} | {kind: one_step(shop, kind, loss=kind).losses[0] for kind in ("mae", "huber")}
    assert losses["huber"] == pytest.approx(0.1 * (2 * losses["mae"] - 0.1), rel=0.02)  # nearly all errors are larger
    assert losses["mae"] < losses["mse"] ** 0.5
    assert one_step(shop, "wide", loss="huber", huber_delta=1e3).losses[0] == pytest.approx(losses["mse"], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "quantiles"),
    [
        ("content", (1 - 0.95**3, 1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1 - 0.05**3)),
        ("style", (0.05**3, 0.25**3, 0.5**3, 0.75**3, 0.95**3)),
        ("beta", (0.1354, 0.3264, 0.5, 0.6736, 0.8646)),  # of Beta(2, 2): 3 x^2 - 2 x^3 = p
    ],
)
def test_noise_levels_have_the_distribution_they_are_named_for(text: str, quantiles: tuple[float, ...]) -> None:
    drawn = TimestepSampling.parse(text).sigmas(np.random.default_rng(0), 40_000, 1024)
    np.testing.assert_allclose(np.quantile(drawn, (0.05, 0.25, 0.5, 0.75, 0.95)), quantiles, atol=0.01)


def test_noise_levels_stay_between_the_bounds(shop: Workshop) -> None:
    plain, bounded = (
        TimestepSampling.parse("auto", *bounds).sigmas(np.random.default_rng(0), 10_000, 1024)
        for bounds in ((), (0.2, 0.6))
    )
    np.testing.assert_allclose(bounded, 0.2 + 0.4 * plain, atol=1e-5)
    assert one_step(shop, "low", max_sigma=0.3).losses != one_step(shop, "high", min_sigma=0.7).losses
    with pytest.raises(ConfigError, match="`min_sigma` 0.7 must be below `max_sigma` 0.3"):
        shop.config("none", min_sigma=0.7, max_sigma=0.3)


def test_loss_weights_are_those_of_weighted(shop: Workshop) -> None:
    weighted = one_step(shop, "weighted", timesteps="weighted")
    flow = one_step(shop, "flow-weighted", timesteps="uniform", loss_weight="flow-weighted")
    assert flow.losses == weighted.losses != one_step(shop, "uniform", timesteps="uniform").losses
    assert flow.vector("B").tolist() == weighted.vector("B").tolist()


def test_the_offset_moves_the_noise_of_whole_channels(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[float, list[Any]] = {}
    make = Feed.batch
    for offset in (0.0, 0.5):
        batches = seen.setdefault(offset, [])
        monkeypatch.setattr(Feed, "batch", lambda *args, found=batches: found.append(make(*args)) or found[-1])
        one_step(shop, f"offset{offset:g}", noise_offset=offset)
    plain, moved = (np.array(seen[offset][0].noise) for offset in seen)
    difference = (moved - plain)[0]  # (C, h, w)
    np.testing.assert_allclose(difference, np.broadcast_to(difference[:, :1, :1], difference.shape), atol=1e-6)
    assert 0.25 < difference[:, 0, 0].std() < 0.9
    assert seen[0.0][0].sigma.tolist() == seen[0.5][0].sigma.tolist()


def test_dropout_rests_inputs_of_each_layer(shop: Workshop) -> None:
    """B is 0 in the first step, so A has no gradient. In the second step it has one in its awake columns alone."""
    moving = {"optimizer": "adam", "lr": 1e-2}
    first = one_step(shop, "inputs-first", **moving).matrices("A")
    shares = []
    for share in (0.0, 0.5):
        after = one_step(shop, f"inputs{share:g}", **moving, dropout=share, steps=2).matrices("A")
        moved = [np.abs(A - first[layer]).max(axis=0) > 0 for layer, A in after.items()]
        shares.append(np.concatenate(moved).mean())
    assert shares[0] > 0.95 and 0.4 < shares[1] < 0.6


def test_the_inputs_that_are_left_are_enlarged() -> None:
    config = TrainConfig(Path("m"), Path("d"), dropout=0.25)
    factors = dropout(config, TRAINED["lora"], {"lora_A": {"x": (3, 400), "y": (2, 100)}, "lora_B": {}}, 7)
    first, second = factors["lora_A"][:1200].reshape(3, 400), factors["lora_A"][1200:].reshape(2, 100)
    for part in (np.array(first), np.array(second)):
        assert {round(float(value), 4) for value in np.unique(part)} == {0.0, 1.3333}
        assert (part == part[0]).all()
    assert 0.7 < float((first > 0).mean()) < 0.8
    assert (
        dropout(config, TRAINED["lora"], {"lora_A": {"x": (3, 400)}, "lora_B": {}}, 8)["lora_A"].tolist()
        != first.flatten().tolist()
    )


def test_module_dropout_rests_whole_layers(shop: Workshop) -> None:
    full = one_step(shop, "all-layers").matrices("B")
    some = one_step(shop, "some-layers", module_dropout=0.5).matrices("B")
    resting = [layer for layer, B in some.items() if not B.any()]
    assert 0.2 < len(resting) / len(some) < 0.8
    for layer in set(some) - set(resting):
        np.testing.assert_allclose(some[layer], full[layer], rtol=2e-2, atol=1e-9)


@pytest.mark.slow
def test_preservation_pulls_the_class_word_back_to_the_base(shop: Workshop) -> None:
    """Its loss is 0 as long as the LoRA does nothing; later it is that of the class word's own prediction."""
    data = pictures(shop.folder / "class", (32, 32), captions=["a [trigger] in snow"])
    options = {"dataset": data, "trigger": "sks", "lr": 3e-2, "steps": 4}
    two = {**options, "steps": 2}
    plain, kept = shop.train("unkept", **options), shop.train("kept", **options, preserve="cat")
    assert kept.losses[0] == plain.losses[0] and kept.steps[0].grad_norm == plain.steps[0].grad_norm
    assert kept.losses[1] > plain.losses[1]
    assert np.linalg.norm(kept.vector("B")) != np.linalg.norm(plain.vector("B"))
    heavy = shop.train("heavy", **two, preserve="cat", preserve_weight=3.0)
    extra, more = kept.losses[1] - plain.losses[1], heavy.losses[1] - plain.losses[1]
    assert more == pytest.approx(3 * extra, rel=1e-3)
    rarely = shop.train("rarely", **options, preserve="cat", preserve_every=3)  # steps 1 and 4
    assert rarely.losses[:3] == plain.losses[:3] and rarely.losses[3] > plain.losses[3]
    blank = shop.train("blank", **two, preserve_blank=True)
    assert blank.losses[0] == plain.losses[0] and blank.losses[1] not in (plain.losses[1], kept.losses[1])
    both = shop.train("both", **two, preserve="cat", preserve_blank=True)
    assert both.losses[1] - plain.losses[1] == pytest.approx(extra + blank.losses[1] - plain.losses[1], rel=1e-3)
    with pytest.raises(ConfigError, match="`preserve` puts its words in place of `trigger`: give `trigger`"):
        shop.config("no-trigger", preserve="cat")


def test_prompts_are_preserved_with_and_without_a_class(shop: Workshop) -> None:
    data = pictures(shop.folder / "prompts", (32, 32), captions=["a [trigger] in snow"])
    options = {"dataset": data, "lr": 3e-2, "steps": 2}
    plain, kept = shop.train("unprompted", **options), shop.train("prompted", **options, preserve_prompt="an owl")
    assert kept.losses[0] == plain.losses[0] and kept.losses[1] > plain.losses[1]
    other = shop.train("other", **options, preserve_prompt=("a tree, at night",))
    assert other.losses[1] not in (plain.losses[1], kept.losses[1])
    both = shop.train(
        "class", **options, trigger="sks", preserve="cat", preserve_prompt=("an owl",), preserve_blank=True
    )
    assert both.losses[1] > kept.losses[1]
    with pytest.raises(ConfigError, match="`preserve_prompt` is empty: give `preserve_blank`"):
        shop.config("no-prompt", preserve_prompt=("a cat", " "))


def test_preservation_skips_pictures_without_a_trigger(shop: Workshop) -> None:
    data = pictures(shop.folder / "bare", (32, 32), captions=["an owl"])
    named = pictures(shop.folder / "named", (48, 32), captions=["a [trigger]"])
    tables = (DatasetOptions(folder=named), DatasetOptions(folder=data, kind="regularization"))
    options = {"dataset": None, "datasets": tables, "trigger": "sks", "epochs": 2, "lr": 3e-2}
    plain, kept = shop.train("reg", **options), shop.train("reg-kept", **options, preserve="cat")
    assert kept.losses[0] == plain.losses[0] and len(kept.losses) == 4 and kept.losses[2:] != plain.losses[2:]
