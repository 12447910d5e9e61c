"""Pictures that start from a picture: which noise levels they take, and what stays outside a mask at each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.networks import BACKENDS, pipeline

from zimage_ref import GenerateConfig, ModelFolder
from zimage_ref.generation.config import by_model
from zimage_ref.generation.denoising import denoised
from zimage_ref.generation.jobs import plan_requests
from zimage_ref.generation.starts import Start
from zimage_ref.model.config import SchedulerConfig


def test_a_shift_that_is_given_counts_on_a_model_with_a_dynamic_one(tmp_path: Path) -> None:
    scheduler = SchedulerConfig(shift=3.0, use_dynamic_shifting=True)
    folder = ModelFolder.open(tiny.write_model_folder(tmp_path / "m", scheduler=scheduler))
    size: dict[str, Any] = {"steps": 4, "width": 256, "height": 256}
    given, left = plan_requests([GenerateConfig("x", shift=1.0, **size), GenerateConfig("x", **size)], folder)
    assert given.sigmas == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert left.sigmas[2] == pytest.approx(np.exp(0.5) / (np.exp(0.5) + 1), abs=1e-6)  # 256 tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_the_mask_the_latents_have_the_noise_of_their_step(backend: str, model_dir: Path) -> None:
    pipe, photo = pipeline(backend, model_dir), tiny.photograph(48, 32, 1)
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 255
    config = GenerateConfig("a fox", init_image=photo, mask=Image.fromarray(mask), strength=0.75, steps=4, seed=2)
    (request,) = plan_requests([config], pipe.folder)
    assert len(request.sigmas) == 4
    x_0, noise = np.random.default_rng(0).standard_normal(request.shape).astype(np.float32), request.noise
    captions = {text: pipe.encode_prompt(text) for text in ("a fox", "")}
    seen = 0
    for step in denoised(pipe, [request], captions, Start(pipe.to_backend(x_0[None]), None)):
        x, expected = np.array(step.x)[0], (1 - step.sigma) * x_0 + step.sigma * noise
        np.testing.assert_allclose(x[:, :, :3], expected[:, :, :3], rtol=0, atol=1e-5)
        assert np.abs(x - expected)[:, :, 3:].max() > 0.01
        seen += 1
    assert seen == 3 and step.sigma == 0


def test_help_gives_the_defaults_of_the_right_model() -> None:
    assert by_model("steps") == "8 for Turbo, 50 for the base model"
    assert by_model("guidance") == "0 for Turbo, 4 for the base model"
