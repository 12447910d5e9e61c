"""Training of the transformer itself, the kind `full`: which options it has, what it trains, what it takes.

The backward pass is fused with the optimizer: the gradient of one block is used up before that of the next is made.
So options that need the gradients of all blocks at once, or another copy of the weights, are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from zimage_ref.errors import ConfigError
from zimage_ref.memory import Footprint, Stage, peak
from zimage_ref.model.parameters import Shapes, block_of

from .kinds import FULL
from .optimizers import OPTIMIZERS
from .precisions import FLOATS
from .targets import Target, owner_of

_FILES = (".safetensors", ".npz")

TURBO_WARNING = (
    "this is Turbo, a distilled model: training it destroys its few-step ability (blurred pictures at 8 steps). Train "
    "the base model, or merge a de-distillation LoRA into Turbo before, with zimage convert, `merge_lora`"
)
_OF_LORAS = "it is an option of LoRAs"
_MERGE = "merge the LoRA into the model with zimage convert, `merge_lora`, and give the result as `transformer`"
_REFUSED = {  # an option that has no use -> the reason
    **dict.fromkeys(
        ("rank", "alpha", "lora_plus", "lora_format", "dropout", "rank_dropout", "module_dropout"), _OF_LORAS
    ),
    "init_lora": _MERGE,
    "training_adapter": _MERGE,
    "grad_accumulation": "a gradient is used up block by block, and is not kept for a sum: take a larger `batch_size`",
    "ema": "an average would take another copy of the weights",
}


def check_full(config: object, defaults: Mapping[str, object]) -> None:
    """Raises ConfigError for options of `config`, a TrainConfig, that do not go with the kind full, or only with it.

    defaults: of all options, by name.
    """

    def value(name: str) -> object:
        return getattr(config, name)

    if value("kind") != FULL:
        if value("master_weights"):
            raise ConfigError("`master_weights` needs `kind` full")
        return
    for name, reason in _REFUSED.items():
        if value(name) != defaults[name]:
            raise ConfigError(f"`{name}` does not go with `kind` full: {reason}")
    if (asked := value("base_precision")) not in FLOATS:
        raise ConfigError(f"`base_precision` {asked}: `kind` full changes the weights: give bf16 or f32")
    if value("memory") == "stream" and value("master_weights"):
        raise ConfigError("`master_weights` stay in memory, and `memory` stream is for a lack of it: leave one out")
    optimizer = str(value("optimizer"))
    if optimizer in OPTIMIZERS and (OPTIMIZERS[optimizer].one_rate or OPTIMIZERS[optimizer].averages):
        raise ConfigError(f"`optimizer` {optimizer} needs all gradients at once or keeps averages: take adafactor")
    _check_targets(cast(Iterable[str], value("targets")))
    _check_output(cast(Path, value("output")), defaults["output"])


def _check_targets(targets: Iterable[str]) -> None:
    for target in map(Target.parse, targets):
        if target.rank is not None:
            raise ConfigError(f"`targets` {target}: `kind` full has no rank: write {target.name}")


def _check_output(output: Path, default: object) -> None:
    if output == default:
        raise ConfigError(f"`output` must be given with `kind` full: {default} is a name for a LoRA")
    if output.suffix not in ("", *_FILES):
        raise ConfigError(f"`output` {output}: a transformer is written as {' or '.join(_FILES)}, or into a folder")


def whole_parameters(shapes: Shapes, modules: Iterable[str]) -> Shapes:
    """The parameters of `modules`, in their order. A module is all that is in a name before its last part."""
    owned: dict[str, dict[str, tuple[int, ...]]] = {module: {} for module in modules}
    for name, shape in shapes.items():
        if owner_of(name) in owned:
            owned[owner_of(name)][name] = shape
    return {name: shape for each in owned.values() for name, shape in each.items()}


def state_bytes(parameters: Shapes, optimizer: str, master_weights: bool) -> int:
    """The bytes that are kept from step to step beside the weights: optimizer state, and float32 weights."""
    values = sum(_slots(shape, OPTIMIZERS[optimizer].slots) for shape in parameters.values())
    return round(4 * (values + master_weights * count(parameters)))


def step_bytes(parameters: Shapes, itemsize: int, optimizer: str) -> int:
    """The bytes that a step takes for a moment: the gradient of the largest block, and the change of a parameter."""
    arrays = OPTIMIZERS[optimizer].passing
    blocks: dict[str, int] = {}
    for name, shape in parameters.items():
        block = block_of(name) or name.partition(".")[0]
        blocks[block] = blocks.get(block, 0) + math.prod(shape)
    return itemsize * max(blocks.values()) + 4 * arrays * max(map(math.prod, parameters.values()))


def with_step(train: Stage, parameters: Shapes, itemsize: int, optimizer: str, footprint: Footprint) -> Stage:
    """The stage of training with what a step takes for a moment."""
    passing = footprint.with_margin(0, step_bytes(parameters, itemsize, optimizer))
    return replace(train, activations=train.activations + passing)


def require_room(stages: Sequence[Stage], limit: int | None, streamed: bool) -> None:
    """Raises ConfigError if a stage takes more than `limit` bytes. None means no limit."""
    most = peak(stages)
    if limit is not None and most.total > limit:
        way_out = "a smaller `resolution`" if streamed else "`memory` stream, or a smaller `resolution`"
        raise ConfigError(
            f"this takes about {most.total / 1e9:.1f} GB to {most.name}, and there are {limit / 1e9:.1f} GB: give "
            f"{way_out}; `force` tries it anyway"
        )


def count(parameters: Shapes) -> int:
    """The number of values in `parameters`."""
    return sum(map(math.prod, parameters.values()))


def check_base(bits: Iterable[int], path: Path) -> None:
    """Raises ConfigError if the weights in `path` are stored in a few bits, which no step could change."""
    for each in bits:
        raise ConfigError(
            f"{path}: is stored in {each} bits, and `kind` full changes the weights: make a file for it with zimage "
            "convert: `model_type` transformer, `dtype` bf16"
        )


def _slots(shape: tuple[int, ...], slots: float) -> float:
    """The values that an optimizer keeps for a parameter. Without slots it keeps one for each row and column."""
    return slots * math.prod(shape) if slots else sum(shape)
