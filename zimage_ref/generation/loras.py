"""The LoRA files of a pipeline. Each is read once, checked against the transformer, and hashed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zimage_ref.bounds import LORA_SCALE
from zimage_ref.checkpoints.hub import local_file
from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.checkpoint import find_weights
from zimage_ref.lora.file import LoRAFile, read_lora
from zimage_ref.lora.spellings import companions
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.parameters import transformer_parameters

from .provenance import RecordedLoRA, digest

NamedLoRA = str | Path | LoRAFile  # a file, a folder with one, user/repository:file, or a LoRA that was read already
LoRASource = NamedLoRA | tuple[NamedLoRA, float]  # a LoRA at scale 1, or a pair of LoRA and scale


@dataclass(frozen=True)
class LoRAContent:
    """The content of a LoRA file at the time when it was read."""

    path: Path  # as the user named it
    file: LoRAFile
    stamp: tuple[object, ...] = ()  # differs after the file has been written again
    place: Path | None = None  # the file, if `path` is its name on Hugging Face

    @cached_property
    def sha256(self) -> str:
        """The `digest` of the file, computed on first use. Raises FormatError if it was written again since."""
        place = self.place or self.path
        found = digest(place)
        if self.stamp and _stamp(self.path, place) != self.stamp:
            raise FormatError(f"{self.path}: was changed after it was checked: start again")
        return found


@dataclass(frozen=True)
class LoadedLoRA:
    """A LoRA in use and its scale."""

    content: LoRAContent
    scale: float

    @property
    def recorded(self) -> RecordedLoRA:
        """The LoRA in the form that goes into a record."""
        return RecordedLoRA(self.content.path, self.scale, self.content.sha256)


def with_scale(source: LoRASource) -> tuple[NamedLoRA, float]:
    """A LoRA and its scale. Raises ConfigError for a scale out of bounds."""
    named, scale = source if isinstance(source, tuple) else (source, 1.0)
    if fault := LORA_SCALE.fault(scale):
        path = named.path if isinstance(named, LoRAFile) else named
        raise ConfigError(f"{path}: LoRA scale {scale} {fault}")
    return named, float(scale)


class LoRACache:
    """Reads LoRA files for one transformer. A file of the previous call is read again only if it has changed.

    So you can call a pipeline many times with the same paths and lose no time.
    """

    def __init__(self, transformer: TransformerConfig) -> None:
        self._shapes = transformer_parameters(transformer)
        self._contents: list[LoRAContent] = []  # those of the last call

    def read(self, sources: Sequence[LoRASource]) -> list[LoadedLoRA]:
        """The LoRAs of `sources`, checked against the transformer's layers.

        A LoRAFile is used without a check, so it must have been read for this transformer.
        Raises FormatError, WeightError or ConfigError.
        """
        found: list[LoadedLoRA] = []
        for named, scale in map(with_scale, sources):
            content = self._content(named, [lora.content for lora in found])
            found.append(LoadedLoRA(content, scale))
        self._contents = [lora.content for lora in found]
        return found

    def _content(self, named: NamedLoRA, found: Sequence[LoRAContent]) -> LoRAContent:
        known = [*found, *self._contents]
        if isinstance(named, LoRAFile):
            return next((content for content in known if content.file is named), LoRAContent(named.path, named))
        path = Path(named)
        place = local_file(path)
        stamp = _stamp(path, place)
        same = next((content for content in known if content.stamp == stamp), None)
        return same or LoRAContent(path, read_lora(place, self._shapes), stamp, place)


def _stamp(path: Path, place: Path) -> tuple[object, ...]:
    """A value that differs after the LoRA at `place`, or the file beside it with its alpha, has been written again."""
    weights = find_weights(place) if place.is_dir() else place
    stats = [file.stat() for file in (weights, *companions(weights)) if file.exists()]
    return path, weights, *((stat.st_mtime_ns, stat.st_size) for stat in stats)
