"""python -m zimage_mlx.tiny --output DIR: trains the built-in model again from scratch.

With --control-for MODEL it trains a small ControlNet for that model instead, into DIR/controlnet. With --seconds it
stops before the end and keeps its state beside DIR. Give the same command again to continue.
Each report of progress is a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import mlx.core as mx

from zimage_ref.errors import ConfigError, ZImageError

from .control import ControlRecipe, build_control
from .recipe import BuildOptions, Recipe, build
from .stepper import Compute


def main() -> None:
    """Trains the model with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m zimage_mlx.tiny", description="Trains Tiny Z-Image from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; run again to go on")
    parser.add_argument("--report-every", type=int, default=1000, help="steps between lines of progress")
    parser.add_argument("--judged", type=int, default=40, help="pictures to judge for a line of progress")
    parser.add_argument("--float32", action="store_true", help="text encoder and transformer in float32, too")
    parser.add_argument("--eager", action="store_true", help="kernels of text encoder and transformer one by one, too")
    parser.add_argument("--control-for", type=Path, metavar="MODEL", help="train a ControlNet for this model instead")
    own, others = ({field.name: field for field in fields(recipe)} for recipe in (Recipe, ControlRecipe))
    for name, field in own.items():
        text = f"{field.metadata['help']} (default: {field.default}"
        text += f"; of a ControlNet {others[name].default})" if name in others else "; not of a ControlNet)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), help=text)
    args = parser.parse_args()
    options = BuildOptions(
        every=args.report_every,
        judged=args.judged,
        deadline=time.monotonic() + args.seconds,
        compute=Compute(False if args.eager else None, mx.float32 if args.float32 else None),
        report=_print_line,
    )
    given = {name: value for name in own if (value := getattr(args, name)) is not None}
    try:
        if args.control_for is None:
            build(args.output, Recipe(**given), options)
        elif strange := [name for name in given if name not in others]:
            raise ConfigError(f"a ControlNet has no `{strange[0]}`")
        else:
            build_control(args.control_for, args.output, ControlRecipe(**given), options)
    except ZImageError as error:
        sys.exit(f"error: {error}")


def _print_line(facts: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
