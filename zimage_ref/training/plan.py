"""Plans a training run before it starts, from options, pictures and headers. No weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zimage_ref.checkpoints.fingerprint import part_digests
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError, listing
from zimage_ref.formats.files import sha256
from zimage_ref.formats.quantize import Quantization, QuantizedTensor
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.updates import LoRA
from zimage_ref.memory import (
    LEAN,
    Footprint,
    LoadedModel,
    Mode,
    Stage,
    lora_bytes,
    require_memory,
    trainable_parameters,
    training_stages,
)
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.flow import is_turbo
from zimage_ref.model.parameters import lora_modules, transformer_parameters
from zimage_ref.model.tokenizer import MAX_TOKENS, Tokenizer
from zimage_ref.options_file import to_json
from zimage_ref.streaming import Choice, can_stream, choose, require_streamable

from .batches import BatchOrder, Item
from .buckets import Size, buckets
from .config import LR, TrainConfig
from .dataset import Example, fingerprint, hold_out, list_dataset
from .events import Encoded
from .facts import RunFacts
from .optimizers import OPTIMIZERS

_KEPT = 128 << 20  # bytes of picture files that are kept from their check until they are encoded
_SHOWN = 200  # characters of a path or a prompt in a notice
TURBO_WARNING = (
    "this is Turbo, a distilled model: training it as it is destroys its few-step ability (blurred pictures at 8 "
    "steps). Give `training_adapter` with a de-distillation LoRA, or train the base model"
)


@dataclass(frozen=True)
class TrainPlan:
    """The plan of a run."""

    config: TrainConfig
    model: ModelFolder
    examples: Sequence[Example]
    held_out: Sequence[Example]
    layers: Sequence[str]  # the layers that get a LoRA
    batches: BatchOrder
    adapter: LoRA  # the training adapter, merged into the base while training; empty if there is none
    notices: Sequence[str] = ()  # what the user should know of the pictures and captions

    @cached_property
    def total(self) -> int:
        """The number of optimizer steps."""
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
        """The number of parameters that are trained."""
        return trainable_parameters(transformer_parameters(self.model.transformer), self.layers, self.config.rank)

    @property
    def stored_bits(self) -> list[int]:
        """The bits of weights that the file of the base holds quantized. Training does not change them."""
        tensors = self.model.weights["transformer"].values()
        return sorted({tensor.quantization.bits for tensor in tensors if isinstance(tensor, QuantizedTensor)})

    @property
    def held_out_sizes(self) -> list[Size]:
        """The size at which each held-out picture is measured: its bucket at the largest resolution."""
        return [_sizes(self.config, self.model, example)[-1] for example in self.held_out]

    def tokens(self, size: Size) -> int:
        """The number of image tokens of a picture of `size`."""
        return size[0] * size[1] // self.model.size_multiple**2

    def memory(
        self, precision: str, quantization: Quantization | None, mode: Mode, footprint: Footprint = LEAN
    ) -> list[Stage]:
        """The memory of each stage of the run with the base in this precision.

        footprint: that of the engine in `mode`; for "fast", that of the mode lean. The rest: see `training_stages`.
        """
        model, most = LoadedModel(self.model, precision, quantization), max(map(self.tokens, self.batches.sizes()))
        lora = lora_bytes(self.trainable, OPTIMIZERS[self.config.optimizer].slots, self.config.ema > 0)
        return training_stages(model, most, lora, self.batches.batch_size, mode != "fast", footprint)

    def choose_memory(
        self,
        precision: str,
        quantization: Quantization | None,
        limit: int | None,
        footprint: Callable[[Mode], Footprint],
    ) -> Choice:
        """The memory mode of the run on an engine with such a `footprint` and `limit` bytes.

        Raises ConfigError if the mode stream is asked for and the model's files do not allow it.
        """
        asked = self.config.memory
        if asked == "stream":
            require_streamable(self.model)
        modes: list[Mode] = ["fast", "lean"]
        if asked == "stream" or can_stream(self.model):
            modes.append("stream")
        stages = {
            mode: self.memory(precision, quantization, mode, footprint("lean" if mode == "fast" else mode))
            for mode in modes
        }
        return choose(asked, stages, limit)

    def require_memory(self, stages: Sequence[Stage], limit: int | None) -> None:
        """Raises ConfigError if `stages` take more than `limit` bytes, unless `force` is set."""
        if not self.config.force:
            sides = "`resolution`, `memory` lean" if self.config.memory == "fast" else "`resolution`"
            require_memory(stages, limit, "base_precision", sides)

    def facts(self, environment: dict[str, str]) -> RunFacts:
        """The facts that must be the same to resume the run bit for bit, and all options for the record.

        environment: software and machine.
        """
        adapter = self.config.training_adapter
        return {
            "config": to_json(self.config) | {"lr": self.lr},
            "total": self.total,
            "batch": self.batches.batch_size,
            "dataset": fingerprint([*self.examples, *self.held_out]),
            "model": part_digests(self.model),
            "adapter": sha256(adapter) if adapter else None,
            "environment": environment,
        }


class CheckedDataset:
    """The pictures and captions of a run. They are listed at construction; `check` opens them one by one."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises the errors of `list_dataset`, and ConfigError if `validation` is neither a share nor a folder."""
        self.notices: list[str] = []  # files that are left out, or used in part
        folders = [config.dataset] if _fraction(config) is not None else [config.dataset, Path(config.validation)]
        listed = [list_dataset(folder, config.trigger, self.notices.append) for folder in folders]
        self._listed = (listed[0], listed[1] if len(listed) > 1 else [])
        self.examples: list[Example] = []  # both lists are complete after `check`
        self.held_out: list[Example] = []  # the examples of `validation`, if it is a folder

    def check(self) -> Iterator[Encoded]:
        """Opens every picture. Raises DatasetError if one cannot be read.

        The content of the first ones is kept until they are encoded, as far as memory for it goes.
        """
        kept = 0
        done, total = 0, sum(map(len, self._listed))
        for listed, examples in zip(self._listed, (self.examples, self.held_out), strict=True):
            for picture, caption in listed:
                examples.append(Example.open(picture, caption, self.notices.append))
                kept += picture.stat().st_size
                if kept > _KEPT:
                    examples[-1].content.forget()
                done += 1
                yield Encoded(done, total, "pictures")


