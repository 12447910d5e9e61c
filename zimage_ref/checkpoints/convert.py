"""One network's weights from any file that can be read to .npz or safetensors, a tensor at a time.

    open_source     finds, identifies and checks the weights; their data is not read yet
    write_model     names, casts, quantizes and writes them; memory holds one tensor

Between the two, `Source.tensors` may be replaced by others under the same names, such as weights with a LoRA merged.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zimage_ref.errors import ConfigError, listing
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.checkpoint import RECORD_KEY, SUFFIXES, Checkpoint
from zimage_ref.formats.files import atomic_write, check_writable, existing_parent
from zimage_ref.formats.quantize import Quantization, QuantizedTensor, unfold, without_quantization
from zimage_ref.formats.tensors import BFLOAT16, Array, Tensor, Tensors, cast, float_dtype, row_blocks
from zimage_ref.model.quantization import quantize_all

from .components import COMPONENTS, config_of, identify, official_weights
from .dialects import NAMINGS, OFFICIAL
from .folder import find_component
from .hub import resolved

INDEX_SUFFIX = ".index.json"
CONFIG = "config.json"
_STEMS = {"text_encoder": "model"}  # of the file in an official folder
_STEM = "diffusion_pytorch_model"
_SLACK = 1 << 20  # bytes of headers
Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Source:
    """A component's weights, checked and not yet read."""

    path: Path
    container: str
    dialect: str
    component: str
    config: Any | None  # None where the file does not tell and its sizes are not the official ones
    sizes: Any  # a config of the right sizes, whatever else
    tensors: dict[str, Tensor]  # by official name


@dataclass(frozen=True)
class Target:
    """What is to be written. Raises ConfigError for what cannot be."""

    path: Path
    component: str
    dtype: str | None = None  # None: as stored
    quantization: Quantization | None = None
    naming: str = "diffusers"
    max_shard_size: int | None = None  # bytes
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.path.suffix not in SUFFIXES and not self.is_folder:
            raise ConfigError(
                f"{self.path}: unknown format: the suffix must be {' or '.join(SUFFIXES)}; "
                f"a folder, without one, needs `max_shard_size`"
            )
        if self.path.suffix == ".npz" and self.max_shard_size:
            raise ConfigError(f"{self.path}: only safetensors is written in shards")
        if self.dtype is not None:
            float_dtype(self.dtype)
        if self.naming not in NAMINGS[self.component]:
            title, known = COMPONENTS[self.component].title, ", ".join(NAMINGS[self.component])
            raise ConfigError(f"`naming` {self.naming} is not for the {title}: known are {known}")
        if self.quantization and self.component == "vae":
            raise ConfigError("the autoencoder is not quantized: it is small and made of convolutions")
        if self.quantization and not self.official:
            raise ConfigError(f"quantized weights are written with diffusers names, not {self.naming}")
        check_writable(self.file)
        existing = self.existing()
        if existing and not self.overwrite:
            raise ConfigError(f"{existing[0]}: exists: give `overwrite` to replace it")

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder for shards and their config."""
        return not self.path.suffix and self.max_shard_size is not None

    @property
    def official(self) -> bool:
        """Whether names stay as they are."""
        return NAMINGS[self.component][self.naming] is OFFICIAL[self.component]

    @property
    def file(self) -> Path:
        """Where the weights go if they are one file."""
        return self.path / f"{_STEMS.get(self.component, _STEM)}.safetensors" if self.is_folder else self.path

    def existing(self) -> list[Path]:
        """Files that a finished conversion replaces: the output, and what is there of a sharded one."""
        file = self.file
        parts = [file, file.with_name(file.name + INDEX_SUFFIX), *file.parent.glob(f"{file.stem}-*-of-*.safetensors")]
        parts += [file.with_name(CONFIG)] if self.is_folder else []
        return [path for path in parts if path.exists()]


@dataclass
class Report:
    """What a conversion did."""

    files: list[Path]
    read: Counter[str]  # bytes in the source by dtype
    written: Counter[str]
    tensors: int = 0
    overflowed: int = 0  # values that were finite and became infinite
    nans: int = 0  # values that are not numbers, among those whose dtype changed
    overflowed_in: list[str] = field(default_factory=list)  # names of tensors


def open_source(path: Path, component: str) -> Source:
    """The weights of `component` in `path`: a file, a folder of shards, a whole model's folder, or a model's name.

    Raises FormatError, ConfigError or WeightError; a file of another component is told what it looks like.
    """
    path = resolved(path)
    if path.is_dir() and (path / "model_index.json").is_file():
        path = find_component(path, component)
    file = Checkpoint.open(path)
    identity = identify(file.tensors, component)
    config = config_of(file, component, file.path.parent)
    tensors = official_weights(file, component, config, identity)
    assert identity is not None  # official_weights has refused it otherwise
    if config is None and identity.sizes == COMPONENTS[component].official:
        config = identity.sizes
    return Source(
        file.path, file.container, identity.dialect.name, component, config, config or identity.sizes, tensors
    )


def write_model(
    source: Source,
    target: Target,
    tensors: Tensors | None = None,
    record: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Writes the weights of `source`, or `tensors` under the same names in their stead, as `target` says.

    `record` adds to what the file says of itself. The output is whole or not there; what was there before is replaced
    at the end. Raises ConfigError where the disk has too little room.
    """
    tensors = source.tensors if tensors is None else tensors
    report = Report([], _bytes_by_dtype(tensors.values()), Counter())
    stored = _stored(source, target, tensors, report)
    total = sum(tensor.nbytes for tensor in stored.values())
    _check_room(target.file.parent, total + _SLACK)
    facts = _record(source, target, tensors, record or {})
    report.tensors, report.written = len(stored), _bytes_by_dtype(stored.values())
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
        report.files = _write_safetensors(target, stored, source.config, facts, advance)
    for path in stale.difference(report.files):
        path.unlink()
    return report


