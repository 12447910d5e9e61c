"""safetensors: read and written as the library does, streamed, and refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zimage_ref.errors import FormatError
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import BFLOAT16, DTYPES, Tensor

ARRAYS = {
    "w": np.arange(15, dtype=np.float32).reshape(3, 5), "é": np.ones((2, 1, 2), np.float16),
    "odd": np.array([1, 2, 3], np.uint8), "scalar": np.array(3.0), "none": np.zeros((0, 2), np.float32),
}  # fmt: skip


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a.safetensors", {n: Tensor.of(a) for n, a in ARRAYS.items()}, {"format": "pt"})
    theirs = load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(theirs[name], array, strict=True)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "a.safetensors", {"format": "np", "x": "y"})
    tensors, metadata = safetensors.read(tmp_path / "a.safetensors")
    assert metadata == {"format": "np", "x": "y"} and tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_every_dtype_goes_there_and_back_aligned(tmp_path: Path) -> None:
    arrays = {name: np.arange(6, dtype="u1").repeat(dtype.itemsize).view(dtype) for name, dtype in DTYPES.items()}
    safetensors.write(tmp_path / "a.safetensors", {n: Tensor.of(a) for n, a in arrays.items()})
    for name, tensor in safetensors.read(tmp_path / "a.safetensors")[0].items():
        assert tensor.read().tobytes() == arrays[name].tobytes() and tensor.dtype == DTYPES[name]
        assert tensor.dtype == BFLOAT16 or tensor.read().flags.aligned


def test_order_is_kept_where_that_keeps_tensors_aligned(tmp_path: Path) -> None:
    tensors = {"half": Tensor.of(np.zeros(8, "<f2")), "full": Tensor.of(np.zeros(3, "<f4"))}
    safetensors.write(tmp_path / "a.safetensors", tensors)
    assert list(safetensors.read(tmp_path / "a.safetensors")[0]) == ["half", "full"]


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry()}, b"7 bytes"),
        ({"a": entry()}, b"9 bytes.."),
        ({"a": entry(shape=(3,))}, b"8 bytes."),
        ({"a": entry(shape=(-2,))}, b"8 bytes."),
        ({"a": entry(shape=(1 << 62, 1 << 62))}, b"8 bytes."),
        ({"a": entry(offsets=(8, 0))}, b"8 bytes."),
        ({"a": entry(), "b": entry()}, b"8 bytes."),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"12 bytes...."),
        ({"a": entry(dtype="F99")}, b"8 bytes."),
        ({"a": entry(dtype="F8_E4M3", shape=(7,))}, b"8 bytes."),
        ([], b""),
        ({"a": 3}, b""),
        ("x" * 9, b""),
    ],
)
def test_a_header_that_lies_is_refused(header: object, data: bytes, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(FormatError, match=r"a\.safetensors") as caught:
        safetensors.read(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08", (1 << 62).to_bytes(8, "little") + b"{}", (99).to_bytes(8, "little") + b"{}",
     (80000).to_bytes(8, "little") + b"[" * 80000],
    ids=["empty", "short", "huge", "truncated", "deep"],
)  # fmt: skip
def test_a_file_without_a_header_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="not a valid safetensors file|is empty|is not whole"):
        safetensors.read(tmp_path / "a.safetensors")


def test_a_file_cut_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a.safetensors", {"a": Tensor.of(np.zeros(50000, np.float32))})
    tensor = safetensors.read(tmp_path / "a.safetensors")[0]["a"]
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(FormatError, match="shorter"):
        tensor.read()
