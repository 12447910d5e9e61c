"""Speed and memory of the full-size model on random weights: one JSON line a case, then a table.

    python tests/bench/bench_speed.py                         # everything, on this machine's GPU
    python tests/bench/bench_speed.py --cases forward,step --sides 512,1024
    python tests/bench/bench_speed.py --small                 # a small model, to try the script anywhere

ms is the median of several runs after two warm-ups; over_gb the peak over the weights that lie in memory; mfu the share
of this machine's own bfloat16 matrix product (8192 x 8192 x 8192). Where mflux is installed, it is measured beside
ours, in the same process and on the same number of tokens. Training sets MLX_MAX_OPS_PER_BUFFER=5 and
MLX_MAX_MB_PER_BUFFER=50 in the modes lean and stream; set them to measure lean steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from measure import CAPTION, Bench, random_, random_caption, table
from mlx.utils import tree_flatten, tree_unflatten
from peers import mflux

from zimage_mlx.device import on_gpu
from zimage_mlx.lora import layers as lora_layers
from zimage_mlx.networks.quantized import QuantizedLinear
from zimage_mlx.networks.running import BlockRunner, RunInPieces
from zimage_mlx.networks.strips import Strips
from zimage_mlx.networks.text_encoder import TextEncoder
from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.tree import find, place
from zimage_mlx.networks.vae import VAE
from zimage_mlx.training.gradient import LossAndGradients
from zimage_mlx.training.loss import NoisyBatch
from zimage_mlx.training.optimizer import Optimizer
from zimage_mlx.training.packing import Packing
from zimage_ref.formats.quantize import Quantization
from zimage_ref.memory import FAST, LEAN
from zimage_ref.model import config, parameters
from zimage_ref.model.quantization import covers
from zimage_ref.training.config import TrainConfig

CASES = ("forward", "quantized", "step", "decode", "text", "picture", "scaling", "peers")
SCALING_SIDES = (256, 512, 768, 1024, 1536, 2048)
SMALL = replace(config.OFFICIAL_TRANSFORMER, dim=384, n_heads=3, n_layers=3)


@contextmanager
def transformer(bench: Bench, bits: int | None = None) -> Iterator[Transformer]:
    """A random transformer, of `bits` where given, as the pipeline runs it."""
    model = random_(Transformer(bench.config, BlockRunner()))
    if bits:
        shapes, quantization = parameters.transformer_parameters(bench.config), Quantization(bits, 64)
        covered = {name for name, shape in shapes.items() if covers(quantization, name, shape)}
        layers = []
        for name in covered:
            path = name.removesuffix(".weight")
            layer = QuantizedLinear.from_linear(find(model, path), 64, bits)
            layers.append((path, layer))
            mx.eval(layer.parameters())
        model.update_modules(tree_unflatten(layers))
    yield model
    del model
    gc.collect()
    mx.clear_cache()


def forward(bench: Bench, label: str, bits: int | None = None) -> None:
    """The transformer's forward pass, by blocks as when memory is plenty, and by pieces of them."""
    with transformer(bench, bits) as model:
        by_pieces = RunInPieces(on_gpu()).block
        for side in bench.sides:
            bench.measure(f"{label} {side}", forward_of(bench, model, side), bench.flops(side), 8)
            model.run, by_blocks = by_pieces, model.run
            bench.measure(f"{label} lean {side}", forward_of(bench, model, side), bench.flops(side), 8)
            model.run = by_blocks


