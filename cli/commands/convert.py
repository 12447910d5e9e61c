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
from zimage_ref.lora.merge import merge_loras
from zimage_ref.lora.spellings import DEFAULT_NAMING, lora_namings
from zimage_ref.options import path_and_scale

from ..terminal.console import Console
from ..terminal.parser import CommandParser
from . import convert_lora

_EXAMPLES = (
    (
        "Write a transformer of ComfyUI in 4 bits:",
        "zimage convert --model-type transformer --quantize 4 "
        "--input ~/ComfyUI/models/diffusion_models/z_image_turbo_bf16.safetensors --output transformer.npz",
    ),
    (
        "Write a LoRA with the keys of diffusers:",
        "zimage convert --model-type lora --naming peft --input dog.safetensors --output dog-peft.safetensors",
    ),
)


def add_options(parser: CommandParser) -> None:
    """The options of `zimage convert`."""
    parser.usage = "zimage convert --input PATH --output PATH --model-type NAME [options]"
    parser.examples = _EXAMPLES
    namings = sorted({*lora_namings(), *(naming for component in COMPONENTS.values() for naming in component.namings)})
    parser.option(
        "--input", "File or folder with the weights. For LoRAs, repeat the option to add them up, "
        "each with a strength if you want one.",
        dest="inputs", action="append", required=True, metavar="PATH[:X]",
    )  # fmt: skip
    parser.option(
        "--output", f"File to write ({', '.join(WRITABLE)}), or a folder for several files.",
        type=Path, required=True, metavar="PATH",
    )  # fmt: skip
    parser.option(
        "--model-type", "Part of the model that the weights are of.",
        choices=(*model_types(), "lora"), required=True, metavar="NAME",
    )  # fmt: skip
    parser.option("--dtype", "Precision to write.", choices=("f32", "f16", "bf16"), shown="as stored", metavar="NAME")
    parser.option("--quantize", "Bits of the large matrices.", type=int, choices=BITS, metavar="BITS")
    parser.option(
        "--group-size", "Weights that share one scale, if they are quantized.",
        type=int, choices=GROUP_SIZES, default=GROUP_SIZE, metavar="N",
    )  # fmt: skip
    parser.option(
        "--naming", f"Names of the tensors to write. A LoRA has one of: {', '.join(lora_namings())}.",
        choices=namings, shown=f"diffusers, and {DEFAULT_NAMING} for a LoRA", metavar="NAME",
    )  # fmt: skip
    parser.option("--max-shard-size", "Write several files of at most this size, such as 5GB.", metavar="SIZE")
    parser.option("--overwrite", "Replace the output if it exists.", action="store_true")
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
    if source.ignored:
        count = len(source.ignored)
        console.note(
            f"{source.path}: {count} tensor{'s' * (count > 1)} without use ignored: {listing(source.ignored, 3)}"
        )
    tensors = _with_loras(source, args.merge_lora, args.dtype, console)
    started = time.monotonic()
    with console.progress() as bars:

        def progress(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            bars.update("convert", done / 1e6, total / 1e6, f"MB, {rate / 1e6:,.0f} MB/s")

        report = write_model(source, target, tensors, progress=progress)
    summarize(report, console)


def _with_loras(source: CheckpointSource, loras: list[str], dtype: str | None, console: Console) -> dict[str, Tensor]:
    """The tensors of `source` with `loras`, each PATH[:SCALE], merged in."""
    if not loras:
        return source.tensors
    if source.component != TRANSFORMER.name:
        raise ConfigError("--merge-lora goes with --model-type transformer")
    parameters = TRANSFORMER.parameters(TRANSFORMER.own_config(source.sizes))
    files = [(read_lora(path, parameters), scale) for path, scale in map(path_and_scale, loras)]
    for file, scale in files:
        console.facts(str(file.path), {**file.facts(), "merged at": f"{scale:g}"})
    return merge_loras(source.tensors, [(file.updates, scale) for file, scale in files], dtype)


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
