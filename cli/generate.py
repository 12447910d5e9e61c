"""zimage generate: a picture from a prompt."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from zimage_ref import GenerateConfig
from zimage_ref.images import check_suffix, save_picture

from .backends import BACKENDS, DEFAULT, pipeline
from .console import Console
from .options import add_fields, from_args, path_and_scale


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `zimage generate`."""
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with the Z-Image model")
    add_fields(parser, GenerateConfig)
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]",
        help="LoRA of any dialect, and how much of it (default: 1); may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("output.png"), help="picture to write (default: output.png)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default=DEFAULT, help=f"engine (default here: {DEFAULT})")


def run(args: argparse.Namespace, console: Console) -> None:
    """Makes one picture. Everything that can be wrong is checked before weights are read."""
    config, loras = from_args(GenerateConfig, args), [path_and_scale(text) for text in args.lora]
    check_suffix(args.output)
    pipe = pipeline(args.backend).from_pretrained(args.model_dir, lean=True)  # the process ends with one picture
    for file, scale in pipe.read_loras(loras):
        console.facts(str(file.path), {**file.facts(), "used at": f"{scale:g}"})
    console.facts("generate", {
        "model": args.model_dir, "prompt": config.prompt, "size": f"{config.width} x {config.height}",
        "steps": config.steps, "seed": config.seed,
        "LoRA": ", ".join(f"{path} at {scale:g}" for path, scale in loras) or "none", "backend": args.backend,
    })  # fmt: skip
    with console.progress() as bars:
        (picture,) = pipe(**asdict(config), loras=loras, progress=bars.update)
    save_picture(picture, args.output)
    console.wrote(args.output)
