"""zimage inspect for a LoRA: its rank, alpha and norms."""

from __future__ import annotations

import argparse
from pathlib import Path

from zimage_ref.errors import ZImageError
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.merge import module_groups

from ..terminal.console import Console


def show(path: Path, args: argparse.Namespace, console: Console) -> int:
    """Prints facts about the LoRA in `path`, and how much it changes each module."""
    try:
        file = read_lora(path)
    except ZImageError as error:  # you can inspect a LoRA even if generation would refuse it
        console.note(f"cannot be used: {error}")
        return 0
    console.table(("LoRA", ""), list(file.facts().items()))
    rows = []
    for group, updates in module_groups(file.updates).items():
        ranks = sorted({r for update in updates if (r := update.rank) is not None})
        norms = [update.norm() for update in updates]
        mean = f"{sum(norms) / len(norms):.4g}"
        rows.append((group, len(updates), ", ".join(map(str, ranks)), mean, f"{max(norms):.4g}"))
    console.table(("changes", "blocks", "rank", "mean norm", "largest norm"), rows)
    return 0
