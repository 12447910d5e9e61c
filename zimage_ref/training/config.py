"""A LoRA training run: every option once.

Traits of a field:

    free          you may change the option when you resume a run; the result stays the same, bit for bit
    auto          None means that the run decides; users write "auto", and the help says what the run decides
    repeatable    users give the option once for each value
    essential     most runs need it or gain by it: short help shows it
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from zimage_ref.bounds import TRAINING, check_bounds
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import ConfigError
from zimage_ref.lora.spellings import DEFAULT_NAMING, lora_namings, namings_of_every_kind
from zimage_ref.lora.trained import DEFAULT_KIND, UpdateSize
from zimage_ref.model.flow import TIMESTEP_SAMPLINGS, TimestepSampling
from zimage_ref.options import MEMORY, check_choices, one_of, option, required

from .check_options import CheckOptions
from .dataset_options import REGULARIZATION, TRAIN, DatasetOptions, DatasetSettings, check_resolution
from .full import check_full
from .groups import TrainGroup
from .kinds import AUTO, FULL, kinds, learning_kind
from .learning_options import SHARED, LearningOptions
from .optimizers import OPTIMIZERS, SCHEDULES
from .precisions import PRECISIONS
from .targets import PRESETS, normalized

LR = 1e-4  # at the width of Z-Image; see `TrainPlan.lr`
_PARTS = part_options()  # name -> help; each has a field below
_FORMER_AUTO = ("steps", "lr", "preview_size", "preview_steps", "preview_guidance")  # see `is_former_auto`

MODEL, DATA, LORA, PACE, NOISE, _, _, SAVING, MEMORY_USE, _ = TrainGroup


@dataclass(frozen=True)
class TrainConfig(LearningOptions, CheckOptions):
    """The options of a LoRA training run. Raises ConfigError for values out of bounds.

    You may give paths as text. You may give options of several values as one value or as a list.
    """

    model_dir: Path = required(
        "Folder with a Z-Image model, or the name of a repository on Hugging Face.",
        MODEL,
        value="MODEL",
        essential=True,
        free=True,
    )
    dataset: Path | None = option(
        None,
        "Folder with pictures and captions (.txt, metadata.jsonl or captions.json). For several, see [[dataset]].",
        DATA,
        value="FOLDER",
        essential=True,
        free=True,
    )
    output: Path = option(
        Path("lora_weights.safetensors"), "LoRA file to write.", SAVING, value="FILE", essential=True, free=True
    )
    rank: int = option(16, "Rank of the LoRA. A higher rank learns more.", LORA, essential=True)
    alpha: float = option(16.0, "Strength of the LoRA. Its change of the weights is multiplied by alpha / rank.", LORA)
    kind: str = option(
        DEFAULT_KIND,
        "Form of the change of a weight. Every program reads lora; lokr is small, loha and dora are slower. full "
        "trains the transformer itself.",
        LORA,
        choices=kinds,
        essential=True,
    )
    factor: int = option(
        -1, "For lokr: largest side of the small matrix. -1 makes the two matrices as equal in size as can be.", LORA
    )
    decompose_both: bool = option(False, "For lokr: make the small matrix a product of two, as the large one is.", LORA)
    init_lora: Path | None = option(
        None, "Go on from this LoRA of any kind and spelling instead of a new one.", LORA, value="FILE", free=True
    )
    epochs: int = option(100, "Times that the run goes through the dataset.", PACE)
    steps: int | None = option(
        None, "Training steps. With auto, as many as `epochs` need.", PACE, essential=True, auto=True
    )
    lr: float | None = option(
        None,
        "Learning rate. With auto, 1e-4 for Z-Image, more if narrower, 1 for prodigy. It also depends on `kind`.",
        PACE,
        auto=True,
    )
    resolution: tuple[int, ...] = option(
        (256,),
        "Pictures are scaled to the area of a square of this side, in pixels.",
        DATA,
        essential=True,
    )
    batch_size: int = option(1, "Pictures in a batch. A batch holds pictures of one size.", PACE)
    grad_accumulation: int = option(1, "Batches in a step.", PACE)
    seed: int = option(0, "Seed of noise, noise levels, order and first weights.", PACE)

    trigger: str = option(
        "",
        "Words for the new thing. They replace [trigger] in captions, or go in front.",
        DATA,
        value="WORDS",
        essential=True,
    )
    cache: Path | None = option(
        None,
        "Folder for encoded pictures and captions. With auto, zimage-cache beside `output`.",
        DATA,
        value="FOLDER",
        free=True,
        auto=True,
    )
    lora_format: str = option(
        DEFAULT_NAMING, "Spelling of the keys in the LoRA file.", SAVING, choices=lora_namings, free=True
    )
    targets: tuple[str, ...] = option(
        (AUTO,),
        f"Layers that the LoRA changes: {', '.join(PRESETS)}, or patterns such as layers.10-20.attention.*. =32 sets "
        "a rank. refiners adds the same layers of the refiner blocks. auto is attention, feed_forward and refiners; "
        "for full, everything.",
        LORA,
        value="NAME",
    )
    optimizer: str = option(
        AUTO,
        "Optimizer that changes the LoRA. auto is adamw; for full, adafactor.",
        PACE,
        choices=lambda: (AUTO, *OPTIMIZERS),
    )
    weight_decay: float = option(1e-2, "Weight decay, for an optimizer that has one.", PACE)
    warmup: int = option(20, "Steps in which the learning rate rises from 0.", PACE)
    schedule: str = option("cosine", "How the learning rate changes after the warmup.", PACE, choices=SCHEDULES)
    grad_clip: float = option(1.0, "Largest norm of the gradient of all layers. 0 sets no limit.", PACE)
    ema: float = option(
        0.0, "Decay of an average of the LoRA over the steps. The average becomes the result. 0 makes no average.", PACE
    )
    lora_plus: float = option(1.0, "The learning rate of matrix B is that of matrix A times this number.", PACE)
    timesteps: str = option(
        "auto", f"How noise levels are drawn. Choices: {', '.join(TIMESTEP_SAMPLINGS)}, shift=S.", NOISE, value="NAME"
    )
    base_precision: str = option(
        "auto",
        "Precision of the base model: a type, or bits, such as 4, or 4/32 in groups of 32. auto is bf16 on a GPU.",
        MEMORY_USE,
        choices=PRECISIONS,
        value="NAME",
        essential=True,
    )
    memory: str = option(
        "auto",
        "lean takes less memory, fast takes less time, and stream reads weights when they are needed. auto takes the "
        "fastest that fits.",
        MEMORY_USE,
        choices=MEMORY,
        free=True,
    )
    training_adapter: Path | None = option(
        None,
        "For Turbo: LoRA that undoes its distillation during training.",
        MODEL,
        value="FILE",
        essential=True,
        free=True,
    )
    transformer: Path | None = option(None, _PARTS["transformer"], MODEL, free=True)
    text_encoder: Path | None = option(None, _PARTS["text_encoder"], MODEL, free=True)
    vae: Path | None = option(None, _PARTS["vae"], MODEL, free=True)
    tokenizer: Path | None = option(None, _PARTS["tokenizer"], MODEL, free=True)

    save_every: int = option(
        0, "Save the LoRA every N steps. 0 saves it only at the end.", SAVING, essential=True, free=True
    )
    resume_every: int = option(
        100, "Save the state that `resume` needs every N steps, and with each saved LoRA.", SAVING, free=True
    )
    keep_last: int = option(0, "Number of LoRAs of earlier steps to keep. 0 keeps all.", SAVING, free=True)
    resume: bool = option(False, "Continue the run to `output` that was stopped.", SAVING, essential=True, free=True)
    resume_anyway: bool = option(False, "Resume although dataset, model or options have changed.", SAVING, free=True)
    overwrite: bool = option(False, "Replace `output`, and an unfinished run that writes to it.", SAVING, free=True)
    force: bool = option(False, "Continue if memory seems too small.", MEMORY_USE, free=True)

    def __post_init__(self) -> None:
        for name in ("model_dir", "dataset", "output", "cache", "training_adapter", "init_lora", *_PARTS):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("resolution", "targets", "preserve_prompt", "preview_prompt", "log"):
            object.__setattr__(self, name, _several(getattr(self, name)))
        one_of("kind", self.kind, kinds())
        if self.optimizer == AUTO:
            object.__setattr__(self, "optimizer", learning_kind(self.kind).optimizer)
        chosen = learning_kind(self.kind).targets if self.targets == (AUTO,) else self.targets
        object.__setattr__(self, "targets", normalized(chosen))
        for name in _FORMER_AUTO:
            if is_former_auto(name, getattr(self, name)):
                object.__setattr__(self, name, None)
        self._check_numbers()
        check_full(self, default_options())
        self._check_names()
        self._check_datasets()
        self.check_learning(self.optimizer, self.ema, self.lora_plus, self.kind, self.init_lora is not None)

    @property
    def parts(self) -> dict[str, Path | None]:
        """Files to use instead of those in the folder of the model, for `ModelFolder.open`."""
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def cache_folder(self) -> Path:
        """The folder for encoded pictures and captions."""
        return self.cache or self.output.parent / "zimage-cache"

    @property
    def sets(self) -> tuple[DatasetOptions, ...]:
        """The datasets: those of `datasets`, or the one of `dataset`."""
        return self.datasets if self.dataset is None else (DatasetOptions(folder=self.dataset),)

    def settings(self, number: int) -> DatasetSettings:
        """What the options of dataset `number` come to."""
        given = self.sets[number]
        own = {n: getattr(self, n) if (v := getattr(given, n)) is None else v for n in SHARED}
        if given.kind == REGULARIZATION:
            own["trigger"] = ""
        return DatasetSettings(number, given.kind, given.weight, **own, lines=self.caption_lines)

    def _check_datasets(self) -> None:
        if self.dataset is None and not self.datasets:
            raise ConfigError("`dataset` must be given, or [[dataset]] tables in a file of options")
        if self.dataset is not None and self.datasets:
            raise ConfigError("`dataset` and [[dataset]] tables are both given: give one of them")
        settings = [self.settings(number) for number in range(len(self.sets))]
        if not any(each.kind == TRAIN for each in settings):
            raise ConfigError("every dataset is of the kind regularization: one must be of the kind train")
        if self.preserve and not any(each.trigger for each in settings):
            raise ConfigError("`preserve` puts its words in place of `trigger`: give `trigger`")

    @property
    def size(self) -> UpdateSize:
        """How large the update of a layer may become, if `targets` does not say it."""
        return UpdateSize(self.rank, self.alpha, self.factor, self.decompose_both)

    def _check_numbers(self) -> None:
        check_bounds(self, TRAINING)
        if self.factor == 0:
            raise ConfigError("`factor` 0: give -1, or the largest side of the small matrix")
        check_resolution(self.resolution)
        self.check_previews()

    def _check_names(self) -> None:
        check_choices(self)
        TimestepSampling.parse(self.timesteps)
        if self.kind != FULL and self.output.suffix != ".safetensors":
            raise ConfigError(f"`output` {self.output}: a LoRA is written as .safetensors")
        if self.kind != DEFAULT_KIND and self.lora_format not in (able := namings_of_every_kind()):
            raise ConfigError(f"`lora_format` {self.lora_format} has no {self.kind}: use {' or '.join(able)}")
        for name, needed in (("factor", -1), ("decompose_both", False)):
            if self.kind != "lokr" and getattr(self, name) != needed:
                raise ConfigError(f"`{name}` needs `kind` lokr")


def free_options() -> set[str]:
    """The names of the options that you may change when you resume a run. The result stays the same."""
    return _with_trait("free")


def auto_options() -> set[str]:
    """The names of the options that the run decides if they are None."""
    return _with_trait("auto")


def default_options() -> dict[str, object]:
    """The default of every option that has one, by name."""
    return {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}


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
