"""safetensors files: a reader that maps tensors from disk, and a writer that streams them.

The format is an 8-byte little-endian header length, a JSON header, then the data. The safetensors library checks the
header. This file reads what the library does not offer: offsets, and bfloat16 without torch.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from zimage_ref.errors import FormatError

from .files import atomic_write
from .json_file import Json, JsonObject
from .mapped_file import MappedFile
from .small_floats import float8
from .strangers import check_not_stranger, partly_downloaded
from .tensors import DTYPES, Tensor, Tensors, write_data

_TAGS = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32", "I16": "i16",
    "I8": "i8", "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "BOOL": "bool",
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, as in the library
_FLOAT8_TAGS = {"F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2", "F8_E8M0": "f8_e8m0"}
_TAG_OF = {DTYPES[name]: tag for tag, name in _TAGS.items()}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `path` in the order they are stored, and its metadata.

    Raises FormatError for anything that is not a whole, valid safetensors file of known dtypes.
    """
    if path.is_file():
        _check_whole(path)
    try:
        with safe_open(path, framework="np"):  # this checks lengths, offsets and overlaps
            pass
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from error
    file = MappedFile(path)
    start = 8 + int.from_bytes(file.bytes(0, 8), "little")
    header = json.loads(file.bytes(8, start - 8))
    metadata = header.pop("__metadata__", None) or {}
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _mapped(file, start, name, entry) for name, entry in entries}, metadata


def _check_whole(path: Path) -> None:
    """Raises FormatError if the header of `path` promises more bytes than the file has, and it reads as a header."""
    check_not_stranger(path)
    file = MappedFile(path)
    if file.size < 8:
        return
    start = 8 + int.from_bytes(file.bytes(0, 8), "little")
    try:
        header = json.loads(file.bytes(8, start - 8) if start <= file.size else b"")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = start + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        needed = start if file.bytes(8, 2) == b'{"' and start < _MAX_HEADER else 0
    if needed > file.size:  # else the library says what is wrong with it
        raise partly_downloaded(path, file.size, needed)


def _mapped(file: MappedFile, start: int, name: str, entry: Json) -> Tensor:
    tag, small = entry["dtype"], _FLOAT8_TAGS.get(entry["dtype"])
    if tag not in _TAGS and small is None:
        raise FormatError(f"{file.path}: {name} has dtype {tag}, which this program cannot read")
    dtype = DTYPES["u8" if small else _TAGS[tag]]
    shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
    stored = file.tensor(offset, shape, dtype)
    return float8(stored, small) if small else stored


def write(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes `tensors` to `path`, one at a time. The file becomes complete or does not appear.

    progress: is called with the number of bytes after each write.
    """
    with atomic_write(path) as file:
        write_to(file, tensors, metadata, progress)


def write_to(
    file: BinaryIO,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """As `write`, to a file that is open."""
    ordered = _aligned_order(tensors)
    file.write(header_of(dict(ordered), metadata))
    for _, tensor in ordered:
        write_data(tensor, file.write, progress)


def header_of(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """The first bytes of a file that holds `tensors` in this order: the length of the header, and the header."""
    header: JsonObject = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _TAG_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _aligned_order(tensors: Tensors) -> list[tuple[str, Tensor]]:
    """The tensors in an order that puts each at a multiple of its item size: their own, else the widest items first."""
    offset = 0
    for tensor in tensors.values():
        if offset % tensor.dtype.itemsize:
            return sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
        offset += tensor.nbytes
    return list(tensors.items())