def make_plan(
    config: TrainConfig, progress: Callable[[str, int, int], None] = lambda what, done, total: None, ranks: int = 1
) -> TrainPlan:
    """Checks options, pictures and headers, and plans the run of `ranks` machines. Reads no weights.

    progress: is called with the kind of thing being checked, the number done and the total.
    Raises ConfigError, DatasetError, FormatError or WeightError.
    """
    dataset = CheckedDataset(config)
    for event in dataset.check():
        progress(event.what, event.done, event.total)
    return plan_for(config, dataset, ranks)


def plan_for(config: TrainConfig, dataset: CheckedDataset, ranks: int) -> TrainPlan:
    """The plan for a dataset after its `check`. Raises the errors of `make_plan`."""
    model = ModelFolder.open(config.model_dir, config.parts)
    examples, held_out = dataset.examples, dataset.held_out
    if fraction := _fraction(config):
        examples, held_out = hold_out(examples, fraction, config.seed)
    _check_sides(config, model)
    items = [
        Item(index, size, repeat)
        for repeat in range(config.repeats)
        for index, example in enumerate(examples)
        for size in _sizes(config, model, example)
    ]
    batches = BatchOrder(items, config.batch_size * ranks, config.grad_accumulation, config.seed)
    layers = lora_modules(model.transformer, config.targets)
    adapter = config.training_adapter
    merged = read_lora(adapter, transformer_parameters(model.transformer)).updates if adapter else {}
    notices = [*dataset.notices, *_long_texts(config, model, [*examples, *held_out])]
    return TrainPlan(config, model, examples, held_out, layers, batches, merged, notices)


def _long_texts(config: TrainConfig, model: ModelFolder, examples: Sequence[Example]) -> Iterator[str]:
    """Notices of captions and of prompts of previews that are longer than the model reads."""
    tokenizer = Tokenizer(model.tokenizer)
    texts = {
        "captions": {str(e.picture): e.caption for e in examples},
        "prompts": {p: p for p in config.preview_prompt},
    }
    for what, named in texts.items():
        counts = {name[:_SHOWN]: count for name, text in named.items() if (count := tokenizer.count(text)) > MAX_TOKENS}
        if counts:
            found = listing([f"{name} ({count})" for name, count in counts.items()], 5)
            yield f"{what} longer than {MAX_TOKENS} tokens are cut off ({len(counts)}): {found}"


def _check_sides(config: TrainConfig, model: ModelFolder) -> None:
    previews = [] if config.preview_size is None else [config.preview_size]
    for name, sides in (("resolution", config.resolution), ("preview_size", previews)):
        for side in sides:
            if side % model.size_multiple:
                raise ConfigError(f"`{name}` {side} must be a multiple of {model.size_multiple} for {model.path}")


def _sizes(config: TrainConfig, model: ModelFolder, example: Example) -> list[Size]:
    sides = sorted(config.resolution)
    return buckets(example.size, sides, model.size_multiple, config.max_upscale, config.square)


def _fraction(config: TrainConfig) -> float | None:
    """The share of pictures to hold out; 0 for none. None if `validation` is a folder."""
    try:
        fraction = float(config.validation or 0)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise ConfigError(f"`validation` {config.validation}: a fraction is between 0 and 1, anything else a folder")
    return fraction
