"""Plans a training run before it starts, from options, pictures and headers. No weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from zimage_ref.checkpoints.fingerprint import part_digests
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.files import sha256
from zimage_ref.formats.quantize import Quantization, stored_bits
from zimage_ref.generation.presets import defaults_for
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.trained import TRAINED, Matrices, UpdateSize
from zimage_ref.lora.updates import LoRA
from zimage_ref.memory import (
    LEAN,
    Footprint,
    LoadedModel,
    Mode,
    Stage,
    lora_bytes,
    require_memory,
    training_stages,
)
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.flow import is_turbo
from zimage_ref.model.parameters import Shapes, transformer_parameters
from zimage_ref.options_file import to_json
from zimage_ref.streaming import Choice, can_stream, choose, require_streamable

from .batches import INITIAL, BatchOrder, Item, rng_for
from .buckets import Size, buckets
from .checked_dataset import CheckedDataset, share_held_out
from .config import LR, TrainConfig
from .dataset import Example, fingerprint, hold_out
from .dataset_options import TRAIN
from .facts import RunFacts
from .full import TURBO_WARNING as WHOLE_TURBO_WARNING
from .full import check_base, count, require_room, state_bytes, whole_parameters, with_step
from .kinds import FULL, learning_kind
from .logs import require_logs
from .notices import notices_of
from .optimizers import OPTIMIZERS
from .preview_prompts import Preview, PreviewPrompt
from .start import Start, going_on, layer_matrices, new_matrices, with_magnitudes
from .targets import chosen_layers

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
    layers: Mapping[str, UpdateSize]  # the layers that get a LoRA, in the order in which they run
    batches: BatchOrder
    adapter: LoRA  # the training adapter, merged into the base while training; empty if there is none
    notices: Sequence[str] = ()  # what the user should know before the run
    begins_with: LoRA | None = None  # the LoRA that the run goes on from
    previews: Sequence[Preview] = ()  # the pictures to draw, in the order of `preview_prompt`

    @cached_property
    def total(self) -> int:
        """The number of optimizer steps."""
        return self.config.steps or self.config.epochs * self.batches.steps_per_epoch

    @cached_property
    def lr(self) -> float:
        """The highest learning rate: `lr` if it is given, else LR * sqrt(width of Z-Image / width of this model).

        A kind other than lora has its own share of that; see `kinds`.

        The square root is a choice made on the tiny model, which is 27 times narrower than Z-Image. At Z-Image's own
        rate it learns too little in the default number of steps; at 27 times that rate it forgets what it knew.
        """
        if self.config.lr is not None:
            return self.config.lr
        if (own := OPTIMIZERS[self.config.optimizer].lr) is not None:
            return own
        width = OFFICIAL_TRANSFORMER.dim / self.model.transformer.dim
        kind = learning_kind(self.config.kind)
        return LR * math.pow(width, kind.by_width) * kind.rate(self.matrices.values())

    @property
    def turbo(self) -> bool:
        """Whether the base is the distilled model."""
        return is_turbo(self.model.scheduler)

    @property
    def turbo_warning(self) -> str:
        """A warning if the base is Turbo and its distillation stays; "" if not."""
        if not self.turbo or self.config.training_adapter:
            return ""
        return WHOLE_TURBO_WARNING if self.config.kind == FULL else TURBO_WARNING

    @property
    def trainable(self) -> int:
        """The number of parameters that are trained."""
        matrices = sum(math.prod(shape) for each in self.matrices.values() for shape in each.values())
        return matrices + count(self.parameters)

    @cached_property
    def parameters(self) -> Shapes:
        """The parameters of the transformer that train: those of `layers` with the kind full, else none."""
        if self.config.kind != FULL:
            return {}
        return whole_parameters(transformer_parameters(self.model.transformer), self.layers)

    @cached_property
    def matrices(self) -> dict[str, Matrices]:
        """The shapes of the matrices that train beside the weights, by layer."""
        if self.config.kind == FULL:
            return {}
        shapes, kind = transformer_parameters(self.model.transformer), self.config.kind
        return {layer: layer_matrices(shapes[f"{layer}.weight"], kind, size) for layer, size in self.layers.items()}

    def start(self, magnitudes: bool = False) -> Start:
        """The matrices that the run begins with. Takes time if it goes on from a LoRA of another kind or rank.

        magnitudes: read those of DoRA from the file. Else they are left to the layers.
        """
        kind = self.config.kind
        new = new_matrices(self.matrices, kind, rng_for(self.config.seed, INITIAL))
        if magnitudes and kind == "dora":
            new = with_magnitudes(new, self.model)
        if self.begins_with is None:
            return Start(new)
        return going_on(self.begins_with, kind, self.layers, new, self.model)

    @property
    def stored_bits(self) -> list[int]:
        """The bits of weights that the file of the base holds quantized. Training does not change them."""
        return stored_bits(self.model.weights["transformer"].values())

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
        if self.parameters:
            lora = state_bytes(self.parameters, self.config.optimizer, self.config.master_weights)
        at_once = self.batches.batch_size * (1 + len(self.config.showings) if self.parameters else 1)
        *before, train = training_stages(model, most, lora, at_once, mode != "fast", footprint)
        if self.parameters:
            return [*before, with_step(train, self.parameters, model.itemsize, self.config.optimizer, footprint)]
        shapes = transformer_parameters(self.model.transformer)
        largest = max(math.prod(shapes[f"{layer}.weight"]) for layer in self.layers)
        passing = footprint.with_margin(0, 4 * TRAINED[self.config.kind].passing * largest)
        return [*before, replace(train, activations=train.activations + passing)]

    @property
    def can_stream(self) -> bool:
        """Whether the mode stream may be chosen by itself. It writes too much to a disk for that with the kind full."""
        return can_stream(self.model) and self.config.kind != FULL

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
        if asked == "stream" or self.can_stream:
            modes.append("stream")
        stages = {
            mode: self.memory(precision, quantization, mode, footprint("lean" if mode == "fast" else mode))
            for mode in modes
        }
        return choose(asked, stages, limit)

    def require_memory(self, stages: Sequence[Stage], limit: int | None) -> None:
        """Raises ConfigError if `stages` take more than `limit` bytes, unless `force` is set."""
        if self.config.kind == FULL and not self.config.force:
            require_room(stages, limit, self.config.memory == "stream")
        elif not self.config.force:
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
            "begins_with": sha256(self.config.init_lora) if self.config.init_lora else None,
            "environment": environment,
        }


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
    if fraction := share_held_out(config):
        taught = [example for example in examples if example.settings.kind == TRAIN]
        taught, held_out = hold_out(taught, fraction, config.seed)
        examples = [*taught, *(example for example in examples if example.settings.kind != TRAIN)]
    previews = _previews(config, model)
    _check_sides(config, model, previews)
    require_logs(config.log)
    items = [
        Item(index, size, repeat)
        for repeat in range(max(example.settings.repeats for example in examples))
        for index, example in enumerate(examples)
        if repeat < example.settings.repeats
        for size in _sizes(config, model, example)
    ]
    batches = BatchOrder(items, config.batch_size * ranks, config.grad_accumulation, config.seed)
    layers = chosen_layers(model.transformer, config.targets, config.size, config.kind == FULL)
    shapes = transformer_parameters(model.transformer)
    adapter, begins_with = (
        read_lora(file, shapes).updates if file else None for file in (config.training_adapter, config.init_lora)
    )
    notices = [*dataset.notices, *notices_of(config, model, [*examples, *held_out], previews)]
    plan = TrainPlan(config, model, examples, held_out, layers, batches, adapter or {}, notices, begins_with, previews)
    if config.kind == FULL:
        if ranks > 1:
            raise ConfigError("`kind` full trains on one machine: start it without mlx.launch")
        check_base(plan.stored_bits, model.files["transformer"])
        return plan
    by_rank = TRAINED[config.kind].by_rank
    if config.rank_dropout and not any(by_rank in each for each in plan.matrices.values()):
        raise ConfigError("`rank_dropout` needs matrices with a rank: with this `rank` those of lokr are whole")
    return plan


def _previews(config: TrainConfig, model: ModelFolder) -> list[Preview]:
    """The pictures to draw. Each has another seed, unless its prompt gives one."""
    side = max(config.resolution) if config.preview_size is None else config.preview_size
    usual = defaults_for(model.scheduler)
    return [
        PreviewPrompt.parse(text).decided(
            side, config.preview_steps, config.preview_guidance, config.seed + index, usual
        )
        for index, text in enumerate(config.preview_prompt)
    ]


def _check_sides(config: TrainConfig, model: ModelFolder, previews: Sequence[Preview]) -> None:
    trained = [side for number in range(len(config.sets)) for side in config.settings(number).resolution]
    drawn = [side for each in previews for side in (each.width, each.height)]
    size = [] if config.preview_size is None else [config.preview_size]
    for name, sides in (
        ("resolution", [*config.resolution, *trained]), ("preview_size", size), ("preview_prompt", drawn)
    ):  # fmt: skip
        for side in sides:
            if side % model.size_multiple:
                raise ConfigError(f"`{name}` {side} must be a multiple of {model.size_multiple} for {model.path}")


def _sizes(config: TrainConfig, model: ModelFolder, example: Example) -> list[Size]:
    sides, square = sorted(example.settings.resolution), example.settings.square
    return buckets(example.size, sides, model.size_multiple, config.max_upscale, square)
