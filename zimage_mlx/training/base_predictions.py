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


class BasePredictions:
    """The batches that a plan preserves. Their targets are the predictions."""

    def __init__(self, plan: TrainPlan, feed: Feed) -> None:
        self._plan, self._feed = plan, feed

    def build(self, base: Transformer, done: int) -> Iterator[Encoded]:
        """Computes each prediction that a step after the first `done` ones needs, unless the cache has it.

        Raises TrainingError if the disk is full.
        """
        draws = kept_draws(self._plan, done)
        for number, (epoch, item, blank) in enumerate(draws, start=1):
            batch = self._feed.preserved(self._feed.batch(epoch, [item]), epoch, [item], blank)
            assert batch is not None  # `kept_draws` has only those that are shown again
            (path,) = self._paths(batch)
            if not is_entry(path):
                raw = base(batch.x_sigma, model_time(batch.sigma), batch.captions)
                self._feed.data.write(path, to_stored(raw[0].astype(base.dtype)), len(draws) - number + 1)
            yield Encoded(number, len(draws), "predictions")

    def batches(self, step: int, epoch: int, items: Sequence[int], noisy: NoisyBatch) -> list[NoisyBatch]:
        """What step `step`, from 0, preserves of `items`. noisy: these items as they are in `epoch`.

        Raises TrainingError if a prediction is gone or damaged.
        """
        config = self._plan.config
        if not config.preserves or step % config.preserve_every:
            return []
        drawn = drawn_epoch(self._plan, epoch)
        if drawn != epoch:
            noisy = self._feed.batch(drawn, items)
        shown = [self._feed.preserved(noisy, drawn, items, blank) for blank in config.showings]
        return [replace(batch, target=self._read(batch)) for batch in shown if batch]

    def _read(self, batch: NoisyBatch) -> mx.array:
        """(B, C, h, w): the predictions for `batch`."""
        return mx.stack([self._feed.data.prediction(path) for path in self._paths(batch)])

    def _paths(self, batch: NoisyBatch) -> list[Path]:
        """The entry of each picture of `batch`. It follows from all that the transformer sees."""
        seen = zip(batch.x_sigma, batch.sigma, batch.captions, strict=True)
        return [self._feed.data.cache.prediction([*map(to_stored, inputs)]) for inputs in seen]
