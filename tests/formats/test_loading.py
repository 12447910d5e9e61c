"""Tensors read ahead by two threads arrive as they are stored."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from support.parity import to_float64

from zimage_ref import FormatError
from zimage_ref.formats import npz
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import Tensor

pytest.importorskip("mlx.core", reason="MLX is not installed", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.networks import weights

SHAPES = {
    "a": (37, 5, 3),
    "scalar": (),
    "empty": (0, 4),
    "b": (1001, 3),
    "row": (1, 5000),
    "conv": (8, 4, 3, 3),
    "c": (7,),
}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    npz.write(tmp_path / "w.npz", {name: Tensor.of(array) for name, array in arrays.items()})
    return arrays


# bytes: nothing is large, nearly everything is; and as for CUDA, where nothing is read ahead
@pytest.mark.parametrize(("large", "threads"), [(1 << 20, True), (1, True), (1 << 20, False)])
def test_what_is_read_ahead_is_what_is_stored_in_its_order(
    stored: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int, threads: bool
) -> None:
    monkeypatch.setattr(weights, "_LARGE", large)
    monkeypatch.setattr(weights, "READS_ON_CPU", threads)
    read = list(weights.read_ahead(Checkpoint.open(tmp_path / "w.npz").tensors, mx.float32))
    assert [name for name, _ in read] == list(SHAPES)
    for name, array in read:
        expected = stored[name].transpose(0, 2, 3, 1) if name == "conv" else stored[name]
        assert array.dtype == mx.float32 and array.shape == expected.shape
        np.testing.assert_array_equal(np.array(array), expected)


def test_bfloat16_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_LARGE", 64)
    values = np.arange(-300, 300, dtype=np.float32).reshape(60, 10)
    npz.write(tmp_path / "w.npz", {"w": Tensor.of(values).cast("bf16")})
    ((_, array),) = weights.read_ahead(Checkpoint.open(tmp_path / "w.npz").tensors, mx.bfloat16)
    assert array.dtype == mx.bfloat16
    np.testing.assert_array_equal(to_float64(array), to_float64(mx.array(values).astype(mx.bfloat16)))


def test_what_a_reading_thread_finds_wrong_is_raised(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    tensors = dict(Checkpoint.open(tmp_path / "w.npz").tensors)

    def broken() -> np.ndarray:
        raise FormatError("w.npz: is damaged")

    tensors["b"] = Tensor((1001, 3), np.dtype(np.float32), broken)
    with pytest.raises(FormatError, match="is damaged"):
        list(weights.read_ahead(tensors, mx.float32))


def test_loading_again_and_again_takes_no_further_threads() -> None:
    readers = set()

    def read() -> np.ndarray:
        readers.add(threading.current_thread())
        return np.ones((3, 2), np.float32)

    tensors = {name: Tensor((3, 2), np.dtype(np.float32), read) for name in "abcd"}
    for _ in range(4):
        assert len(list(weights.read_ahead(tensors, mx.float32))) == 4
    assert 0 < len(readers) <= 2 and threading.current_thread() not in readers


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i4", "u1", "?", "<f8"])
def test_a_turned_array_of_any_dtype_is_read_in_its_order(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(weights, "_LARGE", 1)
    turned = np.arange(35).reshape(5, 7).astype(dtype).T
    assert weights._read(Tensor.of(turned)).dtype != mx.float64
    ((_, array),) = weights.read_ahead({"w": Tensor.of(turned)}, mx.float32)
    assert array.dtype == (mx.float32 if turned.dtype.kind == "f" else weights.from_stored(turned).dtype)
    np.testing.assert_array_equal(np.array(array), turned)
