"""Speed and memory of the full-size model on random weights: one JSON line a case, then a table.

    python tests/bench/bench_speed.py                         # everything, on this machine's GPU
    python tests/bench/bench_speed.py --cases forward,step --sides 512,1024
    python tests/bench/bench_speed.py --small                 # a small model, to try the script anywhere

ms is the median of several runs after two warm-ups; over_gb the peak over the weights that lie in memory; mfu the share
of this machine's own bfloat16 matrix product (8192 x 8192 x 8192). Where diffusers or mflux is installed, its forward
pass is measured beside ours, in the same process and on the same number of tokens.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from zimage_mlx import lora
from zimage_mlx.compiled import BlockRunner, on_gpu
from zimage_mlx.gradient import LossAndGradients
from zimage_mlx.loss import Batch
from zimage_mlx.packing import Packing
from zimage_mlx.pipeline import FAST_ROWS, LEAN_ROWS
from zimage_mlx.quantized import QuantizedLinear
from zimage_mlx.text_encoder import TextEncoder
from zimage_mlx.transformer import Transformer
from zimage_mlx.vae import VAE, Strips
from zimage_ref import config, names
from zimage_ref.quantize import Quantization

CAPTION = 64  # tokens
CASES = ("forward", "quantized", "step", "decode", "text", "picture", "peers")
SMALL = replace(config.OFFICIAL_TRANSFORMER, dim=384, n_heads=3, n_layers=3)


class Bench:
    """Measures cases and keeps their rows."""

    def __init__(self, transformer: config.TransformerConfig, sides: list[int]) -> None:
        self.config, self.sides, self.rows = transformer, sides, list[dict[str, Any]]()
        a, b = (mx.random.normal((8192, 8192)).astype(mx.bfloat16) for _ in range(2))
        mx.eval(a, b)
        self.peak = 2 * 8192**3 / self._median(lambda: mx.eval(a @ b), 8) if on_gpu() else math.nan

    def measure(self, case: str, run: Callable[[], Any], flops: float = math.nan, runs: int = 6) -> float:
        """One row: milliseconds, TFLOP/s, utilisation, peak over what is in memory before."""
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        try:
            run()
            run()
            mx.reset_peak_memory()
            seconds = self._median(run, runs)
        except (RuntimeError, ValueError) as error:
            self.rows.append({"case": case, "error": str(error)[:120]})
            print(json.dumps(self.rows[-1]), flush=True)
            return math.nan
        row = {"case": case, "ms": seconds * 1e3, "over_gb": (mx.get_peak_memory() - before) / 1e9}
        if not math.isnan(flops):
            row["tflops"] = flops / seconds / 1e12
        if not math.isnan(flops / self.peak):
            row["mfu"] = flops / seconds / self.peak
        self.rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        print(json.dumps(self.rows[-1]), flush=True)
        return seconds

    def _median(self, run: Callable[[], Any], runs: int) -> float:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def flops(self, side: int, batch: int = 1) -> float:
        """Of one forward pass: matrix products and attention."""
        c, image = self.config, (side // 16) ** 2

        def blocks(count: int, tokens: int) -> float:
            weights = 4 * c.dim**2 + 3 * c.dim * c.ffn_dim
            return count * (2 * tokens * weights + 4 * tokens**2 * c.dim)

        return batch * (
            blocks(c.n_layers, image + CAPTION)
            + blocks(c.n_refiner_layers, image)
            + blocks(c.n_refiner_layers, CAPTION)
        )


def random_(model: Any) -> Any:
    """`model` with small random bfloat16 weights."""
    model.update(tree_map(lambda p: (mx.random.normal(p.shape) * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


@contextmanager
def transformer(bench: Bench, bits: int | None = None) -> Iterator[Transformer]:
    """A random transformer, of `bits` where given, as the pipeline runs it."""
    model = random_(Transformer(bench.config))
    if bits:
        how = Quantization(bits, 64)
        covered = {k for k, s in names.transformer_parameters(bench.config).items() if how.covers(k, s)}
        layers = []
        for name in covered:
            path = name.removesuffix(".weight")
            layer = QuantizedLinear.from_linear(lora.find(model, path), 64, bits)
            layers.append((path, layer))
            mx.eval(layer.parameters())
        model.update_modules(tree_unflatten(layers))
    model.run = BlockRunner()
    yield model
    del model
    gc.collect()
    mx.clear_cache()


def forward(bench: Bench, label: str, bits: int | None = None) -> None:
    """The transformer's forward pass."""
    with transformer(bench, bits) as model:
        for side in bench.sides:
            x, caption = mx.random.normal((1, 16, side // 8, side // 8)), random_caption(bench)
            given, t = model.condition([caption], side // 8, side // 8), mx.array([0.3])
            mx.eval(given.caption, x)
            run = lambda model=model, x=x, t=t, given=given: mx.eval(model.denoise(x, t, given))  # noqa: E731
            bench.measure(f"{label} {side}", run, bench.flops(side), 8)


def step(bench: Bench, bits: int | None = None) -> None:
    """One LoRA step of rank 16 on the default layers: gradient and AdamW."""
    with transformer(bench, bits) as model:
        weights = mx.get_active_memory()
        layers = names.lora_modules(bench.config, ("attention", "feed_forward", "refiners"))
        lora.start(model, layers, 16, 16.0, np.random.default_rng(0))
        packing = Packing(dict(tree_flatten(model.trainable_parameters())))
        vectors = packing.pack(dict(tree_flatten(model.trainable_parameters())))
        optimizer = optim.AdamW(1e-4)
        optimizer.init(vectors)
        mx.eval(vectors, optimizer.state)
        for side in bench.sides:
            shape = (1, 16, side // 8, side // 8)
            batch = Batch(mx.random.normal(shape), mx.random.normal(shape), mx.array([0.6]), [random_caption(bench)])
            for mode, budget in (("fast", math.inf), ("lean", 0)):
                differentiate = LossAndGradients(model, budget, compiled=on_gpu())

                def run(differentiate: Any = differentiate, batch: Batch = batch) -> None:
                    nonlocal vectors
                    model.update(tree_unflatten(list(packing.unpack(vectors, model.dtype).items())))
                    _, gradients = differentiate(batch)
                    vectors = optimizer.apply_gradients(packing.pack(gradients), vectors)
                    mx.eval(vectors, optimizer.state)

                name = f"step {mode} {side}" + (f" {bits} bits" if bits else "")
                bench.measure(name, run, (2 if mode == "fast" else 3) * bench.flops(side), 4)
                if "over_gb" in bench.rows[-1]:
                    bench.rows[-1]["over_gb"] = round((mx.get_peak_memory() - weights) / 1e9, 3)  # with the LoRA


def decode(bench: Bench) -> None:
    """The autoencoder's way out."""
    vae = random_(VAE(config.OFFICIAL_VAE))
    for side in bench.sides:
        latents = mx.random.normal((1, 16, side // 8, side // 8))
        for mode, rows in (("fast", FAST_ROWS), ("lean", LEAN_ROWS)):
            run = lambda z=latents, rows=rows: mx.eval(vae.decode(z, Strips(rows)))  # noqa: E731
            bench.measure(f"decode {mode} {side}", run, runs=4)


def text(bench: Bench) -> None:
    """A prompt through the text encoder."""
    encoder, ids = random_(TextEncoder(config.OFFICIAL_TEXT_ENCODER)), mx.arange(CAPTION)
    bench.measure(f"text encoder {CAPTION} tokens", lambda: mx.eval(encoder(ids)))


def picture(bench: Bench) -> None:
    """Eight steps and decoding, against eight forward passes and decoding measured alone."""
    vae, side = random_(VAE(config.OFFICIAL_VAE)), bench.sides[-1]
    with transformer(bench) as model:

        def whole() -> None:
            x = mx.random.normal((1, 16, side // 8, side // 8))
            given = model.condition([random_caption(bench)], side // 8, side // 8)
            for i in range(8):
                x = x + model.denoise(x, mx.array([i / 8]), given).astype(mx.float32) / 8
                mx.eval(x)
            mx.eval(vae.decode(x, Strips(FAST_ROWS)))

        bench.measure(f"picture, 8 steps {side}", whole, 8 * bench.flops(side), 3)


def peers(bench: Bench) -> None:
    """mflux's forward pass, where it is installed."""
    try:
        mflux = importlib.import_module("mflux.models.z_image.model.z_image_transformer.transformer")
    except ImportError as error:
        print(json.dumps({"case": "mflux", "skipped": f"not installed: {error}"}))
        return
    model = random_(mflux.ZImageTransformer())
    for side in bench.sides:
        x = mx.random.normal((16, 1, side // 8, side // 8)).astype(mx.bfloat16)
        caption, t = random_caption(bench), mx.array([0.3])
        call = mx.compile(lambda x, caption=caption, t=t: model(x=x, timestep=t, sigmas=None, cap_feats=caption))
        bench.measure(f"mflux forward {side}", lambda x=x, call=call: mx.eval(call(x)), bench.flops(side), 8)


def random_caption(bench: Bench) -> mx.array:
    """(CAPTION, cap_feat_dim) bfloat16."""
    return mx.random.normal((CAPTION, bench.config.cap_feat_dim)).astype(mx.bfloat16)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the ratio to mflux where it was measured."""
    peers = {r["case"].removeprefix("mflux "): r["ms"] for r in rows if r["case"].startswith("mflux") and "ms" in r}
    lines = ["| case | ms | TFLOP/s | MFU | over GB | of mflux |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        ratio = f"{row['ms'] / peers[row['case']]:.2f}" if row["case"] in peers and "ms" in row else ""
        cells = [row.get("ms", row.get("error", "")), row.get("tflops", ""), row.get("mfu", ""), row.get("over_gb", "")]
        lines.append(f"| {row['case']} | " + " | ".join(map(str, cells)) + f" | {ratio} |")
    return "\n".join(lines)


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
        "peers": [lambda: peers(bench)],
    }
    for case in args.cases.split(","):
        for run in runs[case]:
            run()
            gc.collect()
            mx.clear_cache()
    print(table(bench.rows))


if __name__ == "__main__":
    main()
