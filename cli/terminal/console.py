"""The output of the program for people. The only file that uses rich.

Results (tables, paths) go to stdout; progress, facts and errors go to stderr. Colours and bars are left out if the
output is not a terminal. NO_COLOR turns colours off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import IO, TypeAlias, cast

import rich.console
from rich.color import Color
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from rich.theme import Theme

from zimage_ref.errors import ConfigError, printable

from . import inline
from .options import in_flags
from .streams import Shown

with suppress(ImportError):
    import readline  # noqa: F401  gives `input` line editing; Windows has none

RGB = tuple[int, int, int]
Line: TypeAlias = Text  # of cells, coloured
_BARS = "▁▂▃▄▅▆▇█"
THEME = Theme({"fact": "cyan", "good": "green", "bad": "bold red", "warn": "yellow", "muted": "dim"})


class Console:
    """The two streams of the terminal."""

    def __init__(self, out: rich.console.Console | None = None, err: rich.console.Console | None = None) -> None:
        shown, warnings = cast(IO[str], Shown(sys.stdout, sys.stderr)), cast(IO[str], Shown(sys.stderr))
        self.out = out or rich.console.Console(theme=THEME, highlight=False, emoji=False, file=shown)
        self.err = err or rich.console.Console(theme=THEME, highlight=False, emoji=False, file=warnings)
        self._bars: Bars | None = None  # the bars that are on the screen now

    def error(self, message: str) -> None:
        """Prints an error as one line."""
        self._say(f"[bad]error:[/] {_plain(message)}")

    def note(self, message: str) -> None:
        """Prints information as one line."""
        self._say(f"[muted]{_plain(message)}[/]")

    def _say(self, markup: str) -> None:
        """Prints one line of text. It is wrapped between words on a terminal, but not for another program."""
        self.err.print(in_flags(markup), soft_wrap=not self.err.is_terminal)

    def wrote(self, path: object) -> None:
        """Prints the path of a result on stdout."""
        # Bars would overwrite text of another stream on the same terminal, so the path is printed above them
        above = self._bars and self.out.is_terminal and self.err.is_terminal
        (self.err if above else self.out).print(_plain(path), style="good", soft_wrap=True)

    def facts(self, title: str, facts: Mapping[str, object]) -> None:
        """Prints a panel with facts about the work that follows."""
        grid = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            grid.add_row(f"[muted]{_plain(name)}[/]", f"[fact]{_plain(value)}[/]")
        self.err.print(Panel(grid, title=Text(printable(title)), title_align="left", expand=False))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
        """Prints a table of results. Long names are wrapped, not cut."""
        table = Table(*(Column(_plain(name), overflow="fold") for name in columns))
        table.title, table.title_justify = _plain(title) or None, "left"
        for row in rows:
            table.add_row(*map(_plain, row))
        self.out.print(table)

    def print(self, text: str) -> None:
        """Prints a plain line of the result."""
        self.out.print(_plain(text), soft_wrap=True)

    def raw(self, data: bytes) -> None:
        """Writes a binary result to stdout."""
        if sys.stdout is None:
            raise ConfigError("--output -: stdout is closed")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def cells(self, most: int) -> int:
        """The width in cells for a picture, at most `most`. 0 if stderr is not a terminal with colours."""
        if not self.err.is_terminal or self.err.no_color or self.err.color_system not in ("256", "truecolor"):
            return 0
        return max(1, min(most, self.err.width))

    @property
    def pictures(self) -> str:
        """The protocol by which the terminal shows pictures, of `inline`; "" if it shows coloured text only."""
        return inline.protocol(os.environ) if self.err.color_system == "truecolor" else ""

    def show(self, lines: Iterable[Line]) -> None:
        """Prints lines of cells on stderr."""
        for line in lines:
            self.err.print(line, soft_wrap=True)

    def command(self, sequence: str) -> None:
        """Writes a command for the terminal to stderr."""
        self.err.file.write(sequence)
        self.err.file.flush()

    def warn(self, message: str) -> None:
        """Prints a warning as one line."""
        self._say(f"[warn]warning:[/] {_plain(message)}")

    def ask(self, prompt: str) -> str:
        """Reads a line from the user. Raises EOFError at the end of the input."""
        return self.err.input(f"[muted]{escape(prompt)}[/]").strip()

    def curve(self, name: str, values: Sequence[float], columns: int = 60) -> None:
        """Prints `values` as one line of bars, and the first and the last as numbers. A bar is a mean of neighbours."""
        ends = [len(values) * i // columns for i in range(columns + 1)]
        means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends) if b > a]
        low, high = min(means), max(means)
        bars = "".join(_BARS[round((m - low) / ((high - low) or 1) * (len(_BARS) - 1))] for m in means)
        self.out.print(f"[muted]{escape(name)}[/] {means[0]:.4f} [fact]{bars}[/] {means[-1]:.4f}", soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Bars]:
        """Progress bars that are shown until the block ends."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
        )
        progress = _PictureProgress(*columns, console=self.err)
        self._bars = Bars(progress)
        try:
            yield self._bars
        finally:
            self._bars.finish()
            self._bars = None


def _plain(value: object) -> str:
    """`value` as text without markup and without characters that control a terminal: it may come from a file."""
    return escape(printable(str(value)))


def coloured(text: str, number: int) -> Line:
    """`text` in the colour with this number, 24 bits."""
    return Text(text, Style(color=Color.from_rgb(number >> 16 & 255, number >> 8 & 255, number & 255)), no_wrap=True)


def half_block_line(cells: Sequence[tuple[RGB, RGB]]) -> Line:
    """A line of cells. A cell is given by the colours of its upper and its lower half."""
    line = Text(no_wrap=True)
    for upper, lower in cells:
        line.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
    return line


class _PictureProgress(Progress):
    """Bars, and a picture under them."""

    picture: Group | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.picture is not None:
            yield self.picture


class Bars:
    """Progress bars by name. A bar appears on its first update."""

    def __init__(self, progress: _PictureProgress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, name: str, done: float, total: float, detail: str = "") -> None:
        """Moves the bar `name` to `done` of `total`. `detail` is shown beside it."""
        if name not in self._tasks:
            self._progress.start()  # not earlier: without bars it would leave an empty line
            self._tasks[name] = self._progress.add_task(name, total=total, detail=detail)
        self._progress.update(self._tasks[name], completed=done, total=total, detail=detail)

    def picture(self, lines: Sequence[Line]) -> None:
        """Shows a picture, given by lines of cells, under the bars until the next one. No lines: none."""
        self._progress.picture = Group(*lines) if lines else None
        self._progress.refresh()

    def finish(self) -> None:
        """Stops updating. The bars stay on the screen, without the picture."""
        self._progress.picture = None
        if self._tasks:
            self._progress.stop()
