"""Every option that diffusers has, live against its pipelines and schedulers: the same noise, the same picture.

Its noise comes from torch's generator and its latents of a picture are a random draw; both are replaced here, by the
noise of the request and by the mode of the draw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (extra `oracle`)")

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from diffusers.pipelines.z_image import pipeline_z_image_img2img, pipeline_z_image_inpaint
from PIL import Image
from support import official, tiny
from support.flows import curved
from support.networks import BACKENDS, pipeline
from support.parity import assert_parity

from zimage_ref.generation.samplers import SAMPLERS
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.flow import sigmas, starting_noise
from zimage_ref.model.spacings import SPACINGS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # the official packages warn about themselves
]

SIZE = (80, 48)
PROMPT, NEGATIVE = "a red fox in the snow", "soft waves"
NOISE = starting_noise(3, (16, SIZE[1] // 8, SIZE[0] // 8))[None]
IMAGE_PIPELINES = (pipeline_z_image_img2img, pipeline_z_image_inpaint)


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> Any:
    return official.pipeline(model_dir)


@pytest.fixture(params=BACKENDS, scope="module")
def ours(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    return pipeline(request.param, model_dir)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in IMAGE_PIPELINES:
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(NOISE))
        monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **kwargs: encoded.latent_dist.mode())


def make(pipe: Any, **options: Any) -> np.ndarray:
    """diffusers' picture, (H, W, 3)."""
    return pipe([PROMPT], width=SIZE[0], height=SIZE[1], output_type="np", **options).images[0]


def check(ours: Any, expected: np.ndarray, **options: Any) -> None:
    actual = ours(PROMPT, width=SIZE[0], height=SIZE[1], output="array", latents=NOISE, **options)[0]
    assert_parity(actual, expected, "official picture")


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_steps_and_shift(ours: Any, theirs: Any, shift: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
    expected = make(theirs, num_inference_steps=steps, guidance_scale=0.0, latents=torch.from_numpy(NOISE))
    check(ours, expected, steps=steps, shift=shift)


@pytest.mark.parametrize(
    ("normalization", "truncation"), [(0.0, 1.0), (1.0, 1.0), (0.6, 1.0), (0.0, 0.4), (1.0, 0.25), (0.0, 0.0)]
)
def test_guidance(ours: Any, theirs: Any, normalization: float, truncation: float) -> None:
    options: dict[str, Any] = {"cfg_normalization": normalization, "cfg_truncation": truncation}
    given = {"num_inference_steps": 5, "guidance_scale": 5.0, "negative_prompt": [NEGATIVE]}
    latents = {"latents": torch.from_numpy(NOISE)}
    expected = make(theirs, **given, **options, **latents)
    if options != {"cfg_normalization": 0.0, "cfg_truncation": 1.0}:
        plain = make(theirs, **given, **latents)
        assert np.abs(plain - expected).max() > 3 / 255  # the option does something
    check(ours, expected, steps=5, guidance=5.0, negative_prompt=NEGATIVE, **options)


def test_the_base_model_and_its_defaults(theirs: Any, model_dir: Path, tmp_path: Path) -> None:
    """As the model card calls it: 50 steps, guidance 4, shift 6."""
    base = tiny.write_model_folder(tmp_path / "base", scheduler=SchedulerConfig(shift=6.0))
    expected = make(
        official.pipeline(base), num_inference_steps=50, guidance_scale=4.0, negative_prompt=[NEGATIVE],
        latents=torch.from_numpy(NOISE),
    )  # fmt: skip
    check(pipeline("numpy", base), expected, negative_prompt=NEGATIVE)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize(("strength", "guidance"), [(1.0, 0.0), (0.6, 0.0), (0.5, 3.0), (0.2, 0.0)])
def test_image_to_image(ours: Any, theirs: Any, strength: float, guidance: float) -> None:
    pipe = ZImageImg2ImgPipeline(**theirs.components)
    pipe.set_progress_bar_config(disable=True)
    photo = tiny.photograph(*SIZE, seed=5)
    expected = make(
        pipe, image=photo, strength=strength, num_inference_steps=6, guidance_scale=guidance, negative_prompt=[NEGATIVE]
    )
    check(ours, expected, init_image=photo, strength=strength, steps=6, guidance=guidance, negative_prompt=NEGATIVE)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting(ours: Any, theirs: Any, strength: float) -> None:
    pipe = ZImageInpaintPipeline(**theirs.components)
    pipe.set_progress_bar_config(disable=True)
    photo, mask = tiny.photograph(*SIZE, seed=5), np.zeros(SIZE[::-1], np.uint8)
    mask[8:32, 24:64] = 255  # on the grid of latents, where both take the same cells
    expected = make(
        pipe, image=photo, mask_image=Image.fromarray(mask), strength=strength, num_inference_steps=6,
        guidance_scale=0.0,
    )  # fmt: skip
    white = mask[..., None] == 255
    pasted = np.where(white, expected, np.asarray(photo) / np.float32(255))  # diffusers leaves this to its caller
    assert np.abs(pasted - expected).max() > 3 / 255
    check(ours, pasted, init_image=photo, mask=Image.fromarray(mask), strength=strength, steps=6)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("res")])  # diffusers has no RES
def test_samplers_are_the_schedulers_of_that_name(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((1, 3, 4, 5))
    table = sigmas(7, SchedulerConfig(shift=3.0), 64)
    table = table[1:] if name == "unipc" else table  # diffusers' solves with infinity at sigma 1
    scheduler = official_scheduler(name, table)
    state = torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].item()  # of Heun, each but the first twice
        state = scheduler.step(torch.from_numpy(-curved(state.numpy(), sigma)), t, state, return_dict=False)[0]
    *_, (actual, _) = SAMPLERS[name](x, table, curved, lambda x, sigma: x)
    np.testing.assert_allclose(actual, state.numpy(), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_are_those_of_diffusers(spacing: str, steps: int) -> None:
    if spacing == "beta":
        pytest.importorskip("scipy", reason="diffusers takes beta quantiles from scipy")
    options = {} if spacing == "simple" else {f"use_{spacing}_sigmas": True}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    ours = sigmas(steps, SchedulerConfig(shift=3.0), 64, spacing=spacing)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=2e-6)


def official_scheduler(name: str, table: list[float]) -> Any:
    """diffusers' scheduler, made to step through the sigmas of `table`."""
    levels = torch.tensor(table)
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(len(table) - 1)
        scheduler.sigmas = levels
    elif name == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(len(table) - 1)
        scheduler.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    elif name == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2",
            lower_order_final=True, final_sigmas_type="zero",
        )  # fmt: skip
        scheduler.set_timesteps(len(table) - 1)
        scheduler.sigmas = levels
    else:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2,
            final_sigmas_type="zero", lower_order_final=False, euler_at_final=True,
        )  # fmt: skip
        scheduler.set_timesteps(len(table) - 1)
        scheduler.sigmas = levels
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    scheduler.set_begin_index(0)
    return scheduler
