"""Weights on disk: one file or a sharded set. The content shows the container; tensors are read when you use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from zimage_ref.errors import FormatError, listing, reason

from . import burnpack, gguf, npz, safetensors, shards
from .folders import own_files
from .folding import fold
from .json_file import Json, JsonObject
from .reading import open_file
from .strangers import check_not_stranger, unfinished
from .tensors import Tensor

WRITABLE = (".npz", ".safetensors")  # suffixes, in order of preference
READABLE = (*WRITABLE, ".bpk", ".gguf")
RECORD_KEY = "zimage"  # the key of our record in the metadata of a safetensors file

Read = Callable[[Path], tuple[dict[str, Tensor], JsonObject]]  # returns the tensors and the metadata as stored

_READERS: dict[bytes, tuple[str, Read]] = {
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
    tensors: dict[str, Tensor]  # a quantized layer is one tensor, see `folding`
    metadata: Json  # as stored: the npz record, safetensors' __metadata__, ...
    record: Json = field(default_factory=dict)  # written by this program: model_type, config, quantization, source

    @property
    def parameters(self) -> int:
        """The number of elements in all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens `path`: a file of any container, a sharded set's index.json, or a folder that holds one of these.

        Reads headers only. Raises FormatError naming the file and the fact.
        """
        if path.is_dir():
            path = find_weights(path)
        if shards.is_index(path):
            container, tensors, metadata = "safetensors", *shards.read(path)
        elif shards.set_of(path):
            container, tensors, metadata = "safetensors", *shards.read_set(path)
        else:
            container, read = _reader(path)
            tensors, metadata = read(path)
        record = metadata if container == "npz" else _record_in_metadata(path, metadata)
        return cls(path, container, fold(tensors, metadata, record, path), metadata, record)


def _reader(path: Path) -> tuple[str, Read]:
    """The container of the file `path`, and the function that reads it."""
    try:
        with open_file(path) as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:  # ValueError: no path can have such characters
        raise FormatError(f"{path}: cannot be opened: {reason(error)}") from error
    check_not_stranger(path)
    return _READERS.get(magic, ("safetensors", safetensors.read))


def _record_in_metadata(path: Path, metadata: Json) -> JsonObject:
    try:
        record = json.loads(metadata.get(RECORD_KEY, "{}"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the record in its metadata is damaged: {error}") from error
    if not isinstance(record, dict):
        raise FormatError(f"{path}: the record in its metadata is a JSON {type(record).__name__}, not an object")
    return record


def find_weights(folder: Path) -> Path:
    """The one checkpoint in `folder`: an .npz, an index.json, a .safetensors, a .bpk or a .gguf, in this order.

    If there are files of several variants, such as x.safetensors and x.fp16.safetensors, it is the one without a name.
    """
    patterns = ("*.npz", shards.INDEX_PATTERN, "*.safetensors", "*.bpk", "*.gguf")
    for pattern in patterns:
        found = shards.without_variants(own_files(folder, pattern))
        if len(found) > 1 and (first := shards.first_of_set(found)):
            return first
        if len(found) > 1:
            raise FormatError(
                f"{folder}: holds {len(found)} {pattern} files ({listing(p.name for p in found)}): name one"
            )
        if found:
            return found[0]
    rest = f"; {listing(partly)} is still being downloaded" if (partly := unfinished(folder)) else ""
    raise FormatError(f"{folder}: holds no weights: looked for {', '.join(patterns)}{rest}")
