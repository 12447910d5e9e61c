"""LoRA training by flow matching.

    x_sigma = (1 - sigma) x_0 + sigma noise          loss = mean( (raw(x_sigma, 1 - sigma, caption) - (x_0 - noise))^2 )

Noise, sigma, loss, LoRA matrices and optimizer state are float32; the frozen base is in its own precision. All
randomness (order, noise, sigma, initial A) comes from one NumPy generator seeded by the config.
Source: train_dreambooth_lora_z_image.py of diffusers; conventions in `zimage_ref.schedule`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from zimage_ref.dataset import Example, read_dataset
from zimage_ref.errors import ConfigError
from zimage_ref.lora_file import write_lora
from zimage_ref.model_folder import ModelFolder
from zimage_ref.names import lora_modules
from zimage_ref.options import TrainConfig
from zimage_ref.schedule import add_noise, model_time, training_sigmas, training_target
from zimage_ref.tensors import Array

from . import lora
from .pipeline import ZImagePipeline
from .transformer import Transformer

BETAS = (0.9, 0.99)  # of AdamW; the second is lower than usual: runs are a few thousand steps


@dataclass(frozen=True)
class Encoded:
    """The latents and the caption of one example are ready."""

    done: int
    total: int


@dataclass(frozen=True)
class Step:
    """One optimizer step was made."""

    step: int  # from 1
    total: int
    epoch: int  # from 1
    loss: float
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A LoRA file was written; the last one is the result."""

    path: Path
    step: int


@dataclass(frozen=True)
class Latents:
    """What training needs of one example: its picture's latents and its caption's features."""

    x_0: mx.array  # (1, C, h, w) float32
    caption: mx.array  # (T, cap_feat_dim)


def train(config: TrainConfig) -> Iterator[Encoded | Step | Saved]:
    """Trains a LoRA and writes it, yielding an event for each thing done.

    The dataset and the model's headers are checked before any weights are read. The text encoder and the autoencoder
    are freed before the transformer is loaded. Raises DatasetError, ConfigError, FormatError or WeightError.
    """
    examples = read_dataset(config.dataset)
    pipeline = ZImagePipeline.from_pretrained(config.model_dir)
    layers = lora_modules(pipeline.folder.transformer, config.targets)
    _check_resolution(config, pipeline.folder)

    encoded: list[Latents] = []
    for example in examples:
        encoded.append(_encode(pipeline, example, config.resolution))
        yield Encoded(len(encoded), len(examples))
    pipeline.release("text_encoder", "vae")

    rng = np.random.default_rng(config.seed)
    model = pipeline.transformer
    lora.start(model, layers, config.rank, config.alpha, rng)
    update = _updater(model, config)
    total, step, save = config.epochs * len(encoded), 0, _saver(model, config)
    for epoch in range(1, config.epochs + 1):
        for index in rng.permutation(len(encoded)):
            began = time.perf_counter()
            loss = update(encoded[index], rng)
            step += 1
            yield Step(step, total, epoch, loss, time.perf_counter() - began)
            if config.save_every and step % config.save_every == 0 and step < total:
                yield save(config.output.with_suffix(f".step{step}.safetensors"), step)
    yield save(config.output, total)


def flow_matching_loss(
    model: Transformer, x_0: mx.array, noise: mx.array, sigma: mx.array, captions: list[mx.array]
) -> mx.array:
    """The loss, a float32 scalar, of pictures x_0 (B, C, h, w) with noise (B, C, h, w) at sigma (B,)."""
    x = add_noise(x_0, noise, sigma[:, None, None, None])
    raw = model(x, model_time(sigma), captions).astype(mx.float32)
    return mx.mean(mx.square(raw - training_target(x_0, noise)))


def _updater(model: Transformer, config: TrainConfig) -> Callable[[Latents, np.random.Generator], float]:
    """A function that makes one optimizer step on one example and returns its loss."""
    optimizer = optim.AdamW(config.lr, betas=list(BETAS), weight_decay=config.weight_decay, bias_correction=True)
    loss_and_gradients: Any = nn.value_and_grad(model, flow_matching_loss)

    def update(example: Latents, rng: np.random.Generator) -> float:
        noise = mx.array(rng.standard_normal(example.x_0.shape, dtype=np.float32))
        sigma = mx.array(training_sigmas(rng, 1, _image_tokens(model, example.x_0)))
        loss, gradients = loss_and_gradients(model, example.x_0, noise, sigma, [example.caption])
        optimizer.update(model, gradients)
        mx.eval(loss, model.trainable_parameters(), optimizer.state)
        return float(loss.item())

    return update


def _saver(model: Transformer, config: TrainConfig) -> Callable[[Path, int], Saved]:
    """A function that writes the LoRA as it is to a path."""

    def save(path: Path, step: int) -> Saved:
        record = {
            "base_model": config.model_dir.resolve().name,
            "rank": config.rank,
            "alpha": config.alpha,
            "target_attention": "attention" in config.targets,
            "target_feed_forward": "feed_forward" in config.targets,
            "target_refiners": "refiners" in config.targets,
            "steps": step,
            "resolution": config.resolution,
        }
        write_lora(path, lora.factors(model), record, config.lora_format)
        return Saved(path, step)

    return save


def _encode(pipeline: ZImagePipeline, example: Example, side: int) -> Latents:
    pixels: Array = example.pixels(side, side)
    x_0 = pipeline.vae.encode(mx.array(pixels)[None]).astype(mx.float32)
    caption = pipeline.encode_prompt(example.caption)
    mx.eval(x_0, caption)
    return Latents(x_0, caption)


def _image_tokens(model: Transformer, latents: mx.array) -> int:
    _, _, h, w = latents.shape
    return int(h * w // model.config.patch_size**2)


def _check_resolution(config: TrainConfig, folder: ModelFolder) -> None:
    if config.resolution % folder.size_multiple:
        raise ConfigError(
            f"--resolution {config.resolution} must be a multiple of {folder.size_multiple} for {folder.path}"
        )
