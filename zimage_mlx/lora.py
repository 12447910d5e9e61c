"""LoRA on MLX: a low-rank branch beside a frozen Linear layer, which it replaces in the module tree.

    y = W x + scale * B (A x)

Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from zimage_ref.lora_file import LoRA, LoRAFactors


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

        def gradient(primals: Any, d: mx.array, _: mx.array) -> Any:
            """Of the branch; the base is frozen. Adding to what is there saves passes over the wide arrays."""
            x, A, B = primals
            (dx,) = mx.vjp(lambda x: [self.base(x)], [x], [d])[1]
            inner = (d @ B) * self._scale  # (..., rank)
            d_A = inner.flatten(0, -2).T @ x.flatten(0, -2)
            d_B = d.flatten(0, -2).T @ ((x @ A.T) * self._scale).flatten(0, -2)
            return mx.addmm(dx, inner, A), d_A, d_B

        function: Any = mx.custom_function(branched)
        function.vjp(gradient)
        return function(x, A, B)


def attach(model: nn.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Gives `model` exactly the LoRAs of `loras` with their scales, replacing those it had.

    Several LoRAs on one layer become one branch of summed rank. A scale of 0 attaches nothing.
    """
    branches: dict[str, list[LoRAFactors]] = {}
    for lora, scale in loras:
        if scale:
            for layer, factors in lora.items():
                branches.setdefault(layer, []).append(LoRAFactors(factors.A, scale * factors.B))
    detach(model)
    replace(model, ((layer, _branch(find(model, layer), parts)) for layer, parts in branches.items()))


def _branch(base: nn.Module, parts: Sequence[LoRAFactors]) -> LoRALinear:
    A = mx.array(np.concatenate([part.A for part in parts], axis=0))
    B = mx.array(np.concatenate([part.B for part in parts], axis=1))
    return LoRALinear(base, A, B)


def detach(model: nn.Module) -> None:
    """Takes every LoRA off `model`."""
    replace(model, [(name, m.base) for name, m in model.named_modules() if isinstance(m, LoRALinear)])


def start(model: nn.Module, layers: Sequence[str], rank: int, alpha: float, rng: np.random.Generator) -> None:
    """Freezes `model` and gives `layers` fresh, trainable, float32 LoRAs: A Kaiming-uniform, B zero, so a no-op."""
    model.freeze()
    for layer in layers:
        base = find(model, layer)
        outputs, inputs = _linear_shape(base)
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt(5), as peft and kohya initialise A
        A = mx.array(rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32))
        replace(model, [(layer, LoRALinear(base, A, mx.zeros((outputs, rank)), alpha / rank))])


def factors(model: nn.Module) -> LoRA:
    """The LoRAs attached to `model`, their scale multiplied into B."""
    return {
        name: LoRAFactors(np.array(m.lora_A.astype(mx.float32)), np.array(m.lora_B.astype(mx.float32)) * m._scale)
        for name, m in model.named_modules()
        if isinstance(m, LoRALinear)
    }


def find(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`, such as layers.0.attention.to_out.0."""
    module: Any = model
    for part in name.split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module


def replace(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Puts each named module in its place in the tree."""
    model.update_modules(tree_unflatten(list(modules)))


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear layer, also of a quantized one."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
