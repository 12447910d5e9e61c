"""The parts of the LoRA that a step leaves out: ranks, inputs, layers. They depend on the seed and the step alone.

    ranks     columns of B, other ones for each layer            (`rank_dropout`)
    inputs    columns of A, for all tokens of the step alike     (`dropout`)
    layers    the whole B of a layer                             (`module_dropout`)

The ranks and inputs that are left are enlarged, so that the mean stays the same. Layers are not, as in kohya's
trainer.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.lora.trained import TrainedKind
from zimage_ref.training.batches import INPUTS, MODULES, RANKS, rng_for
from zimage_ref.training.config import TrainConfig

Shapes = Mapping[str, tuple[int, ...]]  # name -> shape of a matrix


def dropout(config: TrainConfig, kind: TrainedKind, shapes: Mapping[str, Shapes], step: int) -> dict[str, mx.array]:
    """The factors of the vectors of `kind` in `step`, by name; a vector that is left as it is has none.

    shapes: those of the matrices in each vector.
    """
    found: dict[str, mx.array] = {}
    if config.dropout:
        found["lora_A"] = mx.array(_columns(shapes["lora_A"], config.dropout, rng_for(config.seed, INPUTS, step)))
    if config.rank_dropout and kind.by_rank in shapes:
        rng = rng_for(config.seed, RANKS, step)
        found[kind.by_rank] = mx.array(_columns(shapes[kind.by_rank], config.rank_dropout, rng))
    if config.module_dropout:
        for name in set(kind.last) & shapes.keys():
            layers = mx.array(_layers(shapes[name], config.module_dropout, rng_for(config.seed, MODULES, step)))
            found[name] = found[name] * layers if name in found else layers
    return found


def _columns(shapes: Shapes, rest: float, rng: np.random.Generator) -> Array:
    """For every element: 0 if its column rests, more than 1 otherwise."""
    rows = []
    for shape in shapes.values():
        awake = rng.random((1, shape[1])) >= rest
        rows.append(np.broadcast_to(awake / (1 - rest), shape).astype(np.float32).ravel())
    return np.concatenate(rows)


def _layers(shapes: Shapes, rest: float, rng: np.random.Generator) -> Array:
    """For every element: 0 if its layer rests, 1 otherwise."""
    return np.concatenate([np.full(np.prod(shape), rng.random() >= rest, np.float32) for shape in shapes.values()])
