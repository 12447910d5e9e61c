"""From files to the first step: how much of it is reading, quantizing, building programs.

    python tests/bench/bench_start.py
    python tests/bench/bench_start.py --blocks 4 --side 256 --from-disk

It makes its files itself: random weights in bfloat16 and in 4 bits. Each run is a process of its own. It opens the
files, loads the text encoder, encodes a prompt, loads the transformer and makes two steps. The first step takes longer
than the second: programs, kernels and memory are made once. Reading includes the cast to the precision of the
computation.

--from-disk: the system forgets the files before each run; else they come from memory (the page cache). --cpu-seconds
counts the seconds that the process computed, for a CPU that is shared with others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import bench_stream
import mlx.core as mx
import whole_runs

from zimage_mlx import ZImagePipeline
from zimage_ref.model import config

BITS = 4
CASES = (("bf16", BITS), ("4", None))  # what is stored, and what it is quantized to on the way in


class Stages:
    """Seconds by stage, in order."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}
        self._quantizing = 0.0

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, whose time is that of the stage `name`."""
        start = self._clock()
        result = work()
        self.seconds[name] = self._clock() - start
        return result

    def loaded(self, name: str, work: Callable[[], Any]) -> None:
        """As `timed`, with the time of quantizing as a stage of its own."""
        self._quantizing, quantize = 0.0, mx.quantize

        def counted(array: mx.array, *sizes: int, **options: Any) -> Any:
            if sizes:  # a layer makes weights of its own, which are dropped before they are computed
                return quantize(array, *sizes, **options)
            mx.eval(array)  # reading ends here
            start = self._clock()
            made = quantize(array, **options)
            mx.eval(made)
            self._quantizing += self._clock() - start
            return made

        with mock.patch.object(mx, "quantize", counted):
            self.timed(f"{name}: read", work)
        self.seconds[f"{name}: read"] -= self._quantizing
        self.seconds[f"{name}: quantize"] = self._quantizing


def measured(model: Path, quantize: int | None, side: int, started: float) -> dict[str, float]:
    """The stages of this process. started: seconds since the epoch; 0 counts those that the process computed."""
    clock = time.time if started else time.process_time
    stages = Stages(clock)
    stages.seconds["start Python, import"] = clock() - started
    pipe = stages.timed("open the files", lambda: ZImagePipeline.from_pretrained(model, quantize=quantize, lean=True))
    stages.loaded("text encoder", lambda: pipe.text_encoder)
    prompt = stages.timed("encode the prompt", lambda: pipe.settle(pipe.encode_prompt(whole_runs.CAPTION)))
    pipe.release("text_encoder")
    stages.loaded("transformer", lambda: pipe.transformer)
    latents = mx.random.normal((1, config.OFFICIAL_TRANSFORMER.in_channels, side // 8, side // 8))
    conditioning = pipe.condition([prompt], side // 8, side // 8)
    stages.timed("refine the prompt", lambda: pipe.settle(conditioning.caption))

    def step() -> None:
        pipe.settle(pipe.predict(latents, 0.7, conditioning))

    stages.timed("first step", step)
    stages.timed("step", step)
    stages.seconds["first step: made once"] = max(0.0, stages.seconds.pop("first step") - stages.seconds["step"])
    return stages.seconds


def forget(folder: Path) -> None:
    """Makes the system read the files of `folder` from the disk next time. Linux only."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def made(home: Path, precision: str, blocks: int, small: bool) -> Path:
    """The folder of a model whose weights are stored in `precision`."""
    model = home / precision
    if not model.exists():
        unfinished = home / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        bench_stream.write_model(unfinished, precision, blocks, small)
        unfinished.rename(model)
    return model


def show(columns: dict[str, dict[str, float]]) -> None:
    """Prints stages as rows, cases as columns: seconds and share of the whole."""
    names = list(next(iter(columns.values())))
    print("| stage | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    totals = {case: sum(seconds.values()) for case, seconds in columns.items()}
    for name in names:
        cells = [f"{s[name]:.2f} s, {s[name] / totals[case]:.0%}" for case, s in columns.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("| all | " + " | ".join(f"{total:.2f} s" for total in totals.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=config.OFFICIAL_TRANSFORMER.n_layers, help="layers")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3, help="of each case, in turn; the shortest counts")
    parser.add_argument("--small", action="store_true", help="a third of the width")
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the files are made, and kept; default: a temporary one")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "BITS", "STARTED"), help="one run, in this process")
    args = parser.parse_args()
    if args.run:
        model, bits, started = args.run
        print(json.dumps(measured(Path(model), int(bits) or None, args.side, float(started))))
        return
    best: dict[str, dict[str, float]] = {}
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for _ in range(args.runs):
            for stored, bits in CASES:
                model = made(home, stored, args.blocks, args.small)
                if args.from_disk:
                    forget(model)
                command = [sys.executable, __file__, "--side", str(args.side), "--run", str(model), str(bits or 0)]
                command.append(str(0 if args.cpu_seconds else time.time()))
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found, label = json.loads(done.stdout), f"{stored} file" + (f", to {bits} bits" if bits else "")
                print(json.dumps({"case": label} | found), file=sys.stderr, flush=True)
                if label not in best or sum(found.values()) < sum(best[label].values()):
                    best[label] = found
    show(best)


if __name__ == "__main__":
    main()
