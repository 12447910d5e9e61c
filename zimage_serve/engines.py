"""What computes for a server. The command line makes it, so a server knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from zimage_ref.formats.quantize import Quantization
from zimage_ref.generation.pipeline import AnyPipeline
from zimage_ref.memory import Footprint, Mode
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.events import Event


class Trainer(Protocol):
    """The engine that trains. `train` and `precision` raise BackendError if there is none."""

    def train(self, config: TrainConfig, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Trains; see `zimage_mlx.training.run.train`."""

    def precision(self, config: TrainConfig) -> tuple[str, Quantization | None]:
        """The precision of the frozen base."""

    def footprint(self, mode: Mode) -> Footprint:
        """The memory that training takes in `mode`, beside weights."""


@dataclass(frozen=True)
class Engines:
    """What computes, given by the command line."""

    model_dir: Path  # as the user named it
    parts: Mapping[str, Path]  # files to use instead of those in the folder
    open: Callable[[], AnyPipeline]  # is called in the worker's thread
    trainer: Trainer
    backend: str
    defaults: Mapping[str, object] = field(default_factory=dict)  # options of pictures if a client leaves them out
