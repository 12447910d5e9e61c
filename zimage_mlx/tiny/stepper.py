"""Training of all weights of a small network at once: one vector to AdamW, one compiled program a step.

Thousands of small operations on small arrays would leave a GPU waiting for their launches. So weights, moments and
averages are one float32 vector each, and forward, backward, optimizer and average are compiled together, in bfloat16
where the GPU computes; the vectors stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
_STEP, _RECIPE = "step", "recipe"  # metadata of the files of a saved state


class Stepper:
    """One step of `model` a call, under a warmed-up cosine rate, with a moving average of its weights.

    loss: (model, key, *inputs) -> scalar; key is all the randomness it may use.
    recipe: what a saved state must have been made with to be gone on from; the number of steps may differ.
    compiled: None for a GPU, where the kernels of a whole step take minutes to build, once.
    dtype: of forward and backward; None is bfloat16 on a GPU, float32 elsewhere.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., mx.array], rate: float, steps: int, recipe: str = "",
        compiled: bool | None = None, dtype: mx.Dtype | None = None,
    ) -> None:  # fmt: skip
        warm = max(steps // 40, 1)
        schedule = optim.join_schedules(
            [optim.linear_schedule(1e-6, rate, warm), optim.cosine_decay(rate, max(steps - warm, 1), rate / 100)],
            [warm],
        )
        self.model, self.loss, self.steps, self.recipe = model, loss, steps, recipe
        named: Any = tree_flatten(model.parameters())
        self._shapes = [(name, array.shape) for name, array in named]
        self._ends = np.cumsum([array.size for _, array in named])[:-1].tolist()
        vector = mx.concatenate([array.flatten() for _, array in named]).astype(mx.float32)
        self.vectors = {"weights": vector, "average": mx.array(vector)}
        self.optimizer = optim.AdamW(schedule, betas=[0.9, 0.99], weight_decay=1e-2, bias_correction=True)
        self.optimizer.init({"weights": vector})
        mx.eval(self.vectors, self.optimizer.state)
        self.done = 0
        self._dtype = dtype or (mx.bfloat16 if on_gpu() else mx.float32)
        state = [self.vectors, self.optimizer.state]
        compiled = on_gpu() if compiled is None else compiled
        self._step: Callable[..., mx.array] = (
            mx.compile(self._plain, inputs=state, outputs=state) if compiled else self._plain
        )

    def __call__(self, key: mx.array, *inputs: mx.array) -> mx.array:
        """The loss; it and the new weights are under way when this returns. See `place`."""
        value = self._step(key, *inputs)
        self.done += 1
        mx.async_eval(value, self.vectors, self.optimizer.state)
        return value

    def _plain(self, key: mx.array, *inputs: mx.array) -> mx.array:
        def loss_of(weights: mx.array) -> mx.array:
            self.place(weights.astype(self._dtype), self.model)
            return self.loss(self.model, key, *inputs)

        value, gradient = mx.value_and_grad(loss_of)(self.vectors["weights"])
        gradient = gradient * mx.minimum(1, mx.rsqrt(mx.sum(mx.square(gradient)) + 1e-12))  # of length 1 at most
        self.vectors["weights"] = self.optimizer.apply_gradients(
            {"weights": gradient}, {"weights": self.vectors["weights"]}
        )["weights"]
        n = self.optimizer.step.astype(mx.float32)
        pace = mx.maximum(1 - EMA, 9 / (10 + n))  # the first weights are soon forgotten
        self.vectors["average"] = self.vectors["average"] + pace * (self.vectors["weights"] - self.vectors["average"])
        return value

    def place(self, weights: mx.array, model: nn.Module) -> nn.Module:
        """`model` with the parts of a vector as its parameters."""
        parts = zip(self._shapes, mx.split(weights, self._ends), strict=True)
        model.update(tree_unflatten([(name, part.reshape(shape)) for (name, shape), part in parts]))
        return model

    def averaged(self) -> nn.Module:
        """`model` with the averages of its weights, float32. The next step puts its own back."""
        return self.place(self.vectors["average"], self.model)

    def save(self, folder: Path) -> None:
        """Writes all that `restore` needs, one vector a file."""
        metadata = {_STEP: str(self.done), _RECIPE: self.recipe}
        for name, vector in self._state().items():
            safetensors.write(folder / f"{name}.safetensors", {name: Tensor.of(np.array(vector))}, metadata)

    def restore(self, folder: Path) -> None:
        """Goes on from what `save` wrote. Raises ConfigError if it was made otherwise, or was saved only in part."""
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
        return self.vectors | self.optimizer.state["weights"]
