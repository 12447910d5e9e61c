"""The room on disk that a run of the kind full needs, in sentences for the user."""

from __future__ import annotations

import math

from zimage_ref.memory import LoadedModel

from .full import count, state_bytes
from .kept_draws import kept_draws
from .plan import TrainPlan


def room(plan: TrainPlan, precision: str) -> str:
    """What the results and the states to resume from take. precision: of the weights, by name."""
    config, model = plan.config, LoadedModel(plan.model, precision)
    weights = count(plan.parameters) * (4 if config.master_weights else model.itemsize)
    save = weights + state_bytes(plan.parameters, config.optimizer, master_weights=False)
    result = sum(model.sizes("transformer").values())
    return (
        f"on disk the result takes {result / 1e9:.3g} GB, and so does each of `save_every`. A state to resume from "
        f"takes {save / 1e9:.3g} GB; two are kept, and a third is written beside them: {3 * save / 1e9:.3g} GB"
    ) + (_kept(plan, model.itemsize) if config.preserves else "")


def _kept(plan: TrainPlan, itemsize: int) -> str:
    """The base's predictions for pictures to preserve."""
    vae, draws = plan.model.vae, kept_draws(plan)
    pixels = sum(math.prod(plan.batches.items[draw.item].size) for draw in draws)
    nbytes = itemsize * vae.latent_channels * pixels // vae.factor**2
    return (
        f". The base's predictions for {len(draws):,} noised pictures are computed before the first step and kept in "
        f"the cache: {nbytes / 1e6:.3g} MB"
    )


def written(plan: TrainPlan, precision: str) -> str:
    """What the mode stream writes."""
    nbytes = count(plan.parameters) * LoadedModel(plan.model, precision).itemsize
    return f"the weights are changed in a file without a name beside `output`: a step writes {nbytes / 1e9:.3g} GB"
