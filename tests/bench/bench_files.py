"""Files at full size: loading time, conversion speed and memory. Run: python tests/bench/bench_files.py [GB] [FOLDER]

Everything is measured in one run, each file read once before the clock starts. Peak memory is the resident set of a
process of its own, above what it has before it opens the file; pages of mapped files count in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from zimage_mlx.networks.weights import read_ahead, to_mlx
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import BFLOAT16, Tensor

SHAPE = (10240, 3840)  # the largest matrix of the transformer

_MEASURED = """
import pathlib, resource, sys, time
from zimage_cli.app import main
def peak():
    if sys.platform == "linux":  # ru_maxrss would start with the parent's
        return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = peak(), time.perf_counter()
code = main(sys.argv[1:])
print(code, time.perf_counter() - start, peak() - before, file=sys.stderr)
"""


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The best of `times` runs: the others were disturbed."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def load_with_mlx(path: Path) -> None:
    for array in mx.load(str(path)).values():
        mx.eval(array)


def load_with_ours(path: Path) -> None:
    mx.eval(dict(read_ahead(Checkpoint.open(path).tensors, mx.bfloat16)))


def convert(*options: str) -> tuple[float, int]:
    """Seconds (the best of four runs) and peak bytes of `zimage convert` in a process of its own."""
    return min(_convert(*options) for _ in range(4))


def _convert(*options: str) -> tuple[float, int]:
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, "convert", "--overwrite", *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, took, peak = run.stderr.split("\n")[-2].split()
    if code != "0":
        raise SystemExit(run.stderr)
    return float(took), int(peak)


def copy(source: Path, target: Path) -> None:
    """cp, and the data on the disk, as our writer leaves it."""
    subprocess.run(["cp", str(source), str(target)], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def bench_loading(folder: Path, gigabytes: float) -> None:
    count = max(1, round(gigabytes * 1e9 / (2 * SHAPE[0] * SHAPE[1])))
    data = np.random.default_rng(0).integers(0, 1 << 15, SHAPE, np.uint16).view(BFLOAT16)
    tensors = {f"layers.{i}.w1.weight": Tensor.of(data) for i in range(count)}
    total = sum(t.nbytes for t in tensors.values()) / 1e9
    theirs = folder / "theirs.npz"
    safetensors.write(folder / "a.safetensors", tensors)
    npz.write(folder / "a.npz", tensors)
    array = to_mlx(Tensor.of(data), mx.bfloat16)
    mx.savez(str(theirs), **dict.fromkeys(tensors, array))
    print(f"loading {total:.2f} GB of bfloat16 in {count} tensors")
    base = seconds(lambda: load_with_mlx(folder / "a.safetensors"))
    slow = seconds(lambda: load_with_mlx(folder / "a.npz"))
    print(f"  mx.load of safetensors     {base:6.2f} s")
    print(f"  mx.load of npz             {slow:6.2f} s")
    for name in ("a.npz", "theirs.npz", "a.safetensors"):
        ours = seconds(lambda name=name: load_with_ours(folder / name))  # type: ignore[misc]
        print(
            f"  ours, {name:<20} {ours:6.2f} s   {ours / base:.2f} x safetensors, {slow / ours:.1f} x faster than npz"
        )
    for path in (theirs, folder / "a.npz", folder / "a.safetensors"):
        path.unlink()


def bench_convert(folder: Path, blocks: int) -> None:
    """A transformer of full width with fewer blocks, through the command line."""
    from dataclasses import replace

    from zimage_ref.model import config, parameters

    shapes = parameters.transformer_parameters(replace(config.OFFICIAL_TRANSFORMER, n_layers=blocks))
    block = np.random.default_rng(0).standard_normal(max(int(np.prod(s)) for s in shapes.values()), np.float32)
    tensors = {n: Tensor.of(block[: int(np.prod(s))].reshape(s)) for n, s in shapes.items()}
    source = folder / "source.safetensors"
    safetensors.write(source, {n: t.cast("bf16") for n, t in tensors.items()})
    largest = 2 * block.size
    size = source.stat().st_size
    copied = seconds(lambda: copy(source, folder / "copy"))
    os.remove(folder / "copy")
    print(f"converting {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; cp takes {copied:.2f} s")
    common = ("--input", str(source), "--model-type", "t")
    for options in (
        ("a.npz",), ("a.safetensors",), ("a.safetensors", "--naming", "comfy"), ("a.npz", "--dtype", "f32"),
        ("a.npz", "--dtype", "f16"), ("a.npz", "--quantize", "4"), ("a.safetensors", "--quantize", "8"),
    ):  # fmt: skip
        took, peak = convert(*common, "--output", str(folder / options[0]), *options[1:])
        fused = 3 if "comfy" in options else 1
        biggest = max(largest, 2 * fused * 3840**2) * (2 if "f32" in options else 1)
        print(
            f"  {' '.join(options):<32} {took:6.2f} s   {size / took / 1e9:5.2f} GB/s   {took / copied:5.2f} x cp   "
            f"peak {peak / 1e6:6.0f} MB = {peak / biggest:.1f} largest tensors"
        )


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else None))
    try:
        bench_loading(folder, gigabytes)
        bench_convert(folder, max(1, round(3 * gigabytes)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
