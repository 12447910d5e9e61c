"""A LoRA training run: every option once.

Traits of a field:

    free          you may change the option when you resume a run; the result stays the same, bit for bit
    auto          None means that the run decides; users write "auto", and the help says what the run decides
    repeatable    users give the option once for each value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import ConfigError
from zimage_ref.generation.config import by_model, check_side
from zimage_ref.lora.spellings import DEFAULT_NAMING, lora_namings
from zimage_ref.model.flow import TimestepSampling
from zimage_ref.model.parameters import LORA_TARGETS, check_targets
from zimage_ref.options import MEMORY, at_least, one_of, option, required

from .optimizers import OPTIMIZERS

# Schedule -> function from progress (0 after the warmup, 1 at the last step) to a share of the learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}
LR = 1e-4  # at the width of Z-Image; see `TrainPlan.lr`
_PARTS = part_options()  # name -> help; each has a field below
PRECISIONS = ("auto", "bf16", "f32", "8", "4")  # those of the frozen base
_FORMER_AUTO = ("steps", "lr", "preview_size", "preview_steps", "preview_guidance")  # see `is_former_auto`


@dataclass(frozen=True)
class TrainConfig:
    """The options of a LoRA training run. Raises ConfigError for values out of bounds.

    You may give paths as text. You may give options of several values as one value or as a list.
    """

    model_dir: Path = required("folder with the Z-Image model, or a repository's id", free=True)
    dataset: Path = required("folder with pictures and captions (.txt, metadata.jsonl or captions.json)", free=True)
    output: Path = option(Path("lora_weights.safetensors"), "LoRA file to write (.safetensors)", free=True)
    rank: int = option(16, "rank of the LoRA matrices")
    alpha: float = option(16.0, "LoRA strength; the update is scaled by alpha / rank")
    epochs: int = option(100, "passes over the dataset")
    steps: int | None = option(None, "optimizer steps to make; default: auto (as many as `epochs` takes)", auto=True)
    lr: float | None = option(
        None, "learning rate; default: auto (1e-4 at Z-Image's width, more for a narrower model)", auto=True
    )
    resolution: tuple[int, ...] = option((256,), "pictures get the area of a square of this side; or of these: 512,768")
    batch_size: int = option(1, "pictures in a batch, all of one size")
    grad_accumulation: int = option(1, "batches to a step")
    seed: int = option(0, "seed of noise, times, order and initialisation")

    trigger: str = option("", "word for the thing to learn: put in place of [trigger] in captions, or before them")
    caption_dropout: float = option(0.05, "share of pictures shown with the empty prompt, for guidance to work")
    repeats: int = option(1, "times each picture is shown in an epoch")
    flip: bool = option(False, "mirror pictures left to right half of the time")
    max_upscale: float = option(1.0, "pictures smaller than `resolution` are enlarged at most this many times")
    square: bool = option(False, "crop every picture to a square instead of keeping its shape")
    cache: Path | None = option(
        None,
        "folder for latents and caption features; default: auto (zimage-cache beside `output`)",
        free=True,
        auto=True,
    )
    validation: str = option("", "pictures to measure but not to learn: a folder, or a fraction of the dataset")
    validation_every: int = option(50, "steps between measurements of the held-out loss", free=True)

    lora_format: str = option(DEFAULT_NAMING, f"key naming of the LoRA file: {', '.join(lora_namings())}", free=True)
    targets: tuple[str, ...] = option(
        (*LORA_TARGETS, "refiners"), "layers to train: attention, feed-forward, refiners (their share too), adaln, all"
    )
    optimizer: str = option("adamw", f"one of {', '.join(OPTIMIZERS)}")
    weight_decay: float = option(1e-2, "weight decay, of the optimizers that have one")
    warmup: int = option(20, "steps over which the learning rate rises from 0")
    schedule: str = option("cosine", f"learning rate after the warmup: {', '.join(SCHEDULES)}")
    grad_clip: float = option(1.0, "longest gradient, as one vector over all layers (0: any)")
    ema: float = option(0.0, "decay of an average of the LoRA over steps, which becomes the result (0: none)")
    lora_plus: float = option(1.0, "learning rate of B over that of A")
    rank_dropout: float = option(0.0, "share of ranks that rest in a step")
    timesteps: str = option(
        "auto", "how noise levels are drawn: auto, uniform, logit-normal, sigmoid, weighted, shift=S"
    )
    base_precision: str = option(
        "auto", "the frozen model in bf16, f32, 8 or 4 bits (auto: bf16 on a GPU); 8 and 4 also for captions"
    )
    memory: str = option("auto", f"memory for speed: {', '.join(MEMORY)} (auto: as much as the machine has)", free=True)
    training_adapter: Path | None = option(None, "LoRA that undoes Turbo's distillation while training", free=True)
    transformer: Path | None = option(None, _PARTS["transformer"], free=True)
    text_encoder: Path | None = option(None, _PARTS["text_encoder"], free=True)
    vae: Path | None = option(None, _PARTS["vae"], free=True)
    tokenizer: Path | None = option(None, _PARTS["tokenizer"], free=True)

    save_every: int = option(0, "also save the LoRA every N steps (0: only at the end)", free=True)
    resume_every: int = option(100, "save what `resume` needs every N steps, and with each saved LoRA", free=True)
    keep_last: int = option(0, "LoRA files of earlier steps to keep (0: all)", free=True)
    preview_prompt: tuple[str, ...] = option(
        (), "prompt to draw as training goes on; may be given several times", free=True, repeatable=True
    )
    preview_every: int = option(250, "steps between previews", free=True)
    preview_size: int | None = option(
        None, "side of previews in pixels; default: auto (the largest `resolution`)", free=True, auto=True
    )
    preview_steps: int | None = option(
        None, f"denoising steps of previews; default: auto ({by_model('preview_steps')})", free=True, auto=True
    )
    preview_guidance: float | None = option(
        None, f"guidance of previews, 0 is none; default: auto ({by_model('guidance')})", free=True, auto=True
    )
    resume: bool = option(False, "go on from where an earlier run into `output` stopped", free=True)
    resume_anyway: bool = option(False, "resume although dataset, model or options have changed", free=True)
    overwrite: bool = option(False, "replace `output`, and an unfinished run into it", free=True)
    force: bool = option(False, "go on even if memory seems too small", free=True)

    def __post_init__(self) -> None:
        for name in ("model_dir", "dataset", "output", "cache", "training_adapter", *_PARTS):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("resolution", "targets", "preview_prompt"):
            object.__setattr__(self, name, _several(getattr(self, name)))
        object.__setattr__(self, "targets", tuple(target.replace("-", "_") for target in self.targets))
        for name in _FORMER_AUTO:
            if is_former_auto(name, getattr(self, name)):
                object.__setattr__(self, name, None)
        self._check_numbers()
        self._check_names()

    @property
    def parts(self) -> dict[str, Path | None]:
        """Files to use instead of those in the folder of the model, for `ModelFolder.open`."""
        return {name: getattr(self, name) for name in _PARTS}

    def _check_numbers(self) -> None:
        at_least(self, 1, "rank", "epochs", "batch_size", "grad_accumulation", "repeats", "max_upscale")
        at_least(self, 1, "steps", "validation_every", "resume_every", "preview_every", "preview_steps")
        at_least(self, 0, "save_every", "keep_last", "seed", "weight_decay", "warmup", "grad_clip", "preview_guidance")
        for name in ("alpha", "lora_plus"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` {getattr(self, name)} must be above 0")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ConfigError(f"`lr` {self.lr} must be 0 or above")
        for name in ("caption_dropout", "ema", "rank_dropout"):
            limit = 1.0
            if not 0 <= getattr(self, name) <= limit or (getattr(self, name) == limit and name != "caption_dropout"):
                raise ConfigError(f"`{name}` {getattr(self, name)} must be a share from 0 to below 1")
        if not self.resolution:
            raise ConfigError("`resolution` needs at least one side in pixels")
        for side in self.resolution:
            check_side("resolution", side)
        if self.preview_size is not None:
            check_side("preview_size", self.preview_size)

    def _check_names(self) -> None:
        one_of(self, "optimizer", OPTIMIZERS)
        one_of(self, "schedule", SCHEDULES)
        one_of(self, "base_precision", PRECISIONS)
        one_of(self, "lora_format", lora_namings())
        one_of(self, "memory", MEMORY)
        check_targets(self.targets)
        TimestepSampling.parse(self.timesteps)
        if self.output.suffix != ".safetensors":
            raise ConfigError(f"`output` {self.output}: a LoRA is written as .safetensors")


def free_options() -> set[str]:
    """The names of the options that you may change when you resume a run. The result stays the same."""
    return _with_trait("free")


def auto_options() -> set[str]:
    """The names of the options that the run decides if they are None."""
    return _with_trait("auto")


def is_former_auto(name: str, value: object) -> bool:
    """Whether `value` of the option `name` is a number that meant auto before the word "auto" existed.

    These numbers are 0 and, for `preview_guidance`, all numbers below 0. Old files and commands still work.
    """
    if name not in _FORMER_AUTO or not isinstance(value, (int, float)):
        return False
    return value < 0 if name == "preview_guidance" else value == 0


def _with_trait(trait: str) -> set[str]:
    return {field.name for field in fields(TrainConfig) if field.metadata.get(trait)}


def _several(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
