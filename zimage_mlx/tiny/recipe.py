"""Tiny Z-Image: the recipe of the small model in `zimage_ref/tiny`, from drawings to a folder in the official layout.

    python -m zimage_mlx.tiny --output DIR

First the autoencoder learns to reproduce drawings; its latents are evened out, their mean and deviation become
shift_factor and scaling_factor (`tiny_latents`). Then text encoder and transformer learn together, by flow matching as
in `zimage_ref.schedule`. Moving averages of the weights are what is written. On an H100 this took 20 minutes: a step of
the autoencoder 91 ms, one of the others 33 ms. The first time, building their kernels takes 4 minutes more.
With --seconds a run stops before the end, keeps its state beside DIR and goes on when the same command is given again.
Progress is a line of JSON now and then.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from zimage_mlx.networks.vae import VAE
from zimage_mlx.networks.weights import load, to_numpy
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.errors import ConfigError, ZImageError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_ref.model.parameters import text_encoder_parameters, text_encoder_unused
from zimage_ref.model.tokenizer import Tokenizer
from zimage_ref.options import option
from zimage_ref.pictures.images import Picture, to_array, to_picture, to_unit
from zimage_ref.tiny.data import GUIDANCE, STEPS, TOKENS, drawings, tokenized
from zimage_ref.tiny.drawings import SIDE, illustrated, take
from zimage_ref.tiny.files import write_card, write_component, write_surroundings
from zimage_ref.tiny.judge import share_shown

from .latents import finish, in_batches
from .losses import Denoiser, denoising_loss, to_signed, vae_loss
from .stepper import Stepper


@dataclass(frozen=True)
class Networks:
    """How large everything is. The factors of the autoencoder are measured when it is trained."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig


NETWORKS = Networks(
    TransformerConfig(
        dim=144, n_layers=5, n_refiner_layers=1, n_heads=3, in_channels=16, cap_feat_dim=96, patch_size=2,
        norm_eps=1e-5, rope_theta=256.0, t_scale=1000.0, axes_dims=(8, 20, 20), axes_lens=(640, 64, 64),
    ),
    TextEncoderConfig(
        vocab_size=768, hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6, rope_theta=10_000.0,
    ),
    VAEConfig(
        in_channels=3, latent_channels=16, block_out_channels=(24, 32, 56, 56), layers_per_block=1,
        norm_num_groups=8, scaling_factor=1.0, shift_factor=0.0,
    ),
)  # fmt: skip
# Not distilled, so a base model, whose shift is 6; at 128 x 128 the shift by resolution, 1.6, leaves steps for outlines
SCHEDULER = SchedulerConfig(shift=6.0, use_dynamic_shifting=True)

CROP = SIDE // 2  # of a drawing: a quarter of the work, and most of what is left out is plain background
WHOLE = 0.1  # of the autoencoder's steps, the last ones, see whole pictures
EMPTY = 0.1  # of captions become "", so that guidance has something to guide away from

Report = Callable[[dict[str, Any]], None]
Shares = dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """How long everything takes."""

    pictures: int = option(120_000, "drawings to learn from")
    vae_steps: int = option(4_000, "steps of the autoencoder")
    vae_batch: int = option(64, "drawings in a batch of them")
    vae_rate: float = option(2e-3, "their highest learning rate")
    steps: int = option(23_000, "steps of text encoder and transformer")
    batch: int = option(512, "drawings in a batch of them")
    rate: float = option(1.5e-3, "their highest learning rate")
    seed: int = option(0, "seed of drawings, weights, order and noise")


@dataclass(frozen=True)
class Pace:
    """When to report, how many pictures to judge then, and when to stop."""

    every: int = 1000
    judged: int = 40
    deadline: float = math.inf  # of time.monotonic()
    compiled: bool | None = None  # of text encoder and transformer, as in `Stepper`, and the next too
    dtype: mx.Dtype | None = None


def make(output: Path, recipe: Recipe, report: Report, pace: Pace = Pace(), networks: Networks = NETWORKS) -> bool:
    """Trains the whole model and writes it to `output`; whether it is finished, or was stopped by the deadline.

    What it needs to go on lies in a folder beside `output`, by its name and ".training".
    """
    state = output.with_name(output.name + ".training")
    pictures, captions = drawings(recipe.pictures, recipe.seed)
    report({"stage": "drawings", "drawings": len(captions), "such as": captions[:3]})
    if not (output / "tokenizer" / "tokenizer_config.json").is_file():  # the last of them to be written
        write_surroundings(output, captions, networks.text_encoder.vocab_size, SCHEDULER)
    if not (output / "vae" / "config.json").is_file():
        trained = train_vae(pictures, recipe, report, pace, networks.vae, state / "autoencoder")
        if not trained:
            return False
        write_component(output, "vae", trained.config, parameters(trained))
        shutil.rmtree(state / "autoencoder")
    vae = read_vae(output)  # as it is written: what the denoiser learns is what users decode
    latents = mx.concatenate([encode(vae, batch) for batch in in_batches(pictures)])
    texts = tokenized(Tokenizer(output / "tokenizer" / "tokenizer.json"), captions)
    return train_denoiser(latents, texts, recipe, report, pace, networks, output, state / "denoiser")


