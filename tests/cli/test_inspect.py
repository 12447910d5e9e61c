"""zimage inspect: what it shows of files and folders, for people and for programs, and how fast."""

from __future__ import annotations

import json
import shutil
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign, tiny

from zimage_cli.app import main
from zimage_ref.checkpoints.registry import model_parts
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import Tensor
from zimage_ref.inspection import describe
from zimage_ref.model import config, parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("inspect") / "model", "bf16")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def as_json(path: Path, capfd: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    assert main(["inspect", "--input", str(path), "--json", *options]) == code
    return json.loads(capfd.readouterr().out)


def test_a_file_is_described_for_programs(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arrays = foreign.in_dialect(foreign.official(model, "vae"), "vae", "burn", tiny.VAE)
    found = as_json(foreign.write(tmp_path / "x.bpk", arrays), capfd, "--filter", "*mid_attn_1.q.*")
    assert (found["container"], found["dialect"], found["model_type"]) == ("burnpack", "burn", "vae")
    assert found["parameters"] == sum(array.size for array in arrays.values())
    assert [line["name"] for line in found["tensors"]] == [f"{c}.mid_attn_1.q.{p}" for c in ("decoder", "encoder")
                                                           for p in ("bias", "weight")]  # fmt: skip
    assert found["tensors"][1]["shape"] == [20, 20, 1, 1]
    assert found["dtypes"] == {"bf16": {"tensors": len(arrays), "bytes": 2 * found["parameters"]}}
    assert found["metadata"] == {"format": "burnpack"}


def test_faults_are_found_and_are_exit_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arrays = {
        "good": np.ones(3, np.float32),
        "zero": np.zeros((2, 2), np.float16),
        "bad": np.array([np.nan, np.inf, 1, np.nan], np.float32),
        "damaged": np.arange(9, dtype=np.float32),
    }
    path = tmp_path / "a.npz"
    npz.write(path, {name: Tensor.of(array) for name, array in arrays.items()})
    data = bytearray(path.read_bytes())
    data[data.index(arrays["damaged"].tobytes()) + 9] ^= 1
    path.write_bytes(data)
    found = as_json(path, capfd, "--verify", code=1)
    assert {(fault["tensor"], fault["fact"]) for fault in found["faults"]} == {
        ("damaged", "differs from its checksum"), ("zero", "all values are zero"),
        ("bad", "2 of 4 values are NaN"), ("bad", "1 of 4 values are infinite"),
    }  # fmt: skip
    assert "faults" not in as_json(path, capfd)


def test_a_models_folder_tells_files_and_memory(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = as_json(model, capfd)
    assert found["complete"] and found["components"].keys() == {*model_parts(), "tokenizer"}
    assert found["components"]["vae"]["content"]["model_type"] == "vae"
    assert found["memory"].keys() == {"16", "8", "4"}
    assert main(["inspect", "--input", str(model)]) == 0
    text = capfd.readouterr().out
    assert "transformer/diffusion_pytorch_model.safetensors" in text and "4 bits" in text
    assert "train, streamed" in text


def test_what_a_models_folder_lacks_is_told(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("vae", "tokenizer"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = as_json(folder, capfd)
    problems = {name: part["problem"] for name, part in found["components"].items()}
    assert not found["complete"] and problems["text_encoder"] is None
    assert "holds no autoencoder" in problems["vae"] and "holds no tokenizer" in problems["tokenizer"]
    assert "was not downloaded to its end" in problems["transformer"]


def test_a_full_size_file_is_described_in_half_a_second(tmp_path: Path) -> None:
    """12.3 GB of holes behind the official header."""
    entries, offset = {}, 0
    for name, shape in parameters.transformer_parameters(config.OFFICIAL_TRANSFORMER).items():
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + 2 * prod(shape)]}
        offset += 2 * prod(shape)
    header = json.dumps(entries).encode()
    path = tmp_path / "full.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    start = time.process_time()
    description = describe(Checkpoint.open(path))
    assert time.process_time() - start < 0.5
    assert (description.parameters, description.model_type) == (6_154_908_736, "transformer")


def test_markup_and_control_characters_in_names_do_no_harm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    safetensors.write(tmp_path / "a.safetensors", {"[bold]x[/nope]": Tensor.of(np.ones(1, np.float32))})
    assert main(["inspect", "--input", str(tmp_path / "a.safetensors")]) == 0
    assert "[bold]x[/nope]" in capfd.readouterr().out
