"""A ControlNet's file, checked against the transformer that it is to steer. Its data is not read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from zimage_ref.formats.tensors import Tensor
from zimage_ref.model.control import ControlNetConfig, check_pair

from .controlnet import CONTROLNET
from .convert import CheckpointSource, open_source
from .fingerprint import weights_fingerprint
from .folder import ModelFolder


@dataclass(frozen=True, eq=False)
class ControlFile:
    """A ControlNet on disk."""

    path: Path
    config: ControlNetConfig
    tensors: Mapping[str, Tensor]  # by official name, those that are used
    stamp: tuple[object, ...]  # differs for another file, and after the file has been written again

    @classmethod
    def open(cls, path: Path, model: ModelFolder) -> ControlFile:
        """Opens the ControlNet at `path`: a file, a folder, or a repository's id.

        Raises FormatError or WeightError if there is none, ConfigError if it does not fit the transformer of `model`.
        """
        source = open_source(path, CONTROLNET.name)
        config = CONTROLNET.own_config(source.sizes)
        check_pair(config, model.transformer, str(path))
        facts = source.path.stat()
        return cls(source.path, config, _used(source), (source.path.resolve(), facts.st_mtime_ns, facts.st_size))

    @cached_property
    def fingerprint(self) -> str:
        """Its `control_fingerprint`."""
        return _fingerprint(self.tensors)

    def beside(self, model: ModelFolder) -> ModelFolder:
        """`model` with this ControlNet among its weights, for an estimate of memory."""
        return replace(model, weights={**model.weights, CONTROLNET.name: dict(self.tensors)})


def control_fingerprint(path: Path) -> str:
    """The digest of the ControlNet at `path`: names, shapes and first elements of its tensors.

    Raises FormatError or WeightError if there is none.
    """
    return _fingerprint(_used(open_source(path, CONTROLNET.name)))


def _used(source: CheckpointSource) -> dict[str, Tensor]:
    unused = CONTROLNET.unused(CONTROLNET.own_config(source.sizes))
    return {name: tensor for name, tensor in source.tensors.items() if name not in unused}


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    return weights_fingerprint({CONTROLNET.name: tensors})
