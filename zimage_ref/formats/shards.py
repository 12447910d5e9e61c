"""Sharded sets: tensors in several safetensors files, and an index.json that says which file holds which tensor.

    x.safetensors.index.json    {"metadata": {"total_size": bytes, ...}, "weight_map": {tensor: file}}
    x-00001-of-00002.safetensors, ...

Source: the files that `save_pretrained` of transformers and diffusers writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from zimage_ref.errors import ConfigError, FormatError, listing

from . import safetensors
from .files import atomic_write
from .folders import own_files
from .json_file import JsonObject, json_bytes, read_json
from .tensors import Tensor, Tensors

INDEX_SUFFIX = ".index.json"
INDEX_PATTERN = "*.safetensors.index*.json"  # a variant is between: x.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|ema|non_ema)(?=[.-])")
_NUMBERED = re.compile(r"(.*?)(\d{5})-of-(\d{5})((?:\.\w+)?\.safetensors)|()(\d{1,3})()(\.safetensors)")


def is_index(path: Path) -> bool:
    """Whether `path` is the index of a sharded set, by its name."""
    return path.match(INDEX_PATTERN) or path.name.endswith(INDEX_SUFFIX)


def without_variants(paths: Sequence[Path]) -> list[Path]:
    """Those of `paths` without a variant in their names; all if each has one."""
    plain = [path for path in paths if not _VARIANT.search(path.name)]
    return plain or list(paths)


def set_of(path: Path) -> list[Path]:
    """The files of the set that `path` begins, if it is the first shard of a set without an index; else none.

    Sets are x-00001-of-00002.safetensors, as Z-Image.swift writes them, and 0.safetensors, 1.safetensors of mflux.
    Raises FormatError if a shard is missing. Files with plain numbers that hold the same tensors are no set.
    """
    match = _NUMBERED.fullmatch(path.name)
    if match is None or any(own_files(path.parent, INDEX_PATTERN)):
        return []
    if match[3] is None:  # mflux counts from 0 and does not say how many there are
        found = sorted(
            (p for p in own_files(path.parent) if re.fullmatch(r"\d{1,3}\.safetensors", p.name)), key=_number
        )
        names = [f"{i}.safetensors" for i in range(_number(found[-1]) + 1)]
    else:
        names = [f"{match[1]}{i:05}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if path.name != names[0] or len(names) < 2:
        return []
    if missing and match[3] is None and _alike([path.parent / name for name in names if name not in missing]):
        return []
    if missing:
        raise FormatError(f"{path.parent}: lacks {listing(missing)} of {len(names)} shards: download the rest")
    return [path.parent / name for name in names]


def _alike(files: Sequence[Path]) -> bool:
    """Whether two of `files` hold a tensor of one name. Then they are no set, such as LoRAs that you have numbered."""
    names = [name for file in files for name in safetensors.read(file)[0]]
    return len(set(names)) < len(names)


def _number(path: Path) -> int:
    return int(path.stem)


def first_of_set(paths: Sequence[Path]) -> Path | None:
    """The first shard, if `paths` are all the shards of one set without an index."""
    return next((path for path in paths if {*paths} == {*set_of(path)}), None)


def read_set(first: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """All tensors of a set without an index, and its metadata.

    Files with a plain number for a name that hold the same tensors are no set: then `first` is read alone. In a set of
    other names that is an error. Raises FormatError.
    """
    tensors: dict[str, Tensor] = {}
    metadata: JsonObject = {}
    for file in set_of(first):
        shard, own = safetensors.read(file)
        if twice := tensors.keys() & shard.keys():
            if first.stem.isdigit():
                return safetensors.read(first)
            raise FormatError(f"{file}: holds {listing(sorted(twice))}, and so does another shard")
        tensors |= shard
        metadata |= own
    return tensors, metadata


def read(index: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """All tensors of a sharded set, and the index's metadata.

    Raises FormatError unless the index and the shards list exactly the same tensors.
    """
    data = read_json(index)
    weight_map, metadata = data.get("weight_map"), data.get("metadata", {})
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{index}: has no weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    texts: JsonObject = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{index}: names {file!r}, which is not a safetensors file in its own folder")
        shard, own = safetensors.read(index.parent / file)
        expected = {name for name, home in weight_map.items() if home == file}
        if shard.keys() != expected:
            raise FormatError(
                f"{index.parent / file}: differs from {index.name} in {listing(sorted(shard.keys() ^ expected))}"
            )
        tensors |= shard
        texts |= {key: text for key, text in own.items() if key != "format"}
    if not tensors:
        raise FormatError(f"{index}: names no tensors")
    return tensors, texts | (metadata if isinstance(metadata, dict) else {})


def write(
    file: Path,
    tensors: Tensors,
    metadata: Mapping[str, str],
    limit: int | None = None,
    beside: Mapping[str, object] | None = None,
    shard_name: Callable[[int, int], str] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """Writes `tensors` to `file`, or to several shards if they take more than `limit` bytes. Returns the paths.

    beside: JSON files to write into the same folder, by name. shard_name: (number from 0, count) -> name; then there is
    an index even for one shard, and the stem of `file` is only that of the index.
    All files get their final names after all are written.
    """
    shards = _split(tensors, limit)
    names = [file.name]
    if shard_name is not None:
        names = [shard_name(i, len(shards)) for i in range(len(shards))]
    elif len(shards) > 1:
        names = [path.name for path in names_of_shards(file, len(shards))[:-1]]
    documents: dict[str, object] = dict(beside or {})
    if names != [file.name]:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        texts = {key: text for key, text in metadata.items() if key != "format"}
        weight_map = {name: home for home, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": total | texts, "weight_map": weight_map}
        documents = {file.name + INDEX_SUFFIX: index, **documents}
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
    parts = [file, file.with_name(file.name + INDEX_SUFFIX), *own_files(file.parent, f"{file.stem}-*-of-*.safetensors")]
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
