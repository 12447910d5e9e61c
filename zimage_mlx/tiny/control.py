"""The recipe of the small ControlNet: it makes the built-in model follow edge maps of drawings.

The layout is that of 2.1: a control block for the noise refiner and one for the first layer. They begin as copies of
the model's own blocks, and the layers behind them as zeros (ControlNet, arXiv 2302.05543). The model does not change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from zimage_mlx.networks.controlnet import Control, ControlNet
from zimage_mlx.networks.weights import load
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.control import OWN, ControlNetConfig
from zimage_ref.options import option
from zimage_ref.pictures.images import Picture
from zimage_ref.tiny.data import GUIDANCE, STEPS, TOKENS, tokenized
from zimage_ref.tiny.drawings import SIDE, Scene, describe, draw, take
from zimage_ref.tiny.files import write_component
from zimage_ref.tiny.judge import share_in_place
from zimage_ref.tiny.outlines import edge_map, name_colours, outlined

from .latents import in_batches
from .losses import Denoiser, denoising_loss
from .recipe import EMPTY, BuildOptions, BuildStage, Shares, encode, parameters, read_vae, state_folder, train_stage
from .stepper import Stepper

CONTROLNET = "controlnet"  # its folder
NAMED = 0.25  # share of captions that name the shapes, too


@dataclass(frozen=True)
class ControlRecipe:
    """The amounts of data and of steps, and the learning rate."""

    pictures: int = option(10_000, "drawings to learn from")
    steps: int = option(3_000, "steps of the ControlNet")
    batch: int = option(32, "drawings in a batch of them")
    rate: float = option(1.5e-3, "their highest learning rate")
    seed: int = option(0, "seed of drawings, weights, order and noise")


def config_for(transformer: TransformerConfig) -> ControlNetConfig:
    """A small ControlNet for `transformer`, that takes maps without a mask."""
    return ControlNetConfig(
        dim=transformer.dim, n_heads=transformer.n_heads, n_refiner_layers=transformer.n_refiner_layers,
        norm_eps=transformer.norm_eps, patch_size=transformer.patch_size, control_in_dim=transformer.in_channels,
        control_layers_places=(0,), control_refiner_layers_places=tuple(range(transformer.n_refiner_layers)),
        refiner=OWN,
    )  # fmt: skip


def build_control(model: Path, output: Path, recipe: ControlRecipe, options: BuildOptions) -> bool:
    """Trains a ControlNet for `model` into the folder `output`/controlnet. Returns False if the deadline stopped it.

    A folder beside `output` keeps the state to continue from, as in `recipe.build`.
    """
    pipeline = ZImagePipeline.from_pretrained(model)
    latents, maps, texts = _data(pipeline, recipe)
    stepper = _stepper(pipeline, latents.shape[2:], recipe, options)
    ids, lengths = (mx.array(part) for part in texts)

    def inputs(rng: np.random.Generator) -> Sequence[mx.array]:
        chosen = rng.integers(len(latents), size=recipe.batch)
        named = mx.array(np.where(rng.uniform(size=recipe.batch) < EMPTY, 0, chosen + 1))  # row 0 is the empty caption
        own = mx.array(chosen)
        return latents[own], maps[own], ids[named], lengths[named]

    def judge() -> Shares:
        network = stepper.averaged()
        write_component(output, CONTROLNET, network.config, parameters(network))
        return judge_control(model, output / CONTROLNET, options.judged)

    stage = BuildStage("control", stepper, inputs, judge, recipe.seed)
    return train_stage(stage, options, state_folder(output, "control"))


def _data(pipeline: ZImagePipeline, recipe: ControlRecipe) -> tuple[mx.array, mx.array, tuple[Array, Array]]:
    """Latents of drawings and of their edge maps, (N, C, h, w) each, and their captions as `tokenized`."""
    rng = np.random.default_rng((recipe.seed, 1))
    pictures, edges, captions = [], [], []
    for scene in take(recipe.pictures, recipe.seed):
        picture = draw(scene, rng)
        pictures.append(np.asarray(picture))
        edges.append(np.asarray(edge_map(picture)))
        captions.append(describe(scene, rng) if rng.uniform() < NAMED else name_colours(scene, rng))
    vae = read_vae(pipeline.folder.path)
    latents, maps = (
        mx.concatenate([encode(vae, batch) for batch in in_batches(np.stack(each))]) for each in (pictures, edges)
    )
    return latents, maps, tokenized(pipeline.tokenizer, captions)


def _stepper(
    pipeline: ZImagePipeline, sides: Sequence[int], recipe: ControlRecipe, options: BuildOptions
) -> Stepper[ControlNet]:
    """The Stepper of the ControlNet, for latents with the `sides` h, w."""
    mx.random.seed(recipe.seed)
    folder = pipeline.folder
    model = Denoiser(folder.transformer, folder.text_encoder)
    load(model.transformer, folder.weights["transformer"], mx.float32)
    load(model.text_encoder, folder.weights["text_encoder"], mx.float32)
    network = beginning(config_for(folder.transformer), model)
    layout = model.transformer.layout([TOKENS], *sides)
    mx.eval(model.parameters(), layout.image_rotation, layout.caption_rotation, layout.rotation)

    def loss(
        network: ControlNet, key: mx.array, x_0: mx.array, context: mx.array, ids: mx.array, lengths: mx.array
    ) -> mx.array:
        control = Control(network, context, 1.0)
        return denoising_loss(model, key, x_0.astype(mx.float32), ids, lengths, layout, control)

    made_with = {"network": asdict(network.config), **asdict(recipe)} | {"steps": None}
    return Stepper(network, loss, recipe.rate, recipe.steps, json.dumps(made_with), options.compute)


def beginning(config: ControlNetConfig, model: Denoiser) -> ControlNet:
    """A ControlNet that changes nothing yet."""
    network, transformer = ControlNet(config), model.transformer
    blocks = [*transformer.noise_refiner, *transformer.layers]
    for own, block in zip([*network.refiner, *network.control_layers], blocks, strict=False):
        own.update(block.parameters())
        own.after_proj.update(tree_map(mx.zeros_like, own.after_proj.parameters()))
    embedder = transformer.all_x_embedder[transformer.config.patch_key]
    network.update({"control_all_x_embedder": {config.blocks.patch_key: embedder.parameters()}})
    return network


def judge_control(model: Path, control: Path, count: int) -> Shares:
    """The share of pictures with every shape in its place, with the ControlNet and without.

    Captions name only the colours of held-out scenes; their edge maps are given.
    """
    return {
        name: round(share_in_place(pictures, scenes), 3)
        for name, (scenes, pictures) in {
            "in place": followed(model, control, count),
            "without control": followed(model, None, count),
        }.items()
    }


def followed(model: Path, control: Path | None, count: int) -> tuple[list[Scene], list[Picture]]:
    """Held-out scenes, and the pictures that `model` makes of their colours and edge maps; without `control`, of
    their colours alone."""
    pipeline = ZImagePipeline.from_pretrained(model)
    scenes = take(count, seed=1, held_out=True)
    pictures = []
    for seed, (edges, caption) in enumerate(outlined(scenes, seed=1)):
        pictures += pipeline(
            caption, seed=seed, width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE,
            control=control and str(control), control_image=control and edges,
        )  # fmt: skip
    return scenes, pictures
