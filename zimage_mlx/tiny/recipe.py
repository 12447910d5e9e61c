"""Tiny Z-Image: the recipe of the small model in `zimage_ref/tiny`, from drawings to a folder in the official layout.

First the autoencoder learns to reproduce drawings. Then its latents get a new basis (see `latents`), and their mean and
deviation become shift_factor and scaling_factor. Then text encoder and transformer learn together, by flow matching as
in `zimage_ref.model.flow`. The written weights are averages over steps.

On an H100 this took 20 minutes: 91 ms for a step of the autoencoder, 33 ms for a step of text encoder and transformer.
The first time, building the kernels takes 4 minutes more. A build may stop before the end; the next one with the same
output continues.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from zimage_mlx.networks.vae import VAE
from zimage_mlx.networks.weights import load, to_numpy
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.errors import ConfigError
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
from .stepper import Compute, Stepper


@dataclass(frozen=True)
class Networks:
    """The sizes of the networks. The two factors of the autoencoder are measured after its training."""

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
# A shift of 6 says that this is a base model, not a distilled one. Sampling shifts by resolution instead (1.6 at
# 128 x 128), so that some steps have little noise, for outlines
SCHEDULER = SchedulerConfig(shift=6.0, use_dynamic_shifting=True)

CROP = SIDE // 2  # side of a crop: a quarter of the work, and most of a drawing is plain background
WHOLE = 0.1  # share of the autoencoder's steps that see whole pictures; these are the last steps
EMPTY = 0.1  # share of captions that become "", because guidance needs predictions for ""

Shares = dict[str, float]  # thing that is judged -> the share that is right, or a PSNR in dB


@dataclass(frozen=True)
class Recipe:
    """The amounts of data and of steps, and the learning rates."""

    pictures: int = option(120_000, "drawings to learn from")
    vae_steps: int = option(4_000, "steps of the autoencoder")
    vae_batch: int = option(64, "drawings in a batch of them")
    vae_rate: float = option(2e-3, "their highest learning rate")
    steps: int = option(23_000, "steps of text encoder and transformer")
    batch: int = option(512, "drawings in a batch of them")
    rate: float = option(1.5e-3, "their highest learning rate")
    seed: int = option(0, "seed of drawings, weights, order and noise")


@dataclass(frozen=True)
class BuildOptions:
    """The options for running a build: its reports, its deadline, and how it computes."""

    every: int = 1000  # steps between two reports
    judged: int = 40  # pictures to judge for a report
    deadline: float = math.inf  # the value of time.monotonic(), in seconds, at which the build stops
    compute: Compute = Compute()  # for text encoder and transformer
    report: Callable[[Mapping[str, object]], None] = lambda facts: None  # takes facts that JSON can hold


@dataclass(frozen=True)
class BuildStage:
    """One of the two trainings of a build."""

    name: str  # autoencoder, denoiser
    stepper: Stepper[nn.Module]
    inputs: Callable[[np.random.Generator], Sequence[mx.array]]  # the inputs of a step, from its random numbers
    judge: Callable[[], Shares]
    seed: int


def build(output: Path, recipe: Recipe, options: BuildOptions = BuildOptions(), networks: Networks = NETWORKS) -> bool:
    """Trains the whole model and writes it to `output`. Returns False if the deadline stopped it before the end.

    A folder beside `output`, with its name and ".training", keeps the state to continue from. Raises ConfigError if
    this state is of another recipe.
    """
    pictures, captions = drawings(recipe.pictures, recipe.seed)
    options.report({"stage": "drawings", "drawings": len(captions), "such as": captions[:3]})
    if not (output / "tokenizer" / "tokenizer_config.json").is_file():  # it is written last
        write_surroundings(output, captions, networks.text_encoder.vocab_size, SCHEDULER)
    if not (output / "vae" / "config.json").is_file():
        state = state_folder(output, "autoencoder")
        trained = train_vae(pictures, recipe, networks.vae, options, state)
        if not trained:
            return False
        write_component(output, "vae", trained.config, parameters(trained))
        shutil.rmtree(state)
    vae = read_vae(output)  # with the written weights, so that the denoiser learns the latents that users decode
    latents = mx.concatenate([encode(vae, batch) for batch in in_batches(pictures)])
    texts = tokenized(Tokenizer(output / "tokenizer" / "tokenizer.json"), captions)
    return train_denoiser(latents, texts, recipe, networks, options, output)


def state_folder(output: Path, stage: str) -> Path:
    """The folder of the state of a stage."""
    return output.with_name(f"{output.name}.training") / stage


def train_stage(stage: BuildStage, options: BuildOptions, state: Path) -> bool:
    """Makes the remaining steps, after `state` if it exists. Returns whether it reached the last step.

    The batches and the noise of a step depend only on the seed and the number of the step. So a stop does not change
    the result.
    """
    stepper, report = stage.stepper, options.report
    if state.is_dir():
        stepper.restore(state)
    losses, since = [], time.monotonic()
    while stepper.done < stepper.steps and time.monotonic() < options.deadline:
        rng = np.random.default_rng((stage.seed, stepper.done))
        losses.append(stepper(mx.random.key(int(rng.integers(1 << 62))), *stage.inputs(rng)))
        if stepper.done % options.every == 0 or stepper.done == stepper.steps:
            loss, seconds, count = mx.mean(mx.stack(losses)).item(), time.monotonic() - since, len(losses)
            report({
                "stage": stage.name, "step": stepper.done, "of": stepper.steps, "loss": loss, **stage.judge(),
                "seconds": round(seconds, 2), "ms a step": round(1000 * seconds / count, 2),
            })  # fmt: skip
            stepper.save(state)
            losses, since = [], time.monotonic()
    if losses:
        stepper.save(state)
    finished = stepper.done >= stepper.steps
    if not finished:
        report({"stage": stage.name, "step": stepper.done, "of": stepper.steps, "stopped": True, "state": str(state)})
    return finished


def train_vae(pictures: Array, recipe: Recipe, config: VAEConfig, options: BuildOptions, state: Path) -> VAE | None:
    """Trains an autoencoder on `pictures` (N, H, W, 3) uint8. Its factors are the shift and scale of its latents.

    state: the folder of the state to continue from. Returns None if the deadline came first.
    """
    mx.random.seed(recipe.seed)
    vae = VAE(config)
    made_with = _as_text(asdict(config), recipe, "pictures", "vae_batch", "vae_rate", "seed")
    # Not compiled: compiling a whole step takes more than a minute and a half, and there are few steps. float32, as for
    # the model in the package; bfloat16 is a tenth faster
    stepper = Stepper(vae, vae_loss, recipe.vae_rate, recipe.vae_steps, made_with, Compute(False, mx.float32))

    def inputs(rng: np.random.Generator) -> Sequence[mx.array]:
        chosen = pictures[np.sort(rng.integers(len(pictures), size=recipe.vae_batch))]
        if stepper.done < (1 - WHOLE) * recipe.vae_steps:
            top, left = rng.integers(SIDE - CROP + 1, size=2)
            chosen = chosen[:, top : top + CROP, left : left + CROP]
        return [mx.array(chosen)]

    def judge() -> Shares:
        return judge_vae(stepper.averaged(), options.judged)

    if not train_stage(BuildStage("autoencoder", stepper, inputs, judge, recipe.seed), options, state):
        return None
    stepper.averaged()
    finish(vae, pictures[:5000])
    return vae


def train_denoiser(
    latents: mx.array, texts: tuple[Array, Array], recipe: Recipe, networks: Networks, options: BuildOptions,
    output: Path,
) -> bool:  # fmt: skip
    """Trains text encoder and transformer by flow matching on latents (N, C, h, w) and `tokenized` captions.

    At every report the averaged model is written to `output`, read again and judged. Returns whether it is finished.
    """
    stepper = _denoiser_stepper(recipe, networks, options.compute, latents.shape[2:])
    ids, lengths = (mx.array(a) for a in texts)
    shares: Shares = {}

    def inputs(rng: np.random.Generator) -> Sequence[mx.array]:
        chosen = rng.integers(len(latents), size=recipe.batch)
        named = mx.array(np.where(rng.uniform(size=recipe.batch) < EMPTY, 0, chosen + 1))  # row 0 is the empty caption
        return latents[mx.array(chosen)], ids[named], lengths[named]

    def judge() -> Shares:
        write_denoiser(output, stepper.averaged(), networks)
        shares.update(judge_model(output, options.judged))
        return shares

    stage = BuildStage("denoiser", stepper, inputs, judge, recipe.seed + 1)
    if not train_stage(stage, options, state_folder(output, "denoiser")):
        return False
    write_card(output, recipe.vae_steps * recipe.vae_batch, recipe.steps * recipe.batch, shares or judge())
    nbytes = sum(file.stat().st_size for file in output.rglob("*"))
    options.report({"stage": "finished", **shares, "model": str(output), "bytes": nbytes})
    return True


def _denoiser_stepper(recipe: Recipe, networks: Networks, compute: Compute, sides: Sequence[int]) -> Stepper[Denoiser]:
    """The Stepper of text encoder and transformer, for latents with the `sides` h, w."""
    mx.random.seed(recipe.seed)
    model = Denoiser(networks.transformer, networks.text_encoder)
    layout = model.transformer.layout([TOKENS], *sides)
    mx.eval(layout.image_rotation, layout.caption_rotation, layout.rotation)

    def loss(model: Denoiser, key: mx.array, x_0: mx.array, ids: mx.array, lengths: mx.array) -> mx.array:
        return denoising_loss(model, key, x_0.astype(mx.float32), ids, lengths, layout)

    sizes = {"transformer": asdict(networks.transformer), "text_encoder": asdict(networks.text_encoder)}
    made_with = _as_text(sizes, recipe, "pictures", "batch", "rate", "seed")
    return Stepper(model, loss, recipe.rate, recipe.steps, made_with, compute)


def _as_text(sizes: Mapping[str, object], recipe: Recipe, *names: str) -> str:
    """The sizes, and the fields `names` of the recipe, as text for `Stepper.recipe`. They decide the weights."""
    return json.dumps({**sizes, **{name: getattr(recipe, name) for name in names}})


def judge_vae(vae: VAE, count: int) -> Shares:
    """Encodes and decodes held-out drawings. Gives the share that can still be read, and the PSNR in dB."""
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


def judge_model(folder: Path, count: int) -> Shares:
    """For each guidance, the share of held-out captions that the model in `folder` draws exactly as they say."""
    scenes = take(count, seed=1, held_out=True)
    captions = [caption for _, caption in illustrated(scenes, seed=1)]
    pipeline = ZImagePipeline.from_pretrained(folder)
    shares = {}
    for guidance in (0.0, GUIDANCE):
        pictures: list[Picture] = pipeline(captions, width=SIDE, height=SIDE, steps=STEPS, guidance=guidance)
        shares[f"judged at guidance {guidance:g}"] = round(share_shown(pictures, scenes), 3)
    return shares


def read_vae(folder: Path) -> VAE:
    """The autoencoder in `folder`, with float32 weights."""
    file = folder / "vae" / "config.json"
    vae = VAE(VAEConfig.from_json(read_json(file, ConfigError), str(file)))
    load(vae, Checkpoint.open(folder / "vae").tensors, mx.float32)
    return vae


def write_denoiser(folder: Path, model: Denoiser, networks: Networks) -> None:
    """Writes text encoder and transformer. The encoder's last layer is random, because no picture depends on it."""
    config = networks.text_encoder
    rng, shapes = np.random.default_rng(0), text_encoder_parameters(config)
    unused = {
        name: np.ones(shapes[name], np.float32) if "norm" in name else 0.02 * rng.standard_normal(shapes[name])
        for name in sorted(text_encoder_unused(config))
    }
    write_component(folder, "text_encoder", config, parameters(model.text_encoder) | unused)
    write_component(folder, "transformer", networks.transformer, parameters(model.transformer))


def parameters(model: nn.Module) -> dict[str, Array]:
    """All weights of `model` as float32 arrays in the layout of the checkpoint."""
    named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: to_numpy(array) for name, array in named.items()}
