"""A training run before it starts: everything that follows from options, pictures and headers, without weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.quantize import Quantization, QuantizedTensor
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.updates import LoRA
from zimage_ref.memory import LoadedModel, Stage, lora_bytes, require_memory, trainable_parameters, training_stages
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.flow import is_turbo
from zimage_ref.model.parameters import lora_modules, transformer_parameters
from zimage_ref.options_file import to_json

from .batches import Batches, Item
from .buckets import Size, buckets
from .cache import model_digests
from .config import LR, TrainConfig, auto_options, free_options, is_former_auto
from .dataset import Example, fingerprint, hold_out, list_dataset
from .optimizers import OPTIMIZERS

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
        """The highest learning rate: `lr` if it is given, else LR * sqrt(width of Z-Image / width of this model).

        The square root is a choice made on the tiny model, which is 27 times narrower than Z-Image. At Z-Image's own
        rate it learns too little in the default number of steps; at 27 times that rate it forgets what it knew.
        """
        if self.config.lr is not None:
            return self.config.lr
        return LR * math.sqrt(OFFICIAL_TRANSFORMER.dim / self.model.transformer.dim)

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
        """The memory of each stage of the run, with the base in this precision; `lean` as of `training_stages`."""
        model, most = LoadedModel(self.model, precision, quantization), max(map(self.tokens, self.batches.sizes()))
        lora = lora_bytes(self.trainable, OPTIMIZERS[self.config.optimizer].slots, self.config.ema > 0)
        return training_stages(model, most, lora, self.batches.batch_size, lean)

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
            "model": model_digests(self.model),
            "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter else None,
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
    previews = [] if config.preview_size is None else [config.preview_size]
    for name, sides in (("resolution", config.resolution), ("preview_size", previews)):
        for side in sides:
            if side % multiple:
                raise ConfigError(f"`{name}` {side} must be a multiple of {multiple} for {model.path}")
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
    free, found = free_options(), []
    for name, value in now["config"].items():
        before = then["config"].get(name)
        if is_former_auto(name, before):
            before = None
        if name not in free and before != value:
            found.append(f"`{name}` {_said(name, before)} -> {_said(name, value)}")
    what = {
        "dataset": "the pictures or captions",
        "model": "the model's weights or tokenizer",
        "adapter": "the training adapter",
        "batch": "the number of machines",
    }
    return found + [text for key, text in what.items() if then.get(key) != now[key]]


def _said(name: str, value: object) -> object:
    if value is None and name in auto_options():
        return "auto"
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