def train_vae(
    pictures: Array, recipe: Recipe, report: Report, pace: Pace, config: VAEConfig, state: Path
) -> VAE | None:
    """An autoencoder of `pictures` (N, H, W, 3) uint8, its factors set to the shift and scale of its latents.

    None if the deadline came first; `state` is what to go on from.
    """
    mx.random.seed(recipe.seed)
    vae = VAE(config)
    made = json.dumps(
        asdict(config) | {name: getattr(recipe, name) for name in ("pictures", "vae_batch", "vae_rate", "seed")}
    )
    # Kernels one by one: those of a whole compiled step were still being built after a minute and a half, and there are
    # few steps. float32, as the shipped one was made; bfloat16 is a tenth faster
    stepper = Stepper(vae, vae_loss, recipe.vae_rate, recipe.vae_steps, made, compiled=False, dtype=mx.float32)

    def inputs(rng: np.random.Generator) -> Sequence[mx.array]:
        chosen = pictures[np.sort(rng.integers(len(pictures), size=recipe.vae_batch))]
        if stepper.done < (1 - WHOLE) * recipe.vae_steps:
            top, left = rng.integers(SIDE - CROP + 1, size=2)
            chosen = chosen[:, top : top + CROP, left : left + CROP]
        return [mx.array(chosen)]

    def judge() -> Shares:
        return judge_vae(cast(VAE, stepper.averaged()), pace.judged)

    if not run(stepper, inputs, judge, report, pace, recipe.seed, state, "autoencoder"):
        return None
    stepper.averaged()
    finish(vae, pictures[:5000])
    return vae


def run(
    stepper: Stepper, inputs: Callable[[np.random.Generator], Sequence[mx.array]], judge: Callable[[], Shares],
    report: Report, pace: Pace, seed: int, state: Path, stage: str,
) -> bool:  # fmt: skip
    """Makes the steps that are left, from `state` on if it is there; whether the last one was reached.

    The batches and the noise of a step depend on the seed and its number alone, so that a stop changes nothing.
    """
    if state.is_dir():
        stepper.restore(state)
    losses, since = [], time.monotonic()
    while stepper.done < stepper.steps and time.monotonic() < pace.deadline:
        rng = np.random.default_rng((seed, stepper.done))
        losses.append(stepper(mx.random.key(int(rng.integers(1 << 62))), *inputs(rng)))
        if stepper.done % pace.every == 0 or stepper.done == stepper.steps:
            loss, seconds, count = mx.mean(mx.stack(losses)).item(), time.monotonic() - since, len(losses)
            report({
                "stage": stage, "step": stepper.done, "of": stepper.steps, "loss": loss, **judge(),
                "seconds": round(seconds, 2), "ms a step": round(1000 * seconds / count, 2),
            })  # fmt: skip
            stepper.save(state)
            losses, since = [], time.monotonic()
    if losses:
        stepper.save(state)
    finished = stepper.done >= stepper.steps
    if not finished:
        report({"stage": stage, "step": stepper.done, "of": stepper.steps, "stopped": True, "state": str(state)})
    return finished


def judge_vae(vae: VAE, count: int) -> Shares:
    """What of held-out drawings survives the autoencoder: the share that can still be read, and the PSNR in dB."""
    scenes = take(count, seed=1, held_out=True)
    drawn = [picture for picture, _ in illustrated(scenes, seed=1)]
    pixels = np.stack([to_array(picture) for picture in drawn])  # (N, 3, H, W)
    decoded = np.concatenate([np.array(vae.decode(vae.encode(mx.array(x[None])))) for x in pixels]).clip(-1, 1)
    error = np.mean(np.square((decoded - pixels) / 2), axis=(1, 2, 3))
    shown = share_shown([to_picture(to_unit(x)) for x in decoded], scenes)
    return {"judged": round(shown, 3), "psnr": round(float(np.mean(-10 * np.log10(error))), 2)}


def encode(vae: VAE, pictures: Array) -> mx.array:
    """Latents (B, C, h, w) float16 of pictures (B, H, W, 3) uint8."""
    latents = vae.encode(to_signed(mx.array(pictures)).transpose(0, 3, 1, 2)).astype(mx.float16)
    mx.eval(latents)
    return latents


