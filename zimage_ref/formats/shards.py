"""Sharded sets: tensors in several safetensors files, and an index.json that says which file holds which tensor.

    x.safetensors.index.json    {"metadata": {"total_size": bytes, ...}, "weight_map": {tensor: file}}
    x-00001-of-00002.safetensors, ...

Source: the files that `save_pretrained` of transformers and diffusers writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from zimage_ref.errors import ConfigError, FormatError, listing

from . import safetensors
from .files import atomic_write
from .json_file import JsonObject, json_bytes, read_json
from .tensors import Tensor, Tensors

INDEX_SUFFIX = ".index.json"


def read(index: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """All tensors of a sharded set, and the index's metadata.

    Raises FormatError unless the index and the shards list exactly the same tensors.
    """
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


def write(
    file: Path,
    tensors: Tensors,
    metadata: Mapping[str, str],
    limit: int | None = None,
    beside: Mapping[str, object] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """Writes `tensors` to `file`, or to several shards if they take more than `limit` bytes. Returns the paths.

    beside: JSON files to write into the same folder, by name. All files get their final names after all are written.
    """
    shards = _split(tensors, limit)
    names = [file.name]
    if len(shards) > 1:
        *paths, index_file = names_of_shards(file, len(shards))
        names = [path.name for path in paths]
    documents: dict[str, object] = dict(beside or {})
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        texts = {key: text for key, text in metadata.items() if key != "format"}
        weight_map = {name: home for home, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": total | texts, "weight_map": weight_map}
        documents = {index_file.name: index, **documents}
    with ExitStack() as stack:  # files get their names in reverse order: the index, which readers open first, is last
        for name, data in documents.items():
            stack.enter_context(atomic_write(file.with_name(name))).write(json_bytes(data))
        outputs = [stack.enter_context(atomic_write(file.with_name(name))) for name in names]
        for output, shard in zip(outputs, shards, strict=True):
            safetensors.write_to(output, shard, metadata, progress)
    return [file.with_name(name) for name in (*names, *documents)]


def names_of_shards(file: Path, count: int) -> list[Path]:
    """The files of `count` shards that stand for `file`, and last their index."""
    shards = [file.with_name(f"{file.stem}-{i:05}-of-{count:05}.safetensors") for i in range(1, count + 1)]
    return [*shards, file.with_name(file.name + INDEX_SUFFIX)]


def written_before(file: Path) -> list[Path]:
    """The files that an earlier `write` to `file` made and that exist: the file, its index and its shards."""
    parts = [file, file.with_name(file.name + INDEX_SUFFIX), *file.parent.glob(f"{file.stem}-*-of-*.safetensors")]
    return [path for path in parts if path.exists()]


def _split(tensors: Tensors, limit: int | None) -> list[dict[str, Tensor]]:
    """The tensors, in order, in shards of at most `limit` bytes. A larger tensor gets a shard of its own."""
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
    """The bytes that `text` means: a number with B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB (powers of 1024).

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
