"""Chooses the pictures of each step from seed and step alone, so that a run can stop and continue at any step.

An epoch shows each item once. Items are shuffled and put into batches of one size, then the batches are shuffled.
The last items of a size make a smaller batch. A step takes `accumulation` batches; the last step of an epoch may take
fewer. Random numbers of an item depend on the item and the epoch, not on the batch. So another batch size does not
change the noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .buckets import Size

# Purposes of random numbers
ORDER, DRAW, INITIAL, RANKS, HELD_OUT, CAPTION, TAGS, INPUTS, MODULES, ROUNDING, PRESERVED = range(11)


def rng_for(seed: int, purpose: int, *indices: int) -> np.random.Generator:
    """The random numbers for one purpose. `indices` select an epoch, item or step."""
    return np.random.default_rng([seed, purpose, *indices])


@dataclass(frozen=True)
class Item:
    """An example as it is shown once in each epoch."""

    example: int
    size: Size
    repeat: int = 0


ItemBatch = list[int]  # indices of items, all of one size


@dataclass(frozen=True)
class BatchOrder:
    """The order of a run: the batches of every step, and the items of every batch."""

    items: Sequence[Item]
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return -(-sum(-(-count // self.batch_size) for count in self.sizes().values()) // self.accumulation)

    def sizes(self) -> dict[Size, int]:
        """Each size, and the number of items that have it."""
        counts: dict[Size, int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return counts

    def epoch(self, epoch: int) -> list[list[ItemBatch]]:
        """The steps of the epoch `epoch`, counted from 0. Each step is a list of batches."""
        rng = rng_for(self.seed, ORDER, epoch)
        by_size: dict[Size, ItemBatch] = {}
        for index in rng.permutation(len(self.items)).tolist():
            by_size.setdefault(self.items[index].size, []).append(index)
        batches = [
            indices[start : start + self.batch_size]
            for indices in by_size.values()
            for start in range(0, len(indices), self.batch_size)
        ]
        shuffled = [batches[i] for i in rng.permutation(len(batches))]
        return [shuffled[i : i + self.accumulation] for i in range(0, len(shuffled), self.accumulation)]

    def since(self, step: int) -> Iterator[tuple[int, list[ItemBatch]]]:
        """Yields (epoch from 0, batches) for every step after the first `step` steps, without end."""
        epoch, first = divmod(step, self.steps_per_epoch)
        while True:
            for batches in self.epoch(epoch)[first:]:
                yield epoch, batches
            epoch, first = epoch + 1, 0
