"""LoRA on MLX: on each Linear layer a low-rank branch beside it, or what the LoRA adds merged into its weight.

    y = W x + scale * B (A x)          branch: the base stays as it is, quantized or not
    W' = W + scale * added(W)          merged: the only way for what is not low-rank

Source: LoRA, arXiv 2106.09685; for what each kind adds see `zimage_ref.lora.kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_mlx.networks.tree import find, replace
from zimage_ref.lora.low_rank import LowRank, concatenated
from zimage_ref.lora.updates import LoRA, Update, by_parameter

from .arithmetic import updated

_Triple = tuple[mx.array, mx.array, mx.array]


class LoRALinear(nn.Module):
    """A Linear layer (quantized or not) and its branch. The factors may be float32 beside a bfloat16 base."""

    def __init__(self, base: nn.Module, A: mx.array, B: mx.array, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A = A  # (rank, in)
        self.lora_B = B  # (out, rank)
        self._scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        A, B = self.lora_A.astype(x.dtype), self.lora_B.astype(x.dtype)  # so that the stream keeps its dtype

        def branched(x: mx.array, A: mx.array, B: mx.array) -> mx.array:
            return mx.addmm(self.base(x), x @ A.T, B.T, self._scale)

        def gradient(primals: _Triple, d: mx.array, _: mx.array) -> _Triple:
            """Of the branch; the base is frozen. Adding to what is there saves passes over the wide arrays."""
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
    """The LoRAs in use on one model, and the way back to the model without them, exactly.

    On a quantized layer a low-rank update stays a branch, because rounding it to the layer's few bits would erase it;
    anything else makes that layer a float one for as long as it lasts. On a float layer `merge` decides.
    """

    def __init__(self, model: nn.Module, reload: Callable[[str], mx.array], merge: bool) -> None:
        """reload: reads a float parameter again, by name. merge: low-rank updates too, if the layer is a float one."""
        self._model, self._reload, self._merge = model, reload, merge
        self._loras: list[tuple[LoRA, float]] = []
        self._replaced: dict[str, nn.Module] = {}  # layer -> the module that stood there
        self._changed: set[str] = set()  # parameters changed in place

    def use(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Gives the model exactly `loras` at their scales, replacing those it had. A scale of 0 leaves no trace."""
        loras = [(lora, scale) for lora, scale in loras if scale]
        if [(id(lora), scale) for lora, scale in loras] == [(id(lora), scale) for lora, scale in self._loras]:
            return
        self._restore()
        try:
            for name, updates in sorted(by_parameter(loras).items()):  # a layer's bias before its weight
                self._apply(name, updates)
        except BaseException:  # an interrupt too: half a LoRA must not stay
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
            self._replace(path, _float_linear(quantized, updates))
        else:
            layer[kind] = updated(layer[kind], updates)
            mx.eval(layer[kind])  # one at a time: a lazy graph would hold every delta of the model
            self._changed.add(name)

    def _replace(self, path: str, module: nn.Module) -> None:
        module.freeze()
        self._replaced[path] = find(self._model, path)
        replace(self._model, [(path, module)])

    def _restore(self) -> None:
        replace(self._model, self._replaced.items())
        for name in self._changed:
            path, _, kind = name.rpartition(".")
            find(self._model, path)[kind] = self._reload(name)
        self._loras, self._replaced, self._changed = [], {}, set()


def as_branch(base: nn.Module, update: LowRank) -> LoRALinear:
    """`base` with the update as a branch beside it."""
    return LoRALinear(base, mx.array(update.A), mx.array(update.B), update.scale)


def _float_linear(layer: nn.QuantizedLinear, updates: Sequence[tuple[Update, float]]) -> nn.Linear:
    """A float Linear layer with the weight that `layer` stands for, and the updates in it."""
    biases = layer.get("biases")
    weight = mx.dequantize(layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode)
    outputs, inputs = weight.shape
    dense = nn.Linear(inputs, outputs, bias="bias" in layer)
    dense.weight = updated(weight, updates)
    if "bias" in layer:
        dense.bias = layer.bias
    mx.eval(dense.parameters())
    return dense


def add_trainable_loras(
    model: nn.Module, layers: Sequence[str], rank: int, alpha: float, rng: np.random.Generator
) -> None:
    """Freezes `model` and gives `layers` fresh, trainable, float32 LoRAs: A Kaiming-uniform, B zero, so a no-op."""
    model.freeze()
    for layer in layers:
        base = find(model, layer)
        outputs, inputs = _linear_shape(base)
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt(5), as peft and kohya initialise A
        A = mx.array(rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32))
        replace(model, [(layer, LoRALinear(base, A, mx.zeros((outputs, rank)), alpha / rank))])


def trained_loras(model: nn.Module) -> LoRA:
    """The trainable branches on `model` as they are now, by layer."""
    return {
        name: LowRank(*(np.array(factor.astype(mx.float32)) for factor in (m.lora_A, m.lora_B)), scale=m._scale)
        for name, m in model.named_modules()
        if isinstance(m, LoRALinear) and "lora_A" in m.trainable_parameters()
    }


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear layer, also of a quantized one."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
