"""The interface of that which learns: a LoRA beside a frozen transformer, or the transformer itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zimage_mlx.networks.transformer import Transformer
from zimage_ref.formats.tensors import Array, Tensors
from zimage_ref.training.events import Encoded


@dataclass(frozen=True)
class Outcome:
    """What one step did."""

    loss: float
    grad_norm: float
    lr: float
    pictures: int
    finite: bool


class Learning(Protocol):
    """It learns one step at a time. Its whole state can be taken out and put in."""

    @property
    def notices(self) -> Sequence[str]:
        """Lines for the user, before the first step."""

    @property
    def file_bytes(self) -> int:
        """About the bytes that `write` needs."""

    def prepare(self, done: int) -> Iterator[Encoded]:
        """Computes what needs the base as it is, before `restore` and the steps after the first `done` ones."""

    def step(self, step: int, epoch: int, batches: Sequence[Sequence[int]]) -> Outcome:
        """Makes step `step`, from 0, on batches of items."""

    def result(self) -> AbstractContextManager[Transformer]:
        """The transformer as the result would make it, until the block ends."""

    def without(self) -> AbstractContextManager[Transformer] | None:
        """The transformer as if nothing were learned, until the block ends.

        None if that is what `result` gives before the first step, or if it cannot be had.
        """

    def write(self, path: Path, record: Mapping[str, object]) -> None:
        """Writes the result to `path`. record: what its file says about itself."""

    def state(self) -> Mapping[str, Tensors]:
        """All that the next step depends on, by part."""

    def check(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Raises ConfigError if `state` is of another run."""

    def restore(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Takes up a state that `state` gave and `check` accepts."""
