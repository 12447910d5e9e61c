"""Converts the weights of one network from any readable file to .npz or safetensors, a tensor at a time.

    open_source     finds, identifies and checks the weights; it does not read their data
    write_model     renames, casts, quantizes and writes them; memory holds one tensor

Between the two you may replace tensors by others of the same names, such as weights with a LoRA merged into them.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zimage_ref.errors import ConfigError
from zimage_ref.formats import npz, shards
from zimage_ref.formats.checkpoint import RECORD_KEY, WRITABLE, Checkpoint
from zimage_ref.formats.files import check_writable, existing_parent
from zimage_ref.formats.folders import own_files
from zimage_ref.formats.json_file import Json, JsonObject
from zimage_ref.formats.quantize import (
    Quantization,
    QuantizedTensor,
    bytes_by_dtype,
    unfold,
    without_quantization,
)
from zimage_ref.formats.tensors import Array, Tensor, Tensors, cast, count_nonfinite, float_dtype, row_blocks
from zimage_ref.model.config_reader import Config
from zimage_ref.model.quantization import quantize_all

from .component import CONFIG_FILE
from .dialects import Dialect, FileStyle
from .folder import find_component
from .hub import resolved
from .identify import config_of, identify, ignored_in, official_weights
from .registry import COMPONENTS

_SLACK = 1 << 20  # bytes allowed for headers
Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """The weights of a component. They are checked, and their data is not read yet."""

    path: Path
    container: str
    dialect: str
    component: str
    config: Config | None  # None if the file has none and its sizes are not the official ones
    sizes: Config  # its sizes are right; its other values may be the official ones
    tensors: dict[str, Tensor]  # by official name
    ignored: list[str]  # the names in the file that no network uses


@dataclass(frozen=True)
class Target:
    """The file or files to write, and their form. Raises ConfigError if the choices do not fit together."""

    path: Path
    component: str
    dtype: str | None = None  # None: as stored
    quantization: Quantization | None = None
    naming: str = "diffusers"
    max_shard_size: int | None = None  # bytes
    overwrite: bool = False

    def __post_init__(self) -> None:
        component = COMPONENTS[self.component]
        if self.naming not in component.namings:
            known = ", ".join(component.namings)
            raise ConfigError(f"`naming` {self.naming} is not for the {component.title}: known are {known}")
        if self.path.suffix not in WRITABLE and not self.is_folder:
            raise ConfigError(
                f"{self.path}: unknown format: the suffix must be {' or '.join(WRITABLE)}; "
                f"a folder, without one, needs `max_shard_size` or `naming` mflux"
            )
        if self.path.suffix == ".npz" and self.max_shard_size:
            raise ConfigError(f"{self.path}: only safetensors is written in shards")
        if self.dtype is not None:
            float_dtype(self.dtype)
        if self.quantization and component.not_quantized:
            raise ConfigError(f"the {component.title} is not quantized: {component.not_quantized}")
        if self.quantization and not self.dialect.whole:
            known = ", ".join(name for name, dialect in component.namings.items() if dialect.whole)
            raise ConfigError(f"`naming` {self.naming} joins matrices, so they are not quantized: take {known}")
        check_writable(*self._names())
        existing = self.existing()
        if existing and not self.overwrite:
            raise ConfigError(f"{existing[0]}: exists: give `overwrite` to replace it")

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder for shards and their config."""
        return not self.path.suffix and (self.max_shard_size is not None or self.style is not None)

    @property
    def dialect(self) -> Dialect[Any]:
        """The names and the layout of the tensors."""
        return COMPONENTS[self.component].namings[self.naming]

    @property
    def style(self) -> FileStyle | None:
        """How the files of a folder are named, if it is a folder and not as on Hugging Face."""
        return self.dialect.files if not self.path.suffix else None

    @property
    def file(self) -> Path:
        """The path of the weights if they are written as one file."""
        stem = self.style.stem if self.style else COMPONENTS[self.component].stem
        return self.path / f"{stem}.safetensors" if self.is_folder else self.path

    def _names(self) -> list[Path]:
        """Every name that may be written. Names of shards have one length, whatever their number."""
        config = [self.file.with_name(CONFIG_FILE)] if self.is_folder else []
        return [self.file, *(shards.names_of_shards(self.file, 1) if self.max_shard_size else ()), *config]

    def existing(self) -> list[Path]:
        """Existing files that the conversion would replace: the output, or the files of a sharded output."""
        config = self.file.with_name(CONFIG_FILE)
        numbered = own_files(self.path, "*.safetensors") if self.style else []
        return shards.written_before(self.file) + numbered + ([config] if self.is_folder and config.exists() else [])


@dataclass
class ConversionReport:
    """The result of a conversion, in numbers."""

    files: list[Path]
    read: Counter[str]  # bytes in the source, by dtype
    written: Counter[str]
    tensors: int = 0
    overflowed: int = 0  # values that were finite and became infinite
    nans: int = 0  # values that are not numbers, among those whose dtype changed
    overflowed_in: list[str] = field(default_factory=list)  # names of tensors


