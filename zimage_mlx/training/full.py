"""The transformer itself as it learns: the optimizer is fused with the backward pass.

    forward     keeps the input of each block
    backward    last block first: its gradient is made, clipped and used up by its optimizer, then dropped

The gradients of two blocks are never in memory together. So the norm of the whole gradient is known only when all is
changed: each parameter has its own limit instead, as in the trainers of kohya-ss. Adafactor also limits each change.

Sources: fused backward pass, arXiv 2306.09782 (LOMO); Adafactor, arXiv 1804.04235.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from zimage_mlx.device import number, on_gpu
from zimage_mlx.networks.parameters import Parameters
from zimage_mlx.networks.streaming import Stream
from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.tree import find
from zimage_mlx.networks.weights import from_stored
from zimage_ref.formats.tensors import Array, Tensors
from zimage_ref.model.parameters import block_of
from zimage_ref.training.batches import ROUNDING, rng_for
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.events import Encoded
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.whole_file import write_whole

from .base_predictions import BasePredictions
from .feed import Feed
from .gradient import LossAndGradients
from .held import Held, as_tensor
from .learner import check_same
from .learning import Outcome
from .loss import JointBatch
from .optimizer import learning_rate, make_optimizer
from .rounding import stochastically

_W = "w"  # the name of a parameter in the state of its optimizer


class FusedOptimizer:
    """An optimizer for each parameter, so that they can be changed one by one. Everything is computed in float32."""

    def __init__(self, config: TrainConfig, parameters: Parameters) -> None:
        """parameters: the weights that train; only master weights need their values.

        Norms, biases and tokens do not decay.
        """
        self._seed = config.seed
        self._order = {name: i for i, name in enumerate(parameters)}
        self._parts = {name: make_optimizer(config, _is_matrix(each)) for name, each in parameters.items()}
        for name, part in self._parts.items():
            part.init({_W: mx.zeros(parameters[name].shape)})
            mx.eval(part.state)  # one at a time: the first step would make all at once
        self.masters: Parameters = {}  # the float32 weights behind the others, if they are kept
        if config.master_weights:
            narrow = {name: each for name, each in parameters.items() if each.dtype != mx.float32}
            self.masters = {name: each.astype(mx.float32) for name, each in narrow.items()}

    def change(self, name: str, weight: mx.array, gradient: mx.array, step: int, lr: float) -> mx.array:
        """`weight` after step `step`, in its dtype, computed."""
        part, dtype = self._parts[name], weight.dtype
        part.learning_rate = lr
        before = self.masters.get(name, weight).astype(mx.float32)
        after = part.apply_gradients({_W: gradient}, {_W: before})[_W]
        if name in self.masters:
            self.masters[name] = after
        if dtype == mx.bfloat16 and name not in self.masters:
            seed = rng_for(self._seed, ROUNDING, step, self._order[name]).integers(1 << 63)
            after = stochastically(after, mx.random.key(int(seed)))
        result: mx.array = after.astype(dtype)
        mx.eval(result, part.state, self.masters.get(name))
        return result

    def use(self, weights: Mapping[str, Array], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
        """Takes up what `weights` gave. Yields each parameter in `dtype`."""
        for name, stored in weights.items():
            array = from_stored(stored)
            if name in self.masters:
                self.masters[name] = array
            array = array.astype(dtype)
            mx.eval(array, self.masters.get(name))
            yield name, array

    def state(self) -> Tensors:
        """Everything that the next step depends on besides the weights."""
        flat: dict[str, mx.array] = {}
        for name, part in self._parts.items():
            for key, value in part.state.items():
                slots = value if isinstance(value, dict) else {"": value}
                flat |= {f"{name}/{key}/{slot}": array for slot, array in slots.items()}
        return {name: as_tensor(array) for name, array in flat.items()}

    def restore(self, flat: Mapping[str, Array]) -> None:
        """Takes up a state that `state` gave."""
        for path, stored in flat.items():
            name, key, slot = path.split("/")
            state, array = self._parts[name].state, from_stored(stored)
            if slot:
                state[key][slot] = array
            else:
                state[key] = array
            mx.eval(array)


class WholeLearner:
    """Trains parameters of a transformer, in the precision that they have in memory."""

    notices: Sequence[str] = ()

    def __init__(
        self, plan: TrainPlan, model: Transformer, feed: Feed, group: mx.distributed.Group, budget: float = math.inf
    ) -> None:
        """group: of one machine. budget: bytes for what the gradient may keep of the forward pass; see `gradient`."""
        assert group.size() == 1  # the plan has refused more
        self._plan, self._model, self._feed, self._predictions = plan, model, feed, BasePredictions(plan, feed)
        model.freeze()
        for name in plan.parameters:
            path, _, key = name.rpartition(".")
            find(model, path).unfreeze(recurse=False, keys=[key])
        blocks = {name: each for name, each in plan.model.weights["transformer"].items() if block_of(name)}
        self._held = Held(model, blocks if isinstance(model.weights, Stream) else None)
        likes = {name: self._held.like(name) for name in plan.parameters}
        self._optimizer = FusedOptimizer(plan.config, likes)
        self._differentiate = LossAndGradients(model, budget, compiled=on_gpu(), use=self._use_up)
        self._step, self._lr, self._squares = 0, 0.0, 0.0  # of the step at work; the squared length of its gradient

    def _weights(self) -> Tensors:
        """The parameters that train, as they are now. A tensor is copied when it is read."""
        return {name: self._held.tensor(name) for name in self._plan.parameters}

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole transformer, those of its parts that do not train as the model's file has them."""
        trained = sum(each.nbytes for each in self._weights().values())
        others = self._plan.model.weights["transformer"].items()
        return trained + sum(tensor.nbytes for name, tensor in others if name not in self._plan.parameters)

    def prepare(self, done: int) -> Iterator[Encoded]:
        """Computes the base's predictions for pictures to preserve, while the weights are still those of the base."""
        return self._predictions.build(self._model, done)

    def step(self, step: int, epoch: int, batches: Sequence[Sequence[int]]) -> Outcome:
        """Makes step `step`, from 0, on a batch of items.

        If the loss is not finite, nothing changes. If the gradient of a block is not, the blocks before it do not
        change, and those after it have changed already.
        """
        self._step, self._lr, self._squares = step, learning_rate(self._plan, step), 0.0
        loss, _ = self._differentiate(self._shown(step, epoch, batches[0]))
        norm = math.sqrt(self._squares)
        finite = math.isfinite(number(loss)) and math.isfinite(norm)
        return Outcome(number(loss), norm, self._lr, len(batches[0]), finite)

    def _shown(self, step: int, epoch: int, items: Sequence[int]) -> JointBatch:
        """The pictures of step `step`, and those to preserve: a gradient is used up at once, so it must be of both."""
        noisy, weight = self._feed.batch(epoch, items), self._plan.config.preserve_weight
        kept = self._predictions.batches(step, epoch, items, noisy)
        shares = [(weight * len(batch.captions) / len(items), batch) for batch in kept]
        return JointBatch([(1.0, noisy), *shares])

    def _use_up(self, gradients: Parameters) -> None:
        """Changes the weights by their gradients, and empties the table of these."""
        squares = {name: number(mx.sum(mx.square(each.astype(mx.float32)))) for name, each in gradients.items()}
        self._squares += sum(squares.values())
        if not math.isfinite(self._squares):
            gradients.clear()
        most = self._plan.config.grad_clip
        while gradients:
            name, gradient = gradients.popitem()
            norm, gradient = math.sqrt(squares[name]), gradient.astype(mx.float32)
            if most and norm > most:
                gradient = gradient * (most / norm)
            weight = self._optimizer.change(name, self._held.get(name), gradient, self._step, self._lr)
            self._held.put(name, weight)
            del gradient, weight

    @contextmanager
    def result(self) -> Iterator[Transformer]:
        """The transformer as it is."""
        yield self._model

    def without(self) -> None:
        """Before the first step, `result` is the base."""

    def write(self, path: Path, record: Mapping[str, object]) -> None:
        """Writes the whole transformer to `path`, a file or a folder, in the precision that it has in memory."""
        write_whole(path, self._plan.model, self._weights(), dict(record))

    def state(self) -> dict[str, Tensors]:
        """All that the next step depends on: weights and optimizer. A tensor is copied when it is read."""
        masters = {name: as_tensor(array) for name, array in self._optimizer.masters.items()}
        return {"weights": {**self._weights(), **masters}, "optimizer": self._optimizer.state()}

    def check(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Raises ConfigError if `state` is of other parameters or another optimizer."""
        fresh, output = self.state(), self._plan.config.output
        for part, what in (("weights", "layers"), ("optimizer", "optimizer state")):
            check_same(output, what, state.get(part, {}), fresh[part])

    def restore(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Takes up a state that `state` gave and `check` accepts."""
        for name, array in self._optimizer.use(state["weights"], self._model.dtype):
            self._held.put(name, array)
        self._optimizer.restore(state["optimizer"])


def _is_matrix(parameter: mx.array) -> bool:
    """Whether it decays: no norm, no bias and no token."""
    return parameter.ndim > 1 and parameter.shape[0] > 1
