"""Every training option does what it says: each of these tests fails if the option does nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import tiny
from support.training_runs import PLAIN, Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

import zimage_mlx.training.learner
from zimage_mlx import Done, ZImagePipeline, train
from zimage_mlx.training.gradient import LossAndGradients
from zimage_mlx.training.loss import NoisyBatch
from zimage_mlx.training.optimizer import averaged, clipped, make_optimizer
from zimage_ref import TrainingError
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.flow import TimestepSampling, shifted
from zimage_ref.options_file import to_json
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.optimizers import OPTIMIZERS
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def pair(shop: Workshop) -> Path:
    """Two pictures of one size, whose captions differ in length by more than the padding."""
    return pictures(shop.folder / "pair", (40, 40), (48, 48), captions=["a fox", "many soft waves in the snow " * 12])


COMPUTE = LossAndGradients.__call__  # as it is, before a test replaces it


def test_every_optimizer_learns_and_none_like_another(shop: Workshop) -> None:
    results = {}
    for name in OPTIMIZERS:
        run = shop.train(f"optimizer-{name}", optimizer=name, steps=2, targets="attention")
        results[name] = run.vector("B")
        assert np.isfinite(results[name]).all() and np.abs(results[name]).max() > 0, name
    assert len({vector.tobytes() for vector in results.values()}) == len(OPTIMIZERS)


def test_weight_decay_shrinks_the_matrices(shop: Workshop) -> None:
    free, decayed = (np.linalg.norm(shop.train(f"decay{d:g}", weight_decay=d, steps=3).vector("A")) for d in (0.0, 5.0))
    assert decayed < 0.95 * free


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "adafactor"])
def test_averages_forget_within_a_run_of_some_hundred_steps(name: str) -> None:
    made = make_optimizer(TrainConfig(Path("m"), Path("d"), optimizer=name))
    assert name == "adafactor" or made.betas == [0.9, 0.99]
    assert name != "adafactor" or not (made.relative_step or made.scale_parameter)


def test_the_learning_rate_rises_then_follows_its_schedule(shop: Workshop) -> None:
    rates = {}
    for schedule in ("constant", "cosine", "linear"):
        run = shop.train(f"rate-{schedule}", schedule=schedule, warmup=2, steps=6)
        rates[schedule] = [step.lr / 1e-2 for step in run.steps]
    assert rates["constant"] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert rates["linear"] == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4])
    assert rates["cosine"][2:] == pytest.approx([(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_the_learning_rate_follows_the_width_unless_it_is_given(shop: Workshop) -> None:
    narrow = shop.train("narrow", lr=None, schedule="constant", steps=1).steps[0].lr
    assert narrow == pytest.approx(1e-4 * math.sqrt(3840 / tiny.TRANSFORMER.dim))
    config, model = shop.config("wide"), SimpleNamespace(transformer=OFFICIAL_TRANSFORMER)
    official = TrainPlan(config, model, [], [], {"layers.0.attention.to_q": config.size}, None, {})
    assert replace(official, config=shop.config("wide", lr=None)).lr == 1e-4 and official.lr == 1e-2


def test_the_learning_rate_of_a_step_is_the_one_applied(shop: Workshop) -> None:
    warm, full = (shop.train(f"warm{w}", **PLAIN, warmup=w, steps=1).vector("B") for w in (3, 0))
    np.testing.assert_allclose(4 * warm, full, rtol=1e-2)  # the file is bfloat16
    assert np.abs(full).max() > 0


def test_clipping_limits_the_gradient_and_reports_its_full_length(shop: Workshop) -> None:
    loose = shop.train("loose", **PLAIN, steps=1)
    tight = shop.train("tight", **{**PLAIN, "grad_clip": 0.01}, steps=1)
    assert tight.steps[0].grad_norm == loose.steps[0].grad_norm > 0.1
    assert np.linalg.norm(tight.vector("B")) == pytest.approx(1e-2 * 0.01, rel=1e-2)
    assert np.linalg.norm(loose.vector("B")) == pytest.approx(1e-2 * loose.steps[0].grad_norm, rel=1e-2)
    gradients, norm = clipped({"a": mx.array([3.0]), "b": mx.array([4.0])}, 1.0)
    assert norm == 5.0 and gradients["b"].item() == pytest.approx(0.8)


def test_a_batch_of_two_is_the_mean_of_two_batches_of_one(shop: Workshop) -> None:
    pipeline = ZImagePipeline.from_pretrained(shop.model)
    rng = np.random.default_rng(3)
    captions = [pipeline.encode_prompt(text) for text in ("a fox", "many soft waves in the snow " * 12)]
    assert len(captions[1]) > 32 > len(captions[0])  # so that the shorter one is masked
    arrays = [mx.array(rng.standard_normal((2, 16, 6, 4), dtype=np.float32)) for _ in range(2)]
    sigma, weight = mx.array([0.3, 0.8]), mx.array([0.5, 1.5])
    zimage_mlx.lora.layers.add_trainable_loras(
        pipeline.transformer, ["layers.0.attention.to_q", "noise_refiner.0.feed_forward.w2"], 2, 2, rng
    )

    differentiate = LossAndGradients(pipeline.transformer, math.inf, compiled=False)

    def of(*items: int) -> tuple[mx.array, dict[str, mx.array]]:
        x_0, noise, s, w = (mx.stack([a[i] for i in items]) for a in (*arrays, sigma, weight))
        return differentiate(NoisyBatch(x_0, noise, s, [captions[i] for i in items], w))

    (loss, together), (first, one), (second, two) = of(0, 1), of(0), of(1)
    assert first.item() != pytest.approx(second.item(), rel=1e-2)
    assert loss.item() == pytest.approx((first.item() + second.item()) / 2, rel=1e-5)
    for name, gradient in together.items():
        np.testing.assert_allclose(gradient, (one[name] + two[name]) / 2, rtol=1e-3, atol=1e-6)


def test_accumulating_two_batches_of_one_equals_a_batch_of_two(shop: Workshop, pair: Path) -> None:
    batch = shop.train("batch", dataset=pair, batch_size=2, epochs=2)
    accumulated = shop.train("accumulated", dataset=pair, grad_accumulation=2, epochs=2)
    single = shop.train("single", dataset=pair, epochs=1)
    assert [step.pictures for step in batch.steps] == [step.pictures for step in accumulated.steps] == [2, 2]
    assert [step.pictures for step in single.steps] == [1] * 2
    assert batch.losses == pytest.approx(accumulated.losses, rel=1e-5)
    assert [s.grad_norm for s in batch.steps] == pytest.approx([s.grad_norm for s in accumulated.steps], rel=1e-4)
    mean = (single.losses[0] + single.losses[1]) / 2  # of the same noise, whatever the batch; the LoRA hardly moved
    assert batch.losses[0] == pytest.approx(mean, rel=0.1)


def test_steps_overrule_epochs_and_repeats_lengthen_them(shop: Workshop) -> None:
    assert len(shop.train("steps", steps=2, epochs=50).steps) == 2
    assert len(shop.train("epochs", epochs=1).steps) == 4
    assert [s.epoch for s in shop.train("repeats", epochs=1, repeats=2).steps] == [1] * 8


def test_the_average_over_steps_becomes_the_result(shop: Workshop) -> None:
    run, plain = shop.train("ema", ema=0.9, steps=2), [shop.train(f"no-ema{n}", steps=n) for n in (1, 2)]
    assert run.losses == plain[1].losses  # it does not steer the training
    averages, first, second = (RunFolder(r.output).latest()[0] for r in (run, *plain))
    assert averages is not None and first is not None and second is not None
    for layer, B in run.matrices("B").items():
        name = f"{layer}.lora_B"  # 0 at the start; kept are 2 / 11, then 3 / 12, until that reaches the decay
        expected = 3 / 12 * (9 / 11 * first.tensors["lora"][name]) + 9 / 12 * second.tensors["lora"][name]
        np.testing.assert_allclose(averages.tensors["ema"][name], expected, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(B, expected, rtol=1e-2, atol=1e-7)  # the file is bfloat16
    assert averaged({"a": mx.array(1.0)}, {"a": mx.array(2.0)}, 0.9, 1000)["a"].item() == pytest.approx(1.1)


def test_rank_and_alpha_set_size_and_strength(shop: Workshop) -> None:
    assert {a.shape[0] for a in shop.train("rank5", rank=5, steps=1).matrices("A").values()} == {5}
    one, two = (shop.train(f"alpha{a}", **PLAIN, alpha=a, steps=1).vector("B") for a in (2.0, 4.0))
    np.testing.assert_allclose(4 * one, two, rtol=2e-2)  # the scale enters the gradient and the folded B


@pytest.mark.parametrize(
    ("targets", "count"),
    [("attention", 8), ("feed-forward", 6), (["attention", "refiners"], 16), ("adaln", 2), ("all", 2 * 8 + 8 + 7)],
)
def test_targets_choose_the_layers(shop: Workshop, targets: str | list[str], count: int) -> None:
    run = shop.train(f"targets-{count}", targets=targets, steps=1)
    assert len(run.matrices("A")) == count
    assert all(np.abs(B).max() > 0 for B in run.matrices("B").values())


def test_lora_plus_makes_b_learn_faster(shop: Workshop) -> None:
    one, eight = (shop.train(f"plus{r:g}", **PLAIN, lora_plus=r, steps=1).vector("B") for r in (1.0, 8.0))
    np.testing.assert_allclose(8 * one, eight, rtol=1e-2)


def test_rank_dropout_rests_ranks_and_rescales_the_others(shop: Workshop) -> None:
    full = shop.train("undropped", **PLAIN, rank=8, steps=1).matrices("B")
    dropped = shop.train("dropped", **PLAIN, rank=8, rank_dropout=0.5, steps=1).matrices("B")
    rested = 0
    for layer, B in dropped.items():
        for column, whole in zip(B.T, full[layer].T, strict=True):
            rested += not column.any()
            if column.any():
                np.testing.assert_allclose(column, 2 * whole, rtol=2e-2, atol=1e-7)
    assert 0.3 < rested / (8 * len(dropped)) < 0.7


@pytest.mark.parametrize(
    ("text", "quantiles"),
    [
        ("uniform", (0.05, 0.25, 0.5, 0.75, 0.95)),
        ("shift=3", (0.14, 0.50, 0.75, 0.90, 0.98)),
        ("shift=6", (0.24, 0.67, 0.86, 0.95, 0.99)),
        ("sigmoid", (0.16, 0.34, 0.50, 0.66, 0.84)),
        ("logit-normal", (0.16, 0.34, 0.50, 0.66, 0.84)),
        ("auto", (0.27, 0.49, 0.65, 0.79, 0.91)),
    ],
)
def test_timesteps_have_the_distribution_they_are_named_for(text: str, quantiles: tuple[float, ...]) -> None:
    drawn = TimestepSampling.parse(text).sigmas(np.random.default_rng(0), 40_000, image_tokens=1024)
    assert drawn.dtype == np.float32 and drawn.min() > 0 and drawn.max() < 1
    np.testing.assert_allclose(np.quantile(drawn, (0.05, 0.25, 0.5, 0.75, 0.95)), quantiles, atol=0.011)


def test_auto_timesteps_shift_with_the_resolution_within_limits() -> None:
    sampling = TimestepSampling.parse("auto")
    plain = TimestepSampling.parse("sigmoid").sigmas(np.random.default_rng(1), 9, 1)
    for tokens, shift in ((256, 1.6487), (1024, 1.8780), (4096, 3.1582), (20_000, 3.2)):
        drawn = sampling.sigmas(np.random.default_rng(1), 9, tokens)
        np.testing.assert_allclose(drawn, shifted(plain, shift), rtol=1e-3)


def test_weighted_timesteps_weigh_the_loss(shop: Workshop) -> None:
    sampling = TimestepSampling.parse("weighted")
    drawn = sampling.sigmas(np.random.default_rng(0), 40_000, 1024)
    assert np.mean(sampling.weights(drawn)) == pytest.approx(1, abs=0.01)
    high, low = sampling.weights(np.array([0.875, 0.2], np.float32))
    assert high / low == pytest.approx(1.52 / 0.72, rel=1e-3)
    losses = [shop.train(f"t-{t}", timesteps=t, steps=1).losses[0] for t in ("uniform", "weighted", "shift=3", "auto")]
    assert len(set(losses)) == 4


@pytest.mark.slow
def test_caption_dropout_shows_pictures_without_their_captions(shop: Workshop) -> None:
    def losses(name: str, captions: list[str], share: float) -> list[float]:
        data = pictures(shop.folder / f"dropout-{name}", (32, 32), (32, 48), captions=captions)
        return shop.train(f"dropout-{name}", dataset=data, caption_dropout=share, epochs=1).losses

    fox, owl = ["a red fox", "the fox again"], ["an owl", "the same owl in soft snow"]
    assert losses("fox1", fox, 1.0) == losses("owl1", owl, 1.0)
    assert losses("fox0", fox, 0.0) != losses("owl0", owl, 0.0)


@pytest.mark.slow
def test_flipping_mirrors_about_half_of_the_pictures(shop: Workshop) -> None:
    plain = shop.train("unflipped", **PLAIN, epochs=2, lr=1e-9)
    flipped = shop.train("flipped", **PLAIN, epochs=2, lr=1e-9, flip=True)
    same = sum(a == pytest.approx(b, rel=1e-6) for a, b in zip(plain.losses, flipped.losses, strict=True))
    assert 2 <= same <= 6  # of 8


@pytest.mark.slow
def test_resolutions_mix_and_squares_are_square(shop: Workshop) -> None:
    data = pictures(shop.folder / "mixed-pictures", (80, 80), (120, 80), (80, 120))
    options = {"dataset": data, "epochs": 1, "batch_size": 9}
    assert [s.pictures for s in shop.train("one", **options, resolution=32).steps] == [1, 1, 1]
    assert [s.pictures for s in shop.train("mixed", **options, resolution=(32, 64)).steps] == [1] * 6
    assert [s.pictures for s in shop.train("square", **options, square=True).steps] == [3]


@pytest.mark.slow
def test_the_trigger_is_in_every_caption_that_is_learned(shop: Workshop) -> None:
    captions = {"none": ["zzz, one", "zzz, two"], "zzz": ["one", "two"]}
    losses = []
    for trigger, texts in captions.items():
        data = pictures(shop.folder / f"trigger-{trigger}", (32, 32), (48, 32), captions=texts)
        options = {} if trigger == "none" else {"trigger": trigger}
        losses.append(shop.train(f"trigger-{trigger}", dataset=data, epochs=1, **options).losses)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_seed_decides_everything(shop: Workshop) -> None:
    one, again, other = (shop.train(n, seed=s, steps=2) for n, s in (("s1", 1), ("s1again", 1), ("s2", 2)))
    assert one.bytes == again.bytes != other.bytes
    assert one.losses == again.losses != other.losses


def _failing(at: set[int]):
    """LossAndGradients, not finite in the calls numbered `at`."""
    calls = iter(range(10**6))

    def fails(self, batch):
        loss, gradients = COMPUTE(self, batch)
        return (loss * math.nan, gradients) if next(calls) in at else (loss, gradients)

    return fails


def test_a_step_that_is_not_finite_is_skipped(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossAndGradients, "__call__", _failing({0}))
    run = shop.train("skipped", steps=1)
    assert [step.skipped for step in run.steps] == [True] and not run.vector("B").any()
    monkeypatch.setattr(LossAndGradients, "__call__", _failing({1, 2, 4}))
    run = shop.train("skipped2", steps=5)
    assert [step.skipped for step in run.steps] == [False, True, True, False, True]
    assert np.isfinite(run.vector("B")).all() and run.vector("B").any()


def test_three_steps_in_a_row_that_are_not_finite_end_the_run_with_the_good_state_saved(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = RunFolder(shop.train("good", steps=2).output).latest()[0]
    monkeypatch.setattr(LossAndGradients, "__call__", _failing({2, 3, 4}))
    with pytest.raises(TrainingError, match="step 5: loss or gradient was not finite 3 times in a row"):
        shop.train("bad", steps=9)
    bad = RunFolder(shop.folder / "bad.safetensors").latest()[0]
    assert good is not None and bad is not None and bad.step == 5
    for name, array in good.tensors["lora"].items():
        np.testing.assert_array_equal(bad.tensors["lora"][name], array)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_base_can_be_quantized(shop: Workshop, bits: int) -> None:
    full, quantized = shop.train(f"full{bits}", steps=2), shop.train(f"q{bits}", base_precision=str(bits), steps=2)
    assert full.losses != quantized.losses
    assert full.losses == pytest.approx(quantized.losses, rel=0.02 if bits == 8 else 0.3)


def test_bf16_and_f32_are_what_they_say(shop: Workshop) -> None:
    half, full = (shop.train(p, base_precision=p, steps=1).losses[0] for p in ("bf16", "f32"))
    assert half != full and half == pytest.approx(full, rel=0.03)


def test_the_result_of_the_defaults_is_complete(shop: Workshop, tmp_path: Path) -> None:
    config = TrainConfig(shop.model, shop.data, tmp_path / "lora.safetensors", epochs=1, resolution=32)
    events = list(train(config))
    assert events[-1] == Done(tmp_path / "lora.safetensors", 4)
    assert to_json(config)["targets"] == ["attention", "feed_forward", "refiners"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "lora.safetensors", "lora.lora.json", "lora.run", "zimage-cache"
    }  # fmt: skip
