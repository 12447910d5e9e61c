"""Writes pictures to files with {seed}, {index} and {prompt} in their names, or to stdout (-).

Existing files are not replaced without --overwrite.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.formats.files import check_writable
from zimage_ref.generation.grid import Grid
from zimage_ref.generation.jobs import Request
from zimage_ref.generation.run import GenerationRun, MadePicture
from zimage_ref.pictures.formats import check_suffix
from zimage_ref.pictures.images import Picture, encoded, fit, half_blocks, save_picture
from zimage_ref.pictures.metadata import Record
from zimage_ref.pictures.sheet import Sheet

from . import inline
from .console import Console, Line, coloured, half_block_line

STDOUT = Path("-")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_KNOWN = ("seed", "index", "prompt")
_WORDS = 48  # the most characters of a prompt in a file name
THUMBNAIL_COLUMNS, SHEET_COLUMNS = 48, 96
_PIXELS = 12  # the most that a cell of a terminal is wide
# numbers of pictures in kitty, other ones for each process: it keeps those that are on the screen
_PREVIEW = (os.getpid() & 0x7FFF) << 8 | 1
_NUMBERS = itertools.count(_PREVIEW + 1)


class OutputNames:
    """The file names of a run's pictures, made from a pattern."""

    def __init__(self, pattern: Path, overwrite: bool) -> None:
        """Raises ConfigError or DatasetError if `pattern` cannot name a picture."""
        unknown = [name for name in _PLACEHOLDER.findall(str(pattern)) if name not in _KNOWN]
        if unknown:
            raise ConfigError(
                f"--output {pattern}: {{{unknown[0]}}} is unknown: known are {{seed}}, {{index}}, {{prompt}}"
            )
        if pattern != STDOUT:
            check_suffix(pattern)
        self.pattern, self.overwrite = pattern, overwrite

    def of(self, configs: Sequence[GenerateConfig]) -> list[Path]:
        """A file for each picture. Raises ConfigError if one exists or is not writable, or for several on stdout."""
        if self.pattern == STDOUT:
            if len(configs) > 1:
                raise ConfigError(f"--output - takes one picture, not {len(configs)}")
            return [STDOUT]
        paths = [self.fill(config, index) for index, config in enumerate(configs, start=1)]
        if len(set(paths)) < len(paths):  # if the pattern gives equal names, add numbers
            paths = [path.with_stem(f"{path.stem}-{index}") for index, path in enumerate(paths, start=1)]
        self._check(*paths)
        return paths

    def of_sheet(self, configs: Sequence[GenerateConfig]) -> Path:
        """The file of the sheet that shows the pictures of `configs`. Raises as `of` does."""
        first = self.fill(configs[0], 1)
        path = first.with_name(f"{first.stem}.grid.png")
        self._check(path)
        return path

    def _check(self, *paths: Path) -> None:
        check_writable(*paths)
        for path in paths:
            if path.exists() and not self.overwrite:
                raise ConfigError(f"{path}: exists: give --overwrite, or another --output such as picture-{{seed}}.png")

    def free(self, config: GenerateConfig) -> Path:
        """The next file of the pattern that does not exist. If the pattern has no number, one is added.

        Raises ConfigError if it is not writable.
        """
        path, index = self.fill(config, 1), 1
        while path.exists() and not self.overwrite:
            index += 1
            numbered = self.fill(config, index)
            path = numbered if "{index}" in str(self.pattern) else numbered.with_stem(f"{numbered.stem}-{index}")
        check_writable(path)
        return path

    def fill(self, config: GenerateConfig, index: int) -> Path:
        """The pattern filled in for one picture."""
        words = re.sub(r"[^\w]+", "-", config.prompt).strip("-")[:_WORDS].strip("-") or "empty"
        values = {"seed": str(config.seed), "index": str(index), "prompt": words}
        return Path(_PLACEHOLDER.sub(lambda match: values[match[1]], str(self.pattern)))


