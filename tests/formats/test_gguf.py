"""GGUF files, written by llama.cpp's own package: plain, quantized, and damaged."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign, tiny

from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.identify import official_weights
from zimage_ref.checkpoints.registry import COMPONENTS
from zimage_ref.errors import BackendError, FormatError
from zimage_ref.formats import gguf as formats_gguf
from zimage_ref.formats.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf", reason="reading .gguf needs the extra gguf")
KINDS = gguf.GGMLQuantizationType
ENCODER = replace(tiny.TEXT_ENCODER, hidden_size=64, intermediate_size=96, head_dim=16)  # rows of whole blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("gguf") / "model")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize(
    ("component", "dialect", "config"),
    [("transformer", "comfy", tiny.TRANSFORMER), ("text_encoder", "llama.cpp", ENCODER)],
)
def test_quantized_weights_are_what_the_package_dequantizes(
    component: str, dialect: str, config: Any, kind: str, tmp_path: Path
) -> None:
    original = tiny.random_weights(COMPONENTS[component].parameters(config))
    arrays = foreign.in_dialect(original, component, dialect, config)
    kind = KINDS[kind]
    foreign.write_gguf(tmp_path / "a.gguf", arrays, kind)

    def through(array: np.ndarray) -> np.ndarray:
        if array.ndim != 2 or array.shape[1] % 32:
            return array
        return gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)

    foreign.write(tmp_path / "a.safetensors", {n: through(a) for n, a in arrays.items()})
    quantized, plain = (Checkpoint.open(tmp_path / f"a.{suffix}") for suffix in ("gguf", "safetensors"))
    assert kind.name in {tensor.stored_as for tensor in quantized.tensors.values()}
    ours, theirs = (official_weights(file, COMPONENTS[component], config) for file in (quantized, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].read(), strict=True)
    errors = {name: np.abs(tensor.read() - original[name]).max() for name, tensor in ours.items()}
    assert 0 < max(errors.values()) < 0.6


def test_a_k_quant_is_read(tmp_path: Path) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[KINDS.Q6_K]
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * nbytes), np.uint8)  # the package cannot write this kind
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "lumina2")
    writer.add_tensor("w", raw, raw_dtype=KINDS.Q6_K)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    tensor = formats_gguf.read(tmp_path / "a.gguf")[0]["w"]
    assert (tensor.shape, tensor.stored_as, tensor.dtype) == ((3, 2 * block), "Q6_K", np.float32)
    np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(raw, KINDS.Q6_K))


def test_a_quantized_transformer_converts_to_bfloat16(model: Path, tmp_path: Path) -> None:
    arrays = foreign.in_dialect(foreign.official(model, "transformer"), "transformer", "comfy", tiny.TRANSFORMER)
    foreign.write_gguf(tmp_path / "a.gguf", arrays, KINDS.Q8_0)
    source = open_source(tmp_path / "a.gguf", "transformer")
    write_model(source, Target(tmp_path / "a.npz", "transformer", dtype="bf16"))
    assert {t.stored_as for t in Checkpoint.open(tmp_path / "a.npz").tensors.values()} == {"bf16"}


def test_a_shape_that_ggml_could_not_hold_is_restored(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "lumina2")
    writer.add_array("comfy.gguf.orig_shape.x_pad_token", [1, 6])
    writer.add_tensor("x_pad_token", np.arange(6, dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    tensor = formats_gguf.read(tmp_path / "a.gguf")[0]["x_pad_token"]
    assert tensor.shape == (1, 6) and tensor.read().tolist() == [[0, 1, 2, 3, 4, 5]]


def test_metadata_is_kept_without_the_vocabulary(model: Path, tmp_path: Path) -> None:
    foreign.write_gguf(tmp_path / "a.gguf", {"w": np.zeros((2, 3), np.float32)})
    metadata = formats_gguf.read(tmp_path / "a.gguf")[1]
    assert metadata == {"general.architecture": "lumina2", "tokenizer.ggml.tokens": None}


def header(version: int = 3, tensors: bytes = b"", count: int = 0, entries: bytes = b"", keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, keys) + entries + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(b"a") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (header(version=1), "GGUF version 1"),
        (header(count=1 << 60), "header is longer than the file"),
        (header(keys=1 << 60), "header is longer than the file"),
        (header(keys=1, entries=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)), "longer than the file"),
        (header(keys=1, entries=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown value type 9"),
        (header(keys=1, entries=text(b"k") + struct.pack("<I", 77)), "unknown value type 77"),
        (header(keys=1, entries=struct.pack("<Q", 1 << 63)), "longer than the file"),
        (header(keys=1, entries=text(b"\xff")), "not UTF-8"),
        (header(keys=1, entries=text(b"general.alignment") + struct.pack("<II", 4, 3)), "not a power of two"),
        (header(count=1, tensors=info((2,))), "is truncated"),
        (header(count=1, tensors=info((1 << 62, 1 << 62))), "is truncated"),
        (header(count=1, tensors=info((1,) * 9)), "9 dimensions"),
        (header(count=1, tensors=info((2,), kind=99)), "ggml type 99"),
        (header(count=1, tensors=info((31,), kind=8)), "blocks of 32 that Q8_0"),
        (header(count=2, tensors=info((0,)) + info((0,))) + bytes(32), "there twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_lies_is_refused(data: bytes, fact: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=fact) as caught:
        formats_gguf.read(tmp_path / "a.gguf")
    assert "a.gguf" in str(caught.value)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(header())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendError, match=r"pip install 'zimage-mlx\[gguf\]'"):
        formats_gguf.read(tmp_path / "a.gguf")
