"""What --nag costs on a processor, where a whole model would take minutes: blocks of full size, in float32.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python tests/bench/bench_nag.py --side 512

The processor's time of a pass with one layer and with two gives that of a layer, and so that of a pass with all layers.
On a GPU, take bench_options.py.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_map

from zimage_mlx.networks.running import BlockRunner
from zimage_mlx.networks.steered import condition_steered
from zimage_mlx.networks.transformer import Transformer
from zimage_ref.model import config
from zimage_ref.model.steering import Nag, Steering

CAPTION = 64  # tokens
NAMES = ("plain", "NAG")


def seconds_with(layers: int, side: int, runs: int) -> dict[str, float]:
    """The processor's seconds of a pass without and with NAG; the fastest of `runs`, in turns."""
    shape = replace(config.OFFICIAL_TRANSFORMER, n_layers=layers, n_refiner_layers=1)
    model, size = Transformer(shape, BlockRunner()), (side // 8, side // 8)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.02, model.parameters()))
    captions = [mx.random.normal((CAPTION, shape.cap_feat_dim)) for _ in NAMES]
    x = mx.random.normal((1, 16, *size))
    mx.eval(model.parameters(), captions, x)
    nag = Steering(nag=Nag(3.0), negatives=captions[1:])
    given = model.condition(captions[:1], *size), condition_steered(model, captions[:1], *size, nag)
    best = dict.fromkeys(NAMES, float("inf"))
    for _ in range(runs):
        for name, conditioning in zip(NAMES, given, strict=True):
            begun = time.process_time()
            mx.eval(model.denoise(x, mx.array([0.3]), conditioning))
            best[name] = min(best[name], time.process_time() - begun)
    return best


def main() -> None:
    """Prints the seconds of a layer and of a whole pass, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    one, two = (seconds_with(layers, args.side, args.runs) for layers in (1, 2))
    layer = {name: two[name] - one[name] for name in NAMES}
    whole = {name: one[name] + (config.OFFICIAL_TRANSFORMER.n_layers - 1) * layer[name] for name in NAMES}
    for what, taken in (("layer", layer), ("pass", whole)):
        print(f"{what}: {taken['plain']:.2f} s, with NAG {taken['NAG']:.2f} s, {taken['NAG'] / taken['plain']:.3f} x")


if __name__ == "__main__":
    main()
