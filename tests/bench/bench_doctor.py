"""What `zimage doctor` predicts beside what the benchmark measures: python tests/bench/bench_doctor.py [--json FILE]

Forward passes, training steps and whole pictures of the official model with random weights, in bfloat16, as
bench_speed.py runs them. --json: predictions of an earlier run of `zimage doctor --json FILE`; without it the doctor is
run first, in full. The exit code is 1 if a prediction is off by more than a quarter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_speed
from measure import Bench

from zimage_mlx import diagnose
from zimage_mlx.device import multiply_in_float32
from zimage_ref.model import config

WITHIN = 0.25
_CASES = re.compile(r"(forward|step fast|step lean|decode fast|decode lean|picture, 8 steps) (\d+)")


def measured(sides: list[int]) -> dict[str, float]:
    """Seconds by case and side, as bench_speed.py names them."""
    bench = Bench(config.OFFICIAL_TRANSFORMER, sides)
    with contextlib.redirect_stdout(io.StringIO()):  # its rows are printed below, beside the predictions
        bench_speed.forward(bench, "forward")
        bench_speed.step(bench)
        bench_speed.decode(bench)
        bench_speed.picture(bench)
    return {row["case"]: row["ms"] / 1e3 for row in bench.rows if "ms" in row}


def predicted(predictions: dict[str, Any], case: str, side: str) -> float:
    """Seconds of a case. The benchmark's picture begins with features of the prompt: it has no text encoder."""
    name, _, mode = case.partition(" ")
    if name == "forward":
        return float(predictions["forward_seconds"]["bf16"][side])
    if name == "picture,":
        whole = predictions["picture_seconds"]["bf16"]["fast"][side]
        return float(whole - predictions["text_seconds"]["bf16"])
    return float(predictions[f"{name}_seconds"]["bf16"][mode][side])


def rows(predictions: dict[str, Any], times: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """Case, predicted and measured seconds."""
    for label, seconds in times.items():
        if found := _CASES.fullmatch(label):
            yield label, predicted(predictions, found[1], found[2]), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="of `zimage doctor --json FILE`")
    parser.add_argument("--sides", default="512,1024", help="some of 512, 768, 1024")
    args = parser.parse_args()
    multiply_in_float32()
    found = json.loads(args.json.read_text()) if args.json else diagnose().to_json()
    print("| case | predicted ms | measured ms | ratio |\n|---|--:|--:|--:|")
    far = 0
    for label, guess, seconds in rows(found["predicted"], measured([int(s) for s in args.sides.split(",")])):
        ratio = guess / seconds
        wrong = abs(ratio - 1) > WITHIN
        far += wrong
        print(f"| {label} | {guess * 1e3:.1f} | {seconds * 1e3:.1f} | {ratio:.2f}{' too far' if wrong else ''} |")
    return int(far > 0)


if __name__ == "__main__":
    sys.exit(main())
