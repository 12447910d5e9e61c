"""zimage compare: the differences between two pictures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.files import check_writable
from zimage_ref.pictures.comparison import PixelDifference, pixel_difference, record_changes
from zimage_ref.pictures.formats import check_suffix
from zimage_ref.pictures.images import Picture, read_picture, save_picture
from zimage_ref.pictures.metadata import read_record
from zimage_ref.pictures.sheet import Sheet

from ..terminal.console import Console
from ..terminal.parser import CommandParser
from ..terminal.pictures import show

_COLUMNS = 96  # cells of the sheet in the terminal
_EXAMPLES = (
    ("See the differences between two pictures and their records:", "zimage compare fox.png fox-2.png"),
    ("Write both and their difference into one picture:", "zimage compare fox.png fox-2.png --output both.png"),
)


def add_options(parser: CommandParser) -> None:
    """The options of `zimage compare`."""
    parser.usage = "zimage compare FIRST SECOND [options]"
    parser.examples = _EXAMPLES
    parser.option("first", "Picture.", type=Path, metavar="FIRST")
    parser.option("second", "Picture to compare it with.", type=Path, metavar="SECOND")
    parser.option(
        "--output", "Picture to write: both pictures and their difference, side by side.", type=Path, metavar="NAME"
    )
    parser.option("--overwrite", "Replace the picture that --output names.", action="store_true")
    parser.option("--json", "Print everything as JSON, for programs.", action="store_true")


def run(args: argparse.Namespace, console: Console) -> int:
    """Prints the differences. Returns 0 in any case."""
    if args.output:
        check_suffix(args.output)
        check_writable(args.output)
        if args.output.exists() and not args.overwrite:
            raise ConfigError(f"{args.output}: exists: give --overwrite, or another --output")
    paths = (args.first, args.second)
    first, second = map(read_picture, paths)
    records = [_record(path, console) for path in paths]
    changes = record_changes(*records)
    pixels = pixel_difference(first, second) if first.size == second.size else None
    if args.json:
        console.print(json.dumps(_facts(changes, pixels), indent=2))
    else:
        _show_changes(changes, all(records), paths, console)
        _show_pixels(pixels, first, second, console)
    if args.output or not args.json:
        sheet = _sheet(first, second, pixels, paths)
        if not args.json:
            show(sheet, console, _COLUMNS)
        if args.output:
            save_picture(sheet, args.output)
            console.wrote(args.output)
    return 0


def _record(path: Path, console: Console) -> dict[str, object]:
    try:
        return read_record(path)
    except FormatError as error:
        console.warn(str(error))
        return {}


def _show_changes(
    changes: Mapping[str, tuple[object, object]], known: bool, paths: tuple[Path, Path], console: Console
) -> None:
    if changes:
        rows = [(name, *("" if value is None else value for value in values)) for name, values in changes.items()]
        console.table(("made with", *map(str, paths)), rows)
    elif known:
        console.print("both were made with the same options")


def _show_pixels(pixels: PixelDifference | None, first: Picture, second: Picture, console: Console) -> None:
    if pixels is None:
        sizes = " and ".join(f"{picture.width} x {picture.height}" for picture in (first, second))
        console.print(f"the pictures are {sizes} pixels: their pixels are not compared")
    elif pixels.box is None:
        console.print("all pixels are equal")
    else:
        left, top, right, bottom = pixels.box
        rows = [
            ("pixels that differ", f"{pixels.changed:.1%}"),
            ("visibly, by 8 of 255 or more", f"{pixels.visible:.1%}"),
            ("mean difference", f"{pixels.mean:.2f} of 255"),
            ("largest difference", f"{pixels.largest} of 255"),
            ("PSNR", f"{pixels.psnr:.1f} dB"),
            ("they differ within", f"{left}, {top} to {right}, {bottom}"),
        ]
        console.table(("pixels", ""), rows)


def _facts(changes: Mapping[str, tuple[object, object]], pixels: PixelDifference | None) -> dict[str, object]:
    """The differences as JSON."""
    found = None
    if pixels is not None:
        found = {name: value for name, value in vars(pixels).items() if name != "picture"}
        found["psnr"] = found["psnr"] if math.isfinite(pixels.psnr) else None
    return {"record": {name: list(values) for name, values in changes.items()}, "pixels": found}


def _sheet(first: Picture, second: Picture, pixels: PixelDifference | None, paths: tuple[Path, Path]) -> Picture:
    shown = [(path.name, picture) for path, picture in zip(paths, (first, second), strict=True)]
    if pixels is not None:
        shown.append((f"difference x {255 / max(1, pixels.largest):.3g}", pixels.picture))
    size = max(first.width, second.width), max(first.height, second.height)
    sheet = Sheet([name for name, _ in shown], [""], size)
    for index, (_, picture) in enumerate(shown):
        sheet.add(index, picture)
    return sheet.picture
