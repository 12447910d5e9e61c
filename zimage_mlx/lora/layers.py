"""LoRA on MLX: an update is a low-rank branch beside a Linear layer, or it is merged into the weight of the layer.

    y = W x + scale * B (A x)          branch: the base does not change; it may be quantized
    W' = W + scale * added(W)          merged: the only way for updates that are not low-rank

`zimage_ref.lora.kinds` says what each kind adds. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from zimage_mlx.networks.streaming import Stream
from zimage_mlx.networks.tree import find, replace
from zimage_ref.lora.low_rank import LowRank, concatenated
from zimage_ref.lora.trained import TRAINED, Factors, UpdateSize
from zimage_ref.lora.updates import LoRA, Update, by_parameter
from zimage_ref.model.parameters import block_of

from .arithmetic import updated
from .trained import LAYERS, LoRALinear, Trainable, dense_weight


class Adapters:
    """The LoRAs in use on one model. Removing them restores the model exactly.

    On a quantized layer a low-rank update is a branch, because rounding it to the few bits of the layer would erase it.
    An update of another kind replaces the quantized layer by a float one while it is in use. On a float layer, `merge`
    decides.
    """

    def __init__(
        self, model: nn.Module, reload: Callable[[str], mx.array], merge: bool, stream: Stream | None = None
    ) -> None:
        """reload: reads a float parameter again, by name. merge: whether float layers merge low-rank updates too.

        stream: what reads the blocks of the model, if they are streamed. Updates are merged into each block that
        arrives.
        """
        self._model, self._reload, self._merge, self._stream = model, reload, merge, stream
        self._loras: list[tuple[LoRA, float]] = []
        self._replaced: dict[str, nn.Module] = {}  # layer -> its original module
        self._changed: set[str] = set()  # parameters changed in place

    def use(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Gives the model exactly `loras` at their scales, instead of earlier ones. A LoRA with scale 0 is left out."""
        loras = [(lora, scale) for lora, scale in loras if scale]
        if [(id(lora), scale) for lora, scale in loras] == [(id(lora), scale) for lora, scale in self._loras]:
            return
        self._restore()
        try:
            for name, updates in sorted(by_parameter(loras).items()):  # the bias of a layer before its weight
                self._apply(name, updates)
        except BaseException:  # an interrupt too: the model must not keep half a LoRA
            self._restore()
            raise
        self._loras = loras

    def _apply(self, name: str, updates: Sequence[tuple[Update, float]]) -> None:
        path, _, kind = name.rpartition(".")
        layer: nn.Module = find(self._model, path)
        quantized = layer if kind == "weight" and isinstance(layer, nn.QuantizedLinear) else None
        low_rank = concatenated(updates) if quantized or not self._merge else None
        if low_rank is not None:
            self._replace(path, as_branch(layer, low_rank))
        elif quantized:
            self._replace(path, self._float_linear(name, quantized, updates))
        elif self._stream and block_of(name):
            self._stream.derive(name, layer, kind, lambda: updated(layer[kind], updates))
        else:
            layer[kind] = updated(layer[kind], updates)
            mx.eval(layer[kind])  # one at a time, because a lazy graph would hold all deltas of the model
            self._changed.add(name)

    def _float_linear(self, name: str, layer: nn.QuantizedLinear, updates: Sequence[tuple[Update, float]]) -> nn.Linear:
        """A float Linear layer with the dequantized weight of `layer`, and the updates merged into it."""
        outputs, inputs = _linear_shape(layer)
        dense = nn.Linear(inputs, outputs, bias="bias" in layer)
        dense.weight = mx.zeros(dense.weight.shape, layer.scales.dtype)
        if "bias" in layer:
            dense.bias = layer.bias
        if self._stream and block_of(name):
            self._stream.derive(name, dense, "weight", lambda: _dense_weight(layer, updates))
        else:
            dense.weight = _dense_weight(layer, updates)
            mx.eval(dense.parameters())
        return dense

    def _replace(self, path: str, module: nn.Module) -> None:
        module.freeze()
        self._replaced[path] = find(self._model, path)
        replace(self._model, [(path, module)])

    def _restore(self) -> None:
        replace(self._model, self._replaced.items())
        if self._stream:
            self._stream.derive_nothing()
        for name in self._changed:
            path, _, kind = name.rpartition(".")
            find(self._model, path)[kind] = self._reload(name)
        self._loras, self._replaced, self._changed = [], {}, set()


def as_branch(base: nn.Module, update: LowRank) -> LoRALinear:
    """`base` with the update as a branch beside it."""
    return LoRALinear(base, {"lora_A": update.A, "lora_B": update.B}, update.scale)


def _dense_weight(layer: nn.QuantizedLinear, updates: Sequence[tuple[Update, float]]) -> mx.array:
    """The dequantized weight of `layer`, and the updates merged into it."""
    return updated(dense_weight(layer), updates)


def add_trainable(model: nn.Module, kind: str, start: Mapping[str, Factors], scales: Mapping[str, float]) -> None:
    """Freezes `model` and gives its layers trainable float32 matrices that begin as `start` says, at their scales.

    kind: in `zimage_ref.lora.trained.TRAINED`.
    """
    model.freeze()
    for layer, factors in start.items():
        replace(model, [(layer, LAYERS[kind](find(model, layer), factors, scales[layer]))])


def add_trainable_loras(
    model: nn.Module, layers: Sequence[str], rank: int, alpha: float, rng: np.random.Generator
) -> None:
    """Freezes `model` and gives `layers` new trainable LoRAs: A Kaiming-uniform, B zero, so they add 0."""
    kind, size = TRAINED["lora"], UpdateSize(rank, alpha)
    shapes = {layer: kind.matrices(*_linear_shape(find(model, layer)), size) for layer in layers}
    start = {layer: kind.initial(each, rng) for layer, each in shapes.items()}
    add_trainable(model, "lora", start, dict.fromkeys(layers, alpha / rank))


def trained_loras(model: nn.Module) -> LoRA:
    """The current trainable updates of `model`, by layer."""
    return {
        name: module.learned()
        for name, module in model.named_modules()
        if isinstance(module, Trainable) and tree_flatten(module.trainable_parameters())
    }


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear layer, quantized or not."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
