"""Trains all weights of a small network as one vector, with one compiled program for each step.

A small network has thousands of short operations, and a GPU would wait most of the time for the next one to start. So
the weights are one float32 vector, and so are the moments and the averages. Forward pass, backward pass, AdamW and
average are compiled into one program. Forward and backward passes are bfloat16 on a GPU; the vectors stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zimage_mlx.device import on_gpu
from zimage_ref.errors import ConfigError
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Tensor

EMA = 0.999
_STEP, _RECIPE = "step", "recipe"  # keys in the metadata of the files of a saved state

AnyModel = TypeVar("AnyModel", bound=nn.Module, covariant=True)
Loss: TypeAlias = Callable[..., mx.array]  # (model, key, *inputs) -> scalar; all randomness must come from key


@dataclass(frozen=True)
class Compute:
    """How a step is computed."""

    compiled: bool | None = None  # None: on a GPU only; the kernels of a whole step take minutes to build, once
    dtype: mx.Dtype | None = None  # of forward and backward pass; None: bfloat16 on a GPU, float32 elsewhere


class Stepper(Generic[AnyModel]):
    """Each call makes one step of `model`. The learning rate warms up and decays; the weights are averaged over steps.

    recipe: how the model is made, as text. A saved state is restored only with the same recipe; the number of steps may
    differ.
    """

    def __init__(
        self, model: AnyModel, loss: Loss, rate: float, steps: int, recipe: str = "", compute: Compute | None = None
    ) -> None:
        compute = compute or Compute()
        warm = max(steps // 40, 1)
        schedule = optim.join_schedules(
            [optim.linear_schedule(1e-6, rate, warm), optim.cosine_decay(rate, max(steps - warm, 1), rate / 100)],
            [warm],
        )
        self.model, self.loss, self.steps, self.recipe = model, loss, steps, recipe
        named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        self._shapes = {name: array.shape for name, array in named.items()}
        self._ends = np.cumsum([array.size for array in named.values()])[:-1].tolist()
        vector = mx.concatenate([array.flatten() for array in named.values()]).astype(mx.float32)
        self.vectors = {"weights": vector, "average": mx.array(vector)}
        self.optimizer = optim.AdamW(schedule, betas=[0.9, 0.99], weight_decay=1e-2, bias_correction=True)
        self.optimizer.init({"weights": vector})
        mx.eval(self.vectors, self.optimizer.state)
        self.done = 0
        self._dtype = compute.dtype or (mx.bfloat16 if on_gpu() else mx.float32)
        state = [self.vectors, self.optimizer.state]
        compiled = on_gpu() if compute.compiled is None else compute.compiled
        self._step = mx.compile(self._plain, inputs=state, outputs=state) if compiled else self._plain

    def __call__(self, key: mx.array, *inputs: mx.array) -> mx.array:
        """Makes a step and gives its loss, a scalar. MLX may still be computing the loss and the weights on return."""
        value: mx.array = self._step(key, *inputs)
        self.done += 1
        mx.async_eval(value, self.vectors, self.optimizer.state)
        return value

    def _plain(self, key: mx.array, *inputs: mx.array) -> mx.array:
        def loss_of(weights: mx.array) -> mx.array:
            self.place(weights.astype(self._dtype))
            return self.loss(self.model, key, *inputs)

        value, gradient = mx.value_and_grad(loss_of)(self.vectors["weights"])
        gradient = gradient * mx.minimum(1, mx.rsqrt(mx.sum(mx.square(gradient)) + 1e-12))  # its length is at most 1
        self.vectors["weights"] = self.optimizer.apply_gradients(
            {"weights": gradient}, {"weights": self.vectors["weights"]}
        )["weights"]
        n = self.optimizer.step.astype(mx.float32)
        share = mx.maximum(1 - EMA, 9 / (10 + n))  # larger at first, so that early weights count little
        self.vectors["average"] = self.vectors["average"] + share * (self.vectors["weights"] - self.vectors["average"])
        return value

    def place(self, weights: mx.array) -> AnyModel:
        """The model with its parameters taken from the vector `weights`."""
        parts = zip(self._shapes.items(), mx.split(weights, self._ends), strict=True)
        self.model.update(tree_unflatten([(name, part.reshape(shape)) for (name, shape), part in parts]))
        return self.model

    def averaged(self) -> AnyModel:
        """The model with the averages of its weights, in float32. The next step restores the weights themselves."""
        return self.place(self.vectors["average"])

    def save(self, folder: Path) -> None:
        """Writes the state for `restore`, one vector in each file."""
        metadata = {_STEP: str(self.done), _RECIPE: self.recipe}
        for name, vector in self._state().items():
            safetensors.write(folder / f"{name}.safetensors", {name: Tensor.of(np.array(vector))}, metadata)

    def restore(self, folder: Path) -> None:
        """Restores the state that `save` wrote. Raises ConfigError if its recipe differs or if it is not complete."""
        made, read = set(), {}
        for name, vector in self._state().items():
            path = folder / f"{name}.safetensors"
            tensors, metadata = safetensors.read(path)
            if metadata.get(_RECIPE) != self.recipe or tensors[name].shape != vector.shape:
                raise ConfigError(f"{path}: made with {metadata.get(_RECIPE)}, not {self.recipe}: delete {folder}")
            made.add(int(metadata[_STEP]))
            read[name] = mx.array(tensors[name].read())
        if len(made) > 1:
            raise ConfigError(f"{folder}: its files are of steps {sorted(made)}, not of one: delete it")
        self.done = made.pop()
        self.vectors.update({name: read.pop(name) for name in list(self.vectors)})
        self.optimizer.state["weights"].update(read)
        self.optimizer.state["step"] = mx.array(self.done, mx.uint64)
        mx.eval(self.vectors, self.optimizer.state)

    def _state(self) -> dict[str, mx.array]:
        moments: dict[str, mx.array] = self.optimizer.state["weights"]
        return self.vectors | moments
