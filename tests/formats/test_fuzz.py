"""Damaged files: whatever a file holds, it opens or is refused in one line, within the memory of its own size."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from support import foreign
from support.daily import daily

from zimage_ref.checkpoints.identify import config_of, identify
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.errors import ZImageError
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import Quantization, quantized, unfold
from zimage_ref.formats.tensors import BFLOAT16, Tensor

SMALLEST_PEAK = 1 << 20  # bytes that opening may take whatever the file's size
ARRAYS = {
    "x_pad_token": np.ones((1, 6), np.float32), "layers.0.attention.qkv.weight": np.ones((18, 6), "<u2").view(BFLOAT16),
    "norm.gamma": np.arange(7, dtype=np.float16), "empty": np.zeros((0, 3), np.float32),
    "decoder.conv_in.weight": np.ones((2, 3, 1, 4), np.float32),
}  # fmt: skip
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)


def write_npz(path: Path) -> None:
    weight = quantized(Tensor.of(np.ones((8, 64), np.float32)), Quantization(4, 32))
    record = {
        "model_type": "transformer",
        "config": TRANSFORMER.official.to_json(),
        "quantization": weight.quantization.to_json(),
    }
    npz.write(path, {n: Tensor.of(a) for n, a in ARRAYS.items()} | unfold({"w.weight": weight}), record)


def write_safetensors(path: Path) -> None:
    safetensors.write(path, {n: Tensor.of(a) for n, a in ARRAYS.items()}, {"format": "pt", "zimage": '{"a": [1]}'})


def write_burnpack(path: Path) -> None:
    foreign.write_burnpack(path, ARRAYS)


def write_gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="reading .gguf needs the extra gguf")
    arrays = {name: array for name, array in ARRAYS.items() if array.size}
    foreign.write_gguf(path, arrays | {"w": np.ones((2, 64), np.float32)}, gguf.GGMLQuantizationType.Q8_0)


def write_index(path: Path) -> None:
    write_safetensors(path.parent / "shard.safetensors")
    path.write_text(json.dumps({"metadata": {"x": 1}, "weight_map": dict.fromkeys(ARRAYS, "shard.safetensors")}))


CONTAINERS: dict[str, Callable[[Path], None]] = {
    "a.npz": write_npz, "a.safetensors": write_safetensors, "a.bpk": write_burnpack, "a.gguf": write_gguf,
    "a.safetensors.index.json": write_index,
}  # fmt: skip


def mutants(data: bytes, rng: Random) -> Iterator[bytes]:
    """Files that differ from `data` by a few flips, cuts, copies, insertions, or numbers that lie; headers mostly."""
    interesting = [i for i, (a, b) in enumerate(pairwise(data)) if a != b]
    while True:
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            at = rng.choice(interesting) if rng.random() < 0.8 else rng.randrange(len(data))
            kind = rng.randrange(7)
            if kind == 0:
                mutant[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                mutant[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)])
            elif kind == 2:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice((*NUMBERS, len(data), at)) & (1 << 8 * width) - 1
                mutant[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
            elif kind == 3:
                del mutant[at : at + rng.choice((1, 4, 64))]
            elif kind == 4:
                mutant[at:at] = data[rng.randrange(len(data)) :][: rng.choice((1, 4, 64))]
            elif kind == 5:
                text = rng.choice(
                    (b"-1", b"99999999999999999999", b"null", b'"x"', b"[[", b"{}", b"1e999", b"\0", b"NaN")
                )
                mutant[at : at + rng.choice((0, 1, len(text)))] = text
            else:
                del mutant[rng.randrange(len(data)) :]
        if bytes(mutant) != data:
            yield bytes(mutant)


def use(path: Path, identified: bool = True) -> None:
    """What every command does with a file: open, identify, look for a config, read all of it."""
    file = Checkpoint.open(path)
    if identified:
        identify(file.tensors)
    config_of(file, TRANSFORMER)
    for tensor in file.tensors.values():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("count", daily([200, 2000], 200))
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_damaged_file_opens_or_is_refused_in_one_line(name: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / name
    CONTAINERS[name](path)
    use(path)
    data, refused = path.read_bytes(), 0
    for number, mutant in zip(range(count), mutants(data, Random(name)), strict=False):
        path.write_bytes(mutant)
        try:
            use(path, identified=number % 40 == 0)  # the slowest part, and the least that bytes can hurt
        except ZImageError as error:
            refused += 1
            assert str(tmp_path) in str(error) and len(str(error)) < 5000, (number, error)
        except BaseException as error:
            raise AssertionError(f"mutant {number} of {name}: {mutant!r}") from error
    assert refused > count // 4  # many flips hit data, which has no checksum


@pytest.mark.parametrize("name", CONTAINERS)
def test_opening_takes_no_more_memory_than_the_file_has_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    CONTAINERS[name](path)
    data = path.read_bytes()
    use(path)  # imports
    worst = 0
    tracemalloc.start()
    for _, mutant in zip(range(50), mutants(data, Random(f"memory {name}")), strict=False):
        path.write_bytes(mutant)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with suppress(ZImageError):
            use(path, identified=False)
        worst = max(worst, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert worst < SMALLEST_PEAK + 4 * len(data)


CONFIGS: list[Any] = [3, [], "x", None, {}, {"dim": "wide"}, {"n_layers": 1 << 40}, {"axes_dims": 7}, {"n_heads": 0},
                      {"dim": 1e308}, {"all_patch_size": 2}, {"rope_theta": float("nan")}]  # fmt: skip


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_config_that_is_none_is_refused(change: Any, tmp_path: Path) -> None:
    good = TRANSFORMER.official.to_json()
    config = good | change if isinstance(change, dict) and change else change
    npz.write(tmp_path / "a.npz", {"a": Tensor.of(ARRAYS["norm.gamma"])}, {"config": config})
    file = Checkpoint.open(tmp_path / "a.npz")
    if change is None:
        assert config_of(file, TRANSFORMER) is None
        return
    with pytest.raises(ZImageError, match=r"a\.npz|is not a size"):
        config_of(file, TRANSFORMER)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(tmp_path / "a.npz", trap=np.array([Trap()], dtype=object))
    with pytest.raises(ZImageError, match=r"dtype \|O"):
        use(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("trap.npy", pickle.dumps(Trap()))
    with pytest.raises(ZImageError, match="does not hold a NumPy array"):
        use(tmp_path / "b.npz")
    assert not (tmp_path / "sprung").exists()
