"""The options of a training run about datasets, masks, captions and the loss. `TrainConfig` adds all others.

The traits of a field are described in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_ref.errors import ConfigError
from zimage_ref.options import option

from .dataset_options import MASKS, DatasetOptions
from .groups import TrainGroup
from .optimizers import OPTIMIZERS

LOSSES = ("mse", "mae", "huber")
LOSS_WEIGHTS = ("none", "flow-weighted")
# Options of the run that a dataset may have for itself
SHARED = ("repeats", "resolution", "trigger", "caption_dropout", "flip", "square", "mask")
_DATA, _LORA, _NOISE, _LOSS = TrainGroup.DATA, TrainGroup.LORA, TrainGroup.NOISE, TrainGroup.LOSS


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """Options of the pictures and captions that are shown, and of the loss."""

    datasets: tuple[DatasetOptions, ...] = ()  # the tables [[dataset]] of a file of options
    caption_dropout: float = option(
        0.05, "Share of pictures that are shown without their caption. Guidance needs it.", _DATA
    )
    repeats: int = option(1, "Times that an epoch shows each picture.", _DATA)
    flip: bool = option(False, "Mirror each picture left to right, half of the time.", _DATA)
    max_upscale: float = option(1.0, "A picture smaller than `resolution` is enlarged at most this many times.", _DATA)
    square: bool = option(False, "Crop each picture to a square. Without this option it keeps its shape.", _DATA)
    mask: str = option(
        MASKS[0],
        "Part of a picture that is learned. file: the white of NAME.mask.png beside it. alpha: its opaque part.",
        _DATA,
        choices=MASKS,
    )
    mask_outside: float = option(0.1, "Weight of the loss outside of a mask. Inside it is 1.", _DATA)
    caption_lines: bool = option(False, "Each line of a caption is a caption of its own; one is drawn.", _DATA)
    caption_choices: bool = option(False, "In captions, {a|b} means a or b; one is drawn.", _DATA)
    shuffle_tags: bool = option(False, "Draw another order of the parts of a caption that commas separate.", _DATA)
    keep_tags: int = option(1, "Parts at the start of a caption that `shuffle_tags` leaves in place.", _DATA)

    master_weights: bool = option(
        False,
        "For full: also keep the weights in float32, and let the steps change these. This takes twice the memory of "
        "the weights more.",
        TrainGroup.MEMORY,
    )
    rank_dropout: float = option(0.0, "Share of the ranks that a step does not train.", _LORA)
    dropout: float = option(0.0, "Share of the inputs of each LoRA layer that a step leaves out.", _LORA)
    module_dropout: float = option(0.0, "Share of the LoRA layers that a step leaves out.", _LORA)

    min_sigma: float = option(0.0, "Noise levels are drawn from this one up. 0 is the picture.", _NOISE)
    max_sigma: float = option(1.0, "Noise levels are drawn up to this one. 1 is pure noise.", _NOISE)
    noise_offset: float = option(
        0.0, "Size of a random number added to all noise of a channel. It helps dark and bright pictures.", _NOISE
    )

    loss: str = option(
        LOSSES[0],
        "Distance of the prediction from its target: squares, absolute values, or huber.",
        _LOSS,
        choices=LOSSES,
    )
    huber_delta: float = option(0.1, "Distance above which huber grows like mae. Below it grows like mse.", _LOSS)
    loss_weight: str = option(
        LOSS_WEIGHTS[0],
        "Weight of a picture by its noise level. flow-weighted has the weights of `timesteps` weighted.",
        _LOSS,
        choices=LOSS_WEIGHTS,
    )
    differential_guidance: float = option(
        1.0, "Moves the target away from the prediction: their distance is multiplied by this number.", _LOSS
    )
    preserve: str = option(
        "",
        "Words for the class, such as dog. With them in place of `trigger`, training should change nothing.",
        _LOSS,
        value="WORDS",
    )
    preserve_prompt: tuple[str, ...] = option(
        (),
        "Prompt at which training should change nothing, such as a dog on a bench. You can repeat this.",
        _LOSS,
        value="TEXT",
        repeatable=True,
    )
    preserve_blank: bool = option(False, "Without a caption, training should change nothing.", _LOSS)
    preserve_every: int = option(1, "Steps from one that preserves something to the next.", _LOSS)
    preserve_weight: float = option(1.0, "Weight of the loss of what is preserved.", _LOSS)

    @property
    def preserves(self) -> bool:
        """Whether there is anything at which training should change nothing."""
        return bool(self.showings)

    @property
    def showings(self) -> list[bool]:
        """How a step that preserves shows its pictures again: with words (False), without a caption (True)."""
        return [False] * bool(self.preserve or self.preserve_prompt) + [True] * self.preserve_blank

    def shows_words(self, trigger: str) -> bool:
        """Whether a picture with this trigger, "" for none, can be shown again under words to preserve."""
        return bool(self.preserve_prompt or (self.preserve and trigger))

    def _check_kind(self, kind: str, goes_on: bool) -> None:
        """Raises ConfigError for options that the kind of the LoRA has not. goes_on: whether it begins with another."""
        if self.dropout and kind not in ("lora", "dora"):
            raise ConfigError("`dropout` needs `kind` lora or dora: the others have no matrix of inputs alone")
        if self.preserves and kind == "dora" and goes_on:
            raise ConfigError("`preserve` of a dora with `init_lora`: its lengths are not those of the base")

    def check_learning(self, optimizer: str, ema: float, lora_plus: float, kind: str, goes_on: bool) -> None:
        """Raises ConfigError for options that exclude one another. goes_on: whether the run begins with a LoRA."""
        self._check_kind(kind, goes_on)
        if not all(prompt.strip() for prompt in self.preserve_prompt):
            raise ConfigError("`preserve_prompt` is empty: give `preserve_blank` for no caption at all")
        if self.min_sigma >= self.max_sigma:
            raise ConfigError(f"`min_sigma` {self.min_sigma:g} must be below `max_sigma` {self.max_sigma:g}")
        found = OPTIMIZERS[optimizer]
        if found.averages and ema:
            raise ConfigError(f"`optimizer` {optimizer} makes an average of its own: leave out `ema`")
        if found.one_rate and lora_plus != 1:
            raise ConfigError(f"`optimizer` {optimizer} finds one rate for all matrices: leave out `lora_plus`")
