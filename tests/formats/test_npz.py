"""Our npz: read by NumPy and MLX, mapped, aligned, reproducible; and what other programs write."""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats import npz
from zimage_ref.formats.tensors import BFLOAT16, DTYPES, Tensor

ARRAYS = {
    "matrix": np.arange(21, dtype=np.float32).reshape(3, 7),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "brain": np.array([[0x3F80, 0x4000, 0xC040]], "<u2").view(BFLOAT16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "conv.weight": np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4),
    "packed": np.array([1, 1 << 31], np.uint32),
    "flag": np.array([True, False]),
}
TENSORS = {name: Tensor.of(array) for name, array in ARRAYS.items()}


def test_it_is_read_back_with_its_record(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", TENSORS, {"model_type": "vae", "config": {"a": [1, 2]}})
    tensors, record = npz.read(tmp_path / "a.npz")
    assert record == {"format_version": 1, "model_type": "vae", "config": {"a": [1, 2]}}
    assert list(tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_numpy_reads_it(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", TENSORS, {"x": 1})
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file[name], array)


def test_mlx_reads_it(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    npz.write(tmp_path / "a.npz", TENSORS, {"x": 1})
    arrays = mx.load(str(tmp_path / "a.npz"))
    assert arrays.keys() == ARRAYS.keys() and arrays["brain"].dtype == mx.bfloat16
    assert arrays["brain"].tolist() == [[1.0, 2.0, -3.0]]
    for name in ARRAYS.keys() - {"brain"}:
        np.testing.assert_array_equal(np.array(arrays[name]), ARRAYS[name])


def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    arrays = {"w": mx.array([[1.5, -2.0]], mx.bfloat16), "v": mx.arange(3), "s": mx.array(1.0), "x": mx.ones((2, 3, 4))}
    mx.savez(str(tmp_path / "a.npz"), **arrays)
    tensors, record = npz.read(tmp_path / "a.npz")
    assert record == {} and tensors.keys() == arrays.keys()
    assert tensors["w"].dtype == BFLOAT16 and tensors["w"].read().view("<u2").tolist() == [[0x3FC0, 0xC000]]
    for name in "vsx":
        np.testing.assert_array_equal(tensors[name].read(), np.array(arrays[name]))


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS, fortran=np.asfortranarray(ARRAYS["matrix"]))
    tensors, _ = npz.read(tmp_path / "a.npz")
    for name, array in (ARRAYS | {"fortran": ARRAYS["matrix"]}).items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_data_is_aligned_and_mapped(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", TENSORS)
    data = (tmp_path / "a.npz").read_bytes()
    for name in ("matrix", "conv.weight"):
        assert data.index(ARRAYS[name].tobytes()) % npz.ALIGNMENT == 0
        array = npz.read(tmp_path / "a.npz")[0][name].read()
        assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        npz.write(tmp_path / f"{name}.npz", TENSORS, {"x": 1})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    npz.write(tmp_path / "a.npz", TENSORS, progress=seen.append)
    assert sum(seen) == sum(array.nbytes for array in ARRAYS.values())


@pytest.mark.skipif(sys.platform == "win32", reason="a file with holes takes its whole size there")
def test_a_file_beyond_4_gib_is_read(tmp_path: Path) -> None:
    """A sparse file: two members of 2.1 GB of zeros and one small one behind them, as a zip64 archive has them."""
    path, shape = tmp_path / "large.npz", (1 << 15, 1 << 14)
    tail = np.arange(5, dtype=np.float32)
    entries = []
    with path.open("wb") as file:
        for name, array_shape, content in (("a", shape, None), ("b", shape, None), ("tail", tail.shape, tail)):
            nbytes = int(np.prod(array_shape)) * 4
            start = file.tell()
            text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {array_shape!r}, }}"
            header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"
            size, member = len(header) + nbytes, f"{name}.npy".encode()
            extra = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(
                struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 33, 0, 2**32 - 1, 2**32 - 1, len(member), 20)
            )
            file.write(member + extra + header)
            if content is None:
                file.seek(nbytes, 1)
            else:
                file.write(content.tobytes())
            entries.append((member, size, start))
        directory = file.tell()
        for member, size, start in entries:
            extra = struct.pack("<HHQQQ", 1, 24, size, size, start)
            file.write(struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45, 45, 0, 0, 0, 33, 0, 2**32 - 1, 2**32 - 1,
                                   len(member), len(extra), 0, 0, 0, 0, 2**32 - 1) + member + extra)  # fmt: skip
        end = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, end - directory, directory))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, 2**32 - 1, 2**32 - 1, 0))
    assert path.stat().st_size > 1 << 32
    tensors, _ = npz.read(path)
    assert tensors["b"].shape == shape and tensors["b"].read()[-1, -3:].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(tensors["tail"].read(), tail)


