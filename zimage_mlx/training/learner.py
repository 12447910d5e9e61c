"""The LoRA as it learns: parameters, optimizer and average, one step at a time, whole state in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from zimage_mlx import device
from zimage_mlx.device import number, on_gpu
from zimage_mlx.lora import layers
from zimage_mlx.networks.parameters import Parameters
from zimage_mlx.networks.streaming import Stream
from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.tree import place
from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array, Tensor, Tensors
from zimage_ref.lora.file import write_lora
from zimage_ref.lora.trained import MAGNITUDE, TRAINED
from zimage_ref.model.flow import model_time
from zimage_ref.training.events import Encoded
from zimage_ref.training.plan import TrainPlan

from .dropout import dropout
from .feed import Feed
from .gradient import LossAndGradients
from .learning import Outcome
from .loss import NoisyBatch
from .machines import summed, summed_together
from .optimizer import Optimizer, averaged, clipped, learning_rate
from .packing import Packing, Vectors


class Learner:
    """Trains the LoRA of a plan on a transformer, alone or with the other machines of a group."""

    def __init__(
        self, plan: TrainPlan, model: Transformer, feed: Feed, group: mx.distributed.Group, budget: float = math.inf
    ) -> None:
        """budget: bytes for what the gradient may keep of the forward pass; see `gradient`."""
        config = plan.config
        self._plan, self._model, self._feed, self._group = plan, model, feed, group
        self._kind = TRAINED[config.kind]
        scales = {layer: self._kind.scale(plan.matrices[layer], size) for layer, size in plan.layers.items()}
        start = plan.start(magnitudes=isinstance(model.weights, Stream))  # no weight of a block is in memory then
        self.notices = start.notices  # what there is to say about the first matrices
        layers.add_trainable(model, config.kind, start.factors, scales)
        parameters: Parameters = dict(tree_flatten(model.trainable_parameters()))
        self._packing = Packing(parameters)
        self._vectors = self._agreed(self._packing.pack(parameters))
        self._lengths = {factor: v for factor, v in self._vectors.items() if factor == MAGNITUDE}  # of the base
        self._average = dict(self._vectors) if config.ema else {}
        self._optimizer = Optimizer(config, self._packing, self._vectors)
        self._differentiate = LossAndGradients(model, budget, compiled=on_gpu())
        self._shape: tuple[int, ...] = ()  # of the latest batch

    @property
    def file_bytes(self) -> int:
        """Bytes of the file with the LoRA, which holds bfloat16."""
        return sum(vector.nbytes for vector in self._vectors.values()) // 2

    def prepare(self, done: int) -> Iterator[Encoded]:
        """Computes nothing: the base stays beside the LoRA."""
        return iter(())

    def step(self, step: int, epoch: int, batches: Sequence[Sequence[int]]) -> Outcome:
        """Makes step `step`, from 0, on batches of items; changes nothing if loss or gradient is not finite."""
        config = self._plan.config
        loss, gradients = self._gradients(step, epoch, batches)
        gradients, norm = clipped(gradients, config.grad_clip)
        lr = learning_rate(self._plan, step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._vectors = self._optimizer.apply(self._vectors, gradients, lr)
            if config.ema:
                self._average = averaged(self._average, self._vectors, config.ema, step + 1)
        return Outcome(loss, norm, lr, sum(map(len, batches)), finite)

    @contextmanager
    def result(self) -> Iterator[Transformer]:
        """The transformer with the LoRA as it would be saved: the average, if there is one."""
        self._use(self._average or self._optimizer.result(self._vectors))
        yield self._model

    def without(self) -> AbstractContextManager[Transformer] | None:
        """The transformer as if there were no LoRA, of a run that goes on from one.

        None for a dora: its first lengths are not those of the base.
        """
        goes_on = self._plan.begins_with is not None and self._plan.config.kind != "dora"
        return self._resting() if goes_on else None

    @contextmanager
    def _resting(self) -> Iterator[Transformer]:
        self._use({factor: mx.zeros_like(vector) for factor, vector in self._vectors.items()})
        yield self._model

    def write(self, path: Path, record: Mapping[str, object]) -> None:
        """Writes the LoRA as it would be saved to `path`."""
        with self.result() as model:
            factors = layers.trained_loras(model)
        ordered = {name: factors[name] for name in self._plan.layers}  # in the order in which the layers run
        write_lora(path, ordered, record, self._plan.config.lora_format)

    def state(self) -> dict[str, Tensors]:
        """All that the next step depends on: lora, optimizer and, if there is one, ema."""
        parts = {"lora": self._vectors, "ema": self._average}
        matrices = {part: self._packing.unpack(vectors) for part, vectors in parts.items() if vectors}
        arrays = {part: {k: Tensor.of(np.array(v)) for k, v in values.items()} for part, values in matrices.items()}
        optimizer = {name: Tensor.of(array) for name, array in self._optimizer.state().items()}
        return {**arrays, "optimizer": optimizer}

    def check(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Raises ConfigError if `state` is of another LoRA or optimizer."""
        fresh = self.state()
        for part, what in (("lora", "layers or another rank"), ("optimizer", "optimizer state")):
            check_same(self._plan.config.output, what, state.get(part, {}), fresh[part])

    def restore(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Takes up a state that `state` gave and `check` accepts."""

        def packed(part: str) -> Vectors:
            return self._packing.pack({name: mx.array(array) for name, array in state[part].items()})

        self._vectors = packed("lora")
        self._average = packed("ema" if "ema" in state else "lora") if self._plan.config.ema else {}
        self._optimizer.restore(state["optimizer"])

    def _gradients(self, step: int, epoch: int, batches: Sequence[Sequence[int]]) -> tuple[float, Vectors]:
        """Loss and gradients, means over all pictures of the step, the same on every machine."""
        dropped = dropout(self._plan.config, self._kind, self._packing.shapes, step)
        masked = thinned(self._vectors, dropped)
        self._use(masked, self._model.dtype)  # the branches work in the stream's dtype
        pictures = sum(map(len, batches))
        loss, gradients = mx.array(0.0), {factor: mx.zeros_like(vector) for factor, vector in masked.items()}
        for batch in batches:
            if own := self._own(batch):
                noisy = self._feed.batch(epoch, own)
                self._forget_buffers_of_another(noisy.x_0.shape)
                for weight, shown in [(1.0, noisy), *self._preserved(noisy, masked, step, epoch, own)]:
                    part_loss, part = self._differentiate(shown)
                    share, packed = weight * len(shown.x_0) / pictures, self._packing.pack(part)
                    loss = loss + share * part_loss
                    gradients = {factor: total + share * packed[factor] for factor, total in gradients.items()}
                    mx.eval(loss, gradients)
        if self._group.size() > 1:
            loss, *summands = summed_together([loss, *gradients.values()], self._group)
            gradients = dict(zip(gradients, summands, strict=True))
        return number(loss), thinned(gradients, dropped)

    def _preserved(
        self, noisy: NoisyBatch, vectors: Vectors, step: int, epoch: int, items: Sequence[int]
    ) -> Iterator[tuple[float, NoisyBatch]]:
        """(weight, batch) of what the LoRA should leave as the base makes it, if that is due in `step`.

        vectors: those of the step, which are in use again before a batch is given.
        """
        config = self._plan.config
        if step % config.preserve_every:
            return
        for blank in config.showings:
            if batch := self._feed.preserved(noisy, epoch, items, blank):
                self._use(
                    {factor: mx.zeros_like(v) for factor, v in vectors.items()} | self._lengths, self._model.dtype
                )
                raw = self._model(batch.x_sigma, model_time(batch.sigma), batch.captions).astype(mx.float32)
                mx.eval(raw)
                self._use(vectors, self._model.dtype)
                yield config.preserve_weight, replace(batch, target=raw)

    def _forget_buffers_of_another(self, shape: tuple[int, ...]) -> None:
        """Frees what MLX kept for reuse if the last batch had another shape: it rarely fits, and a Mac needs it."""
        if device.on_metal() and self._shape and shape != self._shape:
            mx.clear_cache()
        self._shape = shape

    def _own(self, batch: Sequence[int]) -> Sequence[int]:
        """This machine's share of a batch."""
        rank, each = self._group.rank(), self._plan.config.batch_size
        return batch[rank * each : (rank + 1) * each]

    def _agreed(self, vectors: Vectors) -> Vectors:
        """The same first matrices on every machine: the mean, if they follow from singular values."""
        size = self._group.size()
        if size == 1 or self._plan.begins_with is None:
            return vectors
        return {factor: summed(vector / size, self._group) for factor, vector in vectors.items()}

    def _use(self, vectors: Vectors, dtype: mx.Dtype = mx.float32) -> None:
        place(self._model, self._packing.unpack(vectors, dtype))


def thinned(vectors: Vectors, dropped: Mapping[str, mx.array]) -> Vectors:
    """`vectors` times what `dropout` gave. A vector that is left as it is stays the same array."""
    return {factor: v * dropped[factor] if factor in dropped else v for factor, v in vectors.items()}


def check_same(output: Path, what: str, saved: Mapping[str, Array], fresh: Tensors) -> None:
    """Raises ConfigError unless the `saved` arrays have the names and shapes of `fresh` ones."""
    if {name: array.shape for name, array in saved.items()} != {name: each.shape for name, each in fresh.items()}:
        raise ConfigError(f"{output}: the saved run has other {what}: it cannot be resumed so")
