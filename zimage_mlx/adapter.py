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

from zimage_ref.lora_file import LoRA
from zimage_ref.tensors import Tensor

from . import lora
from .transformer import Transformer
from .weights import to_mlx


class TrainingAdapter:
    """The adapter of a transformer whose weights can be read again from `weights`, by layer name."""

    def __init__(self, model: Transformer, adapter: LoRA, weights: Mapping[str, Tensor], dtype: mx.Dtype) -> None:
        self._model, self._adapter, self._weights, self._dtype = model, adapter, weights, dtype

    def merge(self) -> None:
        """W + B A, rounded to the base's own precision, in place of W."""
        for layer, factors in self._adapter.items():
            added = mx.array(factors.B) @ mx.array(factors.A)
            self._set(layer, (self._original(layer).astype(mx.float32) + added).astype(self._dtype))

    @contextmanager
    def removed(self) -> Iterator[None]:
        """A block in which the base is exactly as it was read."""
        for layer in self._adapter:
            self._set(layer, self._original(layer))
        try:
            yield
        finally:
            self.merge()

    def _original(self, layer: str) -> mx.array:
        return to_mlx(self._weights[f"{layer}.weight"], self._dtype)

    def _set(self, layer: str, weight: mx.array) -> None:
        """Puts `weight` into a layer, quantized as that is."""
        module: Any = lora.find(self._model, layer)
        base = module.base if isinstance(module, lora.LoRALinear) else module
        if isinstance(base, nn.QuantizedLinear):
            base.weight, base.scales, base.biases = mx.quantize(weight, base.group_size, base.bits)
            mx.eval(base.weight, base.scales, base.biases)
        else:
            base.weight = weight
            mx.eval(base.weight)
