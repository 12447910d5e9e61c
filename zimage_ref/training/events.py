"""The events that a training run reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Encoded:
    """One piece of the preparation is done: a picture is checked, or captions, latents or a prediction are cached."""

    done: int
    total: int
    what: str = "latents"  # pictures, captions, latents, predictions


@dataclass(frozen=True)
class Notice:
    """A line of information for the user."""

    text: str


@dataclass(frozen=True)
class Started:
    """The steps begin. An earlier run has made the first `step` steps."""

    step: int
    total: int


@dataclass(frozen=True)
class Step:
    """One optimizer step was made."""

    step: int  # from 1
    total: int
    epoch: int  # from 1
    loss: float
    seconds: float
    smoothed: float  # an average of the loss over about the last 50 steps
    lr: float
    grad_norm: float  # before clipping
    pictures: int
    peak_memory: int  # bytes since the run began
    skipped: bool = False  # loss or gradient was not finite, so the step changed nothing


@dataclass(frozen=True)
class Validated:
    """The held-out loss was measured."""

    step: int
    losses: dict[float, float]  # sigma -> loss

    @property
    def loss(self) -> float:
        """The mean of the losses over all sigmas."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Previewed:
    """A preview was drawn."""

    step: int
    index: int  # of the prompt
    prompt: str
    path: Path


@dataclass(frozen=True)
class Saving:
    """A file or folder is about to be written that takes a while."""

    step: int
    nbytes: int  # of weights


@dataclass(frozen=True)
class Checkpointed:
    """A resume folder was written."""

    path: Path
    step: int


@dataclass(frozen=True)
class Saved:
    """A LoRA file was written."""

    path: Path
    step: int


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop, and can be resumed."""

    step: int


@dataclass(frozen=True)
class Done(Saved):
    """The run is complete and `path` is its result."""


Event: TypeAlias = (
    Encoded | Notice | Started | Step | Validated | Previewed | Saving | Checkpointed | Saved | Stopped | Done
)
