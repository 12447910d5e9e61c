"""zimage convert: its options, and the conversion of a model's weights."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from zimage_ref import ConfigError
from zimage_ref.checkpoints.convert import CheckpointSource, ConversionReport, Target, open_source, write_model
from zimage_ref.checkpoints.registry import COMPONENTS, model_types
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.errors import listing
from zimage_ref.formats.checkpoint import WRITABLE
from zimage_ref.formats.quantize import BITS, GROUP_SIZE, GROUP_SIZES, Quantization
from zimage_ref.formats.shards import parse_size
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.merge import merged
from zimage_ref.lora.spellings import lora_namings

from ..terminal.console import Console
from ..terminal.options import path_and_scale
from . import convert_lora


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `zimage convert`."""
    namings = sorted({*lora_namings(), *(naming for component in COMPONENTS.values() for naming in component.namings)})
    parser.add_argument(
        "--input", dest="inputs", action="append", required=True,
        help="weights to read: a file or a folder; a LoRA may have a :SCALE, and may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, help=f"what to write: {' or '.join(WRITABLE)}, or a folder of shards"
    )
    parser.add_argument("--model-type", choices=(*model_types(), "lora"), required=True, help="what the weights are of")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"), help="precision to write (default: as stored)")
    parser.add_argument("--quantize", type=int, choices=BITS, help="bits to quantize the big matrices to")
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=GROUP_SIZE,
        help=f"weights that share a scale when quantized (default: {GROUP_SIZE})",
    )  # fmt: skip
    parser.add_argument(
        "--naming", choices=namings,
        help=f"names to write (default: diffusers, the official ones; for a LoRA: {', '.join(lora_namings())})",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", metavar="SIZE", help="write safetensors in shards of at most this, as 5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    convert_lora.add_options(parser)


def run(args: argparse.Namespace, console: Console) -> None:
    """Converts the weights, one tensor at a time. Everything is checked before weights are read."""
    if args.model_type == "lora":
        convert_lora.run(args, console)
        return
    if len(args.inputs) > 1:
        raise ConfigError("--input may be given several times with --model-type lora only")
    if args.rank is not None:
        raise ConfigError("--rank goes with --model-type lora")
    target = Target(
        args.output,
        model_types()[args.model_type],
        dtype=args.dtype,
        quantization=Quantization(args.quantize, args.group_size) if args.quantize else None,
        naming=args.naming or "diffusers",
        max_shard_size=parse_size(args.max_shard_size) if args.max_shard_size else None,
        overwrite=args.overwrite,
    )
    source = open_source(Path(args.inputs[0]), target.component)
    tensors = _with_loras(source, args.merge_lora, console)
    started = time.monotonic()
    with console.progress() as bars:

        def progress(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            bars.update("convert", done / 1e6, total / 1e6, f"MB, {rate / 1e6:,.0f} MB/s")

        report = write_model(source, target, tensors, progress=progress)
    summarize(report, console)


def _with_loras(source: CheckpointSource, loras: list[str], console: Console) -> dict[str, Tensor]:
    """The tensors of `source` with `loras`, each PATH[:SCALE], merged in."""
    if not loras:
        return source.tensors
    if source.component != TRANSFORMER.name:
        raise ConfigError("--merge-lora goes with --model-type transformer")
    parameters = TRANSFORMER.parameters(TRANSFORMER.own_config(source.sizes))
    files = [(read_lora(path, parameters), scale) for path, scale in map(path_and_scale, loras)]
    for file, scale in files:
        console.facts(str(file.path), {**file.facts(), "merged at": f"{scale:g}"})
    return merged(source.tensors, [(file.updates, scale) for file, scale in files])


def summarize(report: ConversionReport, console: Console) -> None:
    """Shows what was read and written, values that overflowed or are NaN, and the files."""
    console.note(f"{report.tensors} tensors: {_megabytes(report.read)} -> {_megabytes(report.written)}")
    if report.overflowed:
        console.note(
            f"{report.overflowed} values were too large and became infinite, in {listing(report.overflowed_in, 3)}: "
            f"bf16 has the range of f32"
        )
    if report.nans:
        console.note(f"{report.nans} values are NaN")
    for path in report.files:
        console.wrote(path)


def _megabytes(sizes: Counter[str]) -> str:
    parts = ", ".join(f"{dtype} {nbytes / 1e6:,.1f} MB" for dtype, nbytes in sizes.most_common())
    return parts if len(sizes) < 2 else f"{sum(sizes.values()) / 1e6:,.1f} MB ({parts})"
