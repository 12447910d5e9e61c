"""diffusers loads the LoRA files written here, attaches every adapter and makes the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import lora_makers, tiny
from support.tiny_loras import FACTORS, LAYERS

import zimage_ref
from zimage_ref.lora.file import write_lora
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.model.flow import starting_noise

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
diffusers = pytest.importorskip("diffusers", reason="needs the extra `oracle`")
pytest.importorskip("peft", reason="needs the extra `oracle`")

PROMPT, WIDTH, HEIGHT, STEPS, SEED = "a red fox", 32, 48, 2, 5
CLOSE = 2 / 255


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("oracle") / "model")


@pytest.fixture(scope="module")
def official(model: Path) -> Any:
    pipe = diffusers.ZImagePipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def official_picture(pipe: Any) -> np.ndarray:
    noise = starting_noise(SEED, (tiny.VAE.latent_channels, HEIGHT // 8, WIDTH // 8))
    made = pipe(
        prompt=PROMPT, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=0.0,
        latents=torch.from_numpy(noise[None]), output_type="np",
    )  # fmt: skip
    return np.asarray(made.images[0])


def our_picture(model: Path, *loras: object) -> np.ndarray:
    pipe = zimage_ref.ZImagePipeline.from_pretrained(model)
    return pipe(PROMPT, width=WIDTH, height=HEIGHT, steps=STEPS, seed=SEED, loras=loras, output="array")[0]


def mixed_lora() -> dict[str, LowRank]:
    """Ranks and scales that differ from layer to layer."""
    lora = {}
    for i, (layer, (A, B)) in enumerate(lora_makers.factors(LAYERS, 6).items()):
        rank = 3 + i % 4
        lora[layer] = LowRank(A[:rank], B[:, :rank], scale=0.5 if i % 3 else 1.25)
    return lora


@pytest.mark.parametrize("naming", ["comfy", "peft", "kohya", "musubi"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_diffusers_makes_our_picture_with_our_file(
    naming: str, dtype: str, model: Path, official: Any, tmp_path: Path
) -> None:
    lora, path = mixed_lora(), tmp_path / "lora.safetensors"
    write_lora(path, dict(lora), {"base_model": "tiny"}, naming, dtype)
    plain = official_picture(official)
    official.load_lora_weights(path)
    try:
        attached = {name: module for name, module in official.transformer.named_modules() if hasattr(module, "lora_A")}
        assert attached.keys() == lora.keys()
        picture = official_picture(official)
    finally:
        official.unload_lora_weights()
    assert np.abs(picture - plain).max() > 0.1
    assert np.abs(picture - our_picture(model, path)).max() < CLOSE


@pytest.mark.parametrize("name", ["comfy", "diffusers", "kohya", "kohya_fused", "diffsynth"])
def test_the_makers_files_mean_to_diffusers_what_they_mean_here(
    name: str, model: Path, official: Any, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    lora_makers.MAKERS[name](path, FACTORS, 3.0, {})
    official.load_lora_weights(path)
    try:
        picture = official_picture(official)
    finally:
        official.unload_lora_weights()
    assert np.abs(picture - our_picture(model, path)).max() < CLOSE
