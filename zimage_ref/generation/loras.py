"""The LoRA files that a pipeline uses: read once, checked against its transformer, hashed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zimage_ref.errors import ConfigError
from zimage_ref.formats.checkpoint import find_weights
from zimage_ref.lora.file import LoRAFile, read_lora
from zimage_ref.lora.spellings import companions
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.parameters import transformer_parameters

from .provenance import RecordedLoRA, digest

NamedLoRA = str | Path | LoRAFile  # a file, a folder that holds one, or what was read from it
LoRASource = NamedLoRA | tuple[NamedLoRA, float]  # a LoRA at scale 1, or with its scale


@dataclass(frozen=True)
class LoRAContent:
    """What was in a LoRA file when it was read."""

    path: Path  # as the user named it
    file: LoRAFile
    stamp: tuple[object, ...] = ()  # is another one once the file was written anew

    @cached_property
    def sha256(self) -> str:
        """The file's `digest`, taken when it is first asked for."""
        return digest(self.path)


@dataclass(frozen=True)
class LoadedLoRA:
    """A LoRA in use, and how much of it."""

    content: LoRAContent
    scale: float

    @property
    def recorded(self) -> RecordedLoRA:
        """What a record says of it."""
        return RecordedLoRA(self.content.path, self.scale, self.content.sha256)


def with_scale(source: LoRASource) -> tuple[NamedLoRA, float]:
    """A LoRA and its scale. Raises ConfigError for a scale that is not finite."""
    named, scale = source if isinstance(source, tuple) else (source, 1.0)
    if not math.isfinite(scale):
        path = named.path if isinstance(named, LoRAFile) else named
        raise ConfigError(f"{path}: LoRA scale {scale} must be a finite number")
    return named, float(scale)


class LoRACache:
    """Reads LoRA files for one transformer. A file of the call before is not read again unless it has changed.

    So a pipeline that is called again and again with the same paths is as fast as with none to read.
    """

    def __init__(self, transformer: TransformerConfig) -> None:
        self._shapes = transformer_parameters(transformer)
        self._contents: list[LoRAContent] = []  # of the last call

    def read(self, sources: Sequence[LoRASource]) -> list[LoadedLoRA]:
        """The LoRAs of `sources`, checked against the transformer's layers.

        A LoRAFile among them is taken as it is, so it must have been read for this transformer.
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
        stamp = _stamp(path)
        same = next((content for content in known if content.stamp == stamp), None)
        return same or LoRAContent(path, read_lora(path, self._shapes), stamp)


def _stamp(path: Path) -> tuple[object, ...]:
    """What differs once a LoRA file, or the file beside it that holds its alpha, was written anew."""
    weights = find_weights(path) if path.is_dir() else path
    stats = [file.stat() for file in (weights, *companions(weights)) if file.exists()]
    return path, weights, *((stat.st_mtime_ns, stat.st_size) for stat in stats)
