"""Our native file: an .npz that `np.load` and `mx.load` read, laid out so that it can be memory-mapped.

Members are stored, not compressed, and each array's data starts at a multiple of 64 bytes (the .npy header is padded
with spaces). bfloat16 is '<V2', as MLX writes it. What an npz has no room for (format version, model type, config)
is one JSON object in the comment of the zip archive, which NumPy and MLX ignore. Equal input gives equal bytes.
Sources: NEP 1 (the .npy format), PKWARE's APPNOTE (zip local headers).
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from .errors import FormatError
from .files import atomic_write
from .tensors import BFLOAT16, DTYPE_NAMES, Array, Tensor, Tensors

FORMAT_VERSION = 1
ALIGNMENT = 64
_ZIP64_FROM = 1 << 30  # members this large get the wider size fields
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, 5 shorts, crc and sizes, lengths of name and extra
_MAX_NPY_HEADER = 1 << 16


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `path` in the order they are stored, and the record in its comment ({} for foreign files).

    Reads headers only; data is mapped. Raises FormatError for anything but a valid npz of stored, known dtypes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members, comment = archive.infolist(), archive.comment
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        tensors: dict[str, Tensor] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in tensors:
                raise FormatError(f"{path}: {member.filename} is there twice")
            tensors[name] = _member(path, mapped, member)
    except (OSError, zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise FormatError(f"{path}: not a valid npz file: {error}") from error
    return tensors, _record(path, comment)


def _member(path: Path, mapped: Array, member: zipfile.ZipInfo) -> Tensor:
    where = f"{path}: {member.filename}"
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1 or not member.filename.endswith(".npy"):
        raise FormatError(f"{where} is not a plain stored .npy member; convert from the file it was made from")
    local = mapped[member.header_offset : member.header_offset + _LOCAL_HEADER.size].tobytes()
    signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(local)
    if signature != b"PK\x03\x04":
        raise FormatError(f"{where} has a damaged zip header")
    start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    head = io.BytesIO(mapped[start : start + min(member.file_size, _MAX_NPY_HEADER)].tobytes())
    reader = npy.read_array_header_1_0 if npy.read_magic(head) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = reader(head, max_header_size=_MAX_NPY_HEADER)
    if dtype not in DTYPE_NAMES:  # also refuses pickled objects
        raise FormatError(f"{where} has dtype {dtype}, which this program cannot read")
    offset = start + head.tell()
    tensor = Tensor(shape, dtype, lambda: np.ndarray(shape, dtype, mapped, offset, order="F" if fortran else "C"))
    if (
        any(n < 0 for n in shape)
        or tensor.nbytes + head.tell() != member.file_size
        or offset + tensor.nbytes > mapped.size
    ):
        raise FormatError(f"{where} has shape {shape}, which does not fit its {member.file_size} bytes")
    return tensor


def _record(path: Path, comment: bytes) -> dict[str, Any]:
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
    record: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes `tensors` to `path`, one at a time, calling `progress` with the bytes of each; whole or not at all."""
    comment = json.dumps({"format_version": FORMAT_VERSION, **(record or {})}, separators=(",", ":"))
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same bytes whenever it is written
            large = tensor.nbytes >= _ZIP64_FROM
            extra = 20 if large else 0
            data_start = file.tell() + _LOCAL_HEADER.size + len(member.filename.encode()) + extra
            with archive.open(member, "w", force_zip64=large) as out:
                out.write(_npy_header(tensor, data_start))
                if tensor.size:
                    out.write(np.ascontiguousarray(tensor.read()).data.cast("B"))
            progress(tensor.nbytes)
        archive.comment = comment.encode()


def _npy_header(tensor: Tensor, position: int) -> bytes:
    """A version 1.0 header that ends at a multiple of ALIGNMENT when written at `position` of the file."""
    descr = "<V2" if tensor.dtype == BFLOAT16 else tensor.dtype.str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    prefix = len(npy.magic(1, 0)) + 2
    text += " " * (-(position + prefix + len(text) + 1) % ALIGNMENT) + "\n"
    return npy.magic(1, 0) + struct.pack("<H", len(text)) + text.encode()
