"""Tiny Z-Image: the recipe of the small model in `zimage_ref/tiny`, from drawings to a folder in the official layout.

    python -m zimage_mlx.tiny --output DIR

First the autoencoder learns to reproduce drawings; the mean and the deviation of its latents become shift_factor and
scaling_factor. Then text encoder and transformer learn together, by flow matching as in `zimage_ref.schedule`, and
moving averages of their weights are what is written. A run that finds an autoencoder in DIR keeps it, and one that
finds a denoiser goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zimage_ref.checkpoint import Checkpoint
from zimage_ref.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig, read_json
from zimage_ref.drawings import SHAPES, articles, describe, draw, made_up_word, scenes
from zimage_ref.model_folder import ModelFolder
from zimage_ref.names import text_encoder_parameters, text_encoder_unused
from zimage_ref.positions import SEQUENCE_MULTIPLE
from zimage_ref.schedule import add_noise, model_time, resolution_shift, shifted, training_target
from zimage_ref.tensors import Array
from zimage_ref.tiny_files import write_component, write_surroundings
from zimage_ref.tokenizer import Tokenizer

from .text_encoder import TextEncoder
from .transformer import Conditioning, Layout, Transformer
from .vae import VAE
from .weights import load, to_numpy

TRANSFORMER = TransformerConfig(
    dim=144, n_layers=5, n_refiner_layers=1, n_heads=3, in_channels=16, cap_feat_dim=96, patch_size=2, norm_eps=1e-5,
    rope_theta=256.0, t_scale=1000.0, axes_dims=(8, 20, 20), axes_lens=(640, 64, 64),
)  # fmt: skip
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=768, hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6, rope_theta=10_000.0,
)  # fmt: skip
VAE_CONFIG = VAEConfig(  # the factors are measured when the autoencoder is trained
    in_channels=3, latent_channels=16, block_out_channels=(24, 32, 56, 56), layers_per_block=1, norm_num_groups=8,
    scaling_factor=1.0, shift_factor=0.0,
)  # fmt: skip
SCHEDULER = SchedulerConfig(shift=3.0)

EMA = 0.999
KL = 2e-4  # against a reconstruction error that is a mean over pixels
EMPTY = 0.1  # of captions become "", so that guidance has something to guide away from
MADE_UP = 0.06  # of captions name a shape by a word that means nothing
BARE = 0.06  # of captions leave the background unsaid
TOKENS = SEQUENCE_MULTIPLE  # of every caption, filled up


@dataclass(frozen=True)
class Recipe:
    """How long everything takes."""

    pictures: int = 120_000
    vae_steps: int = 5_000
    vae_batch: int = 64
    vae_rate: float = 2e-3
    steps: int = 20_000
    batch: int = 512
    rate: float = 1.5e-3
    seed: int = 0


def make(output: Path, recipe: Recipe, report: Callable[[str], None]) -> ModelFolder:
    """Trains the whole model and writes it to `output`, telling `report` how it goes."""
    mx.random.seed(recipe.seed)
    pictures, captions = drawings(recipe, report)
    if not (output / "tokenizer").is_dir():
        write_surroundings(output, captions, TEXT_ENCODER.vocab_size, SCHEDULER)
    vae = finished_vae(output) or train_vae(pictures, recipe, report)
    write_component(output / "vae", vae.config, parameters(vae))
    latents = mx.concatenate([encode(vae, pictures[i : i + 250]) for i in range(0, len(pictures), 250)])
    mx.eval(latents)
    report(f"{len(latents)} latents, shift {vae.config.shift_factor}, scale {vae.config.scaling_factor}")
    ids, lengths = tokenized(Tokenizer(output / "tokenizer" / "tokenizer.json"), captions)
    denoiser = started_denoiser(output) or Denoiser()
    train_denoiser(denoiser, latents, mx.array(ids), mx.array(lengths), recipe, report, partial(write_denoiser, output))
    return ModelFolder.open(output)


def drawings(recipe: Recipe, report: Callable[[str], None]) -> tuple[Array, list[str]]:
    """Pictures (N, SIDE, SIDE, 3) uint8 and their captions, from a stream of scenes for each thousand."""
    seeds = range(-(-recipe.pictures // 1000))
    with get_context("spawn").Pool() as pool:
        parts = pool.map(partial(_thousand, recipe.seed), seeds)
    pictures = np.concatenate([p for p, _ in parts])[: recipe.pictures]
    captions = [c for _, part in parts for c in part][: recipe.pictures]
    report(f"{len(captions)} drawings, such as: {'; '.join(captions[:5])}")
    return pictures, captions


def _thousand(seed: int, part: int) -> tuple[Array, list[str]]:
    rng = np.random.default_rng((seed, part))
    chosen = [scene for scene, _ in zip(scenes(rng), range(1000), strict=False)]
    pictures = np.stack([np.asarray(draw(scene, rng)) for scene in chosen])
    captions = []
    for scene in chosen:
        if rng.uniform() < MADE_UP:
            words = scene.subject.split(" ")
            named = [i for i, word in enumerate(words) if word in SHAPES]
            if named:
                words[named[rng.integers(len(named))]] = made_up_word(rng)
            scene = replace(scene, subject=" ".join(words))
        captions.append(articles(scene.subject) if rng.uniform() < BARE else describe(scene, rng))
    return pictures, captions


def train_vae(pictures: Array, recipe: Recipe, report: Callable[[str], None]) -> VAE:
    """An autoencoder of `pictures` (N, H, W, 3) uint8, its factors set to the shift and scale of its latents."""
    vae = VAE(VAE_CONFIG)
    step = Stepper(vae, vae_loss, recipe.vae_rate, recipe.vae_steps)
    order = _batches(len(pictures), recipe.vae_batch, recipe.vae_steps, recipe.seed)
    for line in _counted(order, recipe.vae_steps, "autoencoder", lambda i: step(mx.array(pictures[i]))):
        report(line)
    step.finish()
    some = mx.concatenate([encode(vae, pictures[i : i + 250]) for i in range(0, min(len(pictures), 5000), 250)])
    shift, deviation = (float(np.array(f(some.astype(mx.float32)))) for f in (mx.mean, mx.std))
    vae.config = replace(vae.config, shift_factor=round(shift, 5), scaling_factor=round(1 / deviation, 5))
    return vae


def vae_loss(vae: VAE, pixels: mx.array) -> mx.array:
    """Reconstruction and divergence from the normal distribution, of pixels (B, H, W, 3) uint8."""
    x = to_signed(pixels)
    mean, log_variance = mx.split(vae.encoder(x), 2, axis=-1)
    log_variance = mx.clip(log_variance, -20, 10)
    z = mean + mx.exp(0.5 * log_variance) * mx.random.normal(mean.shape)
    error = vae.decoder(z) - x
    divergence = 0.5 * (mx.square(mean) + mx.exp(log_variance) - 1 - log_variance)
    return mx.mean(mx.abs(error)) + mx.mean(mx.square(error)) + KL * mx.mean(divergence)


def to_signed(pixels: mx.array) -> mx.array:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.astype(mx.float32) / 127.5 - 1


def encode(vae: VAE, pictures: Array) -> mx.array:
    """Latents (B, C, h, w) float16 of pictures (B, H, W, 3) uint8."""
    latents = vae.encode(to_signed(mx.array(pictures)).transpose(0, 3, 1, 2)).astype(mx.float16)
    mx.eval(latents)
    return latents


class Denoiser(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(TEXT_ENCODER)
        self.transformer = Transformer(TRANSFORMER)
        for token in ("x_pad_token", "cap_pad_token"):
            self.transformer[token] = 0.02 * mx.random.normal((1, TRANSFORMER.dim))


def train_denoiser(
    model: Denoiser,
    latents: mx.array,
    ids: mx.array,
    lengths: mx.array,
    recipe: Recipe,
    report: Callable[[str], None],
    write: Callable[[Denoiser], None],
) -> None:
    """Flow matching on latents (N, C, h, w) of captions ids (N, TOKENS), lengths (N,); the first caption is "".

    `write` gets the averaged model ten times on the way and at the end.
    """
    average = Denoiser()
    layout = model.transformer.layout([TOKENS], *latents.shape[2:])
    mx.eval(layout.image_rotation, layout.caption_rotation, layout.rotation)

    def loss(model: Denoiser, chosen: mx.array) -> mx.array:
        x_0 = latents[chosen].astype(mx.float32)
        named = mx.where(mx.random.uniform(shape=chosen.shape) < EMPTY, 0, chosen + 1)
        return denoising_loss(model, x_0, ids[named], lengths[named], layout)

    step = Stepper(model, loss, recipe.rate, recipe.steps, average)
    order = _batches(len(latents), recipe.batch, recipe.steps, recipe.seed + 1)
    lines = _counted(order, recipe.steps, "denoiser", lambda i: step(mx.array(i)))
    for i, line in enumerate(lines, start=1):
        report(line)
        if i % 10 == 0:
            step.finish()
            write(average)
    step.finish()
    write(average)


def denoising_loss(model: Denoiser, x_0: mx.array, ids: mx.array, lengths: mx.array, layout: Layout) -> mx.array:
    """The flow-matching loss of x_0 (B, C, h, w) with captions ids (B, TOKENS), each of its own length.

    `layout` is that of one caption: where tokens stand is the same for all captions of one padded length.
    """
    B, _, h, w = x_0.shape
    transformer = model.transformer
    tokens = transformer.embed_caption(model.text_encoder(ids))  # (B, TOKENS, D)
    tokens = mx.where((mx.arange(TOKENS) < lengths[:, None])[..., None], tokens, transformer.cap_pad_token)
    for block in transformer.context_refiner:
        tokens = block(tokens, layout.caption_rotation, None)
    noise = mx.random.normal(x_0.shape)
    shift = resolution_shift(h * w // TRANSFORMER.patch_size**2)
    sigma = shifted(mx.random.uniform(shape=(B,)), shift)
    x = add_noise(x_0, noise, sigma[:, None, None, None])
    raw = transformer.denoise(x, model_time(sigma), Conditioning(tokens, layout))
    return mx.mean(mx.square(raw - training_target(x_0, noise)))


class Stepper:
    """One AdamW step of `model` a call, under a warmed-up cosine rate; `average` follows its weights.

    All weights are one vector to the optimizer: a few large operations instead of thousands of small ones. Nothing is
    compiled: on CUDA the fused kernels of a whole step take minutes to build.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., mx.array], rate: float, steps: int, average: nn.Module | None = None
    ) -> None:
        warm = max(steps // 40, 1)
        schedule = optim.join_schedules(
            [optim.linear_schedule(1e-6, rate, warm), optim.cosine_decay(rate, steps - warm, rate / 100)], [warm]
        )
        self.optimizer = optim.AdamW(schedule, betas=[0.9, 0.99], weight_decay=1e-2, bias_correction=True)
        named: Any = tree_flatten(model.parameters())
        self.shapes = [(name, array.shape) for name, array in named]
        self.ends = np.cumsum([array.size for _, array in named])[:-1].tolist()
        self.weights = self.averages = mx.concatenate([array.flatten() for _, array in named])
        self.model, self.average, self.done = model, average, 0

        def loss_of(weights: mx.array, batch: mx.array) -> mx.array:
            self.place(weights, model)
            return loss(model, batch)

        self.value_and_gradient = mx.value_and_grad(loss_of)

    def __call__(self, batch: mx.array) -> mx.array:
        """The loss; it and the new weights are under way when this returns. See `finish`."""
        value, gradient = self.value_and_gradient(self.weights, batch)
        gradient = gradient * mx.minimum(1, 1 / mx.linalg.norm(gradient))
        self.weights = self.optimizer.apply_gradients({"": gradient}, {"": self.weights})[""]
        self.done += 1
        pace = 1 - min(EMA, (1 + self.done) / (10 + self.done))
        self.averages = self.averages + pace * (self.weights - self.averages)
        mx.async_eval(value, self.weights, self.averages, self.optimizer.state)
        return value

    def finish(self) -> None:
        """Puts the weights into the model, and their averages into the other."""
        self.place(self.weights, self.model)
        if self.average is not None:
            self.place(self.averages, self.average)

    def place(self, weights: mx.array, model: nn.Module) -> None:
        """Gives `model` the parameters that are the parts of a vector."""
        parts = zip(self.shapes, mx.split(weights, self.ends), strict=True)
        model.update(tree_unflatten([(name, part.reshape(shape)) for (name, shape), part in parts]))


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Array]:
    """Sorted indices of `steps` batches, every item once before any comes again."""
    rng, batch = np.random.default_rng(seed), min(batch, count)
    order = rng.permutation(count)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(count)
        yield np.sort(order[:batch])
        order = order[batch:]


