"""A LoRA that is part of the base while training, and gone without a trace for previews and the result.

Turbo is distilled to few steps. Trained as it is, it unlearns that; with a LoRA merged in that undoes the
distillation, the new LoRA learns only what the pictures show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from zimage_mlx.networks.transformer import Transformer
from zimage_ref.lora.updates import BIAS, LoRA

from . import layers

_BASE = ".base"  # of a layer that is trained: where its own module is


class TrainingAdapter:
    """The adapter of a transformer, on the base below the LoRAs that train; see `Adapters` for quantized layers.

    reload: reads a float parameter of the transformer again, by name.
    """

    def __init__(self, model: Transformer, adapter: LoRA, reload: Callable[[str], mx.array]) -> None:
        trained = {name for name, module in model.named_modules() if isinstance(module, layers.LoRALinear)}
        self._adapters = layers.Adapters(model, lambda name: reload(name.replace(f"{_BASE}.", ".")), merge=True)
        self._updates: LoRA = {}
        for name, update in adapter.items():
            layer, bias = (name.removesuffix(BIAS), BIAS) if name.endswith(BIAS) else (name, "")
            self._updates[f"{layer}{_BASE if layer in trained else ''}{bias}"] = update

    def merge(self) -> None:
        """The base with the adapter: merged and rounded to its precision, or beside a layer that is quantized."""
        self._adapters.use([(self._updates, 1.0)])

    @contextmanager
    def removed(self) -> Iterator[None]:
        """A block in which the base is exactly as it was read."""
        self._adapters.use([])
        try:
            yield
        finally:
            self.merge()
