"""Large layers of the autoencoder some rows at a time, and the statistics of the whole from those of its parts."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from zimage_ref.model.shared_moments import SharedMoments

from .compiled import fused
from .running import EvalOneAhead

MOMENT_BYTES = 8  # that `Moments` makes of each value, for a while
_AT_ONCE = 3  # strips that live at once: one computed, one queued, one not yet given back


class Strips:
    """Layers in strips of rows if they are large; each strip is computed while the next is queued."""

    def __init__(self, nbytes: int, shared: SharedMoments[mx.array] | None = None) -> None:
        """nbytes: what the strips that live at once may take for a while, beside whole layers.

        shared: the statistics of a picture that is computed tile by tile.
        """
        self._nbytes, self.eval_ahead, self.shared = nbytes, EvalOneAhead(), shared
        self._measured: tuple[mx.array, Moments] | None = None

    def assemble(
        self, make: Callable[[int, int], mx.array], shape: tuple[int, int, int, int], made: int, norm_follows: bool
    ) -> mx.array:
        """A layer of `shape` (B, H, W, C). make(top, bottom) makes some of its rows.

        made: bytes that `make` takes for each pixel. norm_follows: whether to take the moments, for `take`.
        """
        B, H, W, C = shape
        moments = Moments() if norm_follows else None
        parts = []
        for top, bottom in self.spans(H, B * W * (made + (MOMENT_BYTES * C if moments else 0))):
            parts.append(make(top, bottom))
            if moments:
                moments.add(parts[-1])
            self.eval_ahead(parts[-1], moments.sums if moments else ())
        whole = mx.concatenate(parts, axis=1)  # lazy: what this layer was made of is gone by then
        self._measured = (whole, moments) if moments else None
        return whole

    def spans(self, rows: int, each: int) -> list[tuple[int, int]]:
        """The first row of each strip and the row after its last, if a row takes `each` bytes."""
        count = min(rows, -(-rows * each * _AT_ONCE // self._nbytes))
        height = -(-rows // count)
        return [(top, min(top + height, rows)) for top in range(0, rows, height)]

    def take(self, x: mx.array) -> Moments | None:
        """The moments of x, if it was made last; once, so that nothing is held longer than it is needed."""
        measured, self._measured = self._measured, None
        return measured[1] if measured and measured[0] is x else None


class Moments:
    """Mean and variance of each channel of an array (B, H, W, C) that comes some rows at a time."""

    def __init__(self) -> None:
        self._pixels, self._pivot = 0, mx.array(0.0)
        self.sums = mx.array(0.0), mx.array(0.0)  # (B, 1, 1, C) float32: of deviations from the pivot, of their squares

    def add(self, x: mx.array) -> None:
        """Adds rows."""
        if not self._pixels:  # close to the mean, so that sums lose nothing to a large one
            self._pivot = mx.mean(x[:, :1].astype(mx.float32), axis=(1, 2), keepdims=True)
        deviations = _deviations(x, self._pivot)
        first, second = (mx.sum(mx.sum(part, axis=1, keepdims=True), axis=2, keepdims=True) for part in deviations)
        self.sums = self.sums[0] + first, self.sums[1] + second
        self._pixels += x.shape[1] * x.shape[2]

    def result(self) -> tuple[mx.array, mx.array]:
        """Mean and variance, (B, 1, 1, C) float32."""
        deviation, square = (total / self._pixels for total in self.sums)
        return self._pivot + deviation, square - mx.square(deviation)


@fused
def _deviations(x: mx.array, pivot: mx.array) -> tuple[mx.array, mx.array]:
    """x - pivot and its square, float32."""
    deviation = x.astype(mx.float32) - pivot
    return deviation, mx.square(deviation)
