"""Training on weights that are read while it computes: the LoRA of the mode lean, byte for byte."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.training_runs import EVERYTHING, Run, Workshop, after, workshop

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.lora.file import write_lora
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.memory import Stage
from zimage_ref.training.events import Step
from zimage_ref.training.plan import TrainPlan

pytest.importorskip("mlx.core")
import mlx.core as mx

import zimage_mlx
from zimage_mlx import ZImagePipeline
from zimage_mlx.networks.streaming import Stream


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("streaming"))


@pytest.fixture(scope="module")
def adapter(shop: Workshop) -> Path:
    rng, factors = np.random.default_rng(4), {}
    for layer in ("layers.0.attention.to_q", "layers.1.attention.to_out.0"):
        A, B = rng.standard_normal((2, 3, 96)).astype(np.float32)
        factors[layer] = LowRank(A / 8, B.T / 3)
    write_lora(shop.folder / "adapter.safetensors", factors, {})
    return shop.folder / "adapter.safetensors"


def both(shop: Workshop, name: str, **options: Any) -> tuple[Run, Run]:
    """The same run in the modes lean and stream, each with a cache of its own."""
    runs = [shop.train(f"{name}-{m}", memory=m, cache=shop.folder / m, **options) for m in ("lean", "stream")]
    return runs[0], runs[1]


def same(lean: Run, streamed: Run) -> None:
    assert streamed.losses == lean.losses
    assert streamed.output.read_bytes() == lean.output.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        pytest.param({"base_precision": "4", "steps": 3}, marks=pytest.mark.slow),
        pytest.param({"base_precision": "bf16", "targets": ("all",), "steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_lora_is_that_of_weights_in_memory(options: dict[str, Any], shop: Workshop) -> None:
    lean, streamed = both(shop, str(options.get("base_precision")), **options)
    same(lean, streamed)
    assert [e.losses for e in streamed.of(zimage_mlx.Validated)] == [e.losses for e in lean.of(zimage_mlx.Validated)]


@pytest.mark.parametrize("precision", daily(["f32", "8"], "8"))
def test_the_adapter_and_previews_are_the_same_too(precision: str, shop: Workshop, adapter: Path) -> None:
    options = {"steps": 3, "preview_prompt": "a fox", "preview_steps": 2, "preview_every": 2}
    lean, streamed = both(shop, f"adapted{precision}", base_precision=precision, training_adapter=adapter, **options)
    same(lean, streamed)
    pairs = list(zip(lean.of(zimage_mlx.Previewed), streamed.of(zimage_mlx.Previewed), strict=True))
    assert len(pairs) == 3 and all(a.path.read_bytes() == b.path.read_bytes() for a, b in pairs)


@pytest.mark.parametrize("modes", [("lean", "stream"), pytest.param(("stream", "lean"), marks=pytest.mark.slow)])
def test_a_run_is_resumed_in_the_other_mode(modes: tuple[str, str], shop: Workshop) -> None:
    whole = shop.train(f"whole-{modes[0]}", steps=4, memory="lean")
    name = f"resumed-{modes[0]}"
    shop.train(name, after(2), steps=4, memory=modes[0])
    resumed = shop.train(name, steps=4, memory=modes[1], resume=True)
    assert resumed.output.read_bytes() == whole.output.read_bytes()


def test_auto_streams_if_nothing_else_fits(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    own, needs = Stream._begin, {"fast": 100, "lean": 50, "stream": 20}
    monkeypatch.setattr(Stream, "_begin", lambda self, block: seen.append(block) or own(self, block))
    monkeypatch.setattr(TrainPlan, "memory", lambda self, dtype, bits, mode, *more: [Stage("train", needs[mode], 0)])
    losses = {}
    for limit in (100, 99, 50, 49, 20):
        monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self, limit=limit: limit)
        losses[limit] = shop.train(f"auto{limit}", steps=1).losses
        assert bool(seen) == (limit < 50)
    assert losses[20] == losses[49] == pytest.approx(losses[100], rel=1e-6)
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: 19)
    with pytest.raises(ConfigError, match="`force` tries it anyway"):
        shop.train("nothing", steps=1)


def test_a_file_that_is_cut_ends_the_run_in_one_line_and_leaves_no_lora(shop: Workshop, tmp_path: Path) -> None:
    model = shutil.copytree(shop.model, tmp_path / "model")
    config = shop.config("cut", model_dir=model, steps=3, memory="stream")
    with pytest.raises(FormatError, match="has become shorter since it was opened") as caught:
        for event in zimage_mlx.train(config):
            if isinstance(event, Step):
                os.truncate(model / "transformer" / "diffusion_pytorch_model.safetensors", 5000)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {}
    for blocks in (8, 32):
        monkeypatch.setattr(tiny, "TRANSFORMER", replace(tiny.TRANSFORMER, n_layers=blocks))
        many = workshop(tmp_path / str(blocks))
        weights = many.model / "transformer" / "diffusion_pytorch_model.safetensors"
        options = {"steps": 2, "rank": 1, "targets": ("attention",), "memory": "stream"}
        peaks[blocks] = max(step.peak_memory for step in many.train("x", **options).steps)
        each = weights.stat().st_size // (blocks + 2)
        mx.clear_cache()
    assert peaks[32] - peaks[8] < 24 * each / 2  # inputs of blocks and the LoRA, but no weights
