"""The project's own format: an .npz that `np.load` and `mx.load` read, and that can be memory-mapped.

Members are stored, not compressed. Each array's data starts at a multiple of 64 bytes; spaces pad the .npy header.
bfloat16 is '<V2', as MLX writes it. The comment of the zip archive holds one JSON object, the record: format version,
model type and config. NumPy and MLX ignore the comment. Equal input gives equal bytes.
Sources: NEP 1 (the .npy format), PKWARE's APPNOTE (zip local headers).
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

from zimage_ref.errors import ConfigError, FormatError

from .files import atomic_write
from .json_file import Json, JsonObject
from .mapped_file import MappedFile, check_disjoint
from .tensors import BFLOAT16, DTYPES, Tensor, Tensors, write_data

FORMAT_VERSION = 1
ALIGNMENT = 64
_ZIP64_FROM = 1 << 30  # bytes: members from this size on get 64-bit size fields
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, 5 shorts, crc and sizes, lengths of name and extra
_MAX_NPY_HEADER = 1 << 16
_MAX_COMMENT = (1 << 16) - 1
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{2,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}, )*(?:\d{1,19},?)?)\),? ?\}[ \n]*"
)
_DESCRS = {dtype.str: dtype for dtype in DTYPES.values()} | {"<V2": BFLOAT16}
_UTF8_NAME, _ENCRYPTED = 0x800, 0x1  # flags of a zip member


def read(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The tensors of `path` in the order they are stored, and the record in its comment ({} for foreign files).

    Reads headers only; data is mapped. Raises FormatError unless the file is a valid, uncompressed npz of known dtypes.
    """
    members, comment = _directory(path)
    file = MappedFile(path)
    tensors: dict[str, Tensor] = {}
    extents = []
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in tensors:
            raise FormatError(f"{path}: {member.filename} is there twice")
        start = _data_start(file, member)
        tensors[name] = _array_in(file, member, start)
        extents.append((start, start + member.file_size, member.filename))
    check_disjoint(path, extents)
    return tensors, _record_in_comment(path, comment)


def verify(path: Path) -> list[str]:
    """The members of `path` whose data differs from the checksum in the archive. Reads the whole file."""
    file = MappedFile(path)
    return [m.filename for m in _directory(path)[0] if _checksum(file, m) != m.CRC]


def _checksum(file: MappedFile, member: zipfile.ZipInfo) -> int:
    crc, start = 0, _data_start(file, member)
    for position in range(start, start + member.file_size, 1 << 24):
        crc = zlib.crc32(file.bytes(position, min(1 << 24, start + member.file_size - position)), crc)
    return crc


def _directory(path: Path) -> tuple[list[zipfile.ZipInfo], bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist(), archive.comment
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise FormatError(f"{path}: not a valid npz file: {error}") from error


def _data_start(file: MappedFile, member: zipfile.ZipInfo) -> int:
    """The byte at which the member's data begins. Raises FormatError if its local header and the directory differ."""
    where = f"{file.path}: {member.filename!r}"
    if not member.filename.endswith(".npy"):
        raise FormatError(f"{where} is not an .npy member: this is not an npz of arrays")
    if member.flag_bits & _ENCRYPTED:
        raise FormatError(f"{where} is encrypted; write it with numpy.savez or mlx's savez")
    if member.compress_type != zipfile.ZIP_STORED:
        raise FormatError(f"{where} is compressed; write it with numpy.savez, not savez_compressed")
    local = file.bytes(member.header_offset, _LOCAL_HEADER.size) if member.header_offset >= 0 else b""
    if len(local) < _LOCAL_HEADER.size or local[:4] != b"PK\x03\x04":
        raise FormatError(f"{where} has a damaged zip header")
    _, _, flags, *_, name_length, extra_length = _LOCAL_HEADER.unpack(local)
    name = file.bytes(member.header_offset + _LOCAL_HEADER.size, name_length)
    if name.decode("utf-8" if flags & _UTF8_NAME else "cp437", "replace") != member.orig_filename:
        raise FormatError(f"{where} has another name in its local header")
    start: int = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    return start


def _array_in(file: MappedFile, member: zipfile.ZipInfo, start: int) -> Tensor:
    where = f"{file.path}: {member.filename!r}"
    head = file.bytes(start, min(member.file_size, _MAX_NPY_HEADER))
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise FormatError(f"{where} does not hold a NumPy array")
    prefix = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:prefix], "little")
    match = _NPY_HEADER.fullmatch(head, prefix, prefix + length) if prefix + length <= len(head) else None
    if match is None:
        raise FormatError(f"{where} has a header that is not one of a plain array")
    descr = match[1].decode("latin-1")
    if descr not in _DESCRS:  # this refuses pickled objects too
        raise FormatError(f"{where} has dtype {descr}, which this program cannot read")
    shape, dtype = tuple(int(n) for n in match[3].replace(b",", b" ").split()), _DESCRS[descr]
    if prod(shape) * dtype.itemsize + prefix + length != member.file_size:
        raise FormatError(f"{where} has shape {shape}, which does not fit its {member.file_size} bytes")
    offset = start + prefix + length
    if offset + prod(shape) * dtype.itemsize > file.size:
        raise FormatError(f"{where} is truncated")
    if match[2] == b"True":
        return Tensor(shape, dtype, partial(file.array, offset, shape, dtype, "F"))
    return file.tensor(offset, shape, dtype)


def _record_in_comment(path: Path, comment: bytes) -> JsonObject:
    if not comment.startswith(b"{"):
        return {}
    try:
        record = json.loads(comment)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the record in its zip comment is damaged: {error}") from error
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: format version {version!r}; this program reads {FORMAT_VERSION}")
    return dict(record)


def write(
    path: Path,
    tensors: Tensors,
    record: Json | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes `tensors` to `path`, one at a time. The file becomes complete or does not appear.

    progress: is called with the number of bytes after each write.
    """
    with atomic_write(path) as file:
        write_to(file, tensors, record, progress)


def write_to(
    file: BinaryIO,
    tensors: Tensors,
    record: Json | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """As `write`, to a file that is open. Raises ConfigError if the record is too long for a zip comment."""
    comment = json.dumps({"format_version": FORMAT_VERSION, **(record or {})}, separators=(",", ":")).encode()
    if len(comment) > _MAX_COMMENT:
        raise ConfigError(f"a record of {len(comment)} bytes does not fit the comment of an npz ({_MAX_COMMENT})")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # the date is always 1980, so that equal input gives equal bytes
            large = tensor.nbytes >= _ZIP64_FROM
            extra = 20 if large else 0
            data_start = file.tell() + _LOCAL_HEADER.size + len(member.filename.encode()) + extra
            with archive.open(member, "w", force_zip64=large) as out:
                out.write(npy_header(tensor, data_start))
                write_data(tensor, out.write, progress)
        archive.comment = comment


def npy_header(tensor: Tensor, position: int) -> bytes:
    """A version 1.0 .npy header that ends at a multiple of ALIGNMENT if it is written at `position` in the file."""
    descr = "<V2" if tensor.dtype == BFLOAT16 else tensor.dtype.str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    prefix = 10  # magic, version and the length of the text
    text += " " * (-(position + prefix + len(text) + 1) % ALIGNMENT) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