def forward_of(bench: Bench, model: Transformer, side: int, batch: int = 1) -> Callable[[], None]:
    """Computes the forward pass of `batch` pictures of this side; all that is the same in each step is done before."""
    x, captions = mx.random.normal((batch, 16, side // 8, side // 8)), [random_caption(bench.config)] * batch
    conditioning, t = model.condition(captions, side // 8, side // 8), mx.array([0.3])
    mx.eval(conditioning.caption, x)
    return lambda: mx.eval(model.denoise(x, t, conditioning))


def scaling(bench: Bench) -> None:
    """The forward pass from small pictures to large ones, and of several at once."""
    with transformer(bench) as model:
        for side, batch in [*((side, 1) for side in SCALING_SIDES), *((bench.sides[0], n) for n in (2, 4, 8))]:
            bench.measure(
                f"scaling {side} x {batch}", forward_of(bench, model, side, batch), bench.flops(side, batch), 3
            )


def step(bench: Bench, bits: int | None = None) -> None:
    """One LoRA step of rank 16 on the default layers: gradient and AdamW."""
    with transformer(bench, bits) as model:
        weights = mx.get_active_memory()
        layers = parameters.lora_modules(bench.config, ("attention", "feed_forward", "refiners"))
        lora_layers.add_trainable_loras(model, layers, 16, 16.0, np.random.default_rng(0))
        packing = Packing(dict(tree_flatten(model.trainable_parameters())))
        vectors = packing.pack(dict(tree_flatten(model.trainable_parameters())))
        optimizer = Optimizer(TrainConfig(model_dir=Path(), dataset=Path()), packing, vectors)
        mx.eval(vectors)
        for side in bench.sides:
            shape = (1, 16, side // 8, side // 8)
            batch = NoisyBatch(
                mx.random.normal(shape), mx.random.normal(shape), mx.array([0.6]), [random_caption(bench.config)]
            )
            for mode, budget in (("fast", math.inf), ("lean", 0)):
                differentiate = LossAndGradients(model, budget, compiled=on_gpu())

                def run(differentiate: Any = differentiate, batch: NoisyBatch = batch) -> None:
                    nonlocal vectors
                    place(model, packing.unpack(vectors, model.dtype))
                    vectors = optimizer.apply(vectors, packing.pack(differentiate(batch)[1]), 1e-4)

                name = f"step {mode} {side}" + (f" {bits} bits" if bits else "")
                passes = 2 if mode == "fast" else 3
                bench.measure(name, run, passes * bench.flops(side), 4, before=weights)  # so the LoRA counts


def decode(bench: Bench) -> None:
    """The autoencoder's way out."""
    vae = random_(VAE(config.OFFICIAL_VAE))
    for side in bench.sides:
        latents = mx.random.normal((1, 16, side // 8, side // 8))
        for mode, nbytes in (("fast", FAST.strips), ("lean", LEAN.strips)):
            run = lambda z=latents, nbytes=nbytes: mx.eval(vae.decode(z, Strips(nbytes)))  # noqa: E731
            bench.measure(f"decode {mode} {side}", run, runs=4)


def text(bench: Bench) -> None:
    """A prompt through the text encoder."""
    encoder, ids = random_(TextEncoder(config.OFFICIAL_TEXT_ENCODER)), mx.arange(CAPTION)
    bench.measure(f"text encoder {CAPTION} tokens", lambda: mx.eval(encoder(ids)))


def picture(bench: Bench) -> None:
    """Eight steps and decoding, against eight forward passes and decoding measured alone."""
    vae, side = random_(VAE(config.OFFICIAL_VAE)), bench.sides[-1]
    latents = mx.random.normal((1, 16, side // 8, side // 8))
    with transformer(bench) as model:
        step_alone = bench.measure(f"picture, one step {side}", forward_of(bench, model, side), bench.flops(side))
        end_alone = bench.measure(f"picture, end {side}", lambda: mx.eval(vae.decode(latents, Strips(FAST.strips))))

        def whole() -> None:
            x = mx.random.normal((1, 16, side // 8, side // 8))
            conditioning = model.condition([random_caption(bench.config)], side // 8, side // 8)
            for i in range(8):
                x = x + model.denoise(x, mx.array([i / 8]), conditioning).astype(mx.float32) / 8
                mx.eval(x)
            mx.eval(vae.decode(x, Strips(FAST.strips)))

        seconds = bench.measure(f"picture, 8 steps {side}", whole, 8 * bench.flops(side), 3)
        print(json.dumps({"case": f"picture {side}, of its parts", "ratio": seconds / (8 * step_alone + end_alone)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--sides", default="512,1024")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    bench = Bench(SMALL if args.small else config.OFFICIAL_TRANSFORMER, [int(s) for s in args.sides.split(",")])
    print(
        json.dumps({"device": str(mx.device_info()), "mlx": mx.__version__, "peak_tflops": f"{bench.peak / 1e12:.0f}"})
    )
    runs: dict[str, list[Callable[[], None]]] = {
        "forward": [lambda: forward(bench, "forward")],
        "quantized": [lambda b=b: forward(bench, f"forward {b} bits", b) for b in (4, 8)],
        "step": [lambda: step(bench), lambda: step(bench, 4)],
        "decode": [lambda: decode(bench)],
        "text": [lambda: text(bench)],
        "picture": [lambda: picture(bench)],
        "scaling": [lambda: scaling(bench)],
        "peers": [lambda: mflux(bench)],
    }
    for case in args.cases.split(","):
        for run in runs[case]:
            run()
            gc.collect()
            mx.clear_cache()
    print(table(bench.rows))


if __name__ == "__main__":
    main()
