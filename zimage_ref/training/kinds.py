"""The kinds of training: an update of some form beside a frozen transformer, or the transformer itself.

One table holds what differs in the defaults of the options.

Source of the rate of full: musubi-tuner, docs/zimage.md, which advises 1e-6 to 1e-5 with Adafactor.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_ref.lora.trained import TRAINED
from zimage_ref.model.parameters import LORA_TARGETS

FULL = "full"
AUTO = "auto"  # the value of an option that follows from the kind


@dataclass(frozen=True)
class LearningKind:
    """The defaults of a kind."""

    title: str
    rate: float  # of the learning rate of a LoRA of the kind lora
    optimizer: str = "adamw"
    targets: tuple[str, ...] = (*LORA_TARGETS, "refiners")


_FULL = LearningKind("whole transformer", rate=0.1, optimizer="adafactor", targets=("*",))


def kinds() -> tuple[str, ...]:
    """The names of all kinds."""
    return (*TRAINED, FULL)


def learning_kind(name: str) -> LearningKind:
    """The defaults of the kind `name`."""
    return _FULL if name == FULL else LearningKind(TRAINED[name].title, TRAINED[name].rate)
