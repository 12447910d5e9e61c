"""zimage convert: weights from one file format and precision to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zimage_ref import ConfigError, npz, safetensors_io
from zimage_ref.checkpoint import SUFFIXES, Checkpoint
from zimage_ref.lora_file import read_lora
from zimage_ref.lora_merge import merged
from zimage_ref.model_folder import checked_component
from zimage_ref.names import transformer_parameters
from zimage_ref.tensors import DTYPE_NAMES, Tensor, Tensors

from . import convert_lora
from .console import Console
from .options import path_and_scale

MODEL_TYPES = {
    "transformer": "transformer", "t": "transformer", "autoencoder": "vae", "ae": "vae", "vae": "vae",
    "text-encoder": "text_encoder", "te": "text_encoder",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `zimage convert`."""
    parser.add_argument(
        "--input", dest="inputs", action="append", required=True,
        help="weights to read: a file or a folder; a LoRA may have a :SCALE, and may be given several times",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help=f"file to write: {' or '.join(SUFFIXES)}")
    parser.add_argument("--model-type", choices=(*MODEL_TYPES, "lora"), required=True, help="what the weights are of")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"), help="precision to write (default: as stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    convert_lora.add_options(parser)


def run(args: argparse.Namespace, console: Console) -> None:
    """Streams the tensors over, one at a time."""
    if args.output.suffix not in SUFFIXES:
        raise ConfigError(f"{args.output}: unknown format: the suffix must be {' or '.join(SUFFIXES)}")
    if args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output}: exists: give --overwrite to replace it")
    if args.model_type == "lora":
        return convert_lora.run(args, console)
    if len(args.inputs) > 1:
        raise ConfigError("--input may be given several times with --model-type lora only")
    component = MODEL_TYPES[args.model_type]
    source = Checkpoint.open(Path(args.inputs[0]))
    stored, config = checked_component(source, component)
    if args.merge_lora:
        stored = _merged(stored, component, config, args.merge_lora, console)
    tensors = {name: tensor.cast(args.dtype) for name, tensor in stored.items()}

    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with console.progress() as bars:

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bars.update("convert", done, total, f"{done / 1e6:,.0f} MB")

        if args.output.suffix == ".npz":
            record: dict[str, Any] = {"model_type": component, "config": config.to_json(), "source": source.path.name}
            npz.write(args.output, tensors, record, progress)
        else:
            safetensors_io.write(args.output, tensors, {"format": "pt"}, progress)
    dtypes = sorted({DTYPE_NAMES[tensor.dtype] for tensor in tensors.values()})
    console.note(f"{len(tensors)} tensors, {total / 1e6:,.1f} MB, {', '.join(dtypes)}")
    console.wrote(args.output)


def _merged(tensors: Tensors, component: str, config: Any, loras: list[str], console: Console) -> dict[str, Tensor]:
    if component != "transformer":
        raise ConfigError("--merge-lora goes with --model-type transformer")
    files = [(read_lora(path, transformer_parameters(config)), scale) for path, scale in map(path_and_scale, loras)]
    for file, scale in files:
        console.facts(str(file.path), {**file.facts(), "merged at": f"{scale:g}"})
    return merged(tensors, [(file.updates, scale) for file, scale in files])
