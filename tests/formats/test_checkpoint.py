"""One way to open weights: the container is told by content, shards agree with their index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import foreign

from zimage_ref.errors import FormatError
from zimage_ref.formats.checkpoint import Checkpoint

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".bpk"])
def test_the_container_is_told_by_content(suffix: str, tmp_path: Path) -> None:
    path = foreign.write(tmp_path / f"a{suffix}", ARRAYS).rename(tmp_path / "weights.bin")
    file = Checkpoint.open(path)
    assert file.container == {".npz": "npz", ".safetensors": "safetensors", ".bpk": "burnpack"}[suffix]
    assert file.parameters == 10
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.tensors[name].read(), array, strict=True)


def sharded(folder: Path, weight_map: object) -> Path:
    for name, array in ARRAYS.items():
        foreign.write(folder / f"{name}.safetensors", {name: array})
    (folder / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    file = Checkpoint.open(sharded(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}))
    assert file.tensors.keys() == {"a", "b"} and file.path.name == "m.safetensors.index.json"


@pytest.mark.parametrize(
    ("weight_map", "fact"),
    [
        ({"a": "a.safetensors", "b": "a.safetensors"}, "differs from m.safetensors.index.json in b"),
        ({"a": "a.safetensors", "b": "c.safetensors"}, "c.safetensors: not a valid"),
        ({"a": 3}, "has no weight_map"),
        ([], "has no weight_map"),
        ({}, "names no tensors"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: object, fact: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=fact):
        Checkpoint.open(sharded(tmp_path, weight_map))


def test_a_shard_with_more_than_the_index_says_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    foreign.write(folder / "b.safetensors", {"b": ARRAYS["b"], "more": ARRAYS["a"]})
    with pytest.raises(FormatError, match=r"b\.safetensors: differs from m\.safetensors\.index\.json in more"):
        Checkpoint.open(folder)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: cannot be opened"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"holds no weights: looked for \*\.npz"):
        Checkpoint.open(tmp_path)
