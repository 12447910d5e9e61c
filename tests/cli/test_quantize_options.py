"""Bits and groups as options: of pictures, of conversion and of training; and a merge that rounds once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zimage_cli.app import main
from zimage_ref.errors import ConfigError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import BITS, QuantizedTensor
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.lora.merge import merge_loras
from zimage_ref.pictures.metadata import read_record
from zimage_ref.training.config import TrainConfig

PICTURE = ["generate", "--model-dir=tiny", "--prompt=a star", "--width=64", "--height=64", "--steps=1",
           "--no-thumbnail", "--backend=numpy", "--dtype=float32"]  # fmt: skip


def test_the_group_size_of_a_picture_is_recorded_and_repeated(tmp_path: Path) -> None:
    first, again, default = (tmp_path / f"{name}.png" for name in "abc")
    assert main([*PICTURE, "--quantize=3", "--group-size=32", f"--output={first}"]) == 0
    assert main([*PICTURE, "--quantize=3", f"--output={default}"]) == 0
    assert main(["generate", f"--from-image={first}", f"--output={again}", "--no-thumbnail"]) == 0
    records = [read_record(path) for path in (first, again, default)]
    assert [record.get("group_size") for record in records] == [32, 32, None]
    assert [record["quantize"] for record in records] == [3, 3, 3]
    assert again.read_bytes() == first.read_bytes()
    assert default.read_bytes() != first.read_bytes()


@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_bits_is_written_and_read_back(bits: int, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    assert main(["convert", "--model-type=te", "--input=tiny", f"--output={output}", f"--quantize={bits}",
                 "--group-size=32"]) == 0  # fmt: skip
    found = [t for t in Checkpoint.open(output).tensors.values() if isinstance(t, QuantizedTensor)]
    assert found and {(t.quantization.bits, t.quantization.group_size) for t in found} == {(bits, 32)}


def test_the_base_of_training_takes_every_number_of_bits_and_group() -> None:
    precision = pytest.importorskip("zimage_mlx.training.precision", reason="MLX is not installed")
    for text, expected in (("3", (3, 64)), ("6", (6, 64)), ("4/32", (4, 32)), ("8/128", (8, 128))):
        config = TrainConfig(Path("m"), Path("d"), base_precision=text)
        how = precision.resolve_base_precision(config)[1]
        assert (how.bits, how.group_size) == expected
    assert precision.resolve_base_precision(TrainConfig(Path("m"), Path("d")))[1] is None
    with pytest.raises(ConfigError, match="`base_precision` '4/64' is unknown"):
        TrainConfig(Path("m"), Path("d"), base_precision="4/64")


def test_a_weak_lora_stays_in_a_float32_file_of_a_bfloat16_base() -> None:
    rng = np.random.default_rng(0)
    base = Tensor.of(rng.standard_normal((12, 8)).astype("<f4")).cast("bf16")
    update = LowRank(rng.standard_normal((2, 8)).astype("<f4"), rng.standard_normal((12, 2)).astype("<f4"), scale=1e-4)
    merged = {
        dtype: merge_loras({"x.weight": base}, [({"x": update}, 1.0)], dtype)["x.weight"] for dtype in ("f32", None)
    }
    added = merged["f32"].read() - base.cast("f32").read()
    np.testing.assert_allclose(added, update.scale * update.B @ update.A, atol=2e-7)
    assert merged[None].dtype == base.dtype