class GridSheet:
    """The sheet of a grid, and its file."""

    def __init__(self, grid: Grid, requests: Sequence[Request], path: Path) -> None:
        self._path, self._cells = path, grid.cells
        size = max(each.result.width for each in requests), max(each.result.height for each in requests)
        self.sheet = Sheet(grid.columns, grid.rows, size)

    def add(self, made: MadePicture) -> None:
        """Puts a picture into its cell."""
        self.sheet.add(self._cells[made.index], made.picture)

    def write(self, console: Console) -> None:
        """Writes the sheet."""
        write(self.sheet.picture, self._path, None, console)


class PictureWriter:
    """Makes the pictures of a run, with progress bars and thumbnails, into files or stdout."""

    def __init__(self, run: GenerationRun, console: Console, thumbnails: bool, save_control: bool = False) -> None:
        self.run, self.console, self.thumbnails, self.save_control = run, console, thumbnails, save_control

    def make(self, requests: Sequence[Request], paths: Sequence[Path], grid: GridSheet | None = None) -> None:
        """Makes the pictures of `requests` and writes each to its path. Previews are written beside it.

        grid: the sheet to write at the end.
        """

        def preview(index: int, picture: Picture) -> None:
            save_picture(picture, preview_path(paths[index]))
            if self.thumbnails and (width := self.console.cells(min(THUMBNAIL_COLUMNS, picture.width))):
                bars.picture(lines_of(picture, self.console, width, _PREVIEW))

        with self.console.progress() as bars:
            for made in self.run.make(requests, bars.update, preview):
                path = paths[made.index]
                if grid:
                    grid.add(made)
                bars.picture([])
                write(made.picture, path, made.record, self.console)
                if made.reused:
                    self.console.note(f"the step cache spared {made.reused:.0%} of the passes through the layers")
                if self.save_control and made.request.control and made.request.control.picture:
                    write(made.request.control.picture, control_path(path), None, self.console)
                if self.thumbnails and path != STDOUT:
                    show(made.picture, self.console, THUMBNAIL_COLUMNS)
        if grid:
            grid.write(self.console)
            if self.thumbnails:
                show(grid.sheet.picture, self.console, SHEET_COLUMNS)


def write(picture: Picture, path: Path, record: Record | None, console: Console) -> None:
    """Writes a picture to `path` and prints the path, or writes it to stdout as PNG."""
    if path == STDOUT:
        console.raw(encoded(picture, "PNG", record))
    else:
        save_picture(picture, path, record)
        console.wrote(path)


def show(picture: Picture, console: Console, columns: int = 64) -> None:
    """Shows `picture`, `columns` wide, if stderr is a terminal with colours: itself, or by coloured half blocks."""
    width = console.cells(min(columns, picture.width))
    if width and console.pictures == inline.ITERM2:
        console.command(inline.iterm2(_small(picture, width), width))
    elif width:
        console.show(lines_of(picture, console, width, next(_NUMBERS)))


def lines_of(picture: Picture, console: Console, columns: int, number: int) -> list[Line]:
    """Lines of cells that show `picture`, `columns` wide. number: of the picture, where kitty shows it."""
    cells = half_blocks(picture, columns)
    if console.pictures != inline.KITTY or len(cells) > inline.MOST_LINES:
        return [half_block_line(line) for line in cells]
    console.command(inline.kitty(_small(picture, columns), number, columns, len(cells)))
    return [coloured(line, number) for line in inline.kitty_lines(columns, len(cells))]


def _small(picture: Picture, columns: int) -> bytes:
    """A PNG of `picture` with as many pixels as `columns` cells can show."""
    width = min(picture.width, columns * _PIXELS)
    return encoded(fit(picture, width, max(1, width * picture.height // picture.width), "stretch"), "PNG")


def preview_path(path: Path) -> Path:
    """The file of a preview. It is beside the result, or in the current folder if the result goes to stdout."""
    return Path("preview.png") if path == STDOUT else path.with_name(f"{path.stem}.preview{path.suffix}")


def control_path(path: Path) -> Path:
    """The file of the map that a picture follows. It is beside the picture, or in the current folder."""
    return Path("control.png") if path == STDOUT else path.with_name(f"{path.stem}.control.png")
