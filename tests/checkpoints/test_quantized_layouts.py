"""Checkpoints that other programs quantized: each is read as the program that wrote it reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import foreign, quantizers, tiny
from support.daily import daily

from zimage_cli.app import main
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.errors import FormatError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.folding import METADATA
from zimage_ref.formats.quantize import QuantizedTensor
from zimage_ref.inspection import describe
from zimage_ref.model.parameters import transformer_parameters

CONFIG = tiny.TRANSFORMER
ARRAYS = tiny.random_weights(transformer_parameters(CONFIG), "transformer")


def in_blocks(name: str) -> bool:
    return "layers.0." in name or "refiner" in name


def written(path: Path, maker: str, dialect: str = "diffusers", prefix: str = "") -> dict[str, np.ndarray]:
    """Writes a quantized transformer with its config beside it. Gives the weights that it stands for."""
    arrays = ARRAYS if dialect == "diffusers" else foreign.in_dialect(ARRAYS, "transformer", dialect, CONFIG)
    stored, weights = quantizers.quantized(arrays, in_blocks, maker)
    quantizers.write(path, {prefix + name: part for name, part in stored.items()})
    (path.parent / "config.json").write_text(json.dumps(CONFIG.to_json()))
    return weights


@pytest.mark.parametrize("maker", quantizers.MAKERS)
def test_every_layout_is_read_as_its_writer_reads_it(maker: str, tmp_path: Path) -> None:
    weights = written(tmp_path / "a.safetensors", maker)
    source = open_source(tmp_path / "a.safetensors", "transformer")
    assert source.tensors.keys() == ARRAYS.keys()
    for name, tensor in source.tensors.items():
        np.testing.assert_allclose(tensor.cast("f32").read(), weights[name], rtol=2e-5, atol=2e-6, err_msg=name)
    changed = max(np.abs(weights[name] - ARRAYS[name]).max() for name in ARRAYS)
    assert changed > 1e-3  # what is compared has been rounded


@pytest.mark.parametrize("scale", daily(["nan", "inf"], "nan"))
@pytest.mark.parametrize("maker", ["fp8", "fp8_blocks", "int8", "int8_convrot", "w4a4", "w4a8", "awq"])
def test_scales_that_are_not_finite_give_such_weights_without_a_warning(maker: str, scale: str, tmp_path: Path) -> None:
    stored, _ = quantizers.quantized(ARRAYS, in_blocks, maker)
    for name, (tag, array) in stored.items():
        if tag in ("F16", "F32") and name.endswith(("weight_scale", "scale_weight", "s_channel")):
            damaged = np.array(array)
            damaged.flat[0] = float(scale)
            stored[name] = (tag, damaged)
    quantizers.write(tmp_path / "a.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    tensors = open_source(tmp_path / "a.safetensors", "transformer").tensors
    assert not np.isfinite(tensors["layers.0.feed_forward.w1.weight"].cast("f32").read()).all()


@pytest.mark.parametrize("maker", ["fp8", "fp8_rows", "mxfp8", "nvfp4", "int8_convrot"])
def test_fused_matrices_under_a_prefix_are_split_after_they_are_decoded(maker: str, tmp_path: Path) -> None:
    weights = written(tmp_path / "a.safetensors", maker, "comfy", "model.diffusion_model.")
    source = open_source(tmp_path / "a.safetensors", "transformer")
    query, key, value = np.split(weights["layers.0.attention.qkv.weight"], 3)
    for part, expected in zip("qkv", (query, key, value), strict=True):
        read = source.tensors[f"layers.0.attention.to_{part}.weight"].cast("f32").read()
        np.testing.assert_allclose(read, expected, rtol=2e-5, atol=2e-6)


def test_metadata_names_layers_without_the_prefix_of_the_file(tmp_path: Path) -> None:
    stored, weights = quantizers.quantized(ARRAYS, in_blocks, "int8_convrot")
    layers = {
        name.removesuffix(".comfy_quant"): json.loads(part[1].tobytes())
        for name, part in stored.items()
        if name.endswith(".comfy_quant")
    }
    bare = {f"diffusion_model.{name}": part for name, part in stored.items() if not name.endswith(".comfy_quant")}
    note = json.dumps({"format_version": "1.0", "layers": layers})
    path = quantizers.write(tmp_path / "a.safetensors", bare, {METADATA: note})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    name = "layers.0.feed_forward.w2.weight"
    read = open_source(path, "transformer").tensors[name].cast("f32").read()
    np.testing.assert_allclose(read, weights[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("maker", ["e4m3_plain", "fp8", "nvfp4", "int8", "w4a4"])
def test_inspect_counts_weights_and_not_bytes(maker: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a.safetensors", maker)
    description = describe(Checkpoint.open(tmp_path / "a.safetensors"))
    exact = sum(array.size for array in ARRAYS.values())
    padded = 0 if maker != "nvfp4" else description.parameters - exact
    assert description.parameters == exact + padded and padded < exact / 100
    assert description.written_by == ("ComfyUI" if maker != "e4m3_plain" else "")
    assert description.model_type == "transformer"
    assert main(["inspect", "--input", str(tmp_path / "a.safetensors")]) == 0
    assert f"{description.parameters:,} parameters" in capfd.readouterr().out


def test_float8_becomes_bfloat16_or_bits(tmp_path: Path) -> None:
    weights = written(tmp_path / "a.safetensors", "fp8")
    source, name = open_source(tmp_path / "a.safetensors", "transformer"), "layers.0.feed_forward.w1.weight"
    write_model(source, Target(tmp_path / "b.safetensors", "transformer"))
    plain = Checkpoint.open(tmp_path / "b.safetensors").tensors[name]
    assert plain.stored_as == "bf16"
    np.testing.assert_allclose(plain.cast("f32").read(), weights[name], rtol=2**-8)
    assert main(["convert", "--model-type=t", f"--input={tmp_path / 'a.safetensors'}", "--quantize=8",
                 "--group-size=32", f"--output={tmp_path / 'c.npz'}"]) == 0  # fmt: skip
    bits = Checkpoint.open(tmp_path / "c.npz").tensors[name]
    assert isinstance(bits, QuantizedTensor) and bits.quantization.bits == 8
    assert np.abs(bits.cast("f32").read() - weights[name]).max() < np.abs(weights[name]).max() / 100


@pytest.mark.parametrize(
    ("suffix", "change", "fact"),
    [
        ("comfy_quant", ("U8", np.frombuffer(b"{", np.uint8)), "comfy_quant: is damaged"),
        ("comfy_quant", ("U8", np.frombuffer(b'{"format": "nvfp9"}', np.uint8)), "is quantized as nvfp9"),
        ("comfy_quant", ("U8", np.frombuffer(b'{"format": "mxfp8"}', np.uint8)), "are not a layer of mxfp8"),
        ("weight_scale", ("F32", np.ones((7, 1), "<f4")), "which are not a layer of int8_tensorwise"),
        ("weight", None, "lacks one of"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name(
    suffix: str, change: tuple[str, np.ndarray] | None, fact: str, tmp_path: Path
) -> None:
    stored, _ = quantizers.quantized(ARRAYS, in_blocks, "int8")
    name = f"layers.0.feed_forward.w2.{suffix}"
    stored = {n: part for n, part in stored.items() if n != name} | ({name: change} if change else {})
    with pytest.raises(FormatError, match=fact) as caught:
        Checkpoint.open(quantizers.write(tmp_path / "a.safetensors", stored))
    assert "layers.0.feed_forward.w2" in str(caught.value)


def test_both_engines_read_them_alike(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    from zimage_mlx.networks.weights import to_mlx

    weights = written(tmp_path / "a.safetensors", "fp8_rows")
    name = "layers.0.attention.to_q.weight"
    tensor = open_source(tmp_path / "a.safetensors", "transformer").tensors[name]
    np.testing.assert_allclose(np.array(to_mlx(tensor, mx.float32)), weights[name], rtol=1e-6)
