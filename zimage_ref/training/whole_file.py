"""The transformer that a run of the kind full writes: a file, or a folder of shards, that every command reads."""

from __future__ import annotations

from pathlib import Path

from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.formats.json_file import Json
from zimage_ref.formats.shards import parse_size
from zimage_ref.formats.tensors import Tensors

MAX_SHARD = parse_size("10GB")  # in a folder, as diffusers writes it


def check_names(path: Path) -> None:
    """Raises ConfigError if a transformer cannot be written to `path`."""
    _target(path)


def write_whole(path: Path, model: ModelFolder, trained: Tensors, record: Json) -> list[Path]:
    """Writes the transformer of `model` with `trained` in the place of its tensors. Returns the files.

    trained: by official name. The others are written as the model's file stores them. record: what a run says about
    itself. Memory holds one tensor. The output becomes complete or does not appear.
    """
    source = open_source(model.files[TRANSFORMER.name], TRANSFORMER.name)
    tensors = {name: trained.get(name, tensor) for name, tensor in source.tensors.items()}
    return write_model(source, _target(path), tensors, {"training": record}).files


def _target(path: Path) -> Target:
    return Target(path, TRANSFORMER.name, max_shard_size=None if path.suffix else MAX_SHARD, overwrite=True)
