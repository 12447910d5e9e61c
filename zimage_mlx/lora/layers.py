"""LoRA on MLX: an update is a low-rank branch beside a Linear layer, or it is merged into the weight of the layer.

    y = W x + scale * B (A x)          branch: the base does not change; it may be quantized
    W' = W + scale * added(W)          merged: the only way for updates that are not low-rank

`zimage_ref.lora.kinds` says what each kind adds. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_mlx.networks.streaming import Stream
from zimage_mlx.networks.tree import find, replace
from zimage_ref.lora.low_rank import LowRank, concatenated
from zimage_ref.lora.updates import LoRA, Update, by_parameter
from zimage_ref.model.parameters import block_of

from .arithmetic import updated

_Triple = tuple[mx.array, mx.array, mx.array]


class LoRALinear(nn.Module):
    """A Linear layer (quantized or not) with a branch. The factors may be float32 while the base is bfloat16."""

    def __init__(self, base: nn.Module, A: mx.array, B: mx.array, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A = A  # (rank, in)
        self.lora_B = B  # (out, rank)
        self._scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        A, B = self.lora_A.astype(x.dtype), self.lora_B.astype(x.dtype)  # so that the result keeps the dtype of x

        def branched(x: mx.array, A: mx.array, B: mx.array) -> mx.array:
            return mx.addmm(self.base(x), x @ A.T, B.T, self._scale)

        def gradient(primals: _Triple, d: mx.array, _: mx.array) -> _Triple:
            """The gradient of the branch; the base is frozen. Adding in place saves passes over the wide arrays."""
            x, A, B = primals
            (dx,) = mx.vjp(lambda x: [self.base(x)], [x], [d])[1]
            inner, hidden = d @ B, x @ A.T  # (..., rank)
            if self._scale != 1:
                inner, hidden = inner * self._scale, hidden * self._scale
            d_A = inner.flatten(0, -2).T @ x.flatten(0, -2)
            d_B = d.flatten(0, -2).T @ hidden.flatten(0, -2)
            return mx.addmm(dx, inner, A), d_A, d_B

        function = mx.custom_function(branched)
        function.vjp(gradient)
        return cast(mx.array, function(x, A, B))


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
    return LoRALinear(base, mx.array(update.A), mx.array(update.B), update.scale)


def _dense_weight(layer: nn.QuantizedLinear, updates: Sequence[tuple[Update, float]]) -> mx.array:
    """The dequantized weight of `layer`, and the updates merged into it."""
    biases = layer.get("biases")
    weight = mx.dequantize(layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode)
    return updated(weight, updates)


def add_trainable_loras(
    model: nn.Module, layers: Sequence[str], rank: int, alpha: float, rng: np.random.Generator
) -> None:
    """Freezes `model` and gives `layers` new trainable float32 LoRAs: A Kaiming-uniform, B zero, so they add 0."""
    model.freeze()
    for layer in layers:
        base = find(model, layer)
        outputs, inputs = _linear_shape(base)
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt(5), as peft and kohya initialise A
        A = mx.array(rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32))
        replace(model, [(layer, LoRALinear(base, A, mx.zeros((outputs, rank)), alpha / rank))])


def trained_loras(model: nn.Module) -> LoRA:
    """The current trainable branches of `model`, by layer."""
    return {
        name: LowRank(*(np.array(factor.astype(mx.float32)) for factor in (m.lora_A, m.lora_B)), scale=m._scale)
        for name, m in model.named_modules()
        if isinstance(m, LoRALinear) and "lora_A" in m.trainable_parameters()
    }


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear layer, quantized or not."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
