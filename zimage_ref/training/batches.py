"""Which pictures make up which step: a function of seed and step alone, so that a run can stop and go on anywhere.

An epoch shows each item once. Items are shuffled and gathered into batches of one size, then the batches are shuffled.
Items that are left over in a size make a smaller batch. A step takes `accumulation` batches, the last one of an epoch
maybe fewer. What is random about an item in an epoch depends on the item and not on its batch, so another batch size
changes no noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .buckets import Size

ORDER, DRAW, INITIAL, RANKS, HELD_OUT = range(5)  # purposes of random numbers


def rng_for(seed: int, purpose: int, *indices: int) -> np.random.Generator:
    """The random numbers for one purpose, and for one epoch, item or step of it."""
    return np.random.default_rng([seed, purpose, *indices])


@dataclass(frozen=True)
class Item:
    """One showing of an example in each epoch."""

    example: int
    size: Size
    repeat: int = 0


ItemBatch = list[int]  # indices of items, all of one size


@dataclass(frozen=True)
class BatchOrder:
    """All steps of a run: which items are in which batch of which step."""

    items: Sequence[Item]
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch."""
        return -(-sum(-(-count // self.batch_size) for count in self.sizes().values()) // self.accumulation)

    def sizes(self) -> dict[Size, int]:
        """The sizes that occur, and how many items have each."""
        counts: dict[Size, int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return counts

    def epoch(self, epoch: int) -> list[list[ItemBatch]]:
        """The steps of epoch `epoch`, from 0, each a list of batches."""
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
        """Epoch, from 0, and batches of every step after the first `step` ones; without end."""
        epoch, first = divmod(step, self.steps_per_epoch)
        while True:
            for batches in self.epoch(epoch)[first:]:
                yield epoch, batches
            epoch, first = epoch + 1, 0
