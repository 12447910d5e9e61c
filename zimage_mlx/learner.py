"""The LoRA as it learns: parameters, optimizer and average, one step at a time, whole state in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zimage_ref.batches import INITIAL, RANKS, stream
from zimage_ref.errors import ConfigError
from zimage_ref.lora import LoRA
from zimage_ref.tensors import Array
from zimage_ref.train_plan import TrainPlan

from . import lora
from .feed import Feed
from .loss import Parameters, loss_and_gradients
from .optimizer import Optimizer, averaged, clipped, learning_rate, number
from .transformer import Transformer


@dataclass(frozen=True)
class Outcome:
    """What one step did."""

    loss: float
    grad_norm: float
    lr: float
    pictures: int
    finite: bool


class Learner:
    """Trains the LoRA of a plan on a transformer, alone or with the other machines of a group."""

    def __init__(self, plan: TrainPlan, model: Transformer, feed: Feed, group: mx.distributed.Group) -> None:
        config = plan.config
        self._plan, self._model, self._feed, self._group = plan, model, feed, group
        lora.start(model, plan.layers, config.rank, config.alpha, stream(config.seed, INITIAL))
        self.parameters: Parameters = dict(tree_flatten(model.trainable_parameters()))
        self._average: Parameters = dict(self.parameters) if config.ema else {}
        self._optimizer = Optimizer(config, self.parameters)

    def step(self, step: int, epoch: int, batches: Sequence[Sequence[int]]) -> Outcome:
        """Makes step `step`, from 0, on batches of items; changes nothing where loss or gradient is not finite."""
        config = self._plan.config
        loss, gradients = self._gradients(step, epoch, batches)
        gradients, norm = clipped(gradients, config.grad_clip)
        lr = learning_rate(config, step, self._plan.total)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.parameters = self._optimizer.apply(self.parameters, gradients, lr)
            if config.ema:
                self._average = averaged(self._average, self.parameters, config.ema, step + 1)
        self._use(self.parameters)
        return Outcome(loss, norm, lr, sum(map(len, batches)), finite)

    @contextmanager
    def result(self) -> Iterator[Transformer]:
        """The transformer with the LoRA as it would be saved: the average, where there is one."""
        self._use(self._average or self.parameters)
        try:
            yield self._model
        finally:
            self._use(self.parameters)

    def factors(self) -> LoRA:
        """The LoRA as it would be saved."""
        with self.result() as model:
            return lora.factors(model)

    def state(self) -> dict[str, dict[str, Array]]:
        """All that the next step depends on: lora, optimizer and, where there is one, ema."""
        parts = {"lora": self.parameters, "ema": self._average}
        arrays = {part: {k: np.array(v) for k, v in values.items()} for part, values in parts.items() if values}
        return {**arrays, "optimizer": self._optimizer.state()}

    def restore(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Takes up a state that `state` gave. Raises ConfigError where it is of another LoRA or optimizer."""
        fresh = self.state()
        for part, what in (("lora", "layers or another rank"), ("optimizer", "optimizer state")):
            if _shapes(state[part]) != _shapes(fresh[part]):
                raise ConfigError(
                    f"{self._plan.config.output}: the saved run has other {what}: it cannot be resumed so"
                )
        self.parameters = {name: mx.array(array) for name, array in state["lora"].items()}
        average = state.get("ema", state["lora"]) if self._plan.config.ema else {}
        self._average = {name: mx.array(array) for name, array in average.items()}
        self._optimizer.restore(state["optimizer"])
        self._use(self.parameters)

    def _gradients(self, step: int, epoch: int, batches: Sequence[Sequence[int]]) -> tuple[float, Parameters]:
        """Loss and gradients, means over all pictures of the step, the same on every machine."""
        masks = self._masks(step)
        self._use({name: value * masks[name] if name in masks else value for name, value in self.parameters.items()})
        pictures = sum(map(len, batches))
        loss = mx.array(0.0)
        gradients = {name: mx.zeros_like(value) for name, value in self.parameters.items()}
        for batch in batches:
            if own := self._own(batch):
                part_loss, part = loss_and_gradients(self._model, self._feed.batch(epoch, own))
                share = len(own) / pictures
                loss = loss + share * part_loss
                gradients = {name: total + share * part[name] for name, total in gradients.items()}
                mx.eval(loss, gradients)
        if self._group.size() > 1:
            loss = mx.distributed.all_sum(loss, group=self._group)
            means: Any = nn.average_gradients(tree_unflatten(list(gradients.items())), self._group)
            gradients = {name: mean * self._group.size() for name, mean in dict(tree_flatten(means)).items()}
        return number(loss), {n: g * masks[n] if n in masks else g for n, g in gradients.items()}

    def _own(self, batch: Sequence[int]) -> Sequence[int]:
        """This machine's share of a batch."""
        rank, each = self._group.rank(), self._plan.config.batch_size
        return batch[rank * each : (rank + 1) * each]

    def _masks(self, step: int) -> Parameters:
        """For each B, (1, rank): 0 for the ranks that rest in `step`, more than 1 for the others."""
        rest = self._plan.config.rank_dropout
        if not rest:
            return {}
        rng = stream(self._plan.config.seed, RANKS, step)
        masks = {}
        for name, value in self.parameters.items():
            if name.endswith("lora_B"):
                awake = rng.random((1, value.shape[1])) >= rest
                masks[name] = mx.array((awake / (1 - rest)).astype(np.float32))
        return masks

    def _use(self, parameters: Parameters) -> None:
        self._model.update(tree_unflatten(list(parameters.items())))


def _shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