def train_denoiser(
    latents: mx.array, texts: tuple[Array, Array], recipe: Recipe, report: Report, pace: Pace, networks: Networks,
    output: Path, state: Path,
) -> bool:  # fmt: skip
    """Flow matching on latents (N, C, h, w) and `tokenized` captions; whether it is finished.

    The averaged model is written, and judged as it was written, at every report.
    """
    mx.random.seed(recipe.seed)
    model = Denoiser(networks.transformer, networks.text_encoder)
    layout = model.transformer.layout([TOKENS], *latents.shape[2:])
    mx.eval(layout.image_rotation, layout.caption_rotation, layout.rotation)
    ids, lengths = (mx.array(a) for a in texts)

    def loss(model: Denoiser, key: mx.array, x_0: mx.array, ids: mx.array, lengths: mx.array) -> mx.array:
        return denoising_loss(model, key, x_0.astype(mx.float32), ids, lengths, layout)

    made = json.dumps({
        "transformer": asdict(networks.transformer), "text_encoder": asdict(networks.text_encoder),
        **{name: getattr(recipe, name) for name in ("pictures", "batch", "rate", "seed")},
    })  # fmt: skip
    stepper = Stepper(model, loss, recipe.rate, recipe.steps, made, pace.compiled, pace.dtype)

    def inputs(rng: np.random.Generator) -> Sequence[mx.array]:
        chosen = rng.integers(len(latents), size=recipe.batch)
        named = mx.array(np.where(rng.uniform(size=recipe.batch) < EMPTY, 0, chosen + 1))
        return latents[mx.array(chosen)], ids[named], lengths[named]

    shares: Shares = {}

    def judge() -> Shares:
        write_denoiser(output, cast(Denoiser, stepper.averaged()), networks)
        shares.update(judge_model(output, pace.judged))
        return shares

    if not run(stepper, inputs, judge, report, pace, recipe.seed + 1, state, "denoiser"):
        return False
    write_card(output, recipe.vae_steps * recipe.vae_batch, recipe.steps * recipe.batch, shares or judge())
    report(
        {"stage": "finished", **shares, "model": str(output), "bytes": sum(f.stat().st_size for f in output.rglob("*"))}
    )
    return True


def judge_model(folder: Path, count: int) -> Shares:
    """The share of held-out captions from which the model in `folder` draws just what they say, for each guidance."""
    scenes = take(count, seed=1, held_out=True)
    captions = [caption for _, caption in illustrated(scenes, seed=1)]
    pipeline = ZImagePipeline.from_pretrained(folder)
    shares = {}
    for guidance in (0.0, GUIDANCE):
        pictures: list[Picture] = pipeline(captions, width=SIDE, height=SIDE, steps=STEPS, guidance=guidance)
        shares[f"judged at guidance {guidance:g}"] = round(share_shown(pictures, scenes), 3)
    return shares


def read_vae(folder: Path) -> VAE:
    """The autoencoder in `folder`, its weights float32."""
    file = folder / "vae" / "config.json"
    vae = VAE(VAEConfig.from_json(read_json(file, ConfigError), str(file)))
    load(vae, Checkpoint.open(folder / "vae").tensors, mx.float32)
    return vae


def write_denoiser(folder: Path, model: Denoiser, networks: Networks) -> None:
    """Text encoder and transformer; the encoder's last layer, which no picture depends on, as it would begin."""
    config = networks.text_encoder
    rng, shapes = np.random.default_rng(0), text_encoder_parameters(config)
    unused = {
        name: np.ones(shapes[name], np.float32) if "norm" in name else 0.02 * rng.standard_normal(shapes[name])
        for name in sorted(text_encoder_unused(config))
    }
    write_component(folder, "text_encoder", config, parameters(model.text_encoder) | unused)
    write_component(folder, "transformer", networks.transformer, parameters(model.transformer))


def parameters(model: nn.Module) -> dict[str, Array]:
    """All weights of `model` as float32 arrays, in the layout of the checkpoint."""
    named: Any = tree_flatten(model.parameters())
    return {name: to_numpy(array) for name, array in named}


def main() -> None:
    """Trains the model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m zimage_mlx.tiny", description="Trains Tiny Z-Image from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; run again to go on")
    parser.add_argument("--report-every", type=int, default=1000, help="steps between lines of progress")
    parser.add_argument("--judged", type=int, default=40, help="pictures to judge for a line of progress")
    parser.add_argument("--float32", action="store_true", help="text encoder and transformer in float32, too")
    parser.add_argument("--eager", action="store_true", help="kernels of text encoder and transformer one by one, too")
    for field in fields(Recipe):
        flag, text = f"--{field.name.replace('_', '-')}", f"{field.metadata['help']} (default: {field.default})"
        parser.add_argument(flag, type=type(field.default), default=field.default, help=text)
    args = parser.parse_args()
    pace = Pace(
        args.report_every, args.judged, time.monotonic() + args.seconds,
        False if args.eager else None, mx.float32 if args.float32 else None,
    )  # fmt: skip
    try:
        make(args.output, Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)}), _say, pace)
    except ZImageError as error:
        sys.exit(f"error: {error}")


def _say(facts: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
