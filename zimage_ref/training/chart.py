"""Line charts as inline SVG. They need no script and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from zimage_ref.formats.tensors import Array

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 28  # margins
_POINTS = 400  # a longer line is averaged down to this many points

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart. `style` is the CSS class of its colour."""

    name: str
    style: str
    points: Sequence[Point] | Array  # or (N, 2)


def chart(title: str, lines: Sequence[Line], last: float) -> str:
    """A figure as HTML, with `lines` over the steps 0 to `last`."""
    shown = [Line(line.name, line.style, _thinned(line.points)) for line in lines if len(line.points)]
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


def _thinned(points: Sequence[Point] | Array) -> list[Point]:
    """At most _POINTS points, each the mean of its neighbours."""
    pairs = np.asarray(points, np.float64)
    each = math.ceil(len(pairs) / _POINTS)
    begins = np.arange(0, len(pairs), each)
    counts = np.diff(begins, append=len(pairs))
    return [(x, y) for x, y in (np.add.reduceat(pairs, begins) / counts[:, None]).tolist()]


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
