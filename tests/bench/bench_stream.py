"""Memory and time of whole runs of the full-size model from files, lean and streamed.

    python tests/bench/bench_stream.py --steps 2
    python tests/bench/bench_stream.py --steps 2 --precisions 4 --sides 1024 --works train --folder /scratch

It makes its files itself: random weights in bfloat16 (21 GB) and in 4 bits (7 GB), made on the device and written once.
Every run is a process of its own. One JSON line a run, then a table. --small: a third of the width, for a CPU, where
precision f32 is what the networks compute in.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import whole_runs

from zimage_mlx import Step, TrainConfig, ZImagePipeline, train
from zimage_mlx.networks.fused_attention import without_fused_gradient
from zimage_mlx.networks.weights import to_stored
from zimage_ref.formats import safetensors
from zimage_ref.formats.checkpoint import RECORD_KEY
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import BFLOAT16, DTYPES, Array, Tensor
from zimage_ref.model import config, parameters
from zimage_ref.model.quantization import covers

FOUR = Quantization(4)
SPREAD = 0.02  # of the weights
KEYS = ("work", "side", "precision", "memory", "peak_gb", "resident_gb", "seconds_a_step", "seconds")


def write_model(folder: Path, precision: str, blocks: int, small: bool) -> None:
    """A whole model of random weights, in bfloat16 or float32, or with the large matrices in 4 bits."""
    transformer = replace(config.OFFICIAL_TRANSFORMER, n_layers=blocks)
    text_encoder = replace(config.OFFICIAL_TEXT_ENCODER, num_hidden_layers=min(36, blocks + 1))
    if small:
        transformer = replace(transformer, dim=1280, n_heads=10, cap_feat_dim=640)
        text_encoder = replace(text_encoder, hidden_size=640, intermediate_size=2432, num_attention_heads=8)

    def write(part: str, path: Path, shapes: parameters.Shapes) -> None:
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            tensors |= random_tensors(name, shape, "bf16" if part == "vae" and precision == "4" else precision)
        packed = precision == "4" and part != "vae"
        record = {RECORD_KEY: json.dumps({"quantization": FOUR.to_json()})} if packed else None
        safetensors.write(path, tensors, record)

    whole_runs.write_model(folder, transformer, text_encoder, write)


def random_tensors(name: str, shape: tuple[int, ...], precision: str) -> dict[str, Tensor]:
    """The tensors of a file for one parameter. They are made when they are written."""
    if precision != "4" or not covers(FOUR, name, shape):
        near = 1.0 if len(shape) == 1 and "norm" in name else 0.0
        stored = Tensor(shape, BFLOAT16, lambda: random_values(shape, SPREAD, near))
        return {name: stored.cast("f32") if precision == "f32" else stored}
    rows, groups, layer = shape[0], (shape[0], shape[1] // FOUR.group_size), name.removesuffix("weight")
    words = (rows, shape[1] * FOUR.bits // 32)
    step = SPREAD / 4  # values from -8 to 7 times this
    return {
        f"{layer}weight": Tensor(words, DTYPES["u32"], lambda: random_words(words)),
        f"{layer}scales": Tensor(groups, BFLOAT16, lambda: random_values(groups, 0, step)),
        f"{layer}biases": Tensor(groups, BFLOAT16, lambda: random_values(groups, 0, -8 * step)),
    }


def random_words(shape: tuple[int, ...]) -> Array:
    """Random packed weights in uint32, made on the device."""
    return np.array(mx.random.randint(-(2**31), 2**31 - 1, shape).view(mx.uint32))


def random_values(shape: tuple[int, ...], spread: float, near: float) -> Array:
    """Normal values in bfloat16, made on the device."""
    return to_stored((mx.random.normal(shape) * spread + near).astype(mx.bfloat16))


def measured(work: str, model: Path, side: int, memory: str, steps: int) -> dict[str, Any]:
    """Peak, resident memory and seconds of making a picture in `steps` steps, or of training for as many."""
    times, peak = list[float](), whole_runs.follow_peak()
    start = time.perf_counter()
    if work == "generate":
        pipe = ZImagePipeline.from_pretrained(model, stream=memory == "stream", lean=True)
        clock = [time.perf_counter()]

        def follow(stage: str, done: int, total: int) -> None:
            if stage == "denoise":
                times.append(time.perf_counter() - clock[0])
            clock[0] = time.perf_counter()

        pipe(whole_runs.CAPTION, width=side, height=side, steps=steps, progress=follow)
    else:
        data = whole_runs.write_pictures(model.parent / f"pictures{side}", side)
        output = model.parent / f"{memory}{side}" / "lora.safetensors"
        options = {"resolution": (side,), "steps": steps, "memory": memory, "overwrite": True}
        for event in train(TrainConfig(model, data, output, force=True, **options)):
            if isinstance(event, Step):
                times.append(event.seconds)
    return {
        "peak_gb": round(peak() / 1e9, 3),
        "resident_gb": round(most_resident() / 1e9, 3),
        "seconds_a_step": round(min(times[1:] or times), 3),
        "seconds": round(time.perf_counter() - start, 1),
    }


def most_resident() -> int:
    """Bytes of memory that this process held at most. Linux would count its parent's, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--works", nargs="+", default=["generate", "train"])
    parser.add_argument("--memory", nargs="+", default=["lean", "stream"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "4"])
    parser.add_argument("--blocks", type=int, default=config.OFFICIAL_TRANSFORMER.n_layers)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--chunks", action="store_true", help="the gradient of attention in chunks, as on a Mac")
    parser.add_argument("--folder", type=Path, help="where the files are made, and kept; default: a temporary one")
    parser.add_argument("--run", nargs=4, metavar=("WORK", "MODEL", "SIDE", "MEMORY"), help="one run, in this process")
    args = parser.parse_args()
    if args.run:
        work, model, side, memory = args.run
        with without_fused_gradient() if args.chunks else nullcontext():
            print(json.dumps(measured(work, Path(model), int(side), memory, args.steps)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        home, rows = args.folder or Path(temporary), []
        for precision in args.precisions:
            model = home / precision / "model"
            if not model.exists():
                start = time.perf_counter()
                unfinished = home / precision / "unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                write_model(unfinished, precision, args.blocks, args.small)
                unfinished.rename(model)
                print(f"files of {precision}: {time.perf_counter() - start:.0f} s", flush=True)
            for work in args.works:
                for side in args.sides:
                    for memory in args.memory:
                        given = ["--run", work, str(model), str(side), memory, "--steps", str(args.steps)]
                        given += ["--chunks"] * args.chunks
                        done = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True)
                        row = {"work": work, "side": side, "precision": precision, "memory": memory}
                        row |= json.loads(done.stdout) if done.returncode == 0 else {"seconds": "failed"}
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    print("\n| " + " | ".join(KEYS) + " |\n|" + "---|" * len(KEYS))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in KEYS) + " |")


if __name__ == "__main__":
    main()
