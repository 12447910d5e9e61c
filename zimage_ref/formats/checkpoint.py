"""Weights on disk: one file or a sharded set, its container told by content, its tensors read when they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_ref.errors import FormatError, listing, reason

from . import burnpack, gguf, npz, quantize, safetensors
from .json_file import read_json
from .tensors import Tensor

SUFFIXES = (".npz", ".safetensors")  # that can be written; in order of preference
READABLE = (*SUFFIXES, ".bpk", ".gguf")
RECORD_KEY = "zimage"  # of our record in safetensors' metadata

_READERS: dict[bytes, tuple[str, Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]]] = {
    b"PK\x03\x04": ("npz", npz.read),
    b"PK\x05\x06": ("npz", npz.read),  # an archive without members
    burnpack.MAGIC: ("burnpack", burnpack.read),
    gguf.MAGIC: ("gguf", gguf.read),
}


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors from one or more files of one container."""

    path: Path
    container: str  # "npz", "safetensors", "burnpack" or "gguf"
    tensors: dict[str, Tensor]  # a quantized layer is one QuantizedTensor
    metadata: Mapping[str, Any]  # as stored: the npz record, safetensors' __metadata__, ...

    @property
    def record(self) -> Mapping[str, Any]:
        """What our own writer says of the file (model_type, config, quantization, source), else {}."""
        return self.metadata if self.container == "npz" else _record(self.path, self.metadata)

    @property
    def parameters(self) -> int:
        """Elements in all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens `path`: a file of any container, a sharded set's index.json, or a folder that holds one of these.

        Reads headers only. Raises FormatError naming the file and the fact.
        """
        if path.is_dir():
            path = find_weights(path)
        if path.name.endswith(".index.json"):
            container, tensors, metadata = "safetensors", *_shards(path)
        else:
            container, read = _reader(path)
            tensors, metadata = read(path)
        record = metadata if container == "npz" else _record(path, metadata)
        return cls(path, container, quantize.fold(tensors, record, path), metadata)


def _reader(path: Path) -> tuple[str, Callable[[Path], tuple[dict[str, Tensor], Any]]]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened: {reason(error)}") from error
    return _READERS.get(magic, ("safetensors", safetensors.read))


def _record(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        record = json.loads(metadata.get(RECORD_KEY, "{}"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the record in its metadata is damaged: {error}") from error
    if not isinstance(record, dict):
        raise FormatError(f"{path}: the record in its metadata is a JSON {type(record).__name__}, not an object")
    return record


def find_weights(folder: Path) -> Path:
    """The one checkpoint in `folder`: an .npz, an index.json, a .safetensors, a .bpk or a .gguf, in this order."""
    patterns = ("*.npz", "*.safetensors.index.json", "*.safetensors", "*.bpk", "*.gguf")
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise FormatError(
                f"{folder}: holds {len(found)} {pattern} files ({listing(p.name for p in found)}): name one"
            )
        if found:
            return found[0]
    raise FormatError(f"{folder}: holds no weights: looked for {', '.join(patterns)}")


def _shards(index: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a sharded set; the index and the shards must agree exactly."""
    data = read_json(index)
    weight_map, metadata = data.get("weight_map"), data.get("metadata", {})
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{index}: has no weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{index}: names {file!r}, which is not a safetensors file in its own folder")
        shard, _ = safetensors.read(index.parent / file)
        expected = {name for name, home in weight_map.items() if home == file}
        if shard.keys() != expected:
            raise FormatError(
                f"{index.parent / file}: differs from {index.name} in {listing(sorted(shard.keys() ^ expected))}"
            )
        tensors |= shard
    if not tensors:
        raise FormatError(f"{index}: names no tensors")
    return tensors, metadata if isinstance(metadata, dict) else {}
