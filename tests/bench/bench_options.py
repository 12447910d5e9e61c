"""The cost of options over the plain forward pass, of the full-size model on random weights.

    python tests/bench/bench_options.py                       # ControlNet 2.1 and its lite variant, and NAG
    python tests/bench/bench_options.py --sides 512 --small   # a small model, to try the script anywhere

Where mflux is installed, its ControlNet 2.1 is measured, too. One JSON line a case, then a line for each option with
its time over that of the plain pass.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
from bench_speed import SMALL, transformer
from measure import Bench, random_, random_caption
from peers import mflux_controlled

from zimage_mlx.networks.controlnet import Control, ControlNet
from zimage_mlx.networks.running import BlockRunner
from zimage_mlx.networks.steered import condition_steered
from zimage_mlx.networks.transformer import Conditioning, Transformer
from zimage_ref.model import config
from zimage_ref.model.control import CONTROLNET_2_1
from zimage_ref.model.steering import Nag, Steering

VARIANTS = {"2.1": CONTROLNET_2_1, "2.1 lite": replace(CONTROLNET_2_1, control_layers_places=(0, 10, 20))}


def run_of(model: Transformer, x: mx.array, given: Conditioning) -> Callable[[], None]:
    """Computes one forward pass."""
    return lambda: mx.eval(model.denoise(x, mx.array([0.3]), given))


def main() -> None:
    """Measures every option at every side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="512,1024")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    small, sides = bool(args.small), [int(side) for side in args.sides.split(",")]
    bench = Bench(SMALL if small else config.OFFICIAL_TRANSFORMER, sides)
    lines: list[str] = []
    with transformer(bench) as model:
        for side in sides:
            size, caption = (side // 8, side // 8), random_caption(bench.config)
            x = mx.random.normal((1, 16, *size))
            plain = model.condition([caption], *size)
            nag = Steering(nag=Nag(3.0), negatives=[random_caption(bench.config)])
            cases = {"plain": plain, "NAG": condition_steered(model, [caption], *size, nag)}
            for name, variant in VARIANTS.items():
                if small:
                    variant = replace(variant, dim=SMALL.dim, n_heads=SMALL.n_heads, control_layers_places=(0, 2))
                network = random_(ControlNet(variant, BlockRunner()))
                context = mx.random.normal((1, variant.control_in_dim, *size))
                cases[name] = replace(plain, control=Control(network, context, 0.7))
            seconds = {
                name: bench.measure(f"{name} {side}", run_of(model, x, given), runs=8) for name, given in cases.items()
            }
            lines += [f"{n} {side}: {s / seconds['plain']:.3f} x" for n, s in seconds.items() if not math.isnan(s)]
    lines += [f"mflux 2.1 {side}: {ratio:.3f} x" for side, ratio in mflux_controlled(bench).items()]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
