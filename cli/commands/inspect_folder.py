"""zimage inspect for the folder of a model: the file of each part, problems, and the memory that the model needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.inspection import Fault, Part, describe_folder
from zimage_ref.requirements import WEIGHT_BITS, memory_needs

from ..terminal.console import Console
from .inspect import show_faults, verified


def show(path: Path, args: argparse.Namespace, console: Console) -> int:
    """Prints the file of each part, problems, and the memory that the model needs. Returns 1 if there are problems."""
    parts = describe_folder(path)
    complete = not any(part.problem for part in parts)
    needs = memory_needs(ModelFolder.open(path)) if complete else {}
    faults = {
        part.component: verified(Checkpoint.open(part.file), console)
        for part in parts
        if args.verify and part.file and part.description
    }
    if args.json:
        console.print(json.dumps(_folder_json(path, parts, needs, faults if args.verify else None), indent=2))
    else:
        _show_folder(path, parts, needs, console)
        for component, found in faults.items():
            console.print(f"{component}:")
            show_faults(found, console)
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
            ("GB, about", *needs[WEIGHT_BITS[0]]),
            [(f"{bits} bits", *(f"{n / 1e9:.1f}" for n in need.values())) for bits, need in needs.items()],
            title="1024 x 1024, lean or streamed",
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
