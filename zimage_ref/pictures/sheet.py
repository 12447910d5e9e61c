"""A sheet: pictures side by side in rows and columns, with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .images import Picture

_LARGEST = 64_000_000  # pixels of a sheet: programs that show pictures refuse far larger ones
_GAP = 8  # pixels between pictures, at most
_LETTER = 0.07  # height of the letters, as a share of a cell's side
_SMALLEST = 10  # pixels of letters
_LINES = 3  # the most lines of a label


class Sheet:
    """A sheet that is filled picture by picture. It keeps no picture."""

    def __init__(self, columns: Sequence[str], rows: Sequence[str], size: tuple[int, int]) -> None:
        """columns, rows: the labels; empty ones take no room. size: of a cell, width and height in pixels.

        If the sheet would be too large, all cells shrink alike.
        """
        count = len(columns) * len(rows)
        scale = min(1.0, math.sqrt(_LARGEST / (count * size[0] * size[1])))
        self._width, self._height = (max(1, int(side * scale)) for side in size)
        self._gap = min(_GAP, max(1, min(self._width, self._height) // 16))
        self._font = ImageFont.load_default(max(_SMALLEST, round(_LETTER * min(self._width, self._height))))
        draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        self._columns = [self._wrapped(draw, label, self._width) for label in columns]
        self._rows = [self._wrapped(draw, label, self._width) for label in rows]
        self._top = max(self._extent(draw, label)[1] for label in self._columns)
        self._left = max(self._extent(draw, label)[0] for label in self._rows)
        corner = self._corner(len(rows), len(columns))
        self.picture: Picture = Image.new("RGB", corner, "white")
        self._write_labels()

    def add(self, index: int, picture: Picture) -> None:
        """Puts `picture` into the cell `index`, from 0, row by row. A larger or smaller one is scaled."""
        row, column = divmod(index, len(self._columns))
        scale = min(self._width / picture.width, self._height / picture.height)
        if scale != 1:
            sides = (max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((next(sides), next(sides)), Image.Resampling.LANCZOS)
        x, y = self._corner(row, column)
        self.picture.paste(picture, (x + (self._width - picture.width) // 2, y + (self._height - picture.height) // 2))

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of a cell, (x, y) in pixels."""
        return (
            self._left + self._gap + column * (self._width + self._gap),
            self._top + self._gap + row * (self._height + self._gap),
        )

    def _write_labels(self) -> None:
        draw = ImageDraw.Draw(self.picture)
        for column, label in enumerate(self._columns):
            x, y = self._corner(0, column)
            draw.multiline_text(
                (x + self._width // 2, y - self._gap), label, "black", self._font, anchor="md", align="center"
            )
        for row, label in enumerate(self._rows):
            x, y = self._corner(row, 0)
            draw.multiline_text(
                (x - self._gap, y + self._height // 2), label, "black", self._font, anchor="rm", align="right"
            )

    def _extent(self, draw: ImageDraw.ImageDraw, label: str) -> tuple[int, int]:
        """The room that a label takes, (width, height) in pixels; 0 for an empty one."""
        if not label:
            return 0, 0
        left, top, right, bottom = draw.multiline_textbbox((0, 0), label, self._font)
        return math.ceil(right - left) + 2 * self._gap, math.ceil(bottom - top) + 2 * self._gap

    def _wrapped(self, draw: ImageDraw.ImageDraw, label: str, width: int) -> str:
        """`label` in lines that are at most `width` pixels wide if its words are. A long one is cut."""
        lines = [""]
        for word in label.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and draw.textlength(longer, self._font) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        if len(lines) > _LINES:
            lines = [*lines[:_LINES], "..."]
        return "\n".join(self._cut(draw, line, width) for line in lines)

    def _cut(self, draw: ImageDraw.ImageDraw, line: str, width: int) -> str:
        if draw.textlength(line, self._font) <= width:
            return line
        while line and draw.textlength(f"{line}...", self._font) > width:
            line = line[:-1]
        return f"{line}..."
