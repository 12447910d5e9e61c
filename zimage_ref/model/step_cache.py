"""Step caches: in many steps, the layers of a transformer are not computed, but follow from those of earlier steps.

    first-block   computes the first layer. If it changed the stream about as in the last step that was computed, adds
                  what the other layers added then
    taylor        continues the output of the last layer along a line through the last two that were computed
    mag           adds what all layers added last, while its length is known to change little

A batch has a row for each picture, and one for each negative prompt. Each row has its own state, and decides by itself:
so no picture depends on the others of its batch, and with guidance both branches have their own.
The classes take the arrays of both engines. Sources: the hooks FirstBlockCache, TaylorSeer (arXiv 2503.06923) and
MagCache (arXiv 2506.09045) of diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol

from .arrays import ArrayT

WARM_UP = 3  # steps that taylor computes first
MAG_THRESHOLD, MAG_IN_A_ROW, MAG_WARM_UP = 0.06, 3, 0.2  # error, steps one after the other, share of the first steps


class Layers(Protocol[ArrayT]):
    """The layers of a transformer at one noise level, for a batch. Streams are (n, S, D)."""

    rows: int  # of the batch
    count: int  # of the layers

    def enter(self) -> ArrayT:
        """The stream before the first layer. It is computed when you ask for it."""

    def run(self, stream: ArrayT, first: int, end: int, rows: Sequence[int]) -> ArrayT:
        """The stream of some rows after the layers from `first` to `end` - 1. Each layer runs at most once."""

    def joined(self, rows: Sequence[ArrayT]) -> ArrayT:
        """Rows (1, S, D) one after the other."""

    def kept(self, stream: ArrayT) -> ArrayT:
        """`stream`, fully computed, to be kept for other steps."""

    def size(self, stream: ArrayT, row: int) -> float:
        """The mean of the absolute values of a row (1, S, D), summed in float32, without what fills up its caption."""

    def growth(self, stream: ArrayT, before: ArrayT, row: int) -> float:
        """The mean over the same tokens of their length in `stream` over their length in `before`, (1, S, D) each."""


class StepCache(ABC, Generic[ArrayT]):
    """Gives the output of all layers in the steps of one batch, computed or from earlier steps."""

    def __init__(self) -> None:
        self.asked, self.computed = 0, 0  # rows so far, and those of them that went through all layers

    @property
    def reused(self) -> float:
        """The share of the rows so far that did not go through all layers."""
        return 1 - self.computed / max(self.asked, 1)

    def __call__(self, layers: Layers[ArrayT]) -> ArrayT:
        """The stream (B, S, D) after the last layer. It is called once for each step, in order."""
        self.asked += layers.rows
        return self.output(layers)

    @abstractmethod
    def output(self, layers: Layers[ArrayT]) -> ArrayT:
        """See `__call__`."""

    @abstractmethod
    def restart(self) -> None:
        """Forgets earlier streams, because from here on the transformer is given another prompt or control."""


class Judge(Protocol[ArrayT]):
    """Decides for one row whether its layers are computed."""

    def needs(self, layers: Layers[ArrayT], stream: ArrayT, head: ArrayT, known: bool) -> bool:
        """Whether they are. stream, head: (1, S, D) before the first layer, and where the kept part begins.

        known: whether there is something to add instead.
        """

    def learn(self, layers: Layers[ArrayT], added: ArrayT, before: ArrayT | None) -> None:
        """Is told what the layers added, (1, S, D), now and the last time."""


class Added(StepCache[ArrayT]):
    """Keeps what the layers from `first` on added to the stream of each row, and adds it again.

    judge: makes the judge of a row.
    """

    def __init__(self, first: int, judge: Callable[[int], Judge[ArrayT]]) -> None:
        super().__init__()
        self._first, self._judge = first, judge
        self._judges: list[Judge[ArrayT]] = []  # of the rows
        self._added: dict[int, ArrayT] = {}  # row -> (1, S, D)

    def restart(self) -> None:
        self._added.clear()

    def output(self, layers: Layers[ArrayT]) -> ArrayT:
        everyone = range(layers.rows)
        self._judges += [self._judge(row) for row in range(len(self._judges), layers.rows)]
        stream = layers.enter()
        head = layers.run(stream, 0, self._first, everyone)
        heads = [head[i : i + 1] for i in everyone]
        needy = [
            i for i in everyone
            if self._judges[i].needs(layers, stream[i : i + 1], heads[i], i in self._added)
        ]  # fmt: skip
        if not needy:
            return layers.joined([heads[i] + self._added[i] for i in everyone])
        chosen = head if len(needy) == layers.rows else layers.joined([heads[i] for i in needy])
        whole = layers.run(chosen, self._first, layers.count, needy)
        self.computed += len(needy)
        made = {row: whole[i : i + 1] for i, row in enumerate(needy)}
        for row, output in made.items():
            added = layers.kept(output - heads[row])
            self._judges[row].learn(layers, added, self._added.get(row))
            self._added[row] = added
        if len(needy) == layers.rows:
            return whole
        return layers.joined([made[i] if i in made else heads[i] + self._added[i] for i in everyone])


class FirstBlockJudge(Generic[ArrayT]):
    """Compares what the first layer adds with what it added when the others were computed last."""

    def __init__(self, threshold: float, row: int) -> None:
        self._threshold = threshold  # the most that may differ, as a share
        self._row = row
        self._before: ArrayT | None = None

    def needs(self, layers: Layers[ArrayT], stream: ArrayT, head: ArrayT, known: bool) -> bool:
        """See `Judge`."""
        moved = head - stream
        before = self._before
        if known and before is not None:
            size = layers.size(before, self._row)
            if layers.size(moved - before, self._row) <= self._threshold * size:
                return False
        self._before = layers.kept(moved)
        return True

    def learn(self, layers: Layers[ArrayT], added: ArrayT, before: ArrayT | None) -> None:
        """Learns nothing: `needs` has seen what it needs."""


class MagJudge(Generic[ArrayT]):
    """Sums up how far the length of what the layers add moves away from that of the last step that was computed.

    ratios: for each of `steps` steps, that length over the length of the step before; a list of another length is
    stretched. None: as it was between the last two steps that were computed.
    """

    def __init__(self, steps: int, ratios: Sequence[float] | None, row: int) -> None:
        self._row = row
        self._ratios = stretched(ratios, steps) if ratios else None
        self._warm_up = int(MAG_WARM_UP * steps + 0.5)
        self._step, self._gap = -1, 0  # the step at hand; steps since one was computed
        self._measured = 1.0
        self._begin()

    def _begin(self) -> None:
        self._ratio, self._error, self._skipped = 1.0, 0.0, 0

    def needs(self, layers: Layers[ArrayT], stream: ArrayT, head: ArrayT, known: bool) -> bool:
        """See `Judge`."""
        self._step += 1
        self._gap += 1
        if self._step < self._warm_up:
            return True
        self._ratio *= self._ratio_of_step()
        self._skipped += 1
        self._error += abs(1 - self._ratio)
        if known and self._error <= MAG_THRESHOLD and self._skipped <= MAG_IN_A_ROW:
            return False
        self._begin()
        return True

    def _ratio_of_step(self) -> float:
        if self._ratios is None:
            return self._measured
        return self._ratios[self._step] if self._step < len(self._ratios) else 1.0

    def learn(self, layers: Layers[ArrayT], added: ArrayT, before: ArrayT | None) -> None:
        """See `Judge`."""
        if self._ratios is None and before is not None:
            self._measured = layers.growth(added, before, self._row) ** (1 / self._gap)
        self._gap = 0


class Taylor(StepCache[ArrayT]):
    """Computes each `interval`-th step, and continues the output of the last layer along a line in between."""

    def __init__(self, interval: int) -> None:
        super().__init__()
        self._interval = interval
        self.restart()

    def restart(self) -> None:
        self._since = -1  # the step since the start
        self._last = 0  # the last one that was computed
        self._value: ArrayT | None = None  # the output then
        self._slope: ArrayT | None = None  # its change in one step

    def computes(self, step: int) -> bool:
        """Whether the layers are computed in a step, from 0."""
        return step < WARM_UP or (step - WARM_UP - 1) % self._interval == 0

    def output(self, layers: Layers[ArrayT]) -> ArrayT:
        self._since += 1
        n = layers.rows  # fewer than before if guidance has ended: the prompts come first
        value, slope, passed = self._value, self._slope, self._since - self._last
        if value is None or self.computes(self._since):
            made = layers.kept(layers.run(layers.enter(), 0, layers.count, range(n)))
            self._slope = None if value is None else layers.kept((made - value[:n]) * (1 / passed))
            self._value, self._last = made, self._since
            self.computed += n
            return made
        return value[:n] if slope is None else value[:n] + slope[:n] * passed


def stretched(ratios: Sequence[float], steps: int) -> list[float]:
    """`ratios` for `steps` steps: each has the nearest of the list."""
    last = len(ratios) - 1
    if steps == 1:
        return [ratios[last]]
    return [ratios[round(i * (last / (steps - 1)))] for i in range(steps)]