def test_a_large_member_is_written_as_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "_ZIP64_FROM", 16)
    npz.write(tmp_path / "a.npz", TENSORS)
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    np.testing.assert_array_equal(npz.read(tmp_path / "a.npz")[0]["matrix"].read(), ARRAYS["matrix"])
    assert (tmp_path / "a.npz").read_bytes().index(ARRAYS["matrix"].tobytes()) % npz.ALIGNMENT == 0


def test_a_checksum_that_does_not_hold_is_found(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", TENSORS)
    assert npz.verify(tmp_path / "a.npz") == []
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(ARRAYS["matrix"].tobytes()) + 3] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    assert npz.verify(tmp_path / "a.npz") == ["matrix.npy"]


def member(path: Path, data: bytes, name: str = "a.npy", method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), data, method)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (npy(GOOD.replace("<f4", "|O"), b"\x80\x04."), r"dtype \|O"),
        (npy(GOOD.replace("<f4", ">f4"), b"8 bytes."), "dtype >f4"),
        (npy(GOOD.replace("(2,)", "(-2,)"), b"8 bytes."), "header"),
        (npy(GOOD.replace("(2,)", "(1152921504606846976,)"), b"8 bytes."), "does not fit"),
        (npy(GOOD.replace("(2,)", "(0, 9" + "9" * 18 + ")"), b"8 bytes."), "does not fit"),
        (npy(GOOD, b"7 bytes"), "does not fit its"),
        (npy(GOOD, b"8 bytes.", b"\x03\x00"), "does not hold a NumPy array"),
        (npy("__import__('os').abort()", b""), "header"),
        (npy("(" * 60000), "header"),
        (b"", "does not hold a NumPy array"),
    ],
    ids=range(10),
)
def test_a_member_that_is_no_plain_array_is_refused(data: bytes, fact: str, tmp_path: Path) -> None:
    member(tmp_path / "a.npz", data)
    with pytest.raises(FormatError, match=fact) as caught:
        npz.read(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value) and "\n" not in str(caught.value)


def test_odd_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    member(path, npy(GOOD, b"8 bytes."), name="../../etc/passwd")
    with pytest.raises(FormatError, match="not an .npy member"):
        npz.read(path)
    member(path, npy(GOOD, b"8 bytes."), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed; write it with numpy.savez"):
        npz.read(path)
    member(path, npy(GOOD, b"8 bytes."))
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="encrypted"):
        npz.read(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", npy(GOOD, b"8 bytes."))
        archive.writestr("a.npy", npy(GOOD, b"8 bytes."))
    with pytest.raises(FormatError, match="there twice"):
        npz.read(path)


def test_two_members_in_one_place_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(GOOD, b"8 bytes."))
        archive.writestr("b.npy", npy(GOOD, b"8 bytes."))
    data = path.read_bytes()
    second = data.index(b"PK\x03\x04", 4)
    path.write_bytes(data.replace(struct.pack("<I", second) + b"b.npy", struct.pack("<I", 0) + b"b.npy"))
    with pytest.raises(FormatError, match="another name in its local header"):
        npz.read(path)


@pytest.mark.parametrize(
    ("comment", "fact"),
    [(b'{"format_version": 2}', "format version 2"), (b"{]", "damaged"), (b"{" * 50000, "damaged")],
    ids=["version", "syntax", "depth"],
)
def test_a_record_that_is_not_ours_is_refused(comment: bytes, fact: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", npy(GOOD, b"8 bytes."))
        archive.comment = comment
    with pytest.raises(FormatError, match=fact):
        npz.read(tmp_path / "a.npz")


def test_a_record_too_long_for_a_comment_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit the comment"):
        npz.write(tmp_path / "new" / "a.npz", TENSORS, {"x": "y" * 70000})
    assert not list(tmp_path.iterdir())


def test_every_dtype_is_kept(tmp_path: Path) -> None:
    arrays = {name: np.zeros(3, dtype) for name, dtype in DTYPES.items()}
    npz.write(tmp_path / "a.npz", {name: Tensor.of(array) for name, array in arrays.items()})
    assert {name: tensor.dtype for name, tensor in npz.read(tmp_path / "a.npz")[0].items()} == DTYPES
