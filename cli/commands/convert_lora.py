"""zimage convert --model-type lora: converts LoRAs to another naming, precision or container, and adds up several."""

from __future__ import annotations

import argparse

from zimage_ref import ConfigError
from zimage_ref.lora.file import LoRAFile, check_output, read_lora, write_lora
from zimage_ref.lora.merge import combined
from zimage_ref.lora.spellings import DEFAULT_NAMING

from ..terminal.console import Console
from ..terminal.options import flag, path_and_scale


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `zimage convert` that are for LoRAs."""
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, help="reduce to this rank (default: keep, or the sum of several inputs')")
    group.add_argument(
        "--merge-lora", action="append", default=[], metavar="PATH[:SCALE]",
        help="bake this LoRA into a transformer; may be given several times",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> None:
    """Reads every input, `PATH[:SCALE]`, and writes their sum."""
    for name in ("quantize", "max_shard_size"):
        if getattr(args, name):
            raise ConfigError(f"{flag(name)} is not for LoRAs")
    check_output(args.output)
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
    lora = combined([(file.updates, scale) for file, scale in loras], args.rank)
    record = {"sources": ", ".join(f"{file.path.name}:{scale:g}" for file, scale in loras)}
    dtype = args.dtype or _widest([file for file, _ in loras])
    write_lora(args.output, lora, record, args.naming or DEFAULT_NAMING, dtype, with_sidecar=False)
    console.wrote(args.output)


def _widest(files: list[LoRAFile]) -> str:
    """The dtype of the files if all have the same, else float32, which can hold all values."""
    dtypes = {file.dtype for file in files}
    return dtypes.pop() if len(dtypes) == 1 else "f32"
