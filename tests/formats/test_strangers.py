"""Files that are not what their names say, folders with files of systems, variants: each is told or skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import foreign, tiny

from zimage_cli.app import main
from zimage_ref import ModelFolder
from zimage_ref.checkpoints.convert import open_source
from zimage_ref.errors import ConfigError, FormatError, WeightError
from zimage_ref.formats import safetensors
from zimage_ref.formats.checkpoint import Checkpoint, find_weights
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.tensors import Tensor
from zimage_ref.inspection import is_model_folder
from zimage_ref.model.parameters import transformer_parameters

ARRAYS = tiny.random_weights(transformer_parameters(tiny.TRANSFORMER), "transformer")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12309866400\n"


def weights(path: Path) -> Path:
    safetensors.write(path, {"a": Tensor.of(np.arange(60, dtype=np.float32).reshape(12, 5))})
    return path


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (POINTER, "is a pointer of git-lfs"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n <html lang=en>", "is a web page"),
        (b'{"error":"Access to this model is restricted"}', "is an error message of the server"),
        (b"Entry not found", "is an error message of the server"),
        (b"", "is empty"),
        (b"\0" * 4096, "begins with zeros only"),
        (b"\0\x05\x16\x07\0\x02\0\0" + b"\0" * 40, "a file that macOS left"),
        (b"\x80\x02}q\0(X\x05\0\0\0stateq", "is a pickle"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "model.gguf"])
def test_a_file_that_is_something_else_is_named_as_that(content: bytes, fact: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=fact) as caught:
        Checkpoint.open(tmp_path / name)
    assert name in str(caught.value)


def test_a_config_that_is_a_pointer_is_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"config\.json: is a pointer of git-lfs"):
        read_json(tmp_path / "config.json", ConfigError)


@pytest.mark.parametrize("part", [0.999, 0.5, 0.1])
def test_a_file_that_was_not_downloaded_to_its_end_is_told(part: float, tmp_path: Path) -> None:
    whole = weights(tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(FormatError, match=r"is not whole: \d+ of \d+ bytes are there"):
        Checkpoint.open(tmp_path / "a.safetensors")


def test_every_length_of_a_header_is_that_of_a_safetensors_file(tmp_path: Path) -> None:
    for length in (0x0280, 0x0580, 0x0380):  # the first two bytes of a pickle
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        header += b" " * (length - len(header))
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"7")
        assert Checkpoint.open(tmp_path / "a.safetensors").tensors["a"].read().tolist() == [ord("7")]


def test_files_of_systems_are_skipped_wherever_a_folder_is_looked_into(tmp_path: Path) -> None:
    model = tiny.write_model_folder(tmp_path / "model")
    for path in [p for p in model.rglob("*") if p.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\x07" + b"\0" * 60)
        path.with_name(".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert ModelFolder.open(model).transformer == tiny.TRANSFORMER
    assert is_model_folder(model)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "._a.safetensors").write_bytes(b"x")
    (empty / "b.safetensors.part").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"holds no weights: .*b\.safetensors\.part is still being downloaded"):
        find_weights(empty)


def test_a_variant_is_taken_if_it_is_alone_and_left_if_it_is_not(tmp_path: Path) -> None:
    fp16 = weights(tmp_path / "m.fp16.safetensors")
    assert find_weights(tmp_path) == fp16
    plain = weights(tmp_path / "m.safetensors")
    assert find_weights(tmp_path) == plain
    weights(tmp_path / "n.safetensors")
    with pytest.raises(FormatError, match="holds 2"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("m.safetensors.index.fp16.json", "m.fp16-0000{}-of-00002.safetensors"),
        ("m.safetensors.index.fp16.json", "m-0000{}-of-00002.fp16.safetensors"),
        ("", "m-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_of_a_variant_are_one_set(index: str, shard: str, tmp_path: Path) -> None:
    halves = [dict(list(ARRAYS.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves, 1):
        safetensors.write(tmp_path / shard.format(i), {name: Tensor.of(a).cast("f16") for name, a in half.items()})
    if index:
        names = {name: shard.format(i) for i, half in enumerate(halves, 1) for name in half}
        (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (tmp_path / "config.json").write_text(json.dumps(tiny.TRANSFORMER.to_json()))
    assert len(open_source(tmp_path, "transformer").tensors) == len(ARRAYS)


@pytest.mark.parametrize(
    "name",
    ["text_encoders.qwen3_4b.logit_scale", "model_ema.decay", "cond_stage_model.transformer.position_ids",
     "text_encoders.qwen3_4b.transformer.rotary_emb.inv_freq"],
)  # fmt: skip
def test_tensors_without_use_are_ignored_counted_and_named(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    stored = {f"model.diffusion_model.{n}": a for n, a in ARRAYS.items()} | {name: np.float32([4.6])}
    path = foreign.write(tmp_path / "aio.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(tiny.TRANSFORMER.to_json()))
    assert main(["convert", "--model-type=t", f"--input={path}", f"--output={tmp_path / 'o.npz'}"]) == 0
    assert f"1 tensor without use ignored: {name}" in capfd.readouterr().err
    assert main(["inspect", f"--input={path}"]) == 0
    assert f"1 of the tensors is ignored: {name}" in capfd.readouterr().out


def test_any_other_name_is_still_refused(tmp_path: Path) -> None:
    path = foreign.write(tmp_path / "a.safetensors", ARRAYS | {"layers.0.surprise.weight": np.ones((2, 2), "<f4")})
    (tmp_path / "config.json").write_text(json.dumps(tiny.TRANSFORMER.to_json()))
    with pytest.raises(WeightError, match="unknown: layers.0.surprise.weight"):
        open_source(path, "transformer")


def test_gguf_has_no_leading_axes_of_length_1(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    stored = {name: array[0] if array.shape[:1] == (1,) else array for name, array in ARRAYS.items()}
    foreign.write_gguf(tmp_path / "a.gguf", stored)
    (tmp_path / "config.json").write_text(json.dumps(tiny.TRANSFORMER.to_json()))
    tensors = open_source(tmp_path / "a.gguf", "transformer").tensors
    for name in ("x_pad_token", "cap_pad_token"):
        np.testing.assert_array_equal(tensors[name].read(), ARRAYS[name], strict=True)
    flat = foreign.write(tmp_path / "b.safetensors", stored)
    with pytest.raises(WeightError, match="wrongly shaped"):  # only GGUF loses them
        open_source(flat, "transformer")
