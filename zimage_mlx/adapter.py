"""A LoRA that is part of the base while training, and gone without a trace for previews and the result.

Turbo is distilled to few steps. Trained as it is, it unlearns that; with a LoRA merged in that undoes the
distillation, the new LoRA learns only what the pictures show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.lora import LoRA, parameter
from zimage_ref.tensors import Tensor

from . import lora
from .transformer import Transformer
from .weights import to_mlx


class TrainingAdapter:
    """The adapter of a transformer whose weights can be read again from `weights`, by name."""

    def __init__(self, model: Transformer, adapter: LoRA, weights: Mapping[str, Tensor], dtype: mx.Dtype) -> None:
        self._model, self._adapter, self._weights, self._dtype = model, adapter, weights, dtype

    def merge(self) -> None:
        """What the adapter makes of each parameter, rounded to the base's own precision, in its place."""
        for name, update in self._adapter.items():
            self._set(parameter(name), lora.merged(self._original(parameter(name)), [(update, 1.0)]))

    @contextmanager
    def removed(self) -> Iterator[None]:
        """A block in which the base is exactly as it was read."""
        for name in self._adapter:
            self._set(parameter(name), self._original(parameter(name)))
        try:
            yield
        finally:
            self.merge()

    def _original(self, name: str) -> mx.array:
        return to_mlx(self._weights[name], self._dtype)

    def _set(self, name: str, value: mx.array) -> None:
        """Puts `value` into a layer, quantized as that is."""
        layer, _, kind = name.rpartition(".")
        module: Any = lora.find(self._model, layer)
        base = module.base if isinstance(module, lora.LoRALinear) else module
        if kind == "weight" and isinstance(base, nn.QuantizedLinear):
            base.weight, base.scales, base.biases = mx.quantize(value, base.group_size, base.bits)
            mx.eval(base.weight, base.scales, base.biases)
        else:
            base[kind] = value
            mx.eval(value)
