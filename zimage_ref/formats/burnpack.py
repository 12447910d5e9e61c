"""Reads Burnpack (.bpk), the format of the original Rust tool. There is no writer.

    "NRUB", version u16, size u32, metadata in CBOR, then the tensors' data

The data starts at the next multiple of 256. In files from before December 2025 it starts right after the metadata.
The size of the file shows which of the two it is. All numbers are little endian.
Sources: burn-store's burnpack module; CBOR, RFC 8949.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import ClassVar, TypeGuard

from zimage_ref.errors import FormatError

from .json_file import JsonObject
from .mapped_file import MappedFile, check_disjoint
from .tensors import DTYPES, Tensor

MAGIC = b"NRUB"
VERSION = 1
_HEADER = struct.Struct("<4sHI")
_ALIGNMENT = 256
_TAGS = {
    "F64": "f64", "F32": "f32", "Flex32": "f32", "F16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32",
    "I16": "i16", "I8": "i8", "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "Bool": "bool",
}  # fmt: skip
_BOOLS = {"Native": "bool", "U8": "u8", "U32": "u32"}


def read(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The tensors of `path` in the order they are stored, and its metadata.

    Raises FormatError for anything that is not a whole, valid burnpack file of unquantized tensors.
    """
    file = MappedFile(path)
    head = file.bytes(0, _HEADER.size)
    if len(head) < _HEADER.size or head[:4] != MAGIC:
        raise FormatError(f"{path}: not a burnpack file")
    _, version, size = _HEADER.unpack(head)
    if version != VERSION:
        raise FormatError(f"{path}: burnpack version {version}; this program reads {VERSION}")
    if _HEADER.size + size > file.size:
        raise FormatError(f"{path}: is truncated: its metadata would take {size} bytes")
    root = _Cbor(path, file.bytes(_HEADER.size, size)).root()
    entries = root.get("tensors")
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: its metadata lists no tensors")
    parsed = {name: _entry(path, name, entry) for name, entry in entries.items()}
    check_disjoint(path, ((start, end, name) for name, (_, _, start, end) in parsed.items()))
    origin = _data_start(file, _HEADER.size + size, max((end for *_, end in parsed.values()), default=0))
    tensors = {
        name: file.tensor(origin + start, shape, DTYPES[dtype])
        for name, (dtype, shape, start, _) in sorted(parsed.items(), key=lambda item: item[1][2])
    }
    metadata = root.get("metadata")
    return tensors, {str(k): v for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _data_start(file: MappedFile, metadata_end: int, data_size: int) -> int:
    aligned = -(-metadata_end // _ALIGNMENT) * _ALIGNMENT
    for start in (aligned, metadata_end):
        if file.size == start + data_size:
            return start
    raise FormatError(
        f"{file.path}: is truncated or damaged: {file.size} bytes are there, {aligned + data_size} are needed"
    )


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of one tensor."""
    where = f"{path}: {name!r}"
    if not isinstance(entry, dict):
        raise FormatError(f"{where} has no description")
    tag, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if isinstance(tag, dict) and "QFloat" in tag:
        raise FormatError(f"{where} is quantized by burn, which this program cannot read: save the model unquantized")
    dtype = _BOOLS.get(str(tag.get("Bool"))) if isinstance(tag, dict) else _TAGS.get(str(tag))
    if dtype is None:
        raise FormatError(f"{where} has dtype {tag!r}, which this program cannot read")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"{where} has shape {shape!r} at {offsets!r}, which are not valid")
    start, end = offsets
    if end - start != prod(shape) * DTYPES[dtype].itemsize:
        raise FormatError(f"{where} has shape {tuple(shape)}, which does not fit its {end - start} bytes")
    return dtype, tuple(shape), start, end


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


class _Cbor:
    """A reader of the part of CBOR that burn writes: items of definite length, nested at most _MAX_DEPTH levels.

    It refuses an item that is longer than the data.
    """

    _MAX_DEPTH = 16
    _FLOATS: ClassVar[dict[int, str]] = {25: ">e", 26: ">f", 27: ">d"}
    _SIMPLE: ClassVar[dict[int, bool | None]] = {20: False, 21: True, 22: None, 23: None}

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.position = path, data, 0

    def root(self) -> JsonObject:
        """The one map that the data consists of."""
        value = self._item(0)
        if not isinstance(value, dict) or self.position != len(self.data):
            raise self._damaged("it is not one map")
        return value

    def _item(self, depth: int) -> object:
        if depth > self._MAX_DEPTH:
            raise self._damaged("it is nested too deeply")
        initial = self._take(1)[0]
        major, info = initial >> 5, initial & 0x1F
        if major == 7:
            return self._simple(info)
        argument = self._argument(info)
        if major == 0:
            return argument
        if major == 1:
            return -1 - argument
        if major == 2:
            return self._take(argument)
        if major == 3:
            return self._text(argument)
        if major == 4 and argument <= len(self.data) - self.position:  # an item takes at least one byte
            return [self._item(depth + 1) for _ in range(argument)]
        if major == 5 and 2 * argument <= len(self.data) - self.position:
            return self._map(argument, depth)
        raise self._damaged(f"unexpected item {initial:#04x}")

    def _map(self, count: int, depth: int) -> JsonObject:
        result: JsonObject = {}
        for _ in range(count):
            key = self._item(depth + 1)
            if not isinstance(key, str) or key in result:
                raise self._damaged(f"the key {key!r} is there twice" if isinstance(key, str) else "a key is no text")
            result[key] = self._item(depth + 1)
        return result

    def _simple(self, info: int) -> object:
        if info in self._FLOATS:
            code = self._FLOATS[info]
            return struct.unpack(code, self._take(struct.calcsize(code)))[0]
        if info in self._SIMPLE:
            return self._SIMPLE[info]
        raise self._damaged(f"unexpected value {info}")

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._damaged("a text is not UTF-8") from error

    def _argument(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise self._damaged("an item has no definite length")
        return int.from_bytes(self._take(1 << (info - 24)), "big")

    def _take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise self._damaged("it ends early")
        self.position += count
        return self.data[self.position - count : self.position]

    def _damaged(self, fact: str) -> FormatError:
        return FormatError(f"{self.path}: its metadata is damaged: {fact}")
