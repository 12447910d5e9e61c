"""Which noised pictures a run of the kind `full` shows again under captions to preserve.

The base's predictions for them are computed before the first step, while the transformer is still the base, and kept in
the cache. Long runs would need too many, so the draws of the first epochs come again.
"""

from __future__ import annotations

from .plan import TrainPlan

DRAWS = 512  # at most about; an epoch has one for each picture, and the first epoch is always whole


def drawn_epoch(plan: TrainPlan, epoch: int) -> int:
    """The epoch, from 0, whose draws are preserved in `epoch`."""
    return epoch % max(1, DRAWS // len(plan.batches.items))


def kept_draws(plan: TrainPlan) -> list[tuple[int, int]]:
    """(epoch, item) of every draw that some step of the run preserves, in the order of their first use."""
    draws: dict[tuple[int, int], None] = {}
    for step, (epoch, batches) in zip(range(plan.total), plan.batches.since(0), strict=False):
        if step % plan.config.preserve_every == 0:
            draws |= {(drawn_epoch(plan, epoch), item): None for batch in batches for item in batch}
    return list(draws)
