"""Every prefix, wrapper, spelling of a module and suffix goes with every other, in each command and container."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_loras import ALPHA, BASE, FACTORS, LAYERS, RANK, SHAPES, assert_same, difference, make

from zimage_cli.app import main
from zimage_ref import ConfigError, FormatError, WeightError
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import read_lora, write_lora
from zimage_ref.lora.kinds import DoRA
from zimage_ref.lora.merge import merge_loras
from zimage_ref.lora.spellings import grammar, is_lora
from zimage_ref.lora.updates import LoRA
from zimage_ref.lora.whole import Whole

PREFIXES = (
    "", "diffusion_model.", "model.diffusion_model.", "transformer.", "lora_unet_", "lora_unet__", "lora_transformer_",
    "lycoris_", "pipe.dit.", "dit.", "unet.", "base_model.model.", "base_model.model.transformer.",
    "base_model.model.diffusion_model.", "transformer.base_model.model.", "pipe.dit.base_model.model.",
    "module.", "_orig_mod.", "transformer._orig_mod.", "lora_unet_transformer_", "transformer.transformer.",
)  # fmt: skip
MODULES = {
    "official": lambda layer: layer,
    "underscores": lambda layer: layer.replace(".", "_"),
    "dots": lambda layer: layer.replace("_", "."),
    "ComfyUI": lambda layer: layer.replace("to_out.0", "out"),
    "no index": lambda layer: layer.replace("to_out.0", "to_out"),
}
SUFFIXES = tuple(
    (down + tail, up + tail)
    for down, up in ((".lora_A", ".lora_B"), (".lora_down", ".lora_up"), (".lora.down", ".lora.up"))
    for tail in (".weight", ".default.weight", "", ".my-style.weight")
)


def keyed(prefix: str, module: str, suffixes: tuple[str, str]) -> dict[str, np.ndarray]:
    down, up = suffixes
    tensors = {}
    for layer, (A, B) in FACTORS.items():
        name = prefix + MODULES[module](layer)
        tensors |= {f"{name}{down}": A, f"{name}{up}": B, f"{name}.alpha": np.array(ALPHA, np.float32)}
    return tensors


def written(tensors: dict[str, np.ndarray], path: Path) -> Path:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> LoRA:
    return read_lora(make("kohya", tmp_path_factory.mktemp("wanted")), SHAPES).updates


def test_every_prefix_goes_with_every_module_and_suffix() -> None:
    known, count = grammar(), 0
    for prefix, (module, spell), suffixes in itertools.product(PREFIXES, MODULES.items(), SUFFIXES):
        for layer in LAYERS:
            parts = dict(zip(suffixes, "AB", strict=True)) | {".alpha": "alpha", ".dora_scale": "magnitude"}
            for suffix, part in parts.items():
                key = known.parse(f"{prefix}{spell(layer)}{suffix}")
                assert key is not None and key.layers == (layer,) and key.part == part, (prefix, module, suffix)
        count += 1
    assert count == len(PREFIXES) * len(MODULES) * len(SUFFIXES)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_numbers_are_those_of_the_plain_spelling(prefix: str, wanted: LoRA, tmp_path: Path) -> None:
    index = PREFIXES.index(prefix)
    module = list(MODULES)[index % len(MODULES)]
    path = written(keyed(prefix, module, SUFFIXES[index % len(SUFFIXES)]), tmp_path / "x.safetensors")
    for shapes in (SHAPES, None):
        assert_same(read_lora(path, shapes).updates, wanted)
    assert is_lora(load_file(path))


@pytest.mark.parametrize(
    ("prefix", "suffixes", "software"),
    [
        ("lora_unet__", SUFFIXES[4], "VideoX-Fun"),
        ("base_model.model.transformer.", SUFFIXES[0], "PEFT"),
        ("pipe.dit.", SUFFIXES[1], "DiffSynth"),
        ("transformer.", SUFFIXES[4], "OneTrainer"),
        ("transformer.", SUFFIXES[0], "diffusers"),
        ("diffusion_model.", SUFFIXES[4], "kohya with dots"),
        ("model.diffusion_model.", SUFFIXES[0], "ComfyUI"),
        ("", SUFFIXES[1], "bare"),
    ],
)
def test_the_tool_is_named(prefix: str, suffixes: tuple[str, str], software: str, tmp_path: Path) -> None:
    path = written(keyed(prefix, "official", suffixes), tmp_path / "x.safetensors")
    assert read_lora(path, SHAPES).dialect.split(" (")[0] == software


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_may_be_an_integer(dtype: type, shape: tuple[int, ...], wanted: LoRA, tmp_path: Path) -> None:
    tensors = keyed("lora_unet_", "underscores", SUFFIXES[4])
    tensors = {k: np.full(shape, ALPHA, dtype) if k.endswith(".alpha") else v for k, v in tensors.items()}
    assert_same(read_lora(written(tensors, tmp_path / "x.safetensors"), SHAPES).updates, wanted)


def test_an_integer_alpha_that_is_absurd_is_refused(tmp_path: Path) -> None:
    tensors = keyed("lora_unet_", "underscores", SUFFIXES[4])
    key = "lora_unet_layers_0_attention_to_q.alpha"
    tensors[key] = np.array(2**62)
    with pytest.raises(WeightError, match=f"{key} is 4611686018427387904, beyond"):
        read_lora(written(tensors, tmp_path / "x.safetensors"), SHAPES)


@pytest.mark.parametrize("suffix", [".magnitude", ".dora_scale", ".lora_magnitude_vector.default.weight"])
def test_a_magnitude_has_three_names(suffix: str, tmp_path: Path) -> None:
    tensors = keyed("diffusion_model.", "official", SUFFIXES[0])
    lengths = {layer: np.linalg.norm(BASE[f"{layer}.weight"], axis=1) * np.float32(1.1) for layer in LAYERS}
    tensors |= {f"diffusion_model.{layer}{suffix}": m.astype(np.float32) for layer, m in lengths.items()}
    updates = read_lora(written(tensors, tmp_path / "x.safetensors"), SHAPES).updates
    for layer, (A, B) in FACTORS.items():
        changed = BASE[f"{layer}.weight"] + ALPHA / RANK * B.astype(np.float64) @ A
        wanted = lengths[layer][:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)
        assert isinstance(updates[layer], DoRA)
        np.testing.assert_allclose(difference(updates[layer], layer) + BASE[f"{layer}.weight"], wanted, atol=1e-5)


def test_pefts_bias_is_scaled_as_its_matrices(tmp_path: Path) -> None:
    layer, rng = "layers.0.adaLN_modulation.0", np.random.default_rng(0)
    outputs, inputs = SHAPES[f"{layer}.weight"]
    b, name = rng.standard_normal(outputs).astype(np.float32), f"base_model.model.{layer}"
    tensors = {f"{name}.lora_A.weight": np.ones((4, inputs), np.float32), f"{name}.lora_B.bias": b}
    tensors[f"{name}.lora_B.weight"] = np.ones((outputs, 4), np.float32)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 4}', encoding="utf-8")
    updates = read_lora(written(tensors, tmp_path / "x.safetensors"), SHAPES).updates
    np.testing.assert_allclose(updates[f"{layer}.bias"].plain.dense(), 1.5 * b, rtol=1e-6)


@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["generate", "convert"])
def test_a_bias_for_a_layer_without_one_is_refused_by_its_name(shapes: object, tmp_path: Path) -> None:
    for suffix in (".lora_B.bias", ".lora_up.bias", ".diff_b"):
        tensors = keyed("diffusion_model.", "official", SUFFIXES[0])
        key = f"diffusion_model.layers.0.attention.to_q{suffix}"
        tensors[key] = np.ones(96, np.float32)
        with pytest.raises(WeightError, match=f"{key} is for a layer without a bias"):
            read_lora(written(tensors, tmp_path / "x.safetensors"), shapes)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".hada_t1", "a Tucker core"), (".lokr_t2", "a Tucker core"), (".lora_mid.weight", "a Tucker core"),
        (".oft_blocks", "an OFT rotation"), (".lora_E", "an AdaLoRA vector"), (".oft_R.default.weight", "an OFT"),
    ],
)  # fmt: skip
def test_a_kind_that_cannot_be_used_is_named(suffix: str, kind: str, tmp_path: Path) -> None:
    tensors = keyed("diffusion_model.", "official", SUFFIXES[0])
    tensors[f"diffusion_model.layers.0.attention.to_q{suffix}"] = np.ones((4, 4), np.float32)
    path = written(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WeightError) as error:
        read_lora(path, SHAPES)
    assert f"to_q{suffix} is {kind}" in str(error.value)
    assert is_lora([f"to_q{suffix}"])


@pytest.mark.parametrize("form", ["{name}.weight", "{name}.modules_to_save.default.weight", "{name}.set_weight"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_layers_that_were_saved_whole_replace_those_of_the_base(form: str, suffix: str, tmp_path: Path) -> None:
    rng, layers = np.random.default_rng(1), ("all_final_layer.2-1.linear", "layers.0.attention_norm1", "cap_embedder.1")
    new = {layer: rng.standard_normal(SHAPES[f"{layer}.weight"]).astype(np.float32) for layer in layers}
    b = rng.standard_normal(96).astype(np.float32)
    tensors = {form.format(name=f"base_model.model.{layer}"): W for layer, W in new.items()}
    tensors[form.format(name="base_model.model.cap_embedder.1").replace("weight", "bias")] = b
    tensors["base_model.model.layers.0.attention.to_q.lora_A.weight"] = np.ones((2, 96), np.float32)
    tensors["base_model.model.layers.0.attention.to_q.lora_B.weight"] = np.ones((96, 2), np.float32)
    path = written(tensors, tmp_path / "x.safetensors")
    write_lora(tmp_path / f"y{suffix}", read_lora(path, SHAPES).updates, {}, "comfy", "f32")
    base = {name: Tensor.of(value) for name, value in BASE.items()}
    for file in (path, tmp_path / f"y{suffix}"):
        updates = read_lora(file, SHAPES).updates
        assert sum(isinstance(update, Whole) for update in updates.values()) == 4
        merged, half = (merge_loras(base, [(updates, scale)]) for scale in (1.0, 0.5))
        for layer, W in new.items():
            name = f"{layer}.weight"
            np.testing.assert_allclose(merged[name].read(), W, atol=1e-6)
            np.testing.assert_allclose(half[name].read(), (W + BASE[name]) / 2, atol=1e-6)
        np.testing.assert_allclose(merged["cap_embedder.1.bias"].read(), b, atol=1e-6)


def test_factors_in_float8_are_used_or_named(tmp_path: Path) -> None:
    codes = {0x38: 1.0, 0x40: 2.0, 0xB8: -1.0, 0x30: 0.5}  # e4m3
    rng = np.random.default_rng(0)
    A, B = (rng.choice(list(codes), shape).astype(np.uint8) for shape in ((4, 96), (96, 4)))
    name, header, data = "diffusion_model.layers.0.attention.to_q", {}, b""
    for key, array in ((f"{name}.lora_A.weight", A), (f"{name}.lora_B.weight", B)):
        ends = [len(data), len(data) + array.size]
        header[key] = {"dtype": "F8_E4M3", "shape": list(array.shape), "data_offsets": ends}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    left, right = (np.vectorize(codes.get)(array) for array in (B, A))
    try:
        updates = read_lora(path, SHAPES).updates
    except FormatError as error:  # the reader of the container may not know the type
        assert f"{name}.lora_A.weight has dtype F8_E4M3" in str(error)
        return
    np.testing.assert_allclose(updates["layers.0.attention.to_q"].plain.dense(), left @ right, atol=1e-5)
    out = tmp_path / "out.safetensors"
    assert main(["convert", "--model-type=lora", f"--input={path}", f"--output={out}"]) == 0
    assert_same(read_lora(out, SHAPES).updates, updates)


def test_a_whole_layer_is_no_part_of_other_spellings(tmp_path: Path) -> None:
    """Else a checkpoint would pass as a LoRA."""
    path = written({"diffusion_model.layers.0.attention.to_q.weight": np.ones((96, 96))}, tmp_path / "x.safetensors")
    with pytest.raises(WeightError, match="no Z-Image LoRA has"):
        read_lora(path, SHAPES)
    assert not is_lora(BASE)


PATTERNS = {"rank_pattern": {"to_q": 2, "feed_forward.w[12]": 8}, "alpha_pattern": {"layers.1.attention.to_q": 9}}


def peft_scale(layer: str) -> float:
    rank = 2 if layer.endswith("to_q") else 8 if layer.endswith(("w1", "w2")) else 4
    return (9 if layer == "layers.1.attention.to_q" else 6) / rank


@pytest.mark.parametrize("kind", ["LOKR", "LOHA", "whole LoKr"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.transformer."])
def test_pefts_lokr_and_loha_have_the_strength_of_their_config(kind: str, prefix: str, tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    for layer, (A, B) in FACTORS.items():
        name, one = prefix + layer, np.ones((1, 1), np.float32)
        if kind == "LOHA":
            halves = {"w1_a": B, "w1_b": A, "w2_a": np.full_like(B, 1 / RANK), "w2_b": np.ones_like(A)}
            tensors |= {f"{name}.hada_{end}": array for end, array in halves.items()}
        elif kind == "LOKR":
            tensors |= {f"{name}.lokr_w1": one, f"{name}.lokr_w2_a": B, f"{name}.lokr_w2_b": A}
        else:
            tensors |= {f"{name}.lokr_w1": one, f"{name}.lokr_w2": B @ A}
    path, config = written(tensors, tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_config.json"
    peft_type = "LOHA" if kind == "LOHA" else "LOKR"
    config.write_text(json.dumps({"peft_type": peft_type, "r": 4, "alpha": 6, **PATTERNS}), encoding="utf-8")
    file = read_lora(tmp_path, SHAPES)
    assert file.alpha_from == "adapter_config.json"
    for layer, update in file.updates.items():
        assert update.scale == pytest.approx(peft_scale(layer)), layer
        A, B = FACTORS[layer]
        np.testing.assert_allclose(difference(update, layer), peft_scale(layer) * B.astype("f8") @ A, atol=1e-4)
    out = tmp_path / "out.npz"
    assert main(["convert", "--model-type=lora", f"--input={path}", f"--output={out}", "--dtype=f32"]) == 0
    assert_same(read_lora(out, SHAPES).updates, file.updates, 1e-5)
    config.write_text(json.dumps({"peft_type": peft_type, "r": 0, "alpha": 6}), encoding="utf-8")
    with pytest.raises(ConfigError, match="r = 0 must be above 0"):
        read_lora(path, SHAPES)