def open_source(path: Path, component: str) -> CheckpointSource:
    """The weights of `component` in `path`: a file, a folder of shards, the folder of a model, or the name of a model.

    Raises FormatError, ConfigError or WeightError. If it is another component's, the error says what it looks like.
    """
    path, entry = resolved(path), COMPONENTS[component]
    if path.is_dir() and (path / "model_index.json").is_file():
        path = find_component(path, entry)
    file = Checkpoint.open(path)
    identity = identify(file.tensors, component)
    config: Config | None = config_of(file, entry, file.path.parent)
    tensors = official_weights(file, entry, config, identity)
    assert identity is not None  # else official_weights has raised
    if config is None and identity.sizes == entry.official:
        config = identity.sizes
    return CheckpointSource(
        path=file.path,
        container=file.container,
        dialect=identity.dialect.name,
        component=component,
        config=config,
        sizes=config or identity.sizes,
        tensors=tensors,
        ignored=ignored_in(file, entry),
    )


def write_model(
    source: CheckpointSource,
    target: Target,
    tensors: Tensors | None = None,
    record: Json | None = None,
    progress: Progress = lambda done, total: None,
) -> ConversionReport:
    """Writes the weights of `source` as `target` says. `tensors`, of the same names, replace those of `source`.

    record: fields to add to the record in the file. The output becomes complete or does not appear. Existing files are
    replaced at the end. Raises ConfigError if the disk has too little room.
    """
    tensors = source.tensors if tensors is None else tensors
    report = ConversionReport([], bytes_by_dtype(tensors.values()), Counter())
    stored = _stored(source, target, tensors, report)
    total = sum(tensor.nbytes for tensor in stored.values())
    _check_room(target.file.parent, total + _SLACK)
    facts = _record_of(source, target, tensors, record or {})
    report.tensors, report.written = len(stored), bytes_by_dtype(stored.values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    stale = set(target.existing())
    if target.path.suffix == ".npz":
        npz.write(target.path, stored, facts, advance)
        report.files = [target.path]
    else:
        report.files = _write_safetensors(source, target, stored, facts, advance)
    for path in stale.difference(report.files):
        path.unlink()
    return report


def _write_safetensors(
    source: CheckpointSource, target: Target, stored: Tensors, facts: JsonObject, advance: Callable[[int], None]
) -> list[Path]:
    """Writes the file, or the folder with its config. Returns the paths."""
    metadata, style = {"format": "pt", RECORD_KEY: json.dumps(facts, separators=(",", ":"))}, target.style
    beside = {CONFIG_FILE: source.config.to_json()} if target.is_folder and source.config else {}
    if style is None:
        return shards.write(target.file, stored, metadata, target.max_shard_size, beside, progress=advance)
    quantization = facts.get("quantization")
    metadata |= style.metadata(quantization["bits"] if quantization else None)
    limit = target.max_shard_size or style.shard_size
    return shards.write(target.file, stored, metadata, limit, beside, style.shard, advance)


def _stored(source: CheckpointSource, target: Target, tensors: Tensors, report: ConversionReport) -> dict[str, Tensor]:
    """The tensors in the form and order in which the file stores them."""
    how = target.quantization
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, QuantizedTensor) and target.dialect.whole and not target.dtype
        if how in (None, tensor.quantization)
    }
    plain = without_quantization({n: t for n, t in tensors.items() if n not in kept}, target.dtype)
    changed = {name: _counted(name, tensor, target.dtype, report) for name, tensor in plain.items()}
    changed = quantize_all(changed, how) if how else changed
    ordered = {name: kept[name] if name in kept else changed[name] for name in tensors}
    return unfold(target.dialect.write(ordered, source.sizes))


def _counted(name: str, tensor: Tensor, dtype: str | None, report: ConversionReport) -> Tensor:
    """`tensor` in another dtype. When it is read, `report` counts values that overflow or are NaN."""
    changed = tensor.cast(dtype)
    if changed.dtype == tensor.dtype:
        return tensor

    def read() -> Array:
        before, after = tensor.read(), np.empty(tensor.shape, changed.dtype)
        overflowed = 0
        for rows in row_blocks(tensor.shape):
            after[rows] = cast(before[rows], changed.dtype)
            nans, infinite = count_nonfinite(after[rows])
            overflowed += infinite - count_nonfinite(before[rows])[1] if infinite else 0
            report.nans += nans
        report.overflowed += overflowed
        report.overflowed_in += [name] if overflowed else []
        return after

    return Tensor(changed.shape, changed.dtype, read)


def _record_of(source: CheckpointSource, target: Target, tensors: Tensors, more: Json) -> JsonObject:
    """The record that the file holds about itself."""
    quantization = target.quantization
    if not quantization and target.dialect.whole and not target.dtype:
        quantization = next((t.quantization for t in tensors.values() if isinstance(t, QuantizedTensor)), None)
    return {
        "model_type": source.component,
        **({"config": source.config.to_json()} if source.config else {}),
        **({"quantization": quantization.to_json()} if quantization else {}),
        "source": {"file": source.path.name, "container": source.container, "dialect": source.dialect},
        **more,
    }


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(existing_parent(folder / "file")).free
    if needed > free:
        raise ConfigError(
            f"{folder}: the output takes {needed / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f} GB left: "
            f"free some, or write elsewhere"
        )
