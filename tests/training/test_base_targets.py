"""Preservation while the transformer itself trains: the targets are the base's predictions, from the cache."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import HAS_MLX, mlx_only
from support.training_runs import PLAIN, WholeShop, after, pictures, whole_workshop

from zimage_ref import TrainingError
from zimage_ref.training import kept_draws
from zimage_ref.training.cache import read_entry
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
    made = whole_workshop(tmp_path_factory.mktemp("targets"))
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
    run = shop.train("targets", **options, preserve_every=2)
    base = ZImagePipeline(make_plan(shop.config("targets", **options)).model).transformer
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
    draws = {encoded.total for encoded in run.of(Encoded) if encoded.what == "targets"}
    assert draws == {len(kept_draws.kept_draws(make_plan(shop.config("targets", **options, preserve_every=2))))}


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
    assert not [encoded for encoded in plain.of(Encoded) if encoded.what == "targets"]


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
def test_a_run_can_be_stopped_before_all_targets_are_there(shop: WholeShop) -> None:
    options: dict[str, Any] = {**KEPT, "steps": 6, "seed": 8}
    list(train(shop.config("before", **{**options, "steps": 1})))  # captions and pictures are in the cache
    stopped = shop.train("early", after(7), **options)
    assert stopped.of(Stopped) == [Stopped(0)] and not stopped.steps
    assert shop.train("early", **options).bytes == shop.train("late", **options).bytes


def test_the_draws_of_long_runs_come_again(shop: WholeShop, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(shop.config("long", **KEPT, epochs=5, preserve_every=1))
    every_draw = [(epoch, item) for epoch in range(5) for item in range(3)]
    assert sorted(kept_draws.kept_draws(plan)) == every_draw
    monkeypatch.setattr(kept_draws, "DRAWS", 7)
    assert sorted(kept_draws.kept_draws(plan)) == every_draw[:6]
    assert [kept_draws.drawn_epoch(plan, epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    monkeypatch.setattr(kept_draws, "DRAWS", 2)
    assert sorted(kept_draws.kept_draws(plan)) == every_draw[:3]
    some = make_plan(shop.config("some", **KEPT, steps=4, preserve_every=3))
    assert len(kept_draws.kept_draws(some)) == 2  # of the steps 1 and 4


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
    with pytest.raises(TrainingError, match=r"lost/targets/\w+\.safetensors: the cache was changed during the run"):
        for event in train(shop.config("lost", **KEPT, steps=3, cache=cache)):
            if isinstance(event, Encoded) and event.what == "targets" and event.done == event.total:
                shutil.rmtree(cache / "targets")


@pytest.mark.slow
def test_a_disk_that_is_full_before_all_targets_are_there_is_named(
    shop: WholeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = shop.folder / "full-cache"
    list(train(shop.config("room", steps=1, **KEPT, cache=cache)))
    shutil.rmtree(cache / "targets")
    monkeypatch.setattr("zimage_mlx.training.encode.write_entry", full_disk)
    with pytest.raises(TrainingError, match=r"full-cache: the disk is full: about \d+\.\d MB are missing"):
        shop.train("no-room", steps=1, **KEPT, cache=cache)


def test_targets_are_stored_in_the_precision_of_the_base(shop: WholeShop) -> None:
    cache = shop.folder / "narrow"
    shop.train("narrow", steps=1, preserve_blank=True, base_precision="bf16", cache=cache)
    (path,) = (cache / "targets").iterdir()
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
    stored = [read_entry(path).nbytes for path in (cache / "targets").iterdir()]
    said = f"Before the first step, {len(stored)} noised pictures pass through the base"
    assert said in (text := room(make_plan(config), "bfloat16"))
    assert f"predictions are kept to be preserved: {sum(stored) / 1e6:.3g} MB in the cache" in text
    assert "preserve" not in room(make_plan(shop.config("unsized")), "bfloat16")
