"""zimage convert --model-type lora: converts LoRAs to another naming, precision or container, and adds up several."""

from __future__ import annotations

import argparse

from zimage_ref import ConfigError
from zimage_ref.lora.file import check_output, read_lora
from zimage_ref.lora.spellings import DEFAULT_NAMING
from zimage_ref.lora.sums import write_sum
from zimage_ref.options import path_and_scale

from ..terminal.console import Console
from ..terminal.options import flag
from ..terminal.parser import CommandParser


def add_options(parser: CommandParser) -> None:
    """The options of `zimage convert` that concern LoRAs."""
    parser.option(
        "--rank", "Reduce the LoRA to this rank. Without it the rank stays. The ranks of several inputs add up.",
        type=int, metavar="N",
    )  # fmt: skip
    parser.option(
        "--merge-lora", "Add this LoRA to the weights of a transformer. Repeat the option for more LoRAs.",
        action="append", default=[], metavar="FILE[:X]",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> None:
    """Reads every input, `PATH[:SCALE]`, and writes their sum."""
    for name in ("quantize", "max_shard_size"):
        if getattr(args, name):
            raise ConfigError(f"{flag(name)} is not for LoRAs")
    check_output(args.output, args.naming or DEFAULT_NAMING, with_sidecar=False)
    if args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output}: exists: give --overwrite to replace it")
    if args.merge_lora:
        raise ConfigError("--merge-lora goes with --model-type transformer; to add up LoRAs give --input several times")
    loras = []
    for text in args.inputs:
        path, scale = path_and_scale(text)
        file = read_lora(path)
        console.facts(str(path), {**file.facts(), "used at": f"{scale:g}"})
        loras.append((file, scale))
    for sentence in write_sum(args.output, loras, args.rank, args.naming or DEFAULT_NAMING, args.dtype):
        console.warn(sentence)
    console.wrote(args.output)
