"""For benchmarks of whole runs: the folder of a model, pictures to train on, and the peak of MLX's memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from zimage_ref.checkpoints.hub import BUILT_IN
from zimage_ref.model import config, parameters

CAPTION = "a big red star left of a small blue ring on a yellow background " * 3


def write_model(
    folder: Path,
    transformer: config.TransformerConfig,
    text_encoder: config.TextEncoderConfig,
    write: Callable[[str, Path, parameters.Shapes], None],
) -> None:
    """A model in the official layout, with the tokenizer of the built-in one and the official autoencoder.

    write: is called with each network's name, the file of its weights, and the shapes of its parameters.
    """
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(BUILT_IN / part, folder / part)
    shutil.copy(BUILT_IN / "model_index.json", folder)
    for part, stem, network, shapes in (
        ("transformer", "diffusion_pytorch_model", transformer, parameters.transformer_parameters(transformer)),
        ("text_encoder", "model", text_encoder, parameters.text_encoder_parameters(text_encoder)),
        ("vae", "diffusion_pytorch_model", config.OFFICIAL_VAE, parameters.vae_parameters(config.OFFICIAL_VAE)),
    ):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(network.to_json()))
        write(part, folder / part / f"{stem}.safetensors", shapes)


def write_pictures(folder: Path, side: int) -> Path:
    """Four pictures of noise and their captions."""
    folder.mkdir(exist_ok=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTION)
    return folder


def follow_peak() -> Callable[[], int]:
    """Follows the peak of MLX's memory from now on. Returns a function that gives it in bytes.

    Training resets MLX's own count when it comes to the steps; the peak before that counts, too.
    """
    peaks, reset = list[int](), mx.reset_peak_memory

    def remember() -> None:
        peaks.append(mx.get_peak_memory())
        reset()

    mx.reset_peak_memory = remember
    return lambda: max([*peaks, mx.get_peak_memory()])
