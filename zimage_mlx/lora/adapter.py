"""The training adapter: a LoRA that is part of the base during training only, not in previews and the result.

Turbo is distilled to draw in few steps. If you train it directly, it loses this ability. The training adapter is a LoRA
that undoes the distillation. With it merged into the base, the new LoRA learns only what the pictures show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from zimage_mlx.networks.streaming import Stream
from zimage_mlx.networks.transformer import Transformer
from zimage_ref.lora.updates import BIAS, LoRA

from . import layers

_BASE = ".base"  # the name of a layer's own module inside its trained LoRA layer


class TrainingAdapter:
    """The training adapter of a transformer. It changes the base, below the LoRAs that are trained.

    For quantized layers and for `stream` see `Adapters`. reload: reads a float parameter of the transformer again, by
    name.
    """

    def __init__(
        self, model: Transformer, adapter: LoRA, reload: Callable[[str], mx.array], stream: Stream | None = None
    ) -> None:
        trained = {name for name, module in model.named_modules() if isinstance(module, layers.LoRALinear)}
        self._adapters = layers.Adapters(
            model, lambda name: reload(name.replace(f"{_BASE}.", ".")), merge=True, stream=stream
        )
        self._updates: LoRA = {}
        for name, update in adapter.items():
            layer, bias = (name.removesuffix(BIAS), BIAS) if name.endswith(BIAS) else (name, "")
            self._updates[f"{layer}{_BASE if layer in trained else ''}{bias}"] = update

    def merge(self) -> None:
        """Adds the adapter to the base: merged and rounded to its precision, or as a branch of a quantized layer."""
        self._adapters.use([(self._updates, 1.0)])

    @contextmanager
    def removed(self) -> Iterator[None]:
        """A block in which the base is exactly as it was read, without the adapter."""
        self._adapters.use([])
        try:
            yield
        finally:
            self.merge()
