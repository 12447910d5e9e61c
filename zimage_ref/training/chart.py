"""Line charts as inline SVG. They need no script, no network and no library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 28  # margins
_POINTS = 400  # the most of a line; even, since two become one

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart. `style` is the CSS class of its colour."""

    name: str
    style: str
    points: Sequence[Point]


class Curve:
    """The points of a line, at most _POINTS however many are added: each is then the mean of its neighbours."""

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self._each = 1  # how many are averaged
        self._groups: list[tuple[float, float, int]] = []  # sums of x and y, and how many
        for x, y in points:
            self.add(x, y)

    def add(self, x: float, y: float) -> None:
        """Adds a point to the right of the others."""
        if self._groups and self._groups[-1][2] < self._each:
            self._groups[-1] = _sum(self._groups[-1], (x, y, 1))
            return
        if len(self._groups) == _POINTS:
            self._groups = [_sum(a, b) for a, b in zip(self._groups[::2], self._groups[1::2], strict=True)]
            self._each *= 2
        self._groups.append((x, y, 1))

    @property
    def points(self) -> list[Point]:
        """From left to right."""
        return [(x / count, y / count) for x, y, count in self._groups]


def _sum(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def chart(title: str, lines: Sequence[Line], last: float) -> str:
    """A figure as HTML, with `lines` over the steps 0 to `last`."""
    shown = [Line(line.name, line.style, Curve(line.points).points) for line in lines if line.points]
    values = [y for line in shown for _, y in line.points]
    if not values:
        return f"<figure><figcaption>{escape(title)}</figcaption><p class=muted>nothing measured yet</p></figure>"
    low, high = _range(min(values), max(values))
    keys = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in shown)
    legend = f"<span class=legend>{keys}</span>" if len(shown) > 1 else ""
    body = _grid(low, high, last) + "".join(_path(line, low, high, last) for line in shown)
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )


def _path(line: Line, low: float, high: float, last: float) -> str:
    places = [(_x(x, last), _y(y, low, high)) for x, y in line.points]
    ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = places if len(places) <= 40 else places[-1:]
    marks = "".join(f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in dots)
    return f'<polyline class="{line.style}" points="{ends}"/>{"" if "faint" in line.style else marks}'


def _grid(low: float, high: float, last: float) -> str:
    rows = "".join(
        f'<path class=grid d="M{_LEFT} {_y(v, low, high):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class=tick x="{_LEFT - 8}" y="{_y(v, low, high) + 4:.1f}" text-anchor=end>{_number(v)}</text>'
        for v in _ticks(low, high)
    )
    columns = "".join(
        f'<text class=tick x="{_x(v, last):.1f}" y="{_HEIGHT - 8}" text-anchor=middle>{v:g}</text>'
        for v in _ticks(0, last)
        if v == int(v)
    )
    return rows + columns


def _range(low: float, high: float) -> Point:
    """The ends of an axis for values from `low` to `high`, with a margin above and below."""
    if high == low:
        return (0.0, high * 1.25) if high > 0 else (low - 1, high + 1)
    room = 0.06 * (high - low)
    return (0.0 if 0 <= low < room * 6 else low - room), high + room


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.0e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def _x(step: float, last: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(last, 1)


def _y(value: float, low: float, high: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))
