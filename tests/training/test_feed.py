"""What a step is given: noise, noise level and caption of each picture, in every epoch; and what a step makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.training_runs import PLAIN, Workshop, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.training import measure
from zimage_mlx.training.feed import Feed
from zimage_mlx.training.gradient import LossAndGradients
from zimage_mlx.training.loss import NoisyBatch
from zimage_mlx.training.measure import Measurer
from zimage_mlx.training.optimizer import Optimizer, averaged, clipped
from zimage_mlx.training.packing import Packing
from zimage_ref import TrainConfig
from zimage_ref.model.flow import VALIDATION_SIGMAS
from zimage_ref.training.batches import DRAW, INITIAL, ORDER, rng_for
from zimage_ref.training.dataset_options import DatasetSettings

LATENTS = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)


class Encoded:
    """Latents that tell how they were asked for; a caption is its length."""

    def latents(self, example: Any, size: Any, flip: bool = False) -> mx.array:
        return mx.array(np.ascontiguousarray(LATENTS[:, :, ::-1]) if flip else LATENTS)

    def caption(self, caption: str) -> mx.array:
        return mx.full((1, 1), len(caption))


def feed(tokens: int = 256, items: int = 2, **options: Any) -> Feed:
    """Of a plan of `items` pictures of so many image tokens, captioned "abc"."""
    config = TrainConfig(Path("m"), Path("d"), **{"caption_dropout": 0.0, **options})
    showings = [SimpleNamespace(example=0, size=(16, 16)) for _ in range(items)]
    settings = DatasetSettings(caption_dropout=config.caption_dropout, flip=config.flip, trigger=config.trigger)
    example = SimpleNamespace(caption="abc", settings=settings, mask=None)
    plan: Any = SimpleNamespace(
        config=config, batches=SimpleNamespace(items=showings), examples=[example], held_out=[example] * 2,
        held_out_sizes=[(16, 16)] * 2, tokens=lambda size: tokens,
    )  # fmt: skip
    return Feed(plan, Encoded())  # type: ignore[arg-type]


def facts(batch: NoisyBatch) -> tuple[bytes, bytes]:
    return np.array(batch.noise).tobytes(), np.array(batch.sigma).tobytes()


def test_prompts_to_preserve_are_shown_at_high_noise() -> None:
    """With a class, 7 of 10 pictures are under a prompt; without one all are. The class keeps the noise it has."""
    items, kinds = range(400), {"items": 400, "timesteps": "style", "preserve_prompt": ("6 long", "7 long.")}
    several = feed(**kinds, trigger="b", preserve="xyz")
    batch = several.batch(3, items)
    kept, again = (several.preserved(batch, 3, items, blank=False) for _ in range(2))
    assert kept and again
    lengths = np.array([caption.item() for caption in kept.captions])
    assert lengths.tolist() == [caption.item() for caption in again.captions]
    counts = {length: int((lengths == length).sum()) for length in set(lengths)}
    assert set(counts) == {len("axyzc"), 6, 7}
    assert 90 <= counts[5] <= 150 and 105 <= counts[6] <= 175 and 105 <= counts[7] <= 175  # 120, 140, 140
    sigma = np.array(batch.sigma)
    assert (sigma[lengths == 5] < 0.6).sum() > 10
    np.testing.assert_array_equal(kept.sigma, np.where(lengths == 5, sigma, np.maximum(sigma, np.float32(0.6))))
    np.testing.assert_array_equal(kept.noise, batch.noise)
    alone = feed(**kinds).preserved(batch, 3, items, blank=False)
    assert alone and {caption.item() for caption in alone.captions} == {6, 7}


def test_every_epoch_item_and_seed_has_its_own_noise_and_level() -> None:
    one, other = feed(), feed(seed=1)
    drawn = [facts(one.batch(0, [0])), facts(one.batch(1, [0])), facts(one.batch(0, [1])), facts(other.batch(0, [0]))]
    for part in zip(*drawn, strict=True):
        assert len(set(part)) == 4
    assert facts(one.batch(0, [0])) == drawn[0]
    both = one.batch(0, [0, 1])  # a batch changes nothing
    assert both.noise.shape == (2, 4, 2, 3) and np.array(both.noise[1]).tobytes() == drawn[2][0]
    assert np.array(both.noise).std() == pytest.approx(1, abs=0.3)


def test_vectors_are_float32_whatever_the_matrices_are() -> None:
    matrices = {"x.lora_A": mx.ones((2, 3), mx.bfloat16), "x.lora_B": mx.ones((4, 2), mx.bfloat16)}
    vectors = Packing(matrices).pack(matrices)
    assert {name: vector.dtype for name, vector in vectors.items()} == dict.fromkeys(("lora_A", "lora_B"), mx.float32)


def test_each_purpose_has_random_numbers_of_its_own() -> None:
    drawn = {purpose: rng_for(3, purpose, 1, 2).random() for purpose in (ORDER, DRAW, INITIAL)}
    assert len(set(drawn.values())) == len(drawn) == 3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_as_often_as_asked(share: float) -> None:
    one = feed(caption_dropout=share)
    dropped = [one.batch(epoch, [0]).captions[0].item() == 0 for epoch in range(2000)]
    assert np.mean(dropped) == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)
    halves = np.array(dropped).reshape(2, 1000).mean(axis=1)
    assert np.abs(halves - share).max() < 0.05


@pytest.mark.parametrize("flip", [False, True])
def test_half_of_the_pictures_are_mirrored_if_asked(flip: bool) -> None:
    one = feed(flip=flip)
    mirrored = [not np.array_equal(np.array(one.batch(epoch, [0]).x_0[0]), LATENTS) for epoch in range(1000)]
    assert np.mean(mirrored) == pytest.approx(0.5 if flip else 0, abs=0.05 if flip else 0)


@pytest.mark.parametrize(("tokens", "shift"), [(256, 1.6487), (1024, 1.8780), (4096, 3.1582)])
def test_levels_follow_the_size_of_the_picture(tokens: int, shift: float) -> None:
    one = feed(tokens, timesteps="auto")
    drawn = [one.batch(epoch, [0]).sigma.item() for epoch in range(3000)]
    assert np.median(drawn) == pytest.approx(shift / (shift + 1), abs=0.02)


def test_weights_follow_the_level() -> None:
    weighted, plain = feed(timesteps="weighted"), feed(timesteps="uniform")
    weights = np.array([weighted.batch(epoch, [0]).weight.item() for epoch in range(2000)])  # type: ignore[union-attr]
    assert weights.mean() == pytest.approx(1, abs=0.03) and weights.std() > 0.2
    assert plain.batch(0, [0, 1]).weight.tolist() == [1, 1]  # type: ignore[union-attr]


def test_held_out_noise_differs_between_pictures_and_levels_only() -> None:
    one = feed(seed=3)
    first, again, other = one.held_out(0), one.held_out(0), one.held_out(1)
    assert [sigma for sigma, _ in first] == list(VALIDATION_SIGMAS) == [batch.sigma.item() for _, batch in first]
    noises = {np.array(batch.noise).tobytes() for _, batch in (*first, *other)}
    assert len(noises) == 2 * len(VALIDATION_SIGMAS)
    assert all(facts(a) == facts(b) for (_, a), (_, b) in zip(first, again, strict=True))


def test_the_held_out_loss_is_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(measure, "flow_matching_loss", lambda model, batch: mx.array(2.0))
    plan: Any = SimpleNamespace(held_out=[1, 2], total=1, config=SimpleNamespace(validation_every=1, preview_every=0))
    (measured,) = Measurer(plan, feed(), SimpleNamespace(result=Result), None).due(0)  # type: ignore[arg-type]
    assert measured.losses == dict.fromkeys(VALIDATION_SIGMAS, 2.0)  # type: ignore[union-attr]


def test_the_loss_is_float32_whatever_the_model_computes_in() -> None:
    rng = np.random.default_rng(1)
    x_0, noise, raw = (rng.standard_normal((2, 4, 6, 6)).astype(np.float32) for _ in range(3))
    weight = np.array([0.5, 1.5], np.float32)
    narrow = mx.array(raw).astype(mx.bfloat16)
    batch = NoisyBatch(mx.array(x_0), mx.array(noise), mx.array([0.3, 0.6]), [], mx.array(weight))
    loss = batch.error(narrow)
    exact = np.array(narrow.astype(mx.float32)).astype(np.float64) - (x_0.astype(np.float64) - noise)
    expected = (weight * (exact**2).mean(axis=(1, 2, 3))).mean()
    assert loss.dtype == mx.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_lora_plus_raises_b_alone() -> None:
    parameters = {"x.lora_A": mx.zeros((2, 3)), "x.lora_B": mx.zeros((4, 2))}
    config, packing = TrainConfig(Path("m"), Path("d"), **PLAIN, lora_plus=8.0), Packing(parameters)
    vectors = packing.pack(parameters)
    gradients = {factor: mx.ones_like(vector) for factor, vector in vectors.items()}
    after = Optimizer(config, packing, vectors).apply(vectors, gradients, 0.5)
    assert set(after["lora_A"].tolist()) == {-0.5} and set(after["lora_B"].tolist()) == {-4.0}


def test_a_long_gradient_is_shortened_to_the_limit_and_no_other() -> None:
    gradients = {"lora_A": mx.array([3.0]), "lora_B": mx.array([4.0])}
    for longest, factor in ((1.0, 0.2), (5.0, 1.0), (50.0, 1.0), (0.0, 1.0)):
        shortened, norm = clipped(gradients, longest)
        assert norm == pytest.approx(5) and shortened["lora_A"].item() == pytest.approx(3 * factor)


def test_an_average_forgets_faster_at_first() -> None:
    zero, one = {"lora_A": mx.zeros(1)}, {"lora_A": mx.ones(1)}
    assert averaged(zero, one, 0.9, 1)["lora_A"].item() == pytest.approx(1 - 2 / 11)
    assert averaged(zero, one, 0.9, 1000)["lora_A"].item() == pytest.approx(0.1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("feed"))


def test_the_seed_decides_the_first_a(shop: Workshop) -> None:
    one, other = (shop.train(f"seed{seed}", steps=1, lr=1e-9, seed=seed).vector("A") for seed in (1, 2))
    assert np.abs(one - other).max() > 0.01 and one.std() == pytest.approx(other.std(), rel=0.2)


def test_a_gradient_that_is_not_finite_is_not_applied(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LossAndGradients.__call__

    def infinite(self: LossAndGradients, batch: NoisyBatch) -> Any:
        loss, gradients = real(self, batch)
        return loss, {name: g * math.inf for name, g in gradients.items()}

    monkeypatch.setattr(LossAndGradients, "__call__", infinite)
    run = shop.train("infinite", steps=1)
    assert [math.isfinite(step.loss) for step in run.steps] == [True] and run.steps[0].skipped
    assert not run.vector("B").any()
