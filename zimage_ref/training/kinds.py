"""The kinds of training: an update of some form beside a frozen transformer, or the transformer itself.

One table holds what differs in the defaults of the options. The rate of an update is the mean over its layers.

Sources of the rate of full, 1e-5 for Z-Image: the presets of OneTrainer and DiffSynth-Studio. That a rate of Adam goes
with 1 / width for the weights of a network: Tensor Programs V, arXiv 2203.03466, table 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from zimage_ref.lora.trained import TRAINED, Matrices
from zimage_ref.model.parameters import LORA_TARGETS

FULL = "full"
AUTO = "auto"  # the value of an option that follows from the kind


@dataclass(frozen=True)
class LearningKind:
    """The defaults of a kind."""

    title: str
    rate: Callable[[Iterable[Matrices]], float]  # of that of the kind lora, for the matrices of the layers
    by_width: float = 0.5  # the power of 1 / width that the rate goes with; why, for a LoRA: `TrainPlan.lr`
    optimizer: str = "adamw"
    targets: tuple[str, ...] = (*LORA_TARGETS, "refiners")


_FULL = LearningKind("whole transformer", rate=lambda layers: 0.1, by_width=1.0, optimizer="adafactor", targets=("*",))


def kinds() -> tuple[str, ...]:
    """The names of all kinds."""
    return (*TRAINED, FULL)


def learning_kind(name: str) -> LearningKind:
    """The defaults of the kind `name`."""
    if name == FULL:
        return _FULL
    return LearningKind(TRAINED[name].title, lambda layers: fmean(map(TRAINED[name].rate, layers)))
