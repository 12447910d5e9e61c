"""zimage inspect for a picture: how it was made."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from zimage_ref.pictures.metadata import read_record

from ..terminal.console import Console


def show(path: Path, args: argparse.Namespace, console: Console) -> int:
    """Prints the record in the picture."""
    record = read_record(path)
    if args.json:
        console.print(json.dumps(record, indent=2))
        return 0
    rows = {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()}
    with suppress(KeyError, TypeError, ValueError):  # if another program has changed the record, it is shown unchanged
        rows["loras"] = "\n".join(f"{lora['file']} at {lora['scale']:g}" for lora in record["loras"]) or "none"
    console.table(("made with", ""), list(rows.items()))
    return 0
