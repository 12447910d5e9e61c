"""Burnpack files: both layouts, every dtype, and headers that lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign

from zimage_ref.errors import FormatError
from zimage_ref.formats import burnpack
from zimage_ref.formats.tensors import BFLOAT16

ARRAYS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.gamma": np.ones(5, np.float16),
    "z": np.array([[0x3F80]], "<u2").view(BFLOAT16), "i": np.arange(3, dtype=np.int32), "u": np.arange(3, dtype="u1"),
    "wide": np.zeros((40, 30)), "one": np.array(3, np.float32),
}  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False])
def test_both_layouts_are_read(aligned: bool, tmp_path: Path) -> None:
    foreign.write_burnpack(tmp_path / "a.bpk", ARRAYS, aligned)
    tensors, metadata = burnpack.read(tmp_path / "a.bpk")
    assert metadata == {"format": "burnpack"} and tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_metadata_and_scalars_may_be_absent_or_there(tmp_path: Path) -> None:
    foreign.write_burnpack(tmp_path / "a.bpk", ARRAYS, metadata={}, scalars={"x": {"Int": 3}})
    assert burnpack.read(tmp_path / "a.bpk")[0].keys() == ARRAYS.keys()


def described(**changes: Any) -> dict[str, Any]:
    return {"tensors": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}}


@pytest.mark.parametrize(
    ("root", "fact"),
    [
        (described(dtype={"QFloat": {"value": "Q8S"}}), "quantized by burn.*save the model unquantized"),
        (described(dtype="F8"), "dtype 'F8'"),
        (described(dtype={"Bool": "Odd"}), "dtype"),
        (described(shape=[3]), "does not fit its 8 bytes"),
        (described(shape=[1 << 62, 1 << 62]), "does not fit"),
        (described(shape="long"), "not valid"),
        (described(data_offsets=[8, 0]), "does not fit"),
        (described(data_offsets=[0, 8, 9]), "not valid"),
        (described(data_offsets=[1 << 40, (1 << 40) + 8]), "truncated or damaged"),
        ({"tensors": described()["tensors"] | {"b": described()["tensors"]["a"]}}, "overlaps"),
        ({"tensors": {"a": 3}}, "has no description"),
        ({"tensors": [1]}, "lists no tensors"),
        ({}, "lists no tensors"),
    ],
)
def test_a_header_that_lies_is_refused(root: dict[str, Any], fact: str, tmp_path: Path) -> None:
    write(tmp_path / "a.bpk", foreign.cbor(root))
    with pytest.raises(FormatError, match=fact) as caught:
        burnpack.read(tmp_path / "a.bpk")
    assert "a.bpk" in str(caught.value) and "\n" not in str(caught.value)


def test_a_bool_of_2026_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.bpk", foreign.cbor(described(dtype={"Bool": "U8"}, shape=[8])))
    assert burnpack.read(tmp_path / "a.bpk")[0]["a"].read().tolist() == list(b"8 bytes.")


def write(path: Path, metadata: bytes, version: int = 1, size: int | None = None) -> None:
    head = b"NRUB" + struct.pack("<HI", version, len(metadata) if size is None else size) + metadata
    path.write_bytes(head + b"\0" * (-len(head) % 256) + b"8 bytes.")


@pytest.mark.parametrize(
    "metadata",
    [
        b"\x81" * 5000 + b"\x00", b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff", b"\x7b\x00\x00\xff\xff\xff\xff\xff\xff",
        b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff", b"\xbf\xff", b"\xa1\x01\x02", b"\xa2\x61a\x01\x61a\x02", b"\xa1\x61",
        b"\x61\xff", b"\xf8", b"\xc0\x01", b"", b"\xa0\x00",
    ],
    ids=lambda metadata: metadata[:4].hex(),
)  # fmt: skip
def test_metadata_that_is_no_map_of_cbor_is_refused(metadata: bytes, tmp_path: Path) -> None:
    write(tmp_path / "a.bpk", metadata)
    with pytest.raises(FormatError, match="metadata is damaged|metadata lists no tensors"):
        burnpack.read(tmp_path / "a.bpk")


def test_version_and_size_are_checked(tmp_path: Path) -> None:
    write(tmp_path / "a.bpk", foreign.cbor(described()), version=2)
    with pytest.raises(FormatError, match="version 2; this program reads 1"):
        burnpack.read(tmp_path / "a.bpk")
    write(tmp_path / "a.bpk", foreign.cbor(described()), size=(1 << 32) - 1)
    with pytest.raises(FormatError, match="truncated"):
        burnpack.read(tmp_path / "a.bpk")
