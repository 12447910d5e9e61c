"""zimage inspect: its options, and the view of a checkpoint."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from zimage_ref.checkpoints.hub import resolved
from zimage_ref.errors import ConfigError, listing
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.inspection import Description, Fault, describe, is_model_folder, verify
from zimage_ref.lora.spellings import is_lora
from zimage_ref.pictures.formats import PICTURE_SUFFIXES

from ..terminal.console import Console
from ..terminal.parser import CommandParser

_LONGEST = 300  # characters of a metadata value that the table shows
_EXAMPLES = (
    ("See whether a LoRA fits, and its rank and layers:", "zimage inspect --input dog.safetensors"),
    ("See how a picture was made:", "zimage inspect --input fox.png"),
    ("Check the files of a model:", "zimage inspect --input ~/Z-Image-Turbo --verify"),
)


class View(Protocol):
    """The interface of a module in this folder that shows one kind of input."""

    def show(self, path: Path, args: argparse.Namespace, console: Console) -> int:
        """Prints the facts about `path`. Returns the exit code."""


def view(kind: str) -> View:
    """Imports the view of a folder, a lora or a picture. A checkpoint needs none of these imports."""
    return cast(View, import_module(f".inspect_{kind}", __package__))


def add_options(parser: CommandParser) -> None:
    """The options of `zimage inspect`."""
    parser.usage = "zimage inspect --input PATH [options]"
    parser.examples = _EXAMPLES
    parser.option(
        "--input", "File or folder to look into, or the name of a model.", type=Path, required=True, metavar="PATH"
    )
    parser.option("--limit", "Tensors to list. 0 lists all.", type=int, default=20, metavar="N")
    parser.option("--filter", "List only tensors whose names match, such as '*norm*'.", metavar="GLOB", default="*")
    parser.option("--json", "Print everything as JSON, for programs.", action="store_true")
    parser.option(
        "--verify", "Read all data. Check checksums, and look for NaN, infinity and tensors of zeros.",
        action="store_true",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> int:
    """Prints the facts about the input. Returns 1 if --verify finds a fault."""
    path = resolved(args.input)
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return view("picture").show(path, args, console)
    if is_model_folder(path):
        return view("folder").show(path, args, console)
    file = Checkpoint.open(path)
    description = describe(file, args.filter)
    faults = verified(file, console) if args.verify else None
    if args.json:
        found = {} if faults is None else {"faults": [vars(fault) for fault in faults]}
        console.print(json.dumps(description.to_json() | found, indent=2))
    else:
        _show(description, args.limit, console)
        show_faults(faults, console)
        if is_lora(file.tensors):
            view("lora").show(file.path, args, console)
    return 1 if faults else 0


def verified(file: Checkpoint, console: Console) -> list[Fault]:
    """Reads all data of `file` with a progress bar. Returns the faults."""
    with console.progress() as bars:
        return verify(file, lambda done, total: bars.update("verify", done / 1e6, total / 1e6, "MB"))


def _show(description: Description, limit: int, console: Console) -> None:
    shown = description.tensors[: limit or None] if limit >= 0 else []
    rows = [(t.index, t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype) for t in shown]
    console.table(("#", "name", "shape", "dtype"), rows)
    if len(shown) < len(description.tensors):
        console.print(f"... and {len(description.tensors) - len(shown)} more (--limit 0 shows all)")
    total = sum(summary["tensors"] for summary in description.dtypes.values())
    console.print(f"{description.container}: {total} tensors, {description.parameters:,} parameters")
    console.print(f"{description.path}: {description.looks_like}")
    if description.written_by:
        console.print(f"written by {description.written_by}")
    if description.ignored:
        count = len(description.ignored)
        console.print(f"{count} of the tensors {'is' if count == 1 else 'are'} ignored: {listing(description.ignored)}")
    console.table(
        ("dtype", "tensors", "MB"),
        [(dtype, s["tensors"], f"{s['bytes'] / 1e6:,.1f}") for dtype, s in description.dtypes.items()],
    )
    if description.metadata:
        console.table(("metadata", "value"), [(key, _text(value)) for key, value in description.metadata.items()])


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def show_faults(faults: list[Fault] | None, console: Console) -> None:
    """Shows the faults as a table. faults: None if nothing was verified."""
    if faults:
        console.table(("tensor", "fault"), [(fault.tensor, fault.fact) for fault in faults])
    elif faults is not None:
        console.print("verified: all values are finite, no tensor is zero, all checksums are correct")
