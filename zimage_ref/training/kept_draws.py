"""Which noised pictures a run of the kind `full` shows again under captions to preserve.

The base's predictions for them are computed before the first step, while the transformer is still the base, and kept in
the cache. Long runs would need too many, so the draws of the first epochs come again.
"""

from __future__ import annotations

from typing import NamedTuple

from .plan import TrainPlan

DRAWS = 512  # at most this many times `preserve_every`, but always those of a whole epoch


class KeptDraw(NamedTuple):
    """An item as it is in an epoch, from 0, under words to preserve, or without a caption if `blank`."""

    epoch: int
    item: int
    blank: bool


def drawn_epoch(plan: TrainPlan, epoch: int) -> int:
    """The epoch, from 0, whose draws are preserved in `epoch`."""
    return epoch % _epochs(plan)


def kept_draws(plan: TrainPlan, done: int = 0) -> list[KeptDraw]:
    """Every draw that a step after the first `done` ones preserves, in the order of their first use."""
    config, items = plan.config, plan.batches.items
    triggers = [plan.examples[item.example].settings.trigger for item in items]
    blanks = [[blank for blank in config.showings if blank or config.shows_words(each)] for each in triggers]
    most, draws = _epochs(plan) * sum(map(len, blanks)), dict[KeptDraw, None]()
    for step, (epoch, batches) in zip(range(done, plan.total), plan.batches.since(done), strict=False):
        if len(draws) == most:
            break
        if step % config.preserve_every == 0:
            shown = drawn_epoch(plan, epoch)
            draws |= {KeptDraw(shown, i, blank): None for batch in batches for i in batch for blank in blanks[i]}
    return list(draws)


def _epochs(plan: TrainPlan) -> int:
    """The number of epochs after which draws come again."""
    return max(1, DRAWS * plan.config.preserve_every // len(plan.batches.items))
