"""The previews of a run, in rows of one prompt: for the report, and as previews.png, prompts by steps."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zimage_ref.errors import ZImageError
from zimage_ref.pictures.images import Picture, read_picture, save_picture
from zimage_ref.pictures.sheet import Sheet

from .metrics_lines import MetricsLine, preview_lines
from .run_folder import RunFolder

COLUMNS = 12  # the most pictures shown of a prompt
_CELL = 384  # pixels: the longest side of a picture on the sheet
WITHOUT = "without LoRA"


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt."""

    prompt: str
    pictures: dict[str, Path]  # by label: "without LoRA", "step 250"


def preview_rows(run: RunFolder, lines: Iterable[MetricsLine]) -> list[Row]:
    """The previews whose files are there, at most COLUMNS a prompt. The first and the last are among them.

    A new LoRA changes nothing before its first step, so its pictures of that time are those without it.
    """
    by_prompt: dict[tuple[int, str], dict[int, Path]] = {}
    for line in preview_lines(lines):
        if (path := run.path / line["preview"]).is_file():
            by_prompt.setdefault((line["index"], line["prompt"]), {})[line["step"]] = path
    rows = []
    for (index, prompt), drawn in sorted(by_prompt.items()):
        without = run.preview_without(index)
        pictures = {WITHOUT: without} if without.is_file() else {}
        for step in _spread(sorted(drawn)):
            pictures[f"step {step:,}" if step or pictures else WITHOUT] = drawn[step]
        rows.append(Row(prompt, pictures))
    return rows


def write_sheet(run: RunFolder, lines: Iterable[MetricsLine]) -> None:
    """Writes previews.png. A damaged picture leaves its cell white."""
    rows = preview_rows(run, lines)
    labels = dict.fromkeys(label for row in rows for label in row.pictures)
    columns = sorted(labels, key=lambda label: -1 if label == WITHOUT else int(label.split()[1].replace(",", "")))
    read: dict[int, Picture] = {}
    for number, row in enumerate(rows):
        for label, path in row.pictures.items():
            with suppress(ZImageError):
                picture = read_picture(path)
                picture.thumbnail((_CELL, _CELL))
                read[number * len(columns) + columns.index(label)] = picture
    if read:
        size = max(p.width for p in read.values()), max(p.height for p in read.values())
        sheet = Sheet(columns, [row.prompt for row in rows], size)
        for cell, picture in read.items():
            sheet.add(cell, picture)
        save_picture(sheet.picture, run.sheet)


def _spread(steps: list[int]) -> list[int]:
    """At most COLUMNS of `steps`: the first, the last, and others at even distances between them."""
    if len(steps) <= COLUMNS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
