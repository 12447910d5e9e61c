"""From gradients to new LoRA matrices: clipping, learning rate, the optimizers, and the average over steps.

The betas of AdamW and its like are (0.9, 0.99), lower than usual, because a run has only a few thousand steps.
Source: LoRA+, arXiv 2402.12354 (B learns faster than A).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from zimage_mlx.device import number, on_gpu
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.trained import MAGNITUDE, TRAINED
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.optimizers import OPTIMIZERS, SCHEDULES
from zimage_ref.training.plan import TrainPlan

from . import optimizers
from .optimizers import ScheduleFreeAdamW
from .packing import Packing, Vectors

_SETTINGS = {"betas": [0.9, 0.99], "bias_correction": True, "relative_step": False, "scale_parameter": False}


class Optimizer:
    """The optimizer of a config: one for each sort of matrices, which may learn at different rates.

    An optimizer that finds one rate for all is one for all sorts, except for magnitudes, which do not decay.
    """

    def __init__(self, config: TrainConfig, packing: Packing, vectors: Vectors) -> None:
        kind, last = OPTIMIZERS[config.optimizer], TRAINED[config.kind].last
        self._packing, self._by_matrix = packing, kind.by_matrix
        self._ratios = {factor: config.lora_plus if factor in last else 1.0 for factor in packing.shapes}
        alone = [factor for factor in packing.shapes if factor == MAGNITUDE or not kind.one_rate]
        self._factors: dict[str, tuple[str, ...]] = {factor: (factor,) for factor in alone}
        if together := tuple(factor for factor in packing.shapes if factor not in alone):
            self._factors["all"] = together
        self._parts = {name: make_optimizer(config, name != MAGNITUDE) for name in self._factors}
        for name, part in self._parts.items():
            part.init(self._view(name, vectors))
        self._changes = {name: self._change(part) for name, part in self._parts.items()}

    def _change(self, part: optim.Optimizer) -> Callable[[Vectors, Vectors], Vectors]:
        """`part.apply_gradients`. On a GPU its passes become one, so that no array between two passes is in memory."""
        if not on_gpu() or self._by_matrix or not hasattr(optim, type(part).__name__):
            return part.apply_gradients
        return mx.compile(part.apply_gradients, inputs=part.state, outputs=part.state)

    def apply(self, vectors: Vectors, gradients: Vectors, lr: float) -> Vectors:
        """The vectors after one step. `gradients` has the layout of `vectors`."""
        updated: dict[str, mx.array] = {}
        for name, part in self._parts.items():
            part.learning_rate = lr * self._ratios.get(name, 1.0)
            updated |= self._changes[name](self._view(name, gradients), self._view(name, vectors))
            mx.eval(updated, part.state)  # one part after the other, so that only one has old and new state in memory
        return self._packing.pack(updated) if self._by_matrix else updated

    def result(self, vectors: Vectors) -> Vectors:
        """What the run should give: `vectors`, or the averages that the optimizer makes of them."""
        found = dict(vectors)
        for name, part in self._parts.items():
            if isinstance(part, ScheduleFreeAdamW):
                found |= part.result(self._view(name, vectors))
        return found

    def _view(self, name: str, vectors: Vectors) -> dict[str, mx.array]:
        """The arrays that the optimizer `name` works on: its vectors, or the matrices in them by name."""
        factors = self._factors[name]
        if not self._by_matrix:
            return {factor: vectors[factor] for factor in factors}
        endings = tuple(f".{factor}" for factor in factors)
        return {name: matrix for name, matrix in self._packing.unpack(vectors).items() if name.endswith(endings)}

    def state(self) -> dict[str, Array]:
        """Everything that the next step depends on, as one table of arrays, for `restore`."""
        flat = {}
        for factor, part in self._parts.items():
            for key, value in part.state.items():
                slots = value if isinstance(value, dict) else {"": value}
                flat.update({f"{factor}/{key}/{slot}": np.array(array) for slot, array in slots.items()})
        return flat

    def restore(self, flat: Mapping[str, Array]) -> None:
        """Takes up a state that `state` gave."""
        for name, array in flat.items():
            factor, key, slot = name.split("/")
            state = self._parts[factor].state
            if slot:
                state[key][slot] = mx.array(array)
            else:
                state[key] = mx.array(array)


def make_optimizer(config: TrainConfig, decays: bool = True) -> optim.Optimizer:
    """The optimizer that `config` names, with those of our settings that it has. Its rate is set before each step.

    decays: whether the weights decay. A magnitude must not: it is the length of a weight, not a change.
    """
    name = OPTIMIZERS[config.optimizer].mlx_class
    kind = getattr(optim, name, None) or getattr(optimizers, name)
    settings = {**_SETTINGS, "weight_decay": config.weight_decay if decays else 0.0}
    known = inspect.signature(kind).parameters
    optimizer: optim.Optimizer = kind(learning_rate=0.0, **{k: v for k, v in settings.items() if k in known})
    return optimizer


def learning_rate(plan: TrainPlan, step: int) -> float:
    """The learning rate of step `step`, from 0: it rises during the warmup, then follows the schedule."""
    config, total = plan.config, plan.total
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    progress = max(0.0, (step - config.warmup) / max(1, total - config.warmup))  # 0..1
    schedule = "constant" if OPTIMIZERS[config.optimizer].averages else config.schedule
    return plan.lr * rise * SCHEDULES[schedule](progress)


def clipped(gradients: Vectors, longest: float) -> tuple[Vectors, float]:
    """The gradients, and their length as one vector. They are shortened if it is more than `longest` (0: never)."""
    squares = mx.stack([mx.sum(mx.square(g)) for g in gradients.values()])
    norm = number(mx.sqrt(mx.sum(squares)))
    if longest and norm > longest:
        gradients = {factor: g * (longest / norm) for factor, g in gradients.items()}
    return gradients, norm


def averaged(average: Vectors, vectors: Vectors, decay: float, step: int) -> Vectors:
    """The average after step `step`, from 1. It forgets faster at first, so that the first matrices count little."""
    keep = min(decay, (1 + step) / (10 + step))
    average = {factor: keep * average[factor] + (1 - keep) * vector for factor, vector in vectors.items()}
    mx.eval(average)
    return average
