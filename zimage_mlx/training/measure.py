"""Held-out loss and previews while training goes on, each when it is due."""

from __future__ import annotations

from collections.abc import Iterator

from zimage_mlx.device import number
from zimage_ref.model.flow import VALIDATION_SIGMAS
from zimage_ref.training.events import Previewed, Validated
from zimage_ref.training.plan import TrainPlan

from .feed import Feed
from .learning import Learning
from .loss import flow_matching_loss
from .preview import Previewer


class Measurer:
    """Measures the LoRA of a learner. All is due before the first step and after the last one."""

    def __init__(self, plan: TrainPlan, feed: Feed, learner: Learning, previewer: Previewer | None) -> None:
        """previewer: None if this machine draws no previews."""
        self._plan, self._feed, self._learner, self._previewer = plan, feed, learner, previewer

    def due(self, step: int) -> Iterator[Validated | Previewed]:
        """The measurements that are due after `step` steps."""
        config = self._plan.config
        if self._plan.held_out and self._is_due(step, config.validation_every):
            yield Validated(step, self._held_out_loss())
        if self._previewer and self._is_due(step, config.preview_every):
            yield from self._previewer.draw(step)

    def _is_due(self, step: int, every: int) -> bool:
        return step in (0, self._plan.total) or step % every == 0

    def _held_out_loss(self) -> dict[float, float]:
        """The mean loss over held-out pictures, for each sigma."""
        sums = dict.fromkeys(VALIDATION_SIGMAS, 0.0)
        with self._learner.result() as model:
            for index in range(len(self._plan.held_out)):
                for sigma, batch in self._feed.held_out(index):
                    sums[sigma] += number(flow_matching_loss(model, batch))
        return {sigma: total / len(self._plan.held_out) for sigma, total in sums.items()}
