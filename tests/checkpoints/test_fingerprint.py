"""Digests stay what they are: pictures, caches and unfinished runs of earlier versions are known by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from support import tiny

from zimage_ref import ModelFolder
from zimage_ref.checkpoints.fingerprint import model_fingerprint, part_digests
from zimage_ref.formats.quantize import Quantization, QuantizedTensor
from zimage_ref.formats.tensors import BFLOAT16, Tensor

NUMBERS = np.arange(3000, dtype=np.float32).reshape(50, 60)
PACKED = QuantizedTensor.of_parts(
    Tensor.of(np.arange(600, dtype="<u4").reshape(40, 15)),
    Tensor.of(np.ones((40, 3), np.float32)),
    Tensor.of(np.zeros((40, 3), np.float32)),
    Quantization(8, 32),
)
FOREIGN = replace(Tensor.of(NUMBERS), storage="Q8_0")
WEIGHTS = {
    "transformer": {"b": Tensor.of(NUMBERS), "a": Tensor.of(NUMBERS[0].astype(np.float16)), "c": PACKED},
    "text_encoder": {"foreign": FOREIGN, "bf16": Tensor.of(NUMBERS[1].astype(np.float16).view(BFLOAT16))},
    "vae": {"scalar": Tensor.of(np.float32(2) * np.ones((), np.float32)), "none": Tensor.of(NUMBERS[:0])},
}


def folder(path: Path) -> ModelFolder:
    (path / "tokenizer.json").write_bytes(b"words")
    configs = {"transformer": tiny.TRANSFORMER, "text_encoder": tiny.TEXT_ENCODER, "vae": tiny.VAE}
    return ModelFolder(path, configs, WEIGHTS, tiny.SCHEDULER, path / "tokenizer.json")


def test_the_fingerprint_of_a_model_is_what_it_always_was(tmp_path: Path) -> None:
    assert model_fingerprint(folder(tmp_path)) == "d39dfc7b576a3a33df8d17b67041484c4d8a4858998e9c1aeae5705d209f8a3b"


def test_the_digests_of_its_parts_are_what_they_always_were(tmp_path: Path) -> None:
    digests = part_digests(folder(tmp_path))
    assert digests == {
        "transformer": "56fa559c0b802835ed835d1535b5ec60d14259fd9f39d099fbd5011b1b36aff9",
        "text_encoder": "75efd160e87d4d02375aeccb0f6bfa5f096d76805a0cfaa3aad23a4a55f71fbe",
        "vae": "a9c01c8d83486573403b74915865525fae0224d47889a6eafd42721323ff68bc",
        "tokenizer": "dba36bffa5cab0f922d087a3aeb179f9d4e745df40b323e1b1471402848c8a3e",
    }


def test_a_number_in_the_middle_is_not_read_and_one_at_either_end_is(tmp_path: Path) -> None:
    model = folder(tmp_path)
    before = part_digests(model)["transformer"]
    for place, told in ((0, True), (1500, False), (2999, True)):
        changed = NUMBERS.copy()
        changed.flat[place] += 1
        weights = WEIGHTS | {"transformer": WEIGHTS["transformer"] | {"b": Tensor.of(changed)}}
        assert (part_digests(replace(model, weights=weights))["transformer"] != before) == told
