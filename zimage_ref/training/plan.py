"""A training run before it starts: everything that follows from options, pictures and headers, without weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zimage_ref.checkpoints.fingerprint import part_digests
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.files import sha256
from zimage_ref.formats.quantize import Quantization, QuantizedTensor
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.updates import LoRA
from zimage_ref.memory import Stage, require_memory, trainable_parameters, training
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.flow import is_turbo
from zimage_ref.model.parameters import lora_modules, transformer_parameters
from zimage_ref.options_file import to_json

from .batches import Batches, Item
from .buckets import Size, buckets
from .config import LR, TrainConfig, free_options
from .dataset import Example, fingerprint, hold_out, list_dataset

TURBO_WARNING = (
    "this is Turbo, a distilled model: training it as it is wears its few-step ability away (blurred pictures at 8 "
    "steps). Give `training_adapter` with a de-distillation LoRA, or train the base model"
)


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do."""

    config: TrainConfig
    model: ModelFolder
    examples: Sequence[Example]
    held_out: Sequence[Example]
    layers: Sequence[str]  # that get a LoRA
    batches: Batches
    adapter: LoRA  # merged into the base while training; empty without

    @cached_property
    def total(self) -> int:
        """Optimizer steps."""
        return self.config.steps or self.config.epochs * self.batches.steps_per_epoch

    @property
    def lr(self) -> float:
        """The highest learning rate: as given, else in inverse proportion to the root of the model's width.

        Found with the tiny model, 27 times as narrow: as for Z-Image it learns too little in the default number of
        steps; in inverse proportion to the width, what it knew frays.
        """
        return self.config.lr or LR * math.sqrt(OFFICIAL_TRANSFORMER.dim / self.model.transformer.dim)

    @property
    def turbo(self) -> bool:
        """Whether the base is the distilled model."""
        return is_turbo(self.model.scheduler)

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return trainable_parameters(transformer_parameters(self.model.transformer), self.layers, self.config.rank)

    @property
    def stored_bits(self) -> list[int]:
        """Bits of the base's weights that its file holds quantized, which nothing changes."""
        tensors = self.model.weights["transformer"].values()
        return sorted({tensor.quantization.bits for tensor in tensors if isinstance(tensor, QuantizedTensor)})

    @property
    def held_out_sizes(self) -> list[Size]:
        """The size at which each held-out picture is measured: its bucket of the largest resolution."""
        return [_sizes(self.config, self.model, example)[-1] for example in self.held_out]

    def tokens(self, size: Size) -> int:
        """Image tokens of a picture of `size`."""
        return size[0] * size[1] // self.model.size_multiple**2

    def memory(self, precision: str, quantization: Quantization | None, lean: bool) -> list[Stage]:
        """The memory of each stage of the run; options as of `memory.training`."""
        return training(
            self.model,
            precision,
            quantization,
            trainable=self.trainable,
            image_tokens=max(self.tokens(size) for size in self.batches.sizes()),
            batch=self.batches.batch_size,
            optimizer=self.config.optimizer,
            ema=self.config.ema > 0,
            lean=lean,
        )

    def require_memory(self, precision: str, quantization: Quantization | None, limit: int | None) -> None:
        """Raises ConfigError where the run takes more than `limit` bytes and `force` does not say to try."""
        if not self.config.force:
            lean = self.config.memory != "fast"
            stages = self.memory(precision, quantization, lean)
            sides = "`resolution`" if lean else "`resolution`, `memory` lean"
            require_memory(stages, limit, "base_precision", sides)

    def facts(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed bit for bit, and the whole config for the record."""
        adapter = self.config.training_adapter
        return {
            "config": to_json(self.config) | {"lr": self.lr},
            "total": self.total,
            "batch": self.batches.batch_size,
            "dataset": fingerprint([*self.examples, *self.held_out]),
            "model": part_digests(self.model),
            "adapter": sha256(adapter) if adapter else None,
        }


def list_examples(config: TrainConfig) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """Pictures and captions of the dataset, and of `validation` where that is a folder; pictures not yet read."""
    held_out = [] if _fraction(config) is not None else list_dataset(Path(config.validation), config.trigger)
    return list_dataset(config.dataset, config.trigger), held_out


def make_plan(
    config: TrainConfig, model: ModelFolder, examples: list[Example], held_out: list[Example], ranks: int = 1
) -> TrainPlan:
    """The plan of a run on `ranks` machines together. Raises ConfigError, DatasetError or WeightError."""
    if fraction := _fraction(config):
        examples, held_out = hold_out(examples, fraction, config.seed)
    multiple = model.size_multiple
    for side in (*config.resolution, config.preview_size):
        if side % multiple:
            raise ConfigError(f"`resolution` {side} must be a multiple of {multiple} for {model.path}")
    items = [
        Item(index, size, repeat)
        for repeat in range(config.repeats)
        for index, example in enumerate(examples)
        for size in _sizes(config, model, example)
    ]
    batches = Batches(items, config.batch_size * ranks, config.grad_accumulation, config.seed)
    layers = lora_modules(model.transformer, config.targets)
    adapter = config.training_adapter
    merged = read_lora(adapter, transformer_parameters(model.transformer)).updates if adapter else {}
    return TrainPlan(config, model, examples, held_out, layers, batches, merged)


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a run's facts has changed in a way that changes its result, in words."""
    free = free_options()
    found = [
        f"`{name}` {_said(then['config'].get(name))} -> {_said(value)}"
        for name, value in now["config"].items()
        if name not in free and then["config"].get(name) != value
    ]
    what = {
        "dataset": "the pictures or captions",
        "model": "the model's weights or tokenizer",
        "adapter": "the training adapter",
        "batch": "the number of machines",
    }
    return found + [text for key, text in what.items() if then.get(key) != now[key]]


def _said(value: Any) -> Any:
    return "none" if value in (None, "", []) else value


def _sizes(config: TrainConfig, model: ModelFolder, example: Example) -> list[Size]:
    sides = sorted(config.resolution)
    return buckets(example.size, sides, model.size_multiple, config.max_upscale, config.square)


def _fraction(config: TrainConfig) -> float | None:
    """The share to hold out; 0 for none; None where `validation` names a folder."""
    try:
        fraction = float(config.validation or 0)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise ConfigError(f"`validation` {config.validation}: a fraction is between 0 and 1, anything else a folder")
    return fraction
