"""Live against torch, diffusers, transformers and peft, on fresh random weights: what golden files show, once more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (extra `oracle`)")

import torch
from support import cases, official, tiny
from support.networks import BACKENDS, PARAMETERS, native, network, pipeline
from support.parity import assert_parity
from transformers import AutoTokenizer

from zimage_ref.lora.file import write_lora
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.flow import sigmas, starting_noise
from zimage_ref.model.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # the official packages warn about themselves
]

SEED = int(os.environ.get("ZIMAGE_ORACLE_SEED", "1"))  # of weights and inputs, none of them in a golden file
KINDS = {"numpy": ("float64", "golden"), "mlx": ("float32", "golden")}
PROMPTS = ["a red fox in the snow", "", "waves, " * 60, "x " * 600, "狐 <|im_end|> ünïcode\n two lines"]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def fresh(component: str, config: Any) -> dict[str, np.ndarray]:
    return tiny.random_weights(PARAMETERS[component](config), salt=f"{component} {SEED} ")


@every_backend
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_transformer(name: str, case: str, backend: str) -> None:
    config, (dtype, kind) = tiny.TRANSFORMERS[name], KINDS[backend]
    weights, inputs = fresh("transformer", config), cases.transformer_inputs(config, case, SEED)
    expected = official.denoise(official.transformer(config, weights), inputs["x"], inputs["t"], cases.captions(inputs))
    model = network(backend, "transformer", config, weights, dtype)
    captions = [native(backend, caption) for caption in cases.captions(inputs)]
    actual = model(native(backend, inputs["x"]), native(backend, inputs["t"]), captions)
    assert_parity(actual, expected, kind, dtype)


@every_backend
@pytest.mark.parametrize("name", tiny.TEXT_ENCODERS)
def test_text_encoder(name: str, backend: str) -> None:
    config, (dtype, kind) = tiny.TEXT_ENCODERS[name], KINDS[backend]
    weights = fresh("text_encoder", config)
    ids = np.random.RandomState(SEED).randint(0, config.vocab_size, 21).astype(np.int32)
    expected = official.encode_tokens(official.text_encoder(config, weights), ids)
    assert_parity(network(backend, "text_encoder", config, weights, dtype)(native(backend, ids)), expected, kind, dtype)


@every_backend
@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("name", tiny.VAES)
def test_vae(name: str, way: str, backend: str) -> None:
    config, (dtype, kind) = tiny.VAES[name], KINDS[backend]
    weights = fresh("vae", config)
    latents = np.random.RandomState(SEED).standard_normal((2, config.latent_channels, 5, 3)).astype(np.float32)
    given = cases.image_batch(config, SEED) if way == "encode" else latents
    expected = getattr(official, way)(official.vae(config, weights), given)
    model = network(backend, "vae", config, weights, dtype)
    assert_parity(getattr(model, way)(native(backend, given)), expected, kind, dtype)


def test_sigmas_of_any_number_of_steps() -> None:
    for steps in (1, 2, 3, 7, 9, 33, 100):
        for shift in (1.0, 3.0, 6.0):
            ours = sigmas(steps, SchedulerConfig(shift=shift), image_tokens=1024)
            np.testing.assert_allclose(ours, official.sigmas(steps, shift), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: repr(p[:12]))
def test_token_ids(model_dir: Path, prompt: str) -> None:
    theirs = AutoTokenizer.from_pretrained(model_dir / "tokenizer")
    messages = [{"role": "user", "content": prompt}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    expected = theirs([text], max_length=512, truncation=True).input_ids[0]
    assert Tokenizer(model_dir / "tokenizer" / "tokenizer.json").encode(prompt).tolist() == expected


@every_backend
@pytest.mark.parametrize("prompt", PROMPTS[:4], ids=lambda p: repr(p[:12]))
def test_encoded_prompts(model_dir: Path, backend: str, prompt: str) -> None:
    expected = official.pipeline(model_dir)._encode_prompt([prompt])[0].detach().numpy()
    assert_parity(pipeline(backend, model_dir).encode_prompt(prompt), expected, "golden")


@every_backend
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_pictures(model_dir: Path, tmp_path: Path, guidance: float, lora: bool, backend: str) -> None:
    """From the same folder, the same starting noise and the same LoRA file, every adapter of which is attached."""
    theirs, prompt, negative = official.pipeline(model_dir), "a red fox in the snow", "soft waves"
    noise = starting_noise(SEED, (16, 6, 10))[None]
    plain = official.generate(theirs, prompt, noise, 4, "np", guidance, negative)
    loras = []
    if lora:
        loras = [(tmp_path / "fox.safetensors", 1.0)]
        write_lora(loras[0][0], cases.random_lora(rank=4, seed=SEED), {"rank": 4, "alpha": 4.0})
        theirs.load_lora_weights(tmp_path, weight_name="fox.safetensors")
        attached = [name for name, module in theirs.transformer.named_modules() if hasattr(module, "lora_A")]
        assert sorted(attached) == sorted(cases.LAYERS)
    expected = official.generate(theirs, prompt, noise, 4, "np", guidance, negative)
    assert lora == bool(np.abs(expected - plain).max() > 0.05)

    ours = pipeline(backend, model_dir)
    options: dict[str, Any] = {"guidance": guidance, "negative_prompt": negative, "latents": noise, "loras": loras}
    actual = ours(prompt, width=80, height=48, steps=4, output="array", **options)[0]
    assert_parity(actual, expected, "official picture")


@every_backend
def test_a_batch_of_pictures(model_dir: Path, backend: str) -> None:
    prompts = ["waves", "a picture of soft waves and a red fox in the snow, " * 3]
    noise = np.stack([starting_noise(seed, (16, 4, 6)) for seed in (0, 1)])
    theirs = official.pipeline(model_dir)
    expected = theirs(
        list(prompts), height=32, width=48, num_inference_steps=3, guidance_scale=0.0,
        latents=torch.from_numpy(noise), output_type="np",
    ).images  # fmt: skip
    actual = pipeline(backend, model_dir)(prompts, width=48, height=32, steps=3, seed=0, output="array")
    assert_parity(np.stack(actual), expected, "official picture")
