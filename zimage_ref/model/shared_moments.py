"""The statistics of group norms for a picture that the autoencoder computes tile by tile.

A group norm needs the mean and the variance of a whole picture. Those of a tile alone would change its colours and its
contrast. So a picture goes through the autoencoder twice: first each tile with its own statistics, which are kept, and
then each tile with the average of all. Source: the tiled VAE of multidiffusion-upscaler-for-automatic1111 shares
statistics too; it takes them from a small copy of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from .arrays import ArrayT


@dataclass
class SharedMoments(Generic[ArrayT]):
    """The moments of every group norm of a network, over tiles of one size."""

    sums: list[tuple[ArrayT, ArrayT]] = field(default_factory=list)  # for each norm: of means, of mean squares
    tiles: int = 0  # that were begun
    known: bool = False  # whether all tiles were seen
    _norm: int = 0  # the next norm of this tile

    def begin(self) -> None:
        """Says that another tile begins."""
        self._norm = 0
        self.tiles += not self.known

    def close(self) -> None:
        """Says that every tile was seen. From here on the moments are the averages."""
        self.known = True

    def of(self, mean: ArrayT, variance: ArrayT) -> tuple[ArrayT, ArrayT]:
        """The moments to norm with, of those of this tile. A network calls it once for each of its norms, in order."""
        place, self._norm = self._norm, self._norm + 1
        if self.known:
            first, second = (total / self.tiles for total in self.sums[place])
            return first, second - first * first
        square = variance + mean * mean
        if place == len(self.sums):
            self.sums.append((mean, square))
        else:
            first, second = self.sums[place]
            self.sums[place] = first + mean, second + square
        return mean, variance
