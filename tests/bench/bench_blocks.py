"""The model of time beside a few blocks of full width, on any machine: python tests/bench/bench_blocks.py [--side 256]

bench_doctor.py needs a GPU that holds the whole model. This one runs on a CPU, too: a transformer whose blocks are all
one, the autoencoder, some layers of the text encoder. Two predictions stand beside what was measured:

- "rates": the formula with rates alone, which is what the table of chips in docs/macs.md is made with;
- "doctor": the same, corrected by two blocks, or by the decoder, measured as the doctor does it. It has no part of its
  own for the encoder.

Rates, parts and cases are measured in turn, and the fastest of all rounds counts: other work on the machine can only
slow a run down. --cpu-seconds counts the seconds that the process computed, for a CPU that is shared with others: give
it one thread then (OMP_NUM_THREADS=1). The exit code is 1 if a prediction of the doctor is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import mlx.core as mx

from zimage_mlx.device import multiply_in_float32, on_gpu
from zimage_mlx.doctor.checking import Pace
from zimage_mlx.doctor.numbers import DTYPES
from zimage_mlx.doctor.parts import RepeatedTransformer, with_random_weights
from zimage_mlx.doctor.rates import Measuring, by_precision
from zimage_mlx.networks.strips import Strips
from zimage_mlx.networks.vae import VAE
from zimage_ref.doctor import work
from zimage_ref.doctor.findings import Rate
from zimage_ref.doctor.prediction import Part, Rates, TimeModel
from zimage_ref.doctor.work import Tokens, Work
from zimage_ref.memory import FAST, LEAN
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE

WITHIN = 0.15
FEW = 2  # blocks of the parts that correct the formula
STEPS = {"step lean": True, "step fast": False}


@dataclass
class Case:
    """Work that is measured: how much it is, and its shortest run so far."""

    name: str
    blocks: int  # 0 for the autoencoder
    amount: Work
    run: Callable[[], object]
    seconds: float = math.inf

    def measure(self) -> None:
        """One more run."""
        start = time.perf_counter()
        self.run()
        self.seconds = min(self.seconds, time.perf_counter() - start)


def transformer_cases(dtype: str, side: int, blocks: int) -> Iterator[Case]:
    """A forward pass and both ways of a step, with FEW layers and with `blocks`."""
    tokens, itemsize = Tokens.of(side), DTYPES[dtype].size
    network, trained = (RepeatedTransformer(dtype, dtype, trains=trains) for trains in (False, True))
    runs = {"forward": network.forward(side), **{name: trained.step(side, lean) for name, lean in STEPS.items()}}
    for count in (FEW, blocks):
        for name, run in runs.items():
            if name == "forward":
                amount = work.forward(OFFICIAL_TRANSFORMER, tokens, itemsize, count)
            else:
                amount = work.step(OFFICIAL_TRANSFORMER, tokens, itemsize, STEPS[name], count)
            owner = network if name == "forward" else trained

            def resized(owner: RepeatedTransformer = owner, count: int = count, run: Callable[[], None] = run) -> None:
                owner.resize(count)
                run()

            yield Case(name, count, amount, resized)


def autoencoder_cases(dtype: str, side: int) -> Iterator[Case]:
    """Decoding in both modes, and encoding."""
    vae = with_random_weights(VAE(OFFICIAL_VAE), dtype)
    pixels, latents = mx.zeros((1, 3, side, side)), mx.random.normal((1, 16, side // 8, side // 8))
    decoded = work.decode(OFFICIAL_VAE, side * side, DTYPES[dtype].size)
    for mode, strips in (("lean", LEAN.strips), ("fast", FAST.strips)):
        yield Case(f"decode {mode}", 0, decoded, lambda s=strips: mx.eval(vae.decode(latents, Strips(s))))
    encoded = work.encode(OFFICIAL_VAE, side * side, DTYPES[dtype].size)
    yield Case("encode", 0, encoded, lambda: mx.eval(vae.encode(pixels, Strips(LEAN.strips))))


def fastest(found: list[list[Rate]], dtype: str) -> Rates:
    """The rates of the best round, each for itself."""
    best = [max(same, key=lambda rate: rate.per_second) for same in zip(*found, strict=True)]
    for rate in best:
        unit = "GB/s" if rate.unit == "byte" else "GFLOP/s"
        print(f"{rate.name}, {rate.size}: {rate.per_second / 1e9:.1f} {unit}")
    return by_precision(best, [dtype], dtype)[dtype]


def measured(dtype: str, side: int, blocks: int, rounds: int) -> tuple[Rates, list[Case]]:
    """Rates and cases, in turn."""
    cases = [*transformer_cases(dtype, side, blocks), *autoencoder_cases(dtype, side)]
    found = []
    for i in range(rounds):
        rates = Measuring(Pace.measure(), dtype, 0.8)
        found.append([rate for rate in rates.all([dtype], lambda *words: None) if rate.dtype in (dtype, "f32")])
        for case in cases:
            case.measure()
            mx.clear_cache()
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    return fastest(found, dtype), cases


def show(dtype: str, side: int, rates: Rates, cases: list[Case]) -> int:
    """Prints predictions beside what was measured. Returns how many of the doctor's are too far off."""
    parts = [
        Part(each.name, dtype, side, each.amount, each.seconds)
        for each in cases
        if each.blocks == FEW or each.name.startswith("decode")
    ]
    plain, corrected = TimeModel({dtype: rates}, dtype), TimeModel({dtype: rates}, dtype, parts)
    print("| case | measured s | rates: predicted s | ratio | doctor: predicted s | ratio |\n|---|--:|--:|--:|--:|--:|")
    far = 0
    for each in cases:
        name = "decode lean" if each.name == "encode" else each.name
        by_rates, by_doctor = (model.seconds(name, dtype, side, each.amount) for model in (plain, corrected))
        part = each.blocks == FEW or each.name.startswith("decode")
        far += not part and abs(by_doctor / each.seconds - 1) > WITHIN
        doctor = "the part | " if part else f"{by_doctor:.2f} | {by_doctor / each.seconds:.2f}"
        label = f"{each.name}, {each.blocks} layers" if each.blocks else each.name
        print(f"| {label} | {each.seconds:.2f} | {by_rates:.2f} | {by_rates / each.seconds:.2f} | {doctor} |")
    return far


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--blocks", type=int, default=4, help="layers; two or four blocks of refiners come on top")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu() else "f32")
    parser.add_argument("--cpu-seconds", action="store_true", help="count the seconds of this process alone")
    args = parser.parse_args()
    multiply_in_float32()
    with mock.patch.object(time, "perf_counter", time.process_time if args.cpu_seconds else time.perf_counter):
        rates, cases = measured(args.dtype, args.side, args.blocks, args.rounds)
    return int(show(args.dtype, args.side, rates, cases) > 0)


if __name__ == "__main__":
    sys.exit(main())
