"""Peak memory of whole runs of the full-size model, lean, on weights of 4 bits: python tests/bench/bench_totals.py

Every run is a process of its own and begins with files: a model in the official layout whose bfloat16 weights are all
zero, which take no room on a disk with sparse files, quantized while they are loaded. One JSON line a run; peaks are
MLX's. --small: a model of two blocks, to try the script anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import whole_runs

from zimage_mlx import TrainConfig, ZImagePipeline, train
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.model import config

BITS = 4
RUNS = (("generate", 512), ("generate", 1024), ("train", 512), ("train", 1024))


def write_model(folder: Path, small: bool) -> None:
    """A model of zeros."""
    transformer, text_encoder = config.OFFICIAL_TRANSFORMER, config.OFFICIAL_TEXT_ENCODER
    if small:
        transformer = replace(transformer, dim=384, n_heads=3, n_layers=2)
        text_encoder = replace(text_encoder, num_hidden_layers=3)
    whole_runs.write_model(folder, transformer, text_encoder, lambda part, path, shapes: write_zeros(path, shapes))


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros, its data a hole."""
    tensors = {name: Tensor(shape, BFLOAT16, lambda: np.empty(0)) for name, shape in shapes.items()}
    with path.open("wb") as file:
        file.write(safetensors.header_of(tensors))
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors.values()))


def peak_of(work: str, model: Path, side: int) -> int:
    """Bytes at the peak of making a picture in 2 steps, or of training for 3, captions and latents included."""
    peak = whole_runs.follow_peak()
    if work == "generate":
        ZImagePipeline.from_pretrained(model, quantize=BITS, lean=True)("a red fox", width=side, height=side, steps=2)
    else:
        data, output = whole_runs.write_pictures(model / str(side), side), model / f"{side}.safetensors"
        options = {"resolution": (side,), "steps": 3, "base_precision": str(BITS), "memory": "lean"}
        for _ in train(TrainConfig(model, data, output, **options)):
            pass
    return peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("WORK", "MODEL", "SIDE"), help="one run, in this process")
    args = parser.parse_args()
    if args.run:
        work, model, side = args.run
        start = time.perf_counter()
        peak = peak_of(work, Path(model), int(side))
        row = {"case": f"{work} {side} {BITS} bits", "peak_gb": round(peak / 1e9, 3)}
        print(json.dumps(row | {"seconds": round(time.perf_counter() - start, 1)}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.small)
        for work, side in RUNS:
            given = [work, folder, str(side // 16 if args.small else side)]
            subprocess.run([sys.executable, __file__, "--run", *given], check=True)


if __name__ == "__main__":
    main()
