"""The pictures and captions of a run, all opened before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zimage_ref.errors import ConfigError

from .config import TrainConfig
from .dataset import Example, list_dataset
from .dataset_options import DatasetSettings
from .events import Encoded
from .learning_options import SHARED
from .masks import unmasked_notice

_KEPT = 128 << 20  # bytes of picture files that are kept from their check until they are encoded
_Listed = tuple[DatasetSettings, list[tuple[Path, str]]]  # a dataset, and its pictures with their captions


class CheckedDataset:
    """The pictures and captions of a run. They are listed at construction; `check` opens them one by one."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises the errors of `list_dataset`, and ConfigError if `validation` is neither a share nor a folder."""
        self.notices: list[str] = []  # files that are left out, or used in part
        self._listed = [self._list(config.settings(i), each.folder) for i, each in enumerate(config.sets)]
        held_out = _held_out_settings(config)
        self._listed_held_out = (
            [self._list(held_out, Path(config.validation))] if share_held_out(config) is None else []
        )
        self.examples: list[Example] = []  # both lists are complete after `check`
        self.held_out: list[Example] = []  # the examples of `validation`, if it is a folder

    def _list(self, settings: DatasetSettings, folder: Path) -> _Listed:
        masks = settings.mask == "file"
        return settings, list_dataset(folder, settings.trigger, self.notices.append, masks=masks, lines=settings.lines)

    def check(self) -> Iterator[Encoded]:
        """Opens every picture. Raises DatasetError if one cannot be read.

        The content of the first ones is kept until they are encoded, as far as memory for it goes.
        """
        kept = 0
        every = [*self._listed, *self._listed_held_out]
        done, total = 0, sum(len(listed) for _, listed in every)
        for number, (settings, listed) in enumerate(every):
            examples, bare = self.held_out if number >= len(self._listed) else self.examples, list[Path]()
            for picture, caption in listed:
                examples.append(Example.open(picture, caption, self.notices.append, settings))
                kept += picture.stat().st_size
                if kept > _KEPT:
                    examples[-1].forget()
                if not examples[-1].mask:
                    bare.append(picture)
                done += 1
                yield Encoded(done, total, "pictures")
            if settings.mask != "none" and bare:
                self.notices.append(unmasked_notice(bare[0].parent, bare, settings.mask))


def _held_out_settings(config: TrainConfig) -> DatasetSettings:
    """The settings of a folder of held-out pictures: the run's own, without what a loss that is measured has not."""
    shared = {name: getattr(config, name) for name in SHARED if name != "mask"}
    return DatasetSettings(**shared, lines=config.caption_lines)


def share_held_out(config: TrainConfig) -> float | None:
    """The share of pictures to hold out; 0 for none. None if `validation` is a folder."""
    try:
        fraction = float(config.validation or 0)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise ConfigError(f"`validation` {config.validation}: a fraction is between 0 and 1, anything else a folder")
    return fraction