def _counted(order: Iterator[Array], steps: int, what: str, work: Callable[[Array], mx.array]) -> Iterator[str]:
    """Works through `order` and says a hundred times how far it is."""
    began, every, losses = time.perf_counter(), max(steps // 100, 1), []
    for i, indices in enumerate(order, start=1):
        losses.append(work(indices))
        if i % every == 0:
            seconds = time.perf_counter() - began
            loss = mx.mean(mx.stack(losses)).item()
            yield f"{what} {i}/{steps}  loss {loss:.5f}  {seconds:.0f} s  {1000 * seconds / i:.1f} ms a step"
            losses = []


def tokenized(tokenizer: Tokenizer, captions: list[str]) -> tuple[Array, Array]:
    """Token ids (N + 1, TOKENS) int32 filled up with 0, and lengths (N + 1,), of "" and then the captions."""
    encoded = [tokenizer.encode(text) for text in ("", *captions)]
    lengths = np.array([len(e) for e in encoded], np.int32)
    ids = np.zeros((len(encoded), TOKENS), np.int32)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    return ids, lengths


def finished_vae(folder: Path) -> VAE | None:
    """The autoencoder of an earlier run into `folder`, or None."""
    file = folder / "vae" / "config.json"
    if not file.is_file():
        return None
    vae = VAE(VAEConfig.from_json(read_json(file), str(file)))
    load(vae, Checkpoint.open(folder / "vae").tensors, mx.float32)
    return vae


def started_denoiser(folder: Path) -> Denoiser | None:
    """Text encoder and transformer of an earlier run into `folder`, or None."""
    if not (folder / "transformer").is_dir():
        return None
    model, weights = Denoiser(), ModelFolder.open(folder).weights
    load(model.text_encoder, weights["text_encoder"], mx.float32)
    load(model.transformer, weights["transformer"], mx.float32)
    return model


def write_denoiser(folder: Path, model: Denoiser) -> None:
    """Text encoder and transformer; the encoder's last layer, which no picture depends on, as it would begin."""
    rng, shapes = np.random.default_rng(0), text_encoder_parameters(TEXT_ENCODER)
    unused = {
        name: np.ones(shapes[name], np.float32) if "norm" in name else 0.02 * rng.standard_normal(shapes[name])
        for name in sorted(text_encoder_unused(TEXT_ENCODER))
    }
    write_component(folder / "text_encoder", TEXT_ENCODER, parameters(model.text_encoder) | unused)
    write_component(folder / "transformer", TRANSFORMER, parameters(model.transformer))


def parameters(model: nn.Module) -> dict[str, Array]:
    """All weights of `model` as float32 arrays, in the layout of the checkpoint."""
    named: Any = tree_flatten(model.parameters())
    return {name: to_numpy(array) for name, array in named}


def main() -> None:
    """Trains the model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m zimage_mlx.tiny", description="Trains Tiny Z-Image from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    make(options.pop("output"), Recipe(**options), _say)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
