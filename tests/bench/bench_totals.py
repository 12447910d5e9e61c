"""Peak memory of whole runs of the full-size model, lean, on weights of 4 bits: python tests/bench/bench_totals.py

Every run is a process of its own and begins with files: a model in the official layout whose bfloat16 weights are all
zero, which take no room on a disk with sparse files, quantized while they are loaded. One JSON line a run; peaks are
MLX's. --small: a model of two blocks, to try the script anywhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from zimage_mlx import TrainConfig, ZImagePipeline, train
from zimage_ref.checkpoints.hub import BUILT_IN
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.model import config, parameters

BITS = 4
RUNS = (("generate", 512), ("generate", 1024), ("train", 512), ("train", 1024))


def write_model(folder: Path, small: bool) -> None:
    """A model of zeros, with the tokenizer of the built-in one."""
    transformer, text_encoder = config.OFFICIAL_TRANSFORMER, config.OFFICIAL_TEXT_ENCODER
    if small:
        transformer = replace(transformer, dim=384, n_heads=3, n_layers=2)
        text_encoder = replace(text_encoder, num_hidden_layers=3)
    tiny = BUILT_IN
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(tiny / part, folder / part)
    shutil.copy(tiny / "model_index.json", folder)
    for part, stem, network, shapes in (
        ("transformer", "diffusion_pytorch_model", transformer, parameters.transformer_parameters(transformer)),
        ("text_encoder", "model", text_encoder, parameters.text_encoder_parameters(text_encoder)),
        ("vae", "diffusion_pytorch_model", config.OFFICIAL_VAE, parameters.vae_parameters(config.OFFICIAL_VAE)),
    ):
        (folder / part).mkdir()
        write_zeros(folder / part / f"{stem}.safetensors", shapes)
        (folder / part / "config.json").write_text(json.dumps(network.to_json()))


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros, its data a hole."""
    tensors = {name: Tensor(shape, BFLOAT16, lambda: np.empty(0)) for name, shape in shapes.items()}
    with path.open("wb") as file:
        file.write(safetensors.header_of(tensors))
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors.values()))


def write_pictures(folder: Path, side: int) -> Path:
    """Four pictures of noise and their captions."""
    folder.mkdir(exist_ok=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a big red star left of a small blue ring on a yellow background " * 3)
    return folder


def peak_of(work: str, model: Path, side: int) -> int:
    """Bytes at the peak of making a picture in 2 steps, or of training for 3, captions and latents included."""
    peaks, reset = list[int](), mx.reset_peak_memory

    def remember() -> None:  # training starts its count anew when it comes to the steps
        peaks.append(mx.get_peak_memory())
        reset()

    mx.reset_peak_memory = remember
    if work == "generate":
        ZImagePipeline.from_pretrained(model, quantize=BITS, lean=True)("a red fox", width=side, height=side, steps=2)
    else:
        data, output = write_pictures(model / str(side), side), model / f"{side}.safetensors"
        options = {"resolution": (side,), "steps": 3, "base_precision": str(BITS), "memory": "lean"}
        for _ in train(TrainConfig(model, data, output, **options)):
            pass
    return max(*peaks, mx.get_peak_memory(), 0)


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
