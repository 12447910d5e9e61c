"""zimage inspect: what a weights file or a model's folder holds, from headers alone, or how a picture was made."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.hub import resolved
from zimage_ref.errors import ConfigError, ZImageError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.inspection import (
    Description,
    Fault,
    Part,
    describe,
    describe_folder,
    is_model_folder,
    memory_needs,
    verify,
)
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.merge import module_groups
from zimage_ref.lora.spellings import is_lora
from zimage_ref.pictures.images import PICTURE_SUFFIXES
from zimage_ref.pictures.metadata import read_record

from ..terminal.console import Console

_LONGEST = 300  # characters of a metadata value that the table shows


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `zimage inspect`."""
    parser.add_argument("--input", type=Path, required=True, help="file or folder to look into, or the name of a model")
    parser.add_argument("--limit", type=int, default=20, help="tensors to list, 0 for all (default: 20)")
    parser.add_argument(
        "--filter", metavar="GLOB", default="*", help="list only tensors whose names match, as '*norm*'"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    parser.add_argument("--verify", action="store_true", help="read all data: checksums, NaN, infinity, zeros")


def run(args: argparse.Namespace, console: Console) -> int:
    """Prints what there is. Returns 1 if --verify finds a fault."""
    path = resolved(args.input)
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return _picture(path, args.json, console)
    if is_model_folder(path):
        return _folder(path, args, console)
    file = Checkpoint.open(path)
    description = describe(file, args.filter)
    faults = _verified(file, console) if args.verify else None
    if args.json:
        found = {} if faults is None else {"faults": [vars(fault) for fault in faults]}
        console.print(json.dumps(description.to_json() | found, indent=2))
    else:
        _show(description, args.limit, console)
        _show_faults(faults, console)
        if is_lora(file.tensors):
            lora_tables(file.path, console)
    return 1 if faults else 0


def _picture(path: Path, as_json: bool, console: Console) -> int:
    record = read_record(path)
    if as_json:
        console.print(json.dumps(record, indent=2))
        return 0
    rows = {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()}
    with suppress(KeyError, TypeError, ValueError):  # a record that another program has changed is shown as it is
        rows["loras"] = "\n".join(f"{lora['file']} at {lora['scale']:g}" for lora in record["loras"]) or "none"
    console.table(("made with", ""), list(rows.items()))
    return 0


def _verified(file: Checkpoint, console: Console) -> list[Fault]:
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
    console.table(
        ("dtype", "tensors", "MB"),
        [(dtype, s["tensors"], f"{s['bytes'] / 1e6:,.1f}") for dtype, s in description.dtypes.items()],
    )
    if description.metadata:
        console.table(("metadata", "value"), [(key, _text(value)) for key, value in description.metadata.items()])


def lora_tables(path: Path, console: Console) -> None:
    """What the LoRA in `path` is, and how much it changes, by module."""
    try:
        file = read_lora(path)
    except ZImageError as error:  # looking into a file is no failure because generating with it would be one
        console.note(f"cannot be used: {error}")
        return
    console.table(("LoRA", ""), list(file.facts().items()))
    rows = []
    for group, updates in module_groups(file.updates).items():
        ranks = sorted({r for update in updates if (r := update.rank) is not None})
        norms = [update.norm() for update in updates]
        mean = f"{sum(norms) / len(norms):.4g}"
        rows.append((group, len(updates), ", ".join(map(str, ranks)), mean, f"{max(norms):.4g}"))
    console.table(("changes", "blocks", "rank", "mean norm", "largest norm"), rows)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _show_faults(faults: list[Fault] | None, console: Console) -> None:
    if faults:
        console.table(("tensor", "fault"), [(fault.tensor, fault.fact) for fault in faults])
    elif faults is not None:
        console.print("verified: all values are finite, no tensor is zero, every checksum there is holds")


def _folder(path: Path, args: argparse.Namespace, console: Console) -> int:
    parts = describe_folder(path)
    complete = not any(part.problem for part in parts)
    needs = memory_needs(ModelFolder.open(path)) if complete else {}
    faults = {
        part.component: _verified(Checkpoint.open(part.file), console)
        for part in parts
        if args.verify and part.file and part.description
    }
    if args.json:
        console.print(json.dumps(_folder_json(path, parts, needs, faults if args.verify else None), indent=2))
    else:
        _show_folder(path, parts, needs, console)
        for component, found in faults.items():
            console.print(f"{component}:")
            _show_faults(found, console)
    return 1 if any(faults.values()) else 0


def _show_folder(path: Path, parts: list[Part], needs: dict[int, dict[str, int]], console: Console) -> None:
    rows = []
    for part in parts:
        file = part.file.relative_to(path) if part.file and part.file.is_relative_to(path) else part.file
        what, dtypes, parameters = "", "", ""
        if part.description:
            what = f"{part.description.container}, {part.description.dialect or 'unknown'} names"
            dtypes = ", ".join(part.description.dtypes)
            parameters = f"{part.description.parameters:,}"
        absent = "missing" if part.problem else "none"
        rows.append((part.component, file or absent, what, parameters, dtypes))
    console.table(("component", "file", "what", "parameters", "dtype"), rows, title=str(path))
    for part in parts:
        if part.problem:
            console.print(f"{part.component}: {part.problem}")
    if needs:
        console.table(
            ("memory, about", "all weights", "generate 1024 x 1024", "train 1024 x 1024"),
            [(f"{bits} bits a weight", *(f"{n / 1e9:.1f} GB" for n in need.values())) for bits, need in needs.items()],
        )


def _folder_json(
    path: Path, parts: list[Part], needs: dict[int, dict[str, int]], faults: dict[str, list[Fault]] | None
) -> dict[str, Any]:
    components = {
        part.component: {
            "file": str(part.file) if part.file else None,
            "problem": part.problem or None,
            **({"content": part.description.to_json()} if part.description else {}),
            **({"faults": [vars(f) for f in faults.get(part.component, [])]} if faults is not None else {}),
        }
        for part in parts
    }
    complete = not any(part.problem for part in parts)
    return {"path": str(path), "complete": complete, "components": components, "memory": needs}
