"""What every option costs: the estimates of memory and time that people see change with it, on the published model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import pipeline

from zimage_ref import GenerateConfig, GenerationRun, RunSettings, ZImagePipeline
from zimage_ref.checkpoints.registry import model_parts
from zimage_ref.doctor.prediction import official_model
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.generation import run as run_module
from zimage_ref.memory import LEAN, Stage


@dataclass(frozen=True)
class Estimate:
    """What the panel of `zimage generate` says."""

    stages: dict[str, Stage]  # by name
    seconds: float
    words: str

    @property
    def denoise(self) -> int:
        """The bytes while the transformer computes."""
        return self.stages["denoise"].total


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> Any:
    """Gives the estimate of a picture of 1024 x 1024 with these options, for a machine on which a pass takes 1 s."""
    component = model_parts()["text_encoder"]
    last = component.unused(component.official)
    shapes = component.parameters(component.official)
    spare = {name: Tensor(shapes[name], BFLOAT16, lambda: np.empty(0)) for name in last}
    folder = replace(
        official_model(), tokenizer=pipeline("numpy", model_dir).folder.tokenizer, spare={"text_encoder": spare}
    )
    pipe = ZImagePipeline(folder)
    pipe.precision = "bfloat16"
    monkeypatch.setattr(ZImagePipeline, "footprint", classmethod(lambda cls, mode: LEAN))
    monkeypatch.setattr(ZImagePipeline, "measured_seconds", lambda self, mode, pixels, passes: passes * pixels / 2**20)
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: None)
    monkeypatch.setattr(run_module, "read_tiny_decoder", lambda path, folder: {})

    def estimate(settings: dict[str, Any] | None = None, count: int = 1, **options: Any) -> Estimate:
        config = GenerateConfig("a fox", **{"width": 1024, "height": 1024, "guidance": 0.0, "steps": 30} | options)
        run = GenerationRun(pipe, RunSettings(**settings or {}))
        requests = run.plan([config] * count)
        stages, seconds = run._memory(requests, "lean"), run.seconds(requests[0], "lean")
        assert seconds is not None
        words = run.memory(requests).reason
        return Estimate({stage.name: stage for stage in stages}, seconds, words)

    return estimate


HALVES = ("0,0,0.5,1: a fox", "0.5,0,0.5,1: a hare")
# An option -> more memory to denoise, in GB, and the time over that of the plain picture
COSTS: dict[str, tuple[dict[str, Any], tuple[float, float], tuple[float, float]]] = {
    "guidance": ({"guidance": 4.0}, (0.6, 0.8), (2, 2)),
    "NAG": ({"nag": 3.0, "negative_prompt": "red"}, (0.1, 0.25), (1.15, 1.4)),
    "NAG that is off": ({"nag": 1.0, "negative_prompt": "red"}, (0, 0), (1, 1)),
    "regions": ({"region": HALVES}, (0.05, 0.3), (1.05, 1.4)),
    "first-block": ({"cache": "first-block"}, (0.06, 0.1), (1, 1)),
    "taylor": ({"cache": "taylor:4"}, (0.06, 0.1), (0.3, 0.36)),
    "mag": ({"cache": "mag"}, (0.03, 0.05), (1, 1)),
    "a cache that does not act": ({"cache": "taylor", "cache_min_steps": 40}, (0, 0), (1, 1)),
    "two predictions a step": ({"sampler": "heun"}, (0, 0), (59 / 30, 59 / 30)),
    "upscale": ({"upscale": 2.0}, (0.03, 0.1), (3, 8)),
    "variety": ({"variety": 0.5}, (0, 0), (1, 1)),
    "spacing": ({"spacing": "beta"}, (0, 0), (1, 1)),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_estimates_follow_the_options_of_a_picture(name: str, estimated: Any) -> None:
    options, memory, time = COSTS[name]
    plain, asked = estimated(), estimated(**options)
    assert memory[0] - 1e-9 <= (asked.denoise - plain.denoise) / 1e9 <= memory[1], (asked.denoise - plain.denoise) / 1e9
    assert time[0] - 1e-9 <= asked.seconds / plain.seconds <= time[1], asked.seconds / plain.seconds


def test_the_estimates_follow_the_settings_of_a_run(estimated: Any) -> None:
    plain = estimated()
    two = estimated({"batch_size": 2}, count=2)
    assert 0.6e9 < two.denoise - plain.denoise < 0.8e9
    previews, tiny = estimated({"preview_steps": 2}), estimated({"preview_steps": 2, "preview_decoder": Path("t")})
    vae = 2 * 83_819_683
    assert vae <= previews.denoise - plain.denoise < vae + 0.5e9, "the autoencoder comes beside the transformer"
    assert tiny.denoise - plain.denoise == 1024**2 * 64 * 16
    assert previews.seconds == tiny.seconds == plain.seconds


def test_writing_a_prompt_is_a_stage_of_its_own(estimated: Any) -> None:
    plain, written = estimated(), estimated({"enhance": True})
    assert "write a prompt" in written.stages and "write a prompt" not in plain.stages
    stage, encode = written.stages["write a prompt"], plain.stages["encode"]
    assert 0.3e9 < stage.total - encode.total < 0.6e9, "the last layer, and what is remembered of 1024 tokens"


def test_the_words_of_the_panel_change(estimated: Any) -> None:
    words = {estimated(**COSTS[name][0]).words for name in ("NAG that is off", "guidance", "NAG")}
    assert len(words) == 3 and "lean" not in "".join(words) and all("GB" in text for text in words), words
