"""safetensors files: tensors mapped from disk, and a writer that streams them.

The format is an 8-byte little-endian header length, a JSON header, then the data. The safetensors library judges
whether a header is valid; what it does not expose (offsets, bfloat16 without torch) is read here.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import FormatError
from .files import atomic_write
from .tensors import DTYPES, Array, Tensor, Tensors

_TAGS = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32", "I16": "i16",
    "I8": "i8", "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "BOOL": "bool",
}  # fmt: skip
_TAG_OF = {DTYPES[name]: tag for tag, name in _TAGS.items()}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `path` in the order they are stored, and its metadata.

    Raises FormatError for anything that is not a whole, valid safetensors file of known dtypes.
    """
    try:
        with safe_open(path, framework="np") as file:  # validates lengths, offsets and overlaps
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from error
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:start].tobytes())
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _tensor(path, mapped, start, name, entry) for name, entry in entries}, metadata


def _tensor(path: Path, mapped: Array, start: int, name: str, entry: dict[str, Any]) -> Tensor:
    if entry["dtype"] not in _TAGS:
        raise FormatError(f"{path}: {name} has dtype {entry['dtype']}, which this program cannot read")
    dtype = DTYPES[_TAGS[entry["dtype"]]]
    shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
    return Tensor(shape, dtype, lambda: np.ndarray(shape, dtype, mapped, offset))


def write(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes `tensors` to `path`, one at a time, calling `progress` with the bytes of each; whole or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    offset = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _TAG_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(tensor.read()).data.cast("B") if tensor.size else b"")
            progress(tensor.nbytes)
