"""The options of one dataset of a run. In a TOML file each dataset is a table [[dataset]]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_ref.bounds import DATASET, check_bounds
from zimage_ref.errors import ConfigError
from zimage_ref.generation.sizes import check_side
from zimage_ref.options import one_of

MASKS = ("none", "file", "alpha")
TRAIN, REGULARIZATION = "train", "regularization"
KINDS = (TRAIN, REGULARIZATION)


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """The options of one dataset. None takes the value of the run's option with the same name.

    Raises ConfigError for values out of bounds. You may give the folder as text.
    """

    folder: Path
    kind: str = TRAIN  # pictures of the kind `regularization` get no trigger, and none of them is held out
    weight: float = 1.0  # the loss of its pictures is multiplied by this number
    repeats: int | None = None
    resolution: tuple[int, ...] | None = None
    trigger: str | None = None
    caption_dropout: float | None = None
    flip: bool | None = None
    square: bool | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.folder, str):
            object.__setattr__(self, "folder", Path(self.folder))
        if isinstance(self.resolution, int):
            object.__setattr__(self, "resolution", (self.resolution,))
        one_of("kind", self.kind, KINDS)
        if self.mask is not None:
            one_of("mask", self.mask, MASKS)
        check_bounds(self, DATASET)
        if self.resolution is not None:
            check_resolution(self.resolution)
        if self.kind == REGULARIZATION and self.trigger:
            raise ConfigError(f"{self.folder}: a dataset of the kind regularization has no `trigger`")


def check_resolution(sides: Sequence[int]) -> None:
    """Raises ConfigError if there are no `sides`, or if one is not possible."""
    if not sides:
        raise ConfigError("`resolution` needs at least one side in pixels")
    for side in sides:
        check_side("resolution", side)


@dataclass(frozen=True)
class DatasetSettings:
    """The options of a dataset in a run: every value is decided."""

    number: int = 0  # of the dataset in the run
    kind: str = TRAIN
    weight: float = 1.0
    repeats: int = 1
    resolution: Sequence[int] = (256,)
    trigger: str = ""
    caption_dropout: float = 0.0
    flip: bool = False
    square: bool = False
    mask: str = MASKS[0]
    lines: bool = False  # each line of a caption is a caption of its own
