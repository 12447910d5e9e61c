"""Weights on disk: one file or a sharded set, opened by content, checked against the model, read when used."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import npz, safetensors_io
from .config import read_json
from .errors import FormatError, WeightError, listing
from .names import Shapes
from .tensors import Tensor, Tensors

SUFFIXES = (".npz", ".safetensors")  # in order of preference


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors from one or more files of one container."""

    path: Path
    container: str  # "npz" or "safetensors"
    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any]  # npz: the record; safetensors: __metadata__

    @property
    def parameters(self) -> int:
        """Elements in all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of data in all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens `path`: an .npz, a .safetensors, a sharded set's index.json, or a folder that holds one of these.

        Reads headers only. Raises FormatError naming the file and the fact.
        """
        if path.is_dir():
            path = find_weights(path)
        if path.name.endswith(".index.json"):
            return cls(path, "safetensors", _shards(path), {})
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise FormatError(f"{path}: cannot be opened: {error.strerror or error}") from error
        if magic == b"PK\x03\x04":
            return cls(path, "npz", *npz.read(path))
        return cls(path, "safetensors", *safetensors_io.read(path))


def require(tensors: Tensors, shapes: Shapes, optional: Set[str], path: Path) -> None:
    """Raises WeightError listing every misfit unless `tensors` are those of a model with parameters `shapes`.

    The `optional` ones need not be there.
    """
    missing = [name for name in shapes if name not in tensors and name not in optional]
    unknown = [name for name in tensors if name not in shapes]
    misshapen = [
        f"{name} {tensor.shape} instead of {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    faults = {"missing": missing, "unknown": unknown, "wrongly shaped": misshapen}
    if any(faults.values()):
        facts = "; ".join(f"{len(v)} {kind}: {listing(v)}" for kind, v in faults.items() if v)
        raise WeightError(f"{path}: does not fit the model ({len(shapes)} tensors): {facts}")


def find_weights(folder: Path) -> Path:
    """The one checkpoint in `folder`: an .npz, an index.json or a single .safetensors, in this order."""
    for pattern in ("*.npz", "*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise FormatError(
                f"{folder}: holds {len(found)} {pattern} files ({listing(p.name for p in found)}): name one"
            )
        if found:
            return found[0]
    raise FormatError(f"{folder}: holds no weights: looked for *.npz, *.safetensors.index.json and *.safetensors")


def _shards(index: Path) -> dict[str, Tensor]:
    """All tensors of a sharded set; the index and the shards must agree exactly."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{index}: has no weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise FormatError(f"{index}: names {file!r}, which is not a file in its own folder")
        shard, _ = safetensors_io.read(index.parent / file)
        expected = {name for name, home in weight_map.items() if home == file}
        if shard.keys() != expected:
            raise FormatError(
                f"{index.parent / file}: differs from {index.name} in {listing(sorted(shard.keys() ^ expected))}"
            )
        tensors |= shard
    if not tensors:
        raise FormatError(f"{index}: names no tensors")
    return tensors
