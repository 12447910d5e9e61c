"""mflux on the same work, where it is installed; its rows are named like ours, so that the table finds the ratios."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from measure import CAPTION, Bench, random_, random_caption
from mlx.utils import tree_flatten

from zimage_ref.model import config

_PADDED = 512  # tokens that mflux encodes, however short the prompt
_Z_IMAGE = "mflux.models.z_image.model."


def mflux(bench: Bench) -> None:
    """Forward pass, LoRA step with and without checkpointing, decoder and text encoder."""
    try:
        net = importlib.import_module(_Z_IMAGE + "z_image_transformer.transformer").ZImageTransformer
        vae = importlib.import_module(_Z_IMAGE + "z_image_vae.vae").VAE
        encoder = importlib.import_module(_Z_IMAGE + "z_image_text_encoder.text_encoder").TextEncoder
        lora = importlib.import_module("mflux.models.common.lora.layer.linear_lora_layer").LoRALinear
    except ImportError as error:
        print(json.dumps({"case": "mflux", "skipped": f"not installed: {error}"}))
        return
    c = bench.config
    model = random_(net(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads))
    _forward(bench, model)
    _steps(bench, model, lora)
    del model
    _decode(bench, random_(vae()))
    text = random_(encoder())
    ids, mask = mx.arange(_PADDED)[None], (mx.arange(_PADDED) < CAPTION).astype(mx.int32)[None]
    bench.measure(f"mflux text encoder {CAPTION} tokens", lambda: mx.eval(text(ids, mask)))


def mflux_controlled(bench: Bench) -> dict[int, float]:
    """A pass of mflux with its ControlNet 2.1, as its loop runs it, over the plain pass, by side."""
    try:
        net = importlib.import_module(_Z_IMAGE + "z_image_transformer.transformer").ZImageTransformer
        control = importlib.import_module("mflux.models.z_image.variants.controlnet.transformer_controlnet")
    except ImportError as error:
        print(json.dumps({"case": "mflux", "skipped": f"not installed: {error}"}))
        return {}
    c, ratios = bench.config, dict[int, float]()
    model = random_(net(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads))
    layout = control.ZImageControlNetConfig.defaults_union_2_1()
    places = [place for place in layout.control_layers_places if place < c.n_layers]
    layout = replace(layout, dim=c.dim, n_heads=c.n_heads, control_layers_places=places)
    network = control.ZImageControlNet.from_transformer(random_(control.ZImageControlNet(layout)), model)
    sigmas = mx.array([0.7])
    for side in bench.sides:
        x, caption = _inputs(side), random_caption(c)
        picture = mx.concatenate([_inputs(side)] * 3)[: layout.control_in_dim]

        def controlled(x: mx.array = x, caption: mx.array = caption, picture: mx.array = picture) -> None:
            hints = network(x=x, t=0, sigmas=sigmas, cap_feats=caption, control_context=picture)
            mx.eval(model(x=x, timestep=0, sigmas=sigmas, cap_feats=caption, controlnet_block_samples=hints))

        plain = bench.measure(f"mflux plain {side}", _pass(model, x, caption), runs=8)
        ratios[side] = bench.measure(f"mflux 2.1 {side}", controlled, runs=8) / plain
    return ratios


def _inputs(side: int) -> mx.array:
    return mx.random.normal((16, 1, side // 8, side // 8)).astype(mx.bfloat16)


def _pass(model: Any, x: mx.array, caption: mx.array) -> Callable[[], None]:
    """Computes a plain forward pass, as one compiled program."""
    t = mx.array([0.3])
    call = mx.compile(lambda x: model(x=x, timestep=t, sigmas=None, cap_feats=caption))
    return lambda: mx.eval(call(x))


def _forward(bench: Bench, model: Any) -> None:
    for side in bench.sides:
        run = _pass(model, _inputs(side), random_caption(bench.config))
        bench.measure(f"mflux forward {side}", run, bench.flops(side), 8)


def _steps(bench: Bench, model: Any, lora: Any) -> None:
    weights = mx.get_active_memory()
    model.freeze()
    for block in model.layers:
        attention, feed_forward = block.attention, block.feed_forward
        for owner, name in [(attention, f"to_{n}") for n in "qkv"] + [(feed_forward, f"w{n}") for n in "123"]:
            setattr(owner, name, lora.from_linear(getattr(owner, name), r=16))
        attention.to_out[0] = lora.from_linear(attention.to_out[0], r=16)
    model.unfreeze(keys=["lora_A", "lora_B"], strict=False)
    mx.eval(model.parameters())
    for mode, passes in (("fast", 2), ("lean", 3)):
        model.gradient_checkpointing = mode == "lean"
        for side in bench.sides:
            run = _step(bench, model, side, mode == "lean")
            bench.measure(f"mflux step {mode} {side}", run, passes * bench.flops(side), 4, before=weights)


def _step(bench: Bench, model: Any, side: int, lean: bool) -> Callable[[], None]:
    x, target, caption, t = _inputs(side), _inputs(side), random_caption(bench.config), mx.array([0.3])
    optimizer = optim.AdamW(1e-4)

    def loss() -> mx.array:
        return mx.mean(mx.square(model(x=x, timestep=t, sigmas=None, cap_feats=caption) - target))

    differentiate = nn.value_and_grad(model, loss)

    def run() -> None:
        value, gradients = differentiate()
        if lean:  # its trainer evaluates the gradients block by block, last block first
            mx.eval(value)
            blocks: dict[str, list[mx.array]] = {}
            for name, gradient in tree_flatten(gradients):
                block = re.match(r"layers\.\d+", name)
                blocks.setdefault(block.group() if block else "", []).append(gradient)
            for arrays in reversed(list(blocks.values())):
                mx.eval(arrays)
        optimizer.update(model, gradients)
        mx.eval(value, model.trainable_parameters(), optimizer.state)

    return run


def _decode(bench: Bench, vae: Any) -> None:
    """Whole, and in the strips that mflux decodes in by default."""
    modes = importlib.import_module("mflux.models.common.vae.block_decoder").VAEBlockDecoder
    for side in bench.sides:
        latents = mx.random.normal((1, config.OFFICIAL_VAE.latent_channels, side // 8, side // 8)).astype(mx.bfloat16)
        for mode, how in (("fast", modes.LEGACY), ("lean", modes.LOW_MEMORY)):
            vae.decode_mode = how
            bench.measure(f"mflux decode {mode} {side}", lambda z=latents: mx.eval(vae.decode(z)), runs=4)
