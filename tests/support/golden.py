"""Remakes the golden files in tests/data, what the official code makes of small inputs.
Run `python -m support.golden` in tests/.

They hold inputs and outputs only; weights come from `tiny`, by name. The official networks run in float64. The
schedule is JSON, everything else npz. Needs the extra `oracle`.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from support import controls, official, tiny
from support.cases import (
    CASES,
    DATA,
    NEGATIVE,
    PICTURES,
    PROMPT,
    SEED,
    STEPS,
    Arrays,
    block_inputs,
    captions,
    image_batch,
    transformer_inputs,
)
from zimage_ref.model import parameters
from zimage_ref.model.control import controlnet_parameters
from zimage_ref.model.flow import starting_noise
from zimage_ref.model.tokenizer import Tokenizer


def make_transformers() -> None:
    """transformer_{config}.npz: every case and both kinds of block."""
    for seed, (name, config) in enumerate(tiny.TRANSFORMERS.items()):
        weights = tiny.random_weights(parameters.transformer_parameters(config))
        model = official.transformer(config, weights)
        arrays: Arrays = {}
        for case in CASES:
            inputs = transformer_inputs(config, case, seed)
            out = official.denoise(model, inputs["x"], inputs["t"], captions(inputs))
            arrays |= {f"{case}.{key}": array for key, array in (inputs | {"out": out}).items()}
        inputs = block_inputs(config, seed)
        for block in ("noise_refiner.0", "context_refiner.0"):
            arrays[f"block.{block}"] = official.block(model, block, **inputs)
        save(f"transformer_{name}", arrays | {f"block.{key}": array for key, array in inputs.items()})


def make_controlnets() -> None:
    """controlnet.npz: the transformer with a ControlNet of each variant, by variant."""
    weights = tiny.random_weights(parameters.transformer_parameters(controls.TRANSFORMER))
    model, arrays = official.transformer(controls.TRANSFORMER, weights), {}
    for name, config in controls.VARIANTS.items():
        own = official.controlnet(config, tiny.random_weights(controlnet_parameters(config)), model)
        inputs = controls.inputs(config, "padded", controls.SEED)
        arrays[name] = official.denoise_controlled(model, own, inputs, controls.SCALE).astype(np.float32)
    save("controlnet", arrays)


def make_text_encoders() -> None:
    """text_encoder_{config}.npz: a sequence and a single token."""
    for seed, (name, config) in enumerate(tiny.TEXT_ENCODERS.items()):
        model = official.text_encoder(config, tiny.random_weights(parameters.text_encoder_parameters(config)))
        arrays = {}
        for length in (13, 1):
            ids = np.random.RandomState(seed).randint(0, config.vocab_size, length).astype(np.int32)
            arrays |= {f"{length}.ids": ids, f"{length}.out": official.encode_tokens(model, ids)}
        save(f"text_encoder_{name}", arrays)


def make_vaes() -> None:
    """vae_{config}.npz: both ways."""
    for seed, (name, config) in enumerate(tiny.VAES.items()):
        model = official.vae(config, tiny.random_weights(parameters.vae_parameters(config)))
        image = image_batch(config, seed)
        latents = np.random.RandomState(seed).standard_normal((2, config.latent_channels, 3, 2)).astype(np.float32)
        arrays = {"image": image, "encoded": official.encode(model, image)}
        save(f"vae_{name}", arrays | {"latents": latents, "decoded": official.decode(model, latents)})


def make_sigmas() -> None:
    """sigmas.json: {shift: {steps: sigmas}}."""
    tables = {shift: {steps: official.sigmas(steps, shift) for steps in (4, 8, 20, 50)} for shift in (3, 6)}
    (DATA / "sigmas.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def make_pipeline() -> None:
    """pipeline.npz: prompt to latents and picture, without and with guidance."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = official.pipeline(tiny.write_model_folder(Path(folder)), torch.float64)
        noise = starting_noise(SEED, (tiny.VAE.latent_channels, 4, 6))[None]
        arrays = {"noise": noise, "ids": Tokenizer(Path(folder) / "tokenizer" / "tokenizer.json").encode(PROMPT)}
        for name, guidance in PICTURES.items():
            for output in ("latent", "np"):
                arrays[f"{name}.{output}"] = official.generate(pipe, PROMPT, noise, STEPS, output, guidance, NEGATIVE)
    save("pipeline", arrays)


def save(name: str, arrays: Arrays) -> None:
    """Writes tests/data/{name}.npz."""
    path = DATA / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers", "numpy")))
    make_transformers()
    make_controlnets()
    make_text_encoders()
    make_vaes()
    make_sigmas()
    make_pipeline()
