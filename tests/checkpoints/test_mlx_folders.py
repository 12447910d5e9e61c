"""Folders that programs on MLX write: quantized layers are found by their shapes, whatever is recorded beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.daily import daily

from zimage_cli.app import main
from zimage_ref import ModelFolder
from zimage_ref.checkpoints.convert import open_source
from zimage_ref.errors import FormatError
from zimage_ref.formats import safetensors
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import BITS, Quantization, QuantizedTensor, quantize
from zimage_ref.formats.tensors import Tensor, cast, float_dtype
from zimage_ref.inspection import describe
from zimage_ref.model.parameters import text_encoder_parameters, transformer_parameters

CONFIG = tiny.TRANSFORMER
ENCODER = replace(tiny.TEXT_ENCODER, hidden_size=64, intermediate_size=96, head_dim=16)
ARRAYS = tiny.random_weights(transformer_parameters(CONFIG), "transformer")
TEXTS = tiny.random_weights(text_encoder_parameters(ENCODER), "text_encoder")
MFLUX_NAMES = {
    "t_embedder.mlp.0.": "t_embedder.linear1.",
    "t_embedder.mlp.2.": "t_embedder.linear2.",
    "2-1.adaLN_modulation.1.": "2-1.adaLN_modulation.0.",
}


def triple(array: np.ndarray, bits: int, group: int, dtype: str) -> dict[str, np.ndarray]:
    """The three tensors of MLX, computed in float32 and kept in `dtype`."""
    packed, scales, biases = quantize(array, Quantization(bits, group))
    floats = {name: cast(part, float_dtype(dtype)) for name, part in (("scales", scales), ("biases", biases))}
    return {"weight": packed} | floats


def packed(arrays: dict[str, np.ndarray], bits: int, group: int, dtype: str = "bf16") -> dict[str, np.ndarray]:
    """Every matrix with rows of whole groups is quantized, the embeddings too, as mflux does."""
    stored: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.ndim == 2 and array.shape[1] % group == 0 and name.endswith(".weight"):
            parts = triple(array, bits, group, dtype)
            stored |= {name.removesuffix("weight") + part: a for part, a in parts.items()}
        else:
            stored[name] = cast(array, float_dtype("bf16"))
    return stored


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    safetensors.write(path, {name: Tensor.of(array) for name, array in arrays.items()}, metadata)


def renamed(name: str) -> str:
    for official, own in MFLUX_NAMES.items():
        name = name.replace(official, own)
    return name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64])
def test_bits_and_group_follow_from_the_shapes_alone(bits: int, group: int, tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", packed(TEXTS, bits, group, "f32"))
    (tmp_path / "config.json").write_text(json.dumps(ENCODER.to_json()))
    source = open_source(tmp_path, "text_encoder")
    bare = Checkpoint.open(tmp_path / "model.safetensors")  # as inspect sees it, without the config
    count = 0
    for name, tensor in source.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            count += 1
            assert (tensor.quantization, tensor.shape) == (Quantization(bits, group), TEXTS[name].shape)
            assert bare.tensors[name].shape == TEXTS[name].shape
            step = (TEXTS[name].max() - TEXTS[name].min()) / (2**bits - 1)
            assert (
                np.abs(tensor.read() - TEXTS[name]).max() <= 1.05 * step
            )  # the edge of a group is moved to a whole step
    assert count > 10 and isinstance(source.tensors["model.embed_tokens.weight"], QuantizedTensor)
    assert bare.parameters == sum(array.size for array in TEXTS.values())


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_bits_that_cross_words_are_those_of_mlx(bits: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    weight = np.random.default_rng(bits).standard_normal((24, 192)).astype(np.float32)
    ours = quantize(weight, Quantization(bits, 64))
    theirs = mx.quantize(mx.array(weight), group_size=64, bits=bits)
    tensor = QuantizedTensor.of_parts(*map(Tensor.of, ours), Quantization(bits, 64))
    if mx.default_device() == mx.cpu:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, np.array(b))
    expected = np.array(mx.dequantize(*map(mx.array, ours), group_size=64, bits=bits))
    np.testing.assert_allclose(tensor.read(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_the_float_modes_of_mlx_are_decoded(mode: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    weight = np.random.default_rng(1).standard_normal((24, 96)).astype(np.float32)
    parts = mx.quantize(mx.array(weight), mode=mode)
    save(tmp_path / "a.safetensors", {"x.weight": np.array(parts[0]), "x.scales": np.array(parts[1])})
    tensor = Checkpoint.open(tmp_path / "a.safetensors").tensors["x.weight"]
    expected = np.array(mx.dequantize(*parts, mode=mode, dtype=mx.float32))
    np.testing.assert_allclose(tensor.cast("f32").read(), expected, rtol=1e-6)
    assert tensor.shape == weight.shape


def test_a_folder_of_mflux_has_no_config_and_other_names(tmp_path: Path) -> None:
    stored = {renamed(name): array for name, array in packed(ARRAYS, 4, 32).items()}
    facts = {"quantization_level": "4", "mflux_version": "0.24.0"}
    names = sorted(stored)
    shards = [{n: stored[n] for n in names[::2]}, {n: stored[n] for n in names[1::2]}]
    folder = tmp_path / "model" / "transformer"
    for i, shard in enumerate(shards):
        save(folder / f"{i}.safetensors", shard, facts)
    description = describe(Checkpoint.open(folder))
    assert (description.written_by, description.dialect) == ("mflux 0.24.0", "mflux")
    assert description.parameters == sum(array.size for array in ARRAYS.values())
    assert open_source(folder, "transformer").tensors.keys() == ARRAYS.keys()
    (folder / "1.safetensors").rename(folder / "2.safetensors")
    with pytest.raises(FormatError, match=r"lacks 1\.safetensors of 3 shards"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("numbers", [(0, 1), (0, 2)])
def test_numbered_files_with_the_same_tensors_are_no_set(numbers: tuple[int, int], tmp_path: Path) -> None:
    for number in numbers:
        save(tmp_path / f"{number}.safetensors", {"a": np.full(3, number, np.float32)})
        assert Checkpoint.open(tmp_path / f"{number}.safetensors").tensors["a"].read()[0] == number
    assert Checkpoint.open(tmp_path / "0.safetensors").tensors["a"].read()[0] == 0


def test_shards_without_an_index_are_one_set(tmp_path: Path) -> None:
    stored = packed({n: a for n, a in ARRAYS.items() if "embed" not in n}, 8, 32, "f32")
    stored |= {n: a for n, a in ARRAYS.items() if "embed" in n}
    folder = tmp_path / "transformer"
    for i in (1, 2, 3):
        save(folder / f"model-0000{i}-of-00003.safetensors", {n: stored[n] for n in sorted(stored)[i - 1 :: 3]})
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json()))
    swift = {"bits": 8, "group_size": 32, "mode": "affine", "layers": []}
    (tmp_path / "quantization.json").write_text(json.dumps(swift))
    assert describe(Checkpoint.open(folder)).written_by == "Z-Image.swift"
    assert len(open_source(folder, "transformer").tensors) == len(ARRAYS)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"lacks model-00002-of-00003\.safetensors of 3 shards"):
        Checkpoint.open(folder)


def test_both_engines_draw_with_quantized_embeddings_and_biases(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    from zimage_mlx.networks import text_encoder, transformer, weights
    from zimage_ref.networks.text_encoder import TextEncoder
    from zimage_ref.networks.weights import Weights

    save(tmp_path / "e.safetensors", packed(TEXTS, 5, 32, "f32"))
    (tmp_path / "config.json").write_text(json.dumps(ENCODER.to_json()))
    tensors = dict(open_source(tmp_path / "e.safetensors", "text_encoder").tensors)
    ids = np.array([3, 200, 7, 7, 150])
    ours = TextEncoder(ENCODER, Weights(tensors, np.dtype("<f4")))(ids)
    model = text_encoder.TextEncoder(ENCODER)
    expected = {n: t for n, t in tensors.items() if not n.startswith(("model.norm", "model.layers.2."))}
    weights.load(model, expected, mx.float32)
    np.testing.assert_allclose(np.array(model(mx.array(ids))), ours, rtol=1e-4, atol=1e-4)
    folder = tmp_path / "t"
    save(folder / "t.safetensors", packed(ARRAYS, 6, 32, "f32"))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json()))
    network = transformer.Transformer(CONFIG)
    weights.load(network, open_source(folder, "transformer").tensors, mx.float32)
    layer = network.layers[0].adaLN_modulation[0]
    if CONFIG.adaln_dim % 32 == 0:
        assert layer.bits == 6
        np.testing.assert_allclose(np.array(layer.bias), ARRAYS["layers.0.adaLN_modulation.0.bias"], rtol=1e-2)


@pytest.mark.parametrize("dtype", daily(["float32", "float16"], "float32"))
def test_quantized_embeddings_and_biases_are_streamed(dtype: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    from zimage_mlx.networks import text_encoder, transformer, weights
    from zimage_mlx.networks.running import RESIDENT
    from zimage_mlx.networks.streaming import Stream

    for name, arrays, config in (("text_encoder", TEXTS, ENCODER), ("transformer", ARRAYS, CONFIG)):
        save(tmp_path / name / "x.safetensors", packed(arrays, 5, 32, "f32"))
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_json()))
    texts, blocks = (dict(open_source(tmp_path / n, n).tensors) for n in ("text_encoder", "transformer"))
    texts = {n: t for n, t in texts.items() if not n.startswith(("model.norm", "model.layers.2."))}
    assert texts["model.embed_tokens.weight"].streamable and all(t.streamable for t in blocks.values())
    latents = mx.array(np.random.default_rng(0).standard_normal((1, CONFIG.in_channels, 4, 8), np.float32))
    made = []
    for way in (RESIDENT, Stream()):
        again = way if way is RESIDENT else Stream()
        encoder = text_encoder.TextEncoder(ENCODER, way)
        denoiser = transformer.Transformer(CONFIG, again.around(transformer.Block.__call__), again)
        for network, tensors, stream in ((encoder, texts, way), (denoiser, blocks, again)):
            how = tensors, weights.DTYPES[dtype], None, True
            weights.load(network, *how) if stream is RESIDENT else stream.open(network, *how)
        caption = encoder(mx.array([3, 200, 7, 7, 150]))
        features = mx.ones((5, CONFIG.cap_feat_dim))
        drawn = denoiser(latents, mx.array([0.5]), [features])
        made.append([np.array(array.astype(mx.float32)) for array in (caption, drawn)])
        if way is not RESIDENT:
            way.close()
            again.close()
    for resident, streamed in zip(*made, strict=True):
        assert np.isfinite(resident).all() and resident.std() > 0.01
        np.testing.assert_array_equal(streamed, resident)


def test_what_is_written_for_mflux_has_its_names_files_and_records(tmp_path: Path) -> None:
    model = tiny.write_model_folder(tmp_path / "model")
    out = tmp_path / "out"
    for kind, part in (("t", "transformer"), ("te", "text_encoder"), ("vae", "vae")):
        bits = ["--quantize=4", "--group-size=32"] if kind == "t" else []
        arguments = [f"--model-type={kind}", f"--input={model}", f"--output={out / part}", "--naming=mflux"]
        assert main(["convert", *arguments, "--dtype=bf16", *bits]) == 0
    tensors, metadata = safetensors.read(out / "transformer" / "0.safetensors")
    assert metadata["quantization_level"] == "4" and metadata["mflux_version"]
    assert {"t_embedder.linear1.weight", "all_final_layer.2-1.adaLN_modulation.0.bias"} <= tensors.keys()
    assert "layers.0.attention.to_q.scales" in tensors
    index = json.loads((out / "transformer" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) and index["metadata"]["quantization_level"] == "4"
    vae, facts = safetensors.read(out / "vae" / "0.safetensors")
    official = safetensors.read(next((model / "vae").glob("*.safetensors")))[0]
    kernel = official["decoder.conv_in.weight"].cast("bf16").read()
    np.testing.assert_array_equal(vae["decoder.conv_in.conv.weight"].read(), kernel.transpose(0, 2, 3, 1))
    assert {"encoder.conv_out.conv2d.bias", "encoder.conv_norm_out.norm.weight"} <= vae.keys()
    assert facts["quantization_level"] == "None"
    texts, _ = safetensors.read(out / "text_encoder" / "0.safetensors")
    assert "embed_tokens.weight" in texts and not any(name.startswith("model.") for name in texts)
    shutil.copytree(model / "tokenizer", out / "tokenizer")
    for config in out.glob("*/config.json"):
        config.unlink()
    again = ModelFolder.open(out)
    assert (again.transformer.dim, again.vae.block_out_channels) == (CONFIG.dim, tiny.VAE.block_out_channels)
