"""Reads GGUF files: the transformer in ComfyUI's names, Qwen3 in llama.cpp's. There is no writer.

The header is read here, with bounds, so that a damaged file cannot take all memory. The package `gguf` (extra `gguf`)
dequantizes tensors to float32, a block of rows at a time.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from zimage_ref.errors import FormatError
from zimage_ref.extras import optional_import

from .json_file import Json, JsonObject
from .mapped_file import MappedFile, check_disjoint
from .packed import PackedTensor
from .tensors import DTYPES, Array, Tensor, row_blocks

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata entries
_ALIGNMENT = 32  # of the data, unless general.alignment says otherwise
_MAX_DIMENSIONS = 8
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by value type
_STRING, _ARRAY = 8, 9
_UNQUANTIZED = {0: "f32", 1: "f16", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 30: "bf16"}  # by ggml type
_PAGE = 1 << 20  # the header is read in pieces of this many bytes


def read(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The tensors of `path` in the order they are stored, and its metadata without the long lists.

    Raises FormatError for anything that is not a whole, valid GGUF file; BackendError without the package `gguf`.
    """
    package = optional_import("gguf", f"{path}: reading GGUF needs the package gguf")
    header = _Header(MappedFile(path))
    magic, version, count, entries = header.unpack(_HEADER.format)
    if magic != MAGIC or version not in VERSIONS:
        raise FormatError(f"{path}: GGUF version {version}; this program reads {' and '.join(map(str, VERSIONS))}")
    metadata = {}
    for _ in range(entries):
        key = header.text()
        (kind,) = header.unpack("<I")
        metadata[key] = header.value(kind)
    infos = [_info(header) for _ in range(count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment {alignment!r} is not a power of two")
    start = -(-header.position // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    extents = []
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        if name in tensors:
            raise FormatError(f"{path}: {name!r} is there twice")
        tensors[name], nbytes = _tensor_at(package, header.file, name, shape, kind, start + offset)
        extents.append((offset, offset + nbytes, name))
    check_disjoint(path, extents)
    return _original_shapes(path, tensors, metadata), metadata


def _info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, ggml type, offset) of one tensor; GGUF lists the fastest axis first."""
    name = header.text()
    (rank,) = header.unpack("<I")
    if rank > _MAX_DIMENSIONS:
        raise FormatError(f"{header.file.path}: {name!r} has {rank} dimensions")
    shape = header.unpack(f"<{rank}Q")[::-1]
    return name, shape, *header.unpack("<IQ")


def _tensor_at(
    package: ModuleType, file: MappedFile, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> tuple[Tensor, int]:
    """The tensor at byte `offset`, and how many bytes it takes."""
    where = f"{file.path}: {name!r}"
    if kind in _UNQUANTIZED:
        dtype = DTYPES[_UNQUANTIZED[kind]]
        tensor, nbytes = Tensor(shape, dtype, partial(file.array, offset, shape, dtype)), prod(shape) * dtype.itemsize
    else:
        block, block_bytes, label = _block_format(package, kind, where)
        if not shape or shape[-1] % block:
            raise FormatError(
                f"{where} has shape {shape}, which does not divide into the blocks of {block} that {label} has"
            )
        stored = (*shape[:-1], shape[-1] // block * block_bytes)
        nbytes = prod(stored)

        bytes_of = Tensor(stored, DTYPES["u8"], partial(file.array, offset, stored, DTYPES["u8"]))

        def dequantize() -> Array:
            rows = bytes_of.read().reshape(-1, stored[-1])
            weights = np.empty((len(rows), shape[-1]), "<f4")
            for part in row_blocks(weights.shape):
                weights[part] = package.quants.dequantize(rows[part], package.GGMLQuantizationType(kind))
            return weights.reshape(shape)

        tensor = PackedTensor.of_values(shape, label, dequantize, {"weight": bytes_of}, "f32")
    if offset + nbytes > file.size:
        raise FormatError(f"{where} is truncated: {offset + nbytes} bytes are needed, {file.size} are there")
    return tensor, nbytes


def _block_format(package: ModuleType, kind: int, where: str) -> tuple[int, int, str]:
    """(weights in a block, bytes of a block, name) of a quantized ggml type that the package can dequantize."""
    try:
        known = package.GGMLQuantizationType(kind)
        block, nbytes = package.GGML_QUANT_SIZES[known]
        package.quants.dequantize(np.zeros((1, nbytes), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise FormatError(f"{where} has ggml type {kind}, which this program cannot read: {error}") from error
    return block, nbytes, known.name


def _original_shapes(path: Path, tensors: dict[str, Tensor], metadata: Json) -> dict[str, Tensor]:
    """The tensors, each with its original shape. ComfyUI-GGUF records the shapes that ggml cannot store."""
    for key, shape in metadata.items():
        name = key.removeprefix("comfy.gguf.orig_shape.")
        if name != key and name in tensors:
            if not isinstance(shape, list) or not all(type(n) is int for n in shape):
                raise FormatError(f"{path}: {key} is {shape!r}, which is not a shape")
            if prod(shape) != tensors[name].size or min(shape, default=1) < 0:
                raise FormatError(f"{path}: {key} is {shape!r}, which {tensors[name].shape} does not fit")
            tensors[name] = tensors[name].view(tuple(shape), _reshape(shape))
    return tensors


def _reshape(shape: list[int]) -> Callable[[Array], Array]:
    return lambda array: array.reshape(shape)


class _Header:
    """A position in the header of a file. It refuses to read beyond the end of the file."""

    _KEPT = 64  # metadata lists longer than this (vocabularies) are skipped

    def __init__(self, file: MappedFile) -> None:
        self.file, self.position = file, 0
        self._page, self._start = b"", 0

    def unpack(self, code: str) -> tuple[Any, ...]:
        """The values of the struct `code`."""
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def text(self) -> str:
        """A string, stored after its length."""
        (length,) = self.unpack("<Q")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.file.path}: its header is damaged: a text is not UTF-8") from error

    def value(self, kind: int, nested: bool = False) -> object:
        """A metadata value. None stands for a list that is too long to keep."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and not nested:
            element, count = self.unpack("<IQ")
            if count <= self._KEPT:
                return [self.value(element, nested=True) for _ in range(count)]
            self._skip(element, count)
            return None
        if kind < len(_SCALARS) and _SCALARS[kind]:
            return self.unpack(_SCALARS[kind])[0]
        raise FormatError(f"{self.file.path}: its header is damaged: unknown value type {kind}")

    def _skip(self, element: int, count: int) -> None:
        if element == _STRING:
            for _ in range(count):  # a wrong count ends with an error at the end of the file
                (length,) = self.unpack("<Q")
                self._advance(length)
        elif element < len(_SCALARS) and _SCALARS[element]:
            self._advance(count * struct.calcsize(_SCALARS[element]))
        else:
            raise FormatError(f"{self.file.path}: its header is damaged: unknown value type {element}")

    def _take(self, count: int) -> bytes:
        start = self.position
        self._advance(count)
        if start < self._start or self.position > self._start + len(self._page):
            self._page, self._start = self.file.bytes(start, max(count, _PAGE)), start
        return self._page[start - self._start : self.position - self._start]

    def _advance(self, count: int) -> None:
        if count > self.file.size - self.position:
            raise FormatError(f"{self.file.path}: is truncated or damaged: its header is longer than the file")
        self.position += count
