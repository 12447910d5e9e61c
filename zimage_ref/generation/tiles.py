"""Overlapping tiles of a large picture, and the blend of what is computed for each.

Every cell of the result is the mean of the tiles that hold it. A tile counts fully in its middle and fades out over the
overlap, so that no seam is left. The noise predictions of a step are blended as MultiDiffusion does, arXiv 2302.08113.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.steering import Box

_OVERLAP = 4  # tiles share at least this part of their side, 1 / 4
Done = Callable[[], None]  # is called after each tile


@dataclass(frozen=True)
class Place:
    """One tile: its first row and column, and its size, in cells."""

    top: int
    left: int
    rows: int
    columns: int

    def index(self, factor: int = 1) -> tuple[slice, slice, slice, slice]:
        """The index of the tile in an array (B, C, factor h, factor w)."""
        everything = slice(None)
        return (
            everything, everything, slice(factor * self.top, factor * (self.top + self.rows)),
            slice(factor * self.left, factor * (self.left + self.columns)),
        )  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """The tiles of a picture of h x w cells. All are of one size, and the first and the last touch the edges."""

    h: int
    w: int
    rows: int  # of a tile
    columns: int

    @classmethod
    def of(cls, h: int, w: int, side: int | None) -> Tiles:
        """Tiles of at most `side` x `side` cells; None is one tile."""
        side = max(h, w) if side is None else side
        return cls(h, w, min(h, side), min(w, side))

    @property
    def single(self) -> bool:
        """Whether one tile holds the whole picture."""
        return (self.rows, self.columns) == (self.h, self.w)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """All tiles, row by row."""
        return tuple(
            Place(top, left, self.rows, self.columns)
            for top in self._starts(self.h, self.rows)
            for left in self._starts(self.w, self.columns)
        )

    def _starts(self, whole: int, tile: int) -> list[int]:
        overlap = tile // _OVERLAP
        count = 1 if whole == tile else -(-(whole - overlap) // (tile - overlap))
        return [round(i * (whole - tile) / max(count - 1, 1)) for i in range(count)]

    def pixels(self, factor: int) -> tuple[int, int]:
        """Width and height of a tile in pixels, `factor` a cell."""
        return factor * self.columns, factor * self.rows

    def pixels_in_all(self, factor: int) -> int:
        """The pixels of the picture."""
        return factor**2 * self.h * self.w

    def box(self, place: Place) -> Box:
        """A tile in shares of the picture."""
        return Box(place.left / self.w, place.top / self.h, place.columns / self.w, place.rows / self.h)

    def shares(self, factor: int = 1) -> Iterator[tuple[Place, Array]]:
        """Each tile, and the share that it has in every cell of its own, (factor rows, factor columns) float32.

        The shares of a cell add up to 1. factor: parts of a cell along each axis, such as pixels of a latent.
        """
        window = np.outer(self._fade(self.h, self.rows, factor), self._fade(self.w, self.columns, factor))
        total = np.zeros((factor * self.h, factor * self.w), np.float32)
        for place in self.places:
            total[place.index(factor)[2:]] += window
        for place in self.places:
            share: Array = window / total[place.index(factor)[2:]]
            yield place, share

    def _fade(self, whole: int, tile: int, factor: int) -> Array:
        """The weights of the cells along one side of a tile, (factor tile,) float32: smooth, 1 beyond the overlap."""
        starts = self._starts(whole, tile)
        overlap = tile - max((later - start for start, later in pairwise(starts)), default=0)
        cells = np.arange(factor * tile) + 0.5
        reach = np.minimum(cells, factor * tile - cells) / (factor * overlap)
        near = np.clip(reach, 0, 1)
        weights: Array = (near * near * (3 - 2 * near)).astype(np.float32)
        return weights

    def blend(self, make: Callable[[Place], Array], factor: int = 1, done: Done = lambda: None) -> Array:
        """What `make` gives for the tiles, (B, C, factor rows, factor columns) each, as one (B, C, factor h, factor w).

        done: is called after each tile.
        """
        whole: Array = np.zeros(0)
        for place, share in self.shares(factor):
            part = make(place)
            if not whole.size:
                whole = np.zeros((*part.shape[:2], factor * self.h, factor * self.w), part.dtype)
            whole[place.index(factor)] += share.astype(part.dtype) * part
            done()
        return whole
