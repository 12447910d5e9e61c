"""zimage inspect: what a weights file holds, from its header alone."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from zimage_ref import ZImageError
from zimage_ref.checkpoint import Checkpoint
from zimage_ref.lora import rank
from zimage_ref.lora_dialects import is_lora
from zimage_ref.lora_file import read_lora
from zimage_ref.lora_merge import module_groups, norm
from zimage_ref.tensors import DTYPE_NAMES

from .console import Console


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `zimage inspect`."""
    parser.add_argument("--input", type=Path, required=True, help="file or folder to look into")
    parser.add_argument("--limit", type=int, default=20, help="tensors to list, 0 for all (default: 20)")


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
        ranks = sorted({r for update in updates if (r := rank(update)) is not None})
        norms = [norm(update) for update in updates]
        mean = f"{sum(norms) / len(norms):.4g}"
        rows.append((group, len(updates), ", ".join(map(str, ranks)), mean, f"{max(norms):.4g}"))
    console.table(("changes", "blocks", "rank", "mean norm", "largest norm"), rows)


def run(args: argparse.Namespace, console: Console) -> None:
    """Prints the tensor table and the summary by dtype."""
    file = Checkpoint.open(args.input)
    shown = list(file.tensors.items())[: args.limit or None]
    rows = [
        (i, name, "x".join(map(str, tensor.shape)) or "scalar", DTYPE_NAMES[tensor.dtype])
        for i, (name, tensor) in enumerate(shown)
    ]
    console.table(("#", "name", "shape", "dtype"), rows)
    if len(shown) < len(file.tensors):
        console.print(f"... and {len(file.tensors) - len(shown)} more (--limit 0 shows all)")

    counts, sizes = Counter[str](), Counter[str]()
    for tensor in file.tensors.values():
        counts[DTYPE_NAMES[tensor.dtype]] += 1
        sizes[DTYPE_NAMES[tensor.dtype]] += tensor.nbytes
    console.print(f"{file.container}: {len(file.tensors)} tensors, {file.parameters:,} parameters")
    console.table(("dtype", "tensors", "MB"), [(d, n, f"{sizes[d] / 1e6:,.1f}") for d, n in counts.most_common()])
    if file.metadata:
        console.table(("metadata", "value"), list(file.metadata.items()))
    if is_lora(file.tensors):
        lora_tables(file.path, console)