def _stored(source: Source, target: Target, tensors: Tensors, report: Report) -> dict[str, Tensor]:
    """The tensors as they go into the file."""
    how = target.quantization
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, QuantizedTensor) and target.official and not target.dtype
        if how in (None, tensor.quantization)
    }
    plain = without_quantization({n: t for n, t in tensors.items() if n not in kept}, target.dtype)
    changed = {name: _counted(name, tensor, target.dtype, report) for name, tensor in plain.items()}
    changed = quantize_all(changed, how) if how else changed
    ordered = {name: kept[name] if name in kept else changed[name] for name in tensors}
    return unfold(NAMINGS[target.component][target.naming].write(ordered, source.sizes))


def _counted(name: str, tensor: Tensor, dtype: str | None, report: Report) -> Tensor:
    """`tensor` in another dtype; reading it counts what does not survive."""
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


def count_nonfinite(array: Array) -> tuple[int, int]:
    """How many values are NaN, and how many infinite."""
    nans = infinite = 0
    for rows in row_blocks(array.shape):
        values = cast(array[rows], np.dtype("<f4")) if array.dtype == BFLOAT16 else array[rows]
        if not np.isfinite(values).all():
            nans += int(np.isnan(values).sum())
            infinite += int(np.isinf(values).sum())
    return nans, infinite


def _bytes_by_dtype(tensors: Iterable[Tensor]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        parts = tensor.parts.values() if isinstance(tensor, QuantizedTensor) else (tensor,)
        sizes[tensor.stored_as] += sum(part.nbytes for part in parts)
    return sizes


def _record(source: Source, target: Target, tensors: Tensors, more: Mapping[str, Any]) -> dict[str, Any]:
    quantization = target.quantization
    if not quantization and target.official and not target.dtype:
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


def _write_safetensors(
    target: Target, tensors: Tensors, config: Any, record: Mapping[str, Any], advance: Callable[[int], None]
) -> list[Path]:
    metadata = {"format": "pt", RECORD_KEY: json.dumps(record, separators=(",", ":"))}
    shards = _shards(tensors, target.max_shard_size)
    file = target.file
    names = [file.name]
    if len(shards) > 1:
        names = [f"{file.stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [file.with_name(name) for name in names]
    with ExitStack() as stack:  # nothing gets its name before all of it is written; the index gets its name last
        if len(shards) > 1:
            index = file.with_name(file.name + INDEX_SUFFIX)
            files.append(index)
            weight_map = {name: home for home, shard in zip(names, shards, strict=True) for name in shard}
            size = {"total_size": sum(t.nbytes for t in tensors.values()), RECORD_KEY: metadata[RECORD_KEY]}
            _write_json(stack, index, {"metadata": size, "weight_map": weight_map})
        if target.is_folder and config is not None:
            _write_json(stack, file.with_name(CONFIG), config.to_json())
            files.append(file.with_name(CONFIG))
        outputs = [stack.enter_context(atomic_write(path)) for path, _ in zip(files, shards, strict=False)]
        for output, shard in zip(outputs, shards, strict=True):
            safetensors.write_to(output, shard, metadata, advance)
    return files


def _write_json(stack: ExitStack, path: Path, data: Any) -> None:
    stack.enter_context(atomic_write(path)).write((json.dumps(data, indent=2) + "\n").encode())


def _shards(tensors: Tensors, limit: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, in as few runs of at most `limit` bytes as that allows; a larger tensor is alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if limit and shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def parse_size(text: str) -> int:
    """Bytes that `text` means: a number with B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB (of 1024).

    Raises ConfigError for anything else.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "B": 1}
    upper = text.strip().upper()
    unit = next((unit for unit in units if upper.endswith(unit)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"size {text!r}: give a number and a unit, such as {listing(['5GB', '500MB'])}")
    return size
