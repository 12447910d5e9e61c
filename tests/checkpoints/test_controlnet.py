"""ControlNet files: which variant one holds is told from the file alone, and wrong ones are refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import cases, controls, foreign, tiny

from zimage_cli.app import main
from zimage_ref import ConfigError, WeightError
from zimage_ref.checkpoints.controlnet import CONTROLNET
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.identify import identify
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import write_lora
from zimage_ref.model import control
from zimage_ref.model.control import ControlNetConfig, check_pair, controlnet_parameters, controlnet_unused

CONTROLNET_2_0 = replace(control.CONTROLNET_2_1, refiner=control.SHARED)
CONTROLNET_LITE = replace(control.CONTROLNET_2_1, control_layers_places=(0, 10, 20))
FULL = {  # variant -> config, names, bytes at 16 bits of the published file in GB
    "1.0: 6 blocks, 16 channels": (control.CONTROLNET_1_0, 136, 3.10),
    "2.0: 15 blocks, 33 channels, takes a mask": (CONTROLNET_2_0, 295, 6.71),
    "2.1: 15 blocks, 33 channels, takes a mask": (control.CONTROLNET_2_1, 295, 6.71),
    "2.1 lite: 3 blocks, 33 channels, takes a mask": (CONTROLNET_LITE, 91, 2.02),
}


def shapes_only(config: ControlNetConfig, zero: bool) -> dict[str, Tensor]:
    value = np.full((1, 1), 0.0 if zero else 1.0, np.float32)
    shapes = controlnet_parameters(config)
    return {name: Tensor(shape, np.dtype("<f4"), lambda: value) for name, shape in shapes.items()}


@pytest.mark.parametrize("variant", FULL)
@pytest.mark.parametrize("dialect", ["diffusers", "comfy"])
def test_full_size(variant: str, dialect: str) -> None:
    config, names, size = FULL[variant]
    shapes = controlnet_parameters(config)
    assert len(shapes) == names and round(2 * sum(map(prod, shapes.values())) / 1e9, 2) == size
    tensors = CONTROLNET.namings[dialect].write(shapes_only(config, config.refiner == control.SHARED), config)
    found = identify(tensors)
    assert found and found.sizes == config and str(found) == f"ControlNet {variant} ({dialect} names)"


def test_2_0_without_its_unused_tensors() -> None:
    config, unused = CONTROLNET_2_0, controlnet_unused(CONTROLNET_2_0)
    assert len(unused) == 36
    tensors = {name: t for name, t in shapes_only(config, zero=True).items() if name not in unused}
    found = identify(tensors)
    assert found and found.sizes == config


def written(folder: Path, variant: str, dialect: str = "diffusers") -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with a small ControlNet and its config."""
    config = controls.VARIANTS[variant]
    arrays = tiny.random_weights(controlnet_parameters(config))
    stored = CONTROLNET.namings[dialect].write({n: Tensor.of(a) for n, a in arrays.items()}, config)
    foreign.write(folder / "diffusion_pytorch_model.safetensors", {n: t.read() for n, t in stored.items()})
    (folder / "config.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    return folder, arrays


@pytest.mark.parametrize("dialect", ["diffusers", "comfy"])
@pytest.mark.parametrize("variant", controls.VARIANTS)
def test_files_are_read_and_converted(variant: str, dialect: str, tmp_path: Path) -> None:
    folder, arrays = written(tmp_path / "net", variant, dialect)
    source = open_source(folder, "controlnet")
    assert source.sizes == controls.VARIANTS[variant]
    target = Target(tmp_path / "out.safetensors", "controlnet")
    write_model(source, target)
    again = open_source(target.path, "controlnet")
    assert again.sizes == source.sizes and again.tensors.keys() == arrays.keys()
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_command_converts_and_inspects(bits: int, tmp_path: Path, capsys: Any) -> None:
    folder, _ = written(tmp_path / "net", "2.1")
    out = tmp_path / "out.safetensors"
    assert not main(["convert", "--model-type", "controlnet", "--input", str(folder), "--output", str(out),
                     "--quantize", str(bits), "--group-size", "32"])  # fmt: skip
    assert not main(["inspect", "--input", str(out), "--limit", "0"])
    assert "ControlNet 2.1 lite: 3 blocks, 33 channels, takes a mask" in " ".join(capsys.readouterr().out.split())
    stored = Checkpoint.open(out).tensors
    assert stored["control_layers.1.after_proj.weight"].stored_as == f"q{bits}"
    assert stored["control_all_x_embedder.2-1.weight"].stored_as == "f32"


def test_other_files_are_refused(model_dir: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, cases.random_lora(rank=4, seed=0), {"rank": 4})
    with pytest.raises(WeightError, match="holds no ControlNet: it looks like a LoRA"):
        open_source(lora, "controlnet")
    with pytest.raises(WeightError, match="holds no ControlNet: it looks like a Z-Image transformer"):
        open_source(model_dir / "transformer", "controlnet")
    folder, _ = written(tmp_path / "net", "1.0")
    with pytest.raises(WeightError, match="holds no transformer: it looks like a Z-Image ControlNet 1.0"):
        open_source(folder, "transformer")


def test_pairs(tmp_path: Path) -> None:
    config = controls.VARIANTS["2.1"]
    check_pair(config, controls.TRANSFORMER, "net")
    for transformer, fact in (
        (tiny.NARROW, "net: is a ControlNet of width 96, the transformer has 60"),
        (tiny.TRANSFORMER, "net: is a ControlNet of refiner blocks 2, the transformer has 1"),
    ):
        with pytest.raises(ConfigError, match=fact):
            check_pair(config, transformer, "net")
    with pytest.raises(ConfigError, match="must rise from 0"):
        ControlNetConfig.from_json(config.to_json() | {"control_layers_places": [2, 4]}, "net")
    assert ControlNetConfig.from_json(config.to_json(), "net") == config
