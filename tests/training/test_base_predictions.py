"""Preservation while the transformer itself trains: the targets are the base's predictions, from the cache."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import HAS_MLX, mlx_only
from support.training_runs import PLAIN, WholeShop, pictures, whole_workshop

from zimage_ref import ConfigError, TrainingError
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Tensor, cast
from zimage_ref.training import kept_draws
from zimage_ref.training.cache import TrainCache, read_entry
from zimage_ref.training.dataset_options import DatasetOptions
from zimage_ref.training.events import Checkpointed, Encoded, Stopped
from zimage_ref.training.plan import make_plan
from zimage_ref.training.whole_room import room

if HAS_MLX:
    import mlx.core as mx

    from zimage_mlx import ZImagePipeline, train
    from zimage_mlx.training import full
    from zimage_mlx.training.loss import Distance, JointBatch, NoisyBatch
    from zimage_ref.model.flow import model_time

pytestmark = mlx_only
KEPT: dict[str, Any] = {
    "trigger": "sks", "preserve": "cat", "preserve_prompt": ("an owl", "a tree, at night"), "preserve_blank": True
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> WholeShop:
    made = whole_workshop(tmp_path_factory.mktemp("predictions"))
    captions = ["a [trigger] in snow", "[trigger]", "the sea and a [trigger]"]
    return WholeShop(made.folder, made.model, pictures(made.folder / "class", *[(32, 32)] * 3, captions=captions))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[JointBatch]:
    """The batches of which gradients are made."""
    batches: list[JointBatch] = []
    plain = full.LossAndGradients.__call__

    def called(self: full.LossAndGradients, batch: JointBatch) -> Any:
        batches.append(batch)
        return plain(self, batch)

    monkeypatch.setattr(full.LossAndGradients, "__call__", called)
    return batches


def noisy(seed: int, pictures: int, **options: Any) -> NoisyBatch:
    rng = np.random.default_rng(seed)
    x_0, noise = (mx.array(rng.standard_normal((pictures, 4, 6, 2), dtype=np.float32)) for _ in range(2))
    captions = [mx.array(rng.standard_normal((5 + i, 3), dtype=np.float32)) for i in range(pictures)]
    return NoisyBatch(x_0, noise, mx.array(rng.random(pictures, dtype=np.float32)), captions, **options)


def test_batches_that_go_together_have_the_sum_of_their_errors() -> None:
    parts = [noisy(0, 2, distance=Distance("huber")), noisy(1, 3, mask=mx.full((3, 1, 6, 2), 0.5)), noisy(2, 1)]
    joint = JointBatch(list(zip((1.0, 0.25, 3.0), parts, strict=True)))
    raws = [mx.array(np.random.default_rng(i).standard_normal(part.x_0.shape)) for i, part in enumerate(parts)]
    expected = sum(weight * part.error(raw).item() for (weight, part), raw in zip(joint.parts, raws, strict=True))
    assert joint.error(mx.concatenate(raws)).item() == pytest.approx(expected, rel=1e-6)
    assert joint.x_sigma.shape == (6, 4, 6, 2) and joint.sigma.shape == (6,)
    assert [len(caption) for caption in joint.captions] == [5, 6, 5, 6, 7, 5]


def test_targets_are_what_the_base_makes_also_after_it_has_changed(shop: WholeShop, shown: list[JointBatch]) -> None:
    options: dict[str, Any] = {**KEPT, "batch_size": 2, "preserve_weight": 2.5, "epochs": 3, "lr": 1e-2}
    run = shop.train("predictions", **options, preserve_every=2)
    base = ZImagePipeline(make_plan(shop.config("predictions", **options)).model).transformer
    assert [len(batch.parts) for batch in shown] == [3, 1, 3, 1, 3, 1]  # the pictures, words, no caption
    for batch in shown[::2]:
        (one, learned), *kept = batch.parts
        assert one == 1.0 and learned.target is None and {weight for weight, _ in kept} == {2.5}
        for _, part in kept:
            made = base(part.x_sigma, model_time(part.sigma), part.captions)
            np.testing.assert_allclose(part.target, made, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(part.noise, learned.noise)
    last = [part for _, part in shown[4].parts[1:]]
    tuned = ZImagePipeline.from_pretrained(shop.model, parts={"transformer": run.output}).transformer
    for part in last:  # the test would see nothing if the weights had not changed
        assert np.abs(np.array(tuned(part.x_sigma, model_time(part.sigma), part.captions) - part.target)).max() > 0.02
    draws = {encoded.total for encoded in run.of(Encoded) if encoded.what == "predictions"}
    assert draws == {len(kept_draws.kept_draws(make_plan(shop.config("predictions", **options, preserve_every=2))))}


@pytest.mark.slow
def test_what_is_preserved_stays_nearer_to_the_base(shop: WholeShop) -> None:
    options: dict[str, Any] = {"preserve_prompt": ("an owl",), "steps": 20, "lr": 1e-3}
    base = ZImagePipeline.from_pretrained(shop.model).transformer
    caption = ZImagePipeline.from_pretrained(shop.model).encode_prompt("an owl")
    x = mx.array(np.random.default_rng(5).standard_normal((1, 16, 4, 4), dtype=np.float32))

    def moved(name: str, **more: Any) -> float:
        run = shop.train(name, **options, **more)
        tuned = ZImagePipeline.from_pretrained(shop.model, parts={"transformer": run.output}).transformer
        seen = x, mx.array([0.2]), [caption]
        return float(np.linalg.norm(np.array(tuned(*seen) - base(*seen))))

    free, kept = moved("light", preserve_weight=1e-3), moved("heavy", preserve_weight=30.0)
    assert kept < 0.8 * free


def test_a_run_without_preservation_shows_its_pictures_alone(shop: WholeShop, shown: list[JointBatch]) -> None:
    plain = shop.train("plain", steps=2, **PLAIN)
    assert [len(batch.parts) for batch in shown] == [1, 1]
    assert not [encoded for encoded in plain.of(Encoded) if encoded.what == "predictions"]


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_targets_even_if_the_cache_is_gone(shop: WholeShop) -> None:
    options: dict[str, Any] = {**KEPT, "steps": 4, "resume_every": 2, "seed": 3}
    whole = shop.train("whole", **options)
    cache = shop.folder / "own-cache"
    events = train(shop.config("cut", **options, cache=cache))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 2):
        pass
    events.close()
    shutil.rmtree(cache)
    rest = shop.train("cut", **options, cache=cache, resume=True)
    assert rest.bytes == whole.bytes and rest.losses == whole.losses[2:]


@pytest.mark.slow
def test_a_run_can_be_stopped_before_all_predictions_are_there(shop: WholeShop) -> None:
    options: dict[str, Any] = {**KEPT, "steps": 6, "seed": 8, "cache": shop.folder / "early-cache"}
    cached = shop.folder / "early-cache/predictions"
    stopped = shop.train("early", lambda: cached.exists() and len(list(cached.iterdir())) == 4, **options)
    assert stopped.of(Stopped) == [Stopped(0)] and not stopped.steps
    assert len(list(cached.iterdir())) == 4 < stopped.of(Encoded)[-1].total == 12
    late = shop.train("late", **{**options, "cache": shop.folder / "late-cache"})
    assert shop.train("early", **options).bytes == late.bytes


def test_what_does_not_fit_is_refused_before_predictions_are_computed(shop: WholeShop) -> None:
    shop.train("fits", **KEPT, steps=2)
    config = shop.config("fits", **KEPT, steps=2, optimizer="lion", resume=True, resume_anyway=True)
    with pytest.raises(ConfigError, match="the saved run has other optimizer state: it cannot be resumed so"):
        for event in train(config):
            assert not isinstance(event, Encoded) or event.what != "predictions"


@pytest.mark.slow
def test_a_resumed_run_computes_only_what_is_left_to_do(shop: WholeShop) -> None:
    options: dict[str, Any] = {**KEPT, "steps": 6, "resume_every": 4, "cache": shop.folder / "rest-cache"}
    whole = shop.train("rest-whole", **options)
    events = train(shop.config("rest", **options))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 4):
        pass
    events.close()
    shutil.rmtree(shop.folder / "rest-cache/predictions")
    rest = shop.train("rest", **options, resume=True)
    assert rest.bytes == whole.bytes
    assert len(list((shop.folder / "rest-cache/predictions").iterdir())) == 2 * 2  # steps, and showings


def test_predictions_are_those_of_this_base_at_this_noise(shop: WholeShop) -> None:
    model = make_plan(shop.config("key", **KEPT)).model
    one, other = (TrainCache(shop.folder, each, "engine") for each in (model, _changed(model, shop.folder / "other")))
    inputs = [np.arange(i, i + 4, dtype=np.float32) for i in range(3)]
    assert one.prediction(inputs) == one.prediction([*map(np.copy, inputs)]) != other.prediction(inputs)
    for i in range(3):
        assert one.prediction([*inputs[:i], inputs[i] + 1, *inputs[i + 1 :]]) != one.prediction(inputs)


def _changed(model: ModelFolder, output: Path) -> ModelFolder:
    """`model` with another transformer."""
    tensors = model.weights["transformer"]
    negated = {name: Tensor.of(-cast(tensor.read(), np.dtype("<f4"))) for name, tensor in tensors.items()}
    safetensors.write(path := output.with_suffix(".safetensors"), negated)
    return ModelFolder.open(model.path, {"transformer": path})


@pytest.mark.slow
def test_a_damaged_prediction_is_computed_again(shop: WholeShop) -> None:
    options: dict[str, Any] = {**KEPT, "steps": 2, "cache": shop.folder / "damaged"}
    whole = shop.train("sound", **options)
    path = next((shop.folder / "damaged/predictions").iterdir())
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert shop.train("mended", **options).bytes == whole.bytes and path.read_bytes() == sound


def test_pictures_without_a_trigger_have_no_class_to_preserve(shop: WholeShop, shown: list[JointBatch]) -> None:
    bare = pictures(shop.folder / "bare", (32, 32), (32, 32), captions=["an owl", "a tree"])
    tables = (DatasetOptions(folder=shop.data), DatasetOptions(folder=bare, kind="regularization"))
    options: dict[str, Any] = {"dataset": None, "datasets": tables, "trigger": "sks", "preserve": "cat", "epochs": 1}
    one = shop.train("one", **options, seed=1)
    assert sorted(len(batch.parts) for batch in shown) == [1, 1, 2, 2, 2]
    assert {encoded.total for encoded in one.of(Encoded) if encoded.what == "predictions"} == {3}
    shown.clear()
    shop.train("all", **options, batch_size=5, preserve_weight=2.0)
    (batch,) = shown
    assert [(weight, len(part.captions)) for weight, part in batch.parts] == [(1.0, 5), (2.0 * 3 / 5, 3)]


def test_the_draws_of_long_runs_come_again(shop: WholeShop, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(done: int = 0, **options: Any) -> list[tuple[int, int, bool]]:
        return sorted(kept_draws.kept_draws(make_plan(shop.config("long", **KEPT, **options)), done))

    every_draw = [(epoch, item, blank) for epoch in range(5) for item in range(3) for blank in (False, True)]
    assert draws(epochs=5) == every_draw
    assert draws(3, epochs=5) == every_draw[6:]  # of the steps after the first epoch
    monkeypatch.setattr(kept_draws, "DRAWS", 7)
    plan = make_plan(shop.config("long", **KEPT, epochs=5))
    assert draws(epochs=5) == draws(epochs=10**6) == every_draw[:12]
    assert [kept_draws.drawn_epoch(plan, epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    monkeypatch.setattr(kept_draws, "DRAWS", 2)
    assert draws(epochs=5) == every_draw[:6]  # an epoch is always complete
    assert len(draws(steps=4, preserve_every=3)) == 2 * 2  # of the steps 1 and 4
    monkeypatch.setattr(kept_draws, "DRAWS", 4)
    assert len(draws(steps=16, preserve_every=4)) == 4 * 2


def test_a_run_whose_draws_come_again_finds_their_targets(
    shop: WholeShop, shown: list[JointBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_draws, "DRAWS", 3)
    shop.train("again", **KEPT, epochs=2, batch_size=3)
    first, second = (batch.parts for batch in shown)
    assert not np.array_equal(first[0][1].noise, second[0][1].noise)
    for (_, before), (_, after_) in zip(first[1:], second[1:], strict=True):
        assert sorted(np.array(before.sigma).tolist()) == sorted(np.array(after_.sigma).tolist())


@pytest.mark.slow
def test_a_target_that_is_gone_is_named(shop: WholeShop) -> None:
    cache = shop.folder / "lost"
    fact = r"lost/predictions/\w+\.safetensors: the cache was changed during the run: go on with `resume`$"
    with pytest.raises(TrainingError, match=fact):
        for event in train(shop.config("lost", **KEPT, steps=3, cache=cache)):
            if isinstance(event, Encoded) and event.what == "predictions" and event.done == event.total:
                shutil.rmtree(cache / "predictions")


@pytest.mark.slow
def test_a_disk_that_is_full_before_all_targets_are_there_is_named(
    shop: WholeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = shop.folder / "full-cache"
    list(train(shop.config("room", steps=1, **KEPT, cache=cache)))
    shutil.rmtree(cache / "predictions")
    monkeypatch.setattr("zimage_mlx.training.encode.write_entry", full_disk)
    with pytest.raises(TrainingError, match=r"full-cache: the disk is full: about \d+\.\d MB are missing"):
        shop.train("no-room", steps=1, **KEPT, cache=cache)


def test_targets_are_stored_in_the_precision_of_the_base(shop: WholeShop) -> None:
    cache = shop.folder / "narrow"
    shop.train("narrow", steps=1, preserve_blank=True, base_precision="bf16", cache=cache)
    (path,) = (cache / "predictions").iterdir()
    assert read_entry(path).dtype.itemsize == 2 and read_entry(path).shape == (16, 4, 4)


def test_estimates_count_the_pictures_that_are_shown_again(shop: WholeShop) -> None:
    def activations(**options: Any) -> int:
        return make_plan(shop.config("room", **options)).memory("float32", None, "fast")[-1].activations

    plain, words, both = activations(), activations(preserve_prompt=("an owl",)), activations(**KEPT)
    assert words == activations(batch_size=2) and both == activations(batch_size=3) and plain < words < both
    lora = {"kind": "lora", "targets": "auto"}
    assert activations(**lora) == activations(**lora, **KEPT)  # its gradients are added up, one pass after the other


def test_the_plan_says_what_is_computed_before_the_first_step(shop: WholeShop) -> None:
    cache = shop.folder / "sized"
    config = shop.config("sized", **KEPT, steps=2, base_precision="bf16", cache=cache)
    list(train(config))
    stored = [read_entry(path).nbytes for path in (cache / "predictions").iterdir()]
    text = room(make_plan(config), "bfloat16")
    assert f"The base's predictions for {len(stored)} noised pictures are computed before the first step" in text
    assert f"kept in the cache: {sum(stored) / 1e6:.3g} MB" in text
    assert "predictions" not in room(make_plan(shop.config("unsized")), "bfloat16")
