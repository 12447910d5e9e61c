"""The base's predictions for pictures to preserve, for a run that changes the base itself.

They are computed before the first step and kept in the cache. So the base need not stay beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.weights import to_stored
from zimage_ref.model.flow import model_time
from zimage_ref.training.cache import is_entry
from zimage_ref.training.events import Encoded
from zimage_ref.training.kept_draws import drawn_epoch, kept_draws
from zimage_ref.training.plan import TrainPlan

from .feed import Feed
from .loss import NoisyBatch


class BaseTargets:
    """The batches to preserve of a plan, with those predictions as their targets."""

    def __init__(self, plan: TrainPlan, feed: Feed) -> None:
        self._plan, self._feed = plan, feed

    def build(self, base: Transformer) -> Iterator[Encoded]:
        """Computes every target that is missing or damaged. Raises TrainingError if the disk is full."""
        if not self._plan.config.preserves:
            return
        draws = kept_draws(self._plan)
        for done, (epoch, item) in enumerate(draws, start=1):
            for batch in self._drawn(epoch, [item]):
                (path,) = self._paths(batch)
                if not is_entry(path):
                    raw = base(batch.x_sigma, model_time(batch.sigma), batch.captions)
                    self._feed.data.write(path, to_stored(raw[0].astype(base.dtype)), len(draws) - done + 1)
            yield Encoded(done, len(draws), "targets")

    def batches(self, step: int, epoch: int, items: Sequence[int]) -> list[NoisyBatch]:
        """What step `step`, from 0, preserves of `items`. Raises TrainingError if a target is gone or damaged."""
        config = self._plan.config
        if not config.preserves or step % config.preserve_every:
            return []
        kept = self._drawn(drawn_epoch(self._plan, epoch), items)
        return [replace(batch, target=mx.stack([*map(self._feed.data.target, self._paths(batch))])) for batch in kept]

    def _drawn(self, epoch: int, items: Sequence[int]) -> list[NoisyBatch]:
        """The pictures of `items` as they are in `epoch`, under captions to preserve, without targets."""
        noisy, showings = self._feed.batch(epoch, items), self._plan.config.showings
        shown = [self._feed.preserved(noisy, epoch, items, blank) for blank in showings]
        return [batch for batch in shown if batch]

    def _paths(self, batch: NoisyBatch) -> list[Path]:
        """The entry of each picture of `batch`. It follows from all that the transformer sees."""
        seen = zip(batch.x_sigma, batch.sigma, batch.captions, strict=True)
        return [self._feed.data.cache.target([*map(to_stored, inputs)]) for inputs in seen]
