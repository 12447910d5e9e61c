"""The training adapter is in the base while a LoRA is trained, and only then; and how memory is traded for time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.training_runs import Workshop, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

import zimage_mlx.training.block_gradient
import zimage_mlx.training.learner
from zimage_mlx import Done, ZImagePipeline
from zimage_mlx.lora.adapter import TrainingAdapter
from zimage_mlx.networks.weights import to_mlx
from zimage_ref import ConfigError, SchedulerConfig
from zimage_ref.lora.file import write_lora
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.model.parameters import transformer_parameters
from zimage_ref.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def adapter(shop: Workshop) -> Path:
    """A strong LoRA over some layers."""
    shapes, rng = transformer_parameters(tiny.TRANSFORMER), np.random.default_rng(4)
    factors = {}
    for layer in ("layers.0.attention.to_q", "layers.1.feed_forward.w2", "noise_refiner.0.attention.to_out.0"):
        out, inputs = shapes[f"{layer}.weight"]
        A, B = rng.standard_normal((3, inputs)), rng.standard_normal((out, 3))
        factors[layer] = LowRank(A.astype(np.float32) / 8, B.astype(np.float32) / 3)
    write_lora(shop.folder / "adapter.safetensors", factors, {})
    return shop.folder / "adapter.safetensors"


@pytest.mark.parametrize("precision", daily(["f32", "8"], "f32"))
def test_the_training_adapter_is_in_the_base_for_training_only(shop: Workshop, adapter: Path, precision: str) -> None:
    options = {"steps": 2, "preview_prompt": "a fox", "preview_steps": 1, "lr": 1e-9, "base_precision": precision}
    without = shop.train(f"without{precision}", **options)
    with_it = shop.train(f"with{precision}", **options, training_adapter=adapter)
    assert np.abs(np.subtract(with_it.losses, without.losses)).max() > 1e-3
    for step in (0, 2):  # the learning rate is so low that the pictures are the base's own
        name = f"previews/step{step}-0.png"
        ours, theirs = (RunFolder(run.output).path / name for run in (with_it, without))
        assert ours.read_bytes() == theirs.read_bytes()
    assert with_it.matrices("A").keys() == without.matrices("A").keys()
    again = shop.train(f"plain{precision}", **{**options, "preview_prompt": ()}, training_adapter=adapter)
    assert again.losses == with_it.losses  # a preview leaves no trace in the training


def test_the_adapter_merges_as_b_times_a(shop: Workshop, adapter: Path) -> None:
    pipeline = ZImagePipeline.from_pretrained(shop.model)
    attached = ZImagePipeline.from_pretrained(shop.model)
    attached.use_loras(attached.read_loras([(adapter, 1.0)]))
    lora = attached.read_loras([(adapter, 1.0)])[0][0].updates
    weights = pipeline.folder.weights["transformer"]
    TrainingAdapter(pipeline.transformer, lora, lambda name: to_mlx(weights[name], pipeline.dtype)).merge()
    x, caption = mx.random.normal((1, 16, 4, 6)), [pipeline.encode_prompt("a fox")]
    merged, branch = (p.transformer(x, mx.array([0.4]), caption) for p in (pipeline, attached))
    np.testing.assert_allclose(merged, branch, rtol=1e-3, atol=1e-4)


def test_training_turbo_without_the_adapter_is_warned_about_once(shop: Workshop, adapter: Path, tmp_path: Path) -> None:
    assert shop.train("turbo", steps=1).notices.count("this is Turbo") == 1
    assert "Turbo" not in shop.train("adapted", steps=1, training_adapter=adapter).notices
    base = tiny.write_model_folder(tmp_path / "base", scheduler=SchedulerConfig(shift=6.0))
    run = shop.train("base", steps=1, model_dir=base)
    assert "Turbo" not in run.notices and run.of(Done)


def test_memory_decides_what_is_kept_and_not_what_is_learned(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, forward = [], zimage_mlx.training.gradient.forward
    monkeypatch.setattr(zimage_mlx.training.gradient, "forward", lambda *args: kept.append(1) or forward(*args))
    monkeypatch.setattr(zimage_mlx.training.block_gradient, "_kept_again", lambda *args: pytest.fail("kept nothing"))
    fast = shop.train("fast", steps=2, memory="fast")
    assert len(kept) == 2 * 4  # two steps, four blocks
    monkeypatch.undo()
    lean = shop.train("lean", steps=2, memory="lean")
    assert lean.losses == pytest.approx(fast.losses, rel=1e-6)
    np.testing.assert_allclose(lean.vector("B"), fast.vector("B"), atol=1e-6)
    tight = shop.train("roomy", steps=1, memory="auto")
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: 0)
    forced = shop.train("nothing", steps=1, memory="auto", force=True)
    assert forced.losses == pytest.approx(tight.losses, rel=1e-6)


@pytest.mark.parametrize(
    ("memory", "way_out"), [("auto", "`resolution`, or"), ("fast", "`resolution`, `memory` lean, or")]
)
def test_a_run_that_does_not_fit_into_memory_is_refused(
    memory: str, way_out: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: 1000)
    monkeypatch.setattr(zimage_mlx.training.run, "EncodedDataset", lambda *args: pytest.fail("went on"))
    with pytest.raises(ConfigError, match=f"there are 0.0 GB: .*{way_out}.*`force`") as caught:
        shop.train("refused", steps=1, memory=memory)
    assert "\n" not in str(caught.value)
    assert not shop.config("refused").output.exists()
