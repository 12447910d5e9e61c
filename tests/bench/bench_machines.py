"""Pictures a second of LoRA training on one GPU and on several of one machine, full-size on random weights.

    mlx.launch --backend nccl -n 2 python tests/bench/bench_machines.py     # -n 1 is the figure to compare with
    python tests/bench/bench_machines.py --small                     # one process, a small model

Each process draws random pictures, makes the gradient, and all of them sum it as training does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from bench_speed import SMALL, transformer
from measure import Bench, random_caption
from mlx.utils import tree_flatten

from zimage_mlx.device import on_gpu
from zimage_mlx.lora.layers import add_trainable_loras
from zimage_mlx.networks.tree import place
from zimage_mlx.training.gradient import LossAndGradients
from zimage_mlx.training.loss import NoisyBatch
from zimage_mlx.training.machines import group, summed_together
from zimage_mlx.training.optimizer import Optimizer
from zimage_mlx.training.packing import Packing
from zimage_ref.model import config, parameters
from zimage_ref.training.config import TrainConfig


def main() -> None:
    """Prints a JSON line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="512,1024")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    machines = group()
    bench = Bench(SMALL if args.small else config.OFFICIAL_TRANSFORMER, [])
    with transformer(bench) as model:
        layers = parameters.lora_modules(bench.config, ("attention", "feed_forward", "refiners"))
        add_trainable_loras(model, layers, 16, 16.0, np.random.default_rng(0))
        factors = dict(tree_flatten(model.trainable_parameters()))
        packing = Packing(factors)
        vectors = packing.pack(factors)
        optimizer = Optimizer(TrainConfig(model_dir=Path(), dataset=Path()), packing, vectors)
        differentiate = LossAndGradients(model, 1e30, compiled=on_gpu())
        for side in map(int, args.sides.split(",")):
            noisy = [mx.random.normal((1, 16, side // 8, side // 8)) for _ in range(2)]
            batch = NoisyBatch(noisy[0], noisy[1], mx.array([0.4]), [random_caption(bench.config)])
            times = []
            for _ in range(args.steps):
                start = time.perf_counter()
                place(model, packing.unpack(vectors, model.dtype))
                loss, gradients = differentiate(batch)
                packed = packing.pack(gradients)
                mx.eval(loss, packed)
                if machines.size() > 1:
                    loss, *parts = summed_together([loss, *packed.values()], machines)
                    packed = dict(zip(packed, parts, strict=True))
                vectors = optimizer.apply(vectors, packed, 1e-4)
                mx.eval(vectors)
                times.append(time.perf_counter() - start)
            if machines.rank() == 0:
                seconds = statistics.median(times[3:])
                row = {"machines": machines.size(), "side": side, "ms": round(1e3 * seconds, 2)}
                print(json.dumps(row | {"pictures a second": round(machines.size() / seconds, 2)}), flush=True)


if __name__ == "__main__":
    main()
