"""Describes a checkpoint or the folder of a model from headers alone. `verify` checks the data too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from .checkpoints.component import AnyComponent
from .checkpoints.folder import component_file, find_component, find_tokenizer
from .checkpoints.identify import config_of, identify, ignored_in, looks_like, official_weights
from .checkpoints.registry import COMPONENTS, TOKENIZER, model_parts
from .checkpoints.writers import written_by
from .errors import ZImageError
from .formats import npz
from .formats.checkpoint import READABLE, Checkpoint
from .formats.folders import own_files
from .formats.json_file import JsonObject
from .formats.quantize import bytes_by_dtype, unfold
from .formats.tensors import DTYPE_NAMES, FLOATS, count_nonfinite


@dataclass(frozen=True)
class TensorLine:
    """One line of the table of tensors."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Description:
    """Facts about one checkpoint."""

    path: Path
    container: str
    dialect: str | None
    model_type: str | None
    looks_like: str  # what the file seems to be, in words
    written_by: str  # the program that wrote it; "" if nothing tells
    ignored: list[str]  # names of tensors that no network uses
    parameters: int
    tensors: list[TensorLine]
    dtypes: dict[str, dict[str, int]]  # dtype -> number of tensors, bytes
    metadata: JsonObject

    def to_json(self) -> JsonObject:
        """The facts as JSON, for programs."""
        return {
            "path": str(self.path),
            "container": self.container,
            "dialect": self.dialect,
            "model_type": self.model_type,
            "looks_like": self.looks_like,
            "written_by": self.written_by or None,
            "ignored": self.ignored,
            "parameters": self.parameters,
            "tensors": [vars(line) | {"shape": list(line.shape)} for line in self.tensors],
            "dtypes": self.dtypes,
            "metadata": self.metadata,
        }


def describe(file: Checkpoint, pattern: str = "*") -> Description:
    """Describes `file`. Its table lists the tensors with names that match the glob `pattern`. Reads no data."""
    identity = identify(file.tensors)
    counts = Counter(tensor.stored_as for tensor in file.tensors.values())
    sizes = bytes_by_dtype(file.tensors.values())
    lines = [
        TensorLine(i, name, tensor.shape, tensor.stored_as)
        for i, (name, tensor) in enumerate(file.tensors.items())
        if fnmatchcase(name, pattern)
    ]
    return Description(
        path=file.path,
        container=file.container,
        dialect=identity.dialect.name if identity else None,
        model_type=identity.component if identity else None,
        looks_like=looks_like(file.tensors, identity),
        written_by=written_by(file),
        ignored=ignored_in(file, COMPONENTS[identity.component]) if identity else [],
        parameters=file.parameters,
        tensors=lines,
        dtypes={dtype: {"tensors": n, "bytes": sizes[dtype]} for dtype, n in counts.most_common()},
        metadata=dict(file.metadata),
    )


@dataclass(frozen=True)
class Fault:
    """An error in the data of a tensor."""

    tensor: str
    fact: str


def verify(file: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Fault]:
    """Reads all data. Reports wrong checksums (only npz has checksums), NaN, infinity, and tensors of zeros only."""
    faults = []
    if file.container == "npz":
        faults = [Fault(name.removesuffix(".npy"), "differs from its checksum") for name in npz.verify(file.path)]
    stored = unfold(file.tensors)
    done, total = 0, sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        array = tensor.read()
        nans, infinite = count_nonfinite(array) if DTYPE_NAMES[tensor.dtype] in FLOATS else (0, 0)
        for count, what in ((nans, "NaN"), (infinite, "infinite")):
            if count:
                faults.append(Fault(name, f"{count} of {tensor.size} values are {what}"))
        if tensor.size and not np.ascontiguousarray(array).view(np.uint8).any():
            faults.append(Fault(name, "all values are zero"))
        done += tensor.nbytes
        progress(done, total)
    return faults


@dataclass(frozen=True)
class Part:
    """One component in the folder of a model."""

    component: str
    file: Path | None
    description: Description | None
    problem: str  # "" if it is there and fits, or if it is optional and missing


def is_model_folder(path: Path) -> bool:
    """Whether `path` is the folder of a whole model, and not of one checkpoint."""
    if not path.is_dir():
        return False
    found = sum(_finds(path, component) for component in model_parts().values())
    own = any(file.suffix in READABLE for file in own_files(path))
    return (path / "model_index.json").is_file() or found > 1 or (found == 1 and not own)


def _finds(folder: Path, component: AnyComponent) -> bool:
    try:
        return component_file(folder, component) is not None
    except ZImageError:
        return False


def describe_folder(folder: Path) -> list[Part]:
    """The file of each component, and the problems: files that are missing or do not fit."""
    parts = [_part(folder, component) for component in model_parts().values()]
    try:
        tokenizer, problem = find_tokenizer(folder), ""
    except ZImageError as error:
        tokenizer, problem = None, str(error)
    return [*parts, Part(TOKENIZER, tokenizer, None, problem)]


def _part(folder: Path, component: AnyComponent) -> Part:
    path, description, problem = None, None, ""
    try:
        path = component_file(folder, component) if component.optional else find_component(folder, component)
        if path is not None:
            file = Checkpoint.open(path)
            description = describe(file)
            official_weights(file, component, config_of(file, component, folder) or component.official)
    except ZImageError as error:
        problem = str(error)
    return Part(component.name, path, description, problem)
