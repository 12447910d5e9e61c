"""LoRAs at work: every dialect gives the picture of the default one, on both backends, on float and quantized bases."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support import lora_makers, tiny
from support.daily import daily
from support.tiny_loras import ALPHA, BASE, FACTORS, LAYERS, RANK, SHAPES, make

pytest.importorskip("mlx.core", reason="compares with MLX", exc_type=ImportError)

import mlx.core as mx
import mlx.nn as nn

import zimage_mlx
import zimage_ref
from zimage_mlx.lora.layers import Adapters, LoRALinear, find
from zimage_ref.formats.tensors import Tensor
from zimage_ref.generation.pipeline import Pipeline
from zimage_ref.lora.file import read_lora

REQUEST = {"prompt": "a red fox", "width": 32, "height": 16, "steps": 1, "output": "array"}
GROUP = 32  # of quantization: tiny layers are narrow
SAME, ROUNDING = 2e-5, 2e-3  # float32 pictures in 0..1: equal arithmetic; weights rounded at other places


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("use") / "model")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_dialects(tmp_path_factory.mktemp("dialects"), BASE)


def write_dialects(folder: Path, base: dict[str, np.ndarray]) -> dict[str, Path]:
    """The same LoRA in every dialect, each in a folder of its own."""
    found = {}
    for name in lora_makers.MAKERS:
        (folder / name).mkdir()
        found[name] = make(name, folder / name, base)
    return found


@cache
def base_weights(bits: int) -> dict[str, np.ndarray]:
    """The base weights as they are after quantizing, in float32."""
    found = {}
    for name, weight in BASE.items():
        if bits < 32 and _quantizable(weight.shape):
            packed = mx.quantize(mx.array(weight), GROUP, bits)
            weight = np.array(mx.dequantize(*packed, GROUP, bits))
        found[name] = weight
    return found


def _quantizable(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[1] % GROUP == 0 and shape[0] > 1


def make_pipeline(model: Path, backend: str, bits: int) -> Pipeline:
    if backend == "numpy":
        reference = zimage_ref.ZImagePipeline.from_pretrained(model)
        reference.folder.weights["transformer"] = {k: Tensor.of(v) for k, v in base_weights(bits).items()}
        return reference
    pipe = zimage_mlx.ZImagePipeline.from_pretrained(model, "float32")
    if bits < 32:
        nn.quantize(
            pipe.transformer, GROUP, bits,
            class_predicate=lambda _, m: isinstance(m, nn.Linear) and _quantizable(m.weight.shape),
        )  # fmt: skip
    return pipe


@pytest.fixture(scope="module", params=[("numpy", 32), ("mlx", 32), ("mlx", 4)], ids=lambda p: f"{p[0]}-{p[1]}")
def pipe(request: pytest.FixtureRequest, model: Path) -> Pipeline:
    return make_pipeline(model, *request.param)


def picture(pipe: Pipeline, *loras: object) -> np.ndarray:
    return pipe(**REQUEST, loras=loras)[0]


@pytest.mark.parametrize(("backend", "bits"), daily(product(["numpy", "mlx"], [32, 8, 4]), ("numpy", 32), ("mlx", 4)))
def test_every_dialect_gives_the_picture_of_the_default_one(
    backend: str, bits: int, model: Path, tmp_path: Path
) -> None:
    pipe, files = make_pipeline(model, backend, bits), write_dialects(tmp_path, base_weights(bits))
    plain, expected = picture(pipe), picture(pipe, files["comfy"])
    assert np.abs(expected - plain).max() > 0.1  # the LoRA does something
    for name, path in files.items():
        error = np.abs(picture(pipe, path) - expected).max()
        dense = name in ("lokr", "lokr_full", "loha", "full_difference", "peft_saved") or "dora" in name
        assert error < (ROUNDING if dense else SAME), name
    np.testing.assert_array_equal(picture(pipe), plain)  # and nothing of any of them is left


def test_the_backends_agree_on_every_kind_of_update(model: Path, files: dict[str, Path]) -> None:
    reference, ours = make_pipeline(model, "numpy", 32), make_pipeline(model, "mlx", 32)
    for name in ("comfy", "lokr", "loha", "onetrainer_dora", "lycoris_dora", "full_difference", "peft_saved"):
        loras = [(files[name], 0.6), (files["kohya_fused"], -0.3)]
        assert np.abs(picture(reference, *loras) - picture(ours, *loras)).max() < ROUNDING, name


def test_scale_0_is_bit_identical_to_none(pipe: Pipeline, files: dict[str, Path]) -> None:
    plain = picture(pipe)
    for name in ("comfy", "lokr", "onetrainer_dora"):
        np.testing.assert_array_equal(picture(pipe, (files[name], 0.0)), plain)


def test_scales_are_linear_and_loras_add_up(pipe: Pipeline, files: dict[str, Path]) -> None:
    whole = picture(pipe, files["comfy"])
    halves = picture(pipe, (files["kohya"], 0.5), (files["burn"], 0.25), (files["diffusers"], 0.25))
    assert np.abs(halves - whole).max() < SAME
    cancelled = picture(pipe, (files["comfy"], 1.0), (files["loha"], -1.0))
    assert np.abs(cancelled - picture(pipe)).max() < ROUNDING


def test_the_scale_counts(pipe: Pipeline, files: dict[str, Path]) -> None:
    pictures = [picture(pipe, (files["comfy"], scale)) for scale in (0.5, 1.0, -1.0)]
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert np.abs(one - other).max() > 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_equals_attached_within_rounding(dtype: str, model: Path, files: dict[str, Path]) -> None:
    loras = [(read_lora(files["comfy"], SHAPES).updates, 0.7), (read_lora(files["burn"], SHAPES).updates, 0.2)]
    pictures = []
    for merge in (False, True):
        pipe = zimage_mlx.ZImagePipeline.from_pretrained(model, dtype)
        weights = dict(pipe.folder.weights["transformer"])
        read = zimage_mlx.networks.weights.to_mlx
        adapters = Adapters(pipe.transformer, lambda name: read(weights[name], pipe.dtype), merge)  # noqa: B023
        pipe.__dict__["_adapters"] = adapters
        adapters.use(loras)
        branches = [m for m in pipe.transformer.modules() if isinstance(m, LoRALinear)]
        assert len(branches) == (0 if merge else len(LAYERS))
        pictures.append(pipe_output(pipe))
    assert np.abs(pictures[0] - pictures[1]).max() < (SAME if dtype == "float32" else 0.05)


def pipe_output(pipe: zimage_mlx.ZImagePipeline) -> np.ndarray:
    """One pass of the transformer as its LoRAs are."""
    rng = np.random.default_rng(3)
    x, caption = rng.standard_normal((1, 16, 6, 4)), rng.standard_normal((7, 40))
    raw = pipe.transformer(mx.array(x.astype(np.float32)), mx.array([0.3]), [mx.array(caption.astype(np.float32))])
    return np.array(raw.astype(mx.float32))


@pytest.mark.parametrize(
    ("bits", "merge"), daily(product([32, 8, 4], [False, True]), (32, False), (32, True), (4, False), (8, True))
)
def test_changing_loras_neither_reloads_nor_drifts(bits: int, merge: bool, model: Path, files: dict[str, Path]) -> None:
    pipe = make_pipeline(model, "mlx", bits)
    assert isinstance(pipe, zimage_mlx.ZImagePipeline)
    transformer, before = pipe.transformer, pipe_output(pipe)
    reads: list[str] = []
    weights = pipe.folder.weights["transformer"]

    def pristine(name: str) -> mx.array:
        reads.append(name)
        return zimage_mlx.networks.weights.to_mlx(weights[name], mx.float32)

    adapters = Adapters(transformer, pristine, merge)
    loras = [read_lora(files[name], SHAPES).updates for name in ("comfy", "full_difference", "onetrainer_dora", "burn")]
    outputs = []
    for _ in range(3):
        for lora in loras:
            adapters.use([(lora, 0.9)])
            outputs.append(pipe_output(pipe))
    for first, again in zip(outputs[:4], outputs[4:], strict=False):
        np.testing.assert_array_equal(first, again)
    adapters.use([])
    np.testing.assert_array_equal(pipe_output(pipe), before)
    assert pipe.transformer is transformer
    touched = {f"{layer}.weight" for layer in LAYERS}
    assert set(reads) <= touched  # at most the layers that were merged into are read again
    adapters.use([(loras[0], 0.9)])
    reads.clear()
    adapters.use([(loras[0], 0.9)])
    assert not reads  # the same again costs nothing


@pytest.mark.parametrize("lean", [False, True])
def test_loras_are_branches_if_the_pipeline_stays_and_merged_if_it_is_lean(
    lean: bool, model: Path, files: dict[str, Path]
) -> None:
    pipe = zimage_mlx.ZImagePipeline.from_pretrained(model, lean=lean)
    pipe.use_loras(pipe.read_loras([files["comfy"]]))
    assert isinstance(find(pipe.transformer, "layers.0.attention.to_q"), LoRALinear) != lean


def test_a_low_rank_lora_leaves_quantized_layers_quantized_and_a_dense_one_does_not(
    model: Path, files: dict[str, Path]
) -> None:
    pipe = make_pipeline(model, "mlx", 4)
    assert isinstance(pipe, zimage_mlx.ZImagePipeline)
    layer = "layers.0.attention.to_q"
    quantized_layer = find(pipe.transformer, layer)
    assert isinstance(quantized_layer, nn.QuantizedLinear)
    pipe.use_loras(pipe.read_loras([files["comfy"]]))
    assert find(pipe.transformer, layer).base is quantized_layer
    pipe.use_loras(pipe.read_loras([files["full_difference"]]))
    assert type(find(pipe.transformer, layer)) is nn.Linear
    pipe.use_loras(())
    assert find(pipe.transformer, layer) is quantized_layer


def test_differences_of_norms_and_biases_are_honoured(model: Path, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / "diff.safetensors"
    names_of = {
        "layers.0.attention_norm1.weight": "diffusion_model.layers.0.attention_norm1.diff",
        "layers.1.attention.norm_q.weight": "diffusion_model.layers.1.attention.q_norm.diff",
        "t_embedder.mlp.0.bias": "diffusion_model.t_embedder.mlp.0.diff_b",
        "all_x_embedder.2-1.weight": "diffusion_model.x_embedder.diff",
        "layers.0.adaLN_modulation.0.bias": "diffusion_model.layers.0.adaLN_modulation.0.diff_b",
    }
    diffs = {name: rng.standard_normal(SHAPES[name]).astype(np.float32) * 0.3 for name in names_of}
    lora_makers.save_file({names_of[name]: diff for name, diff in diffs.items()}, path)
    changed = {name: Tensor.of(weight + diffs.get(name, np.float32(0))) for name, weight in BASE.items()}
    expected = zimage_ref.ZImagePipeline.from_pretrained(model)
    expected.folder.weights["transformer"] = changed
    wanted = picture(expected)
    for backend in ("numpy", "mlx"):
        for bits in (32, 4):
            pipe = make_pipeline(model, backend, bits)
            plain = picture(pipe)
            made = picture(pipe, path)
            assert np.abs(made - plain).max() > 0.02
            assert bits == 4 or np.abs(made - wanted).max() < ROUNDING
            np.testing.assert_array_equal(picture(pipe), plain)


def test_loras_are_read_once_until_their_file_changes(model: Path, tmp_path: Path) -> None:
    pipe, path = make_pipeline(model, "numpy", 32), tmp_path / "lora.safetensors"
    lora_makers.burn(path, FACTORS, ALPHA, BASE)
    ((first, _),), ((again, scale),) = pipe.read_loras([path]), pipe.read_loras([(path, 0.4)])
    assert first is again and scale == 0.4
    lora_makers.burn(path, FACTORS, 11 * ALPHA, BASE)  # only the sidecar differs
    ((changed, _),) = pipe.read_loras([path])
    assert changed.scales == [11 * ALPHA / RANK]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale: float, model: Path, files: dict[str, Path]) -> None:
    pipe = make_pipeline(model, "numpy", 32)
    with pytest.raises(zimage_ref.ConfigError, match="LoRA scale .* must be at"):
        picture(pipe, (files["comfy"], scale))


def test_a_lean_pipeline_merges_and_makes_the_same_picture(model: Path, files: dict[str, Path]) -> None:
    loras = [(files["comfy"], 0.8), (files["lokr"], 0.3)]
    lean = zimage_mlx.ZImagePipeline.from_pretrained(model, "float32", lean=True)
    lean.use_loras(lean.read_loras(loras))
    assert not [m for m in lean.transformer.modules() if isinstance(m, LoRALinear)]
    living = make_pipeline(model, "mlx", 32)
    assert np.abs(picture(lean, *loras) - picture(living, *loras)).max() < SAME


@pytest.mark.parametrize("bits", [32, 4])
def test_every_linear_layer_can_have_a_lora(bits: int, model: Path, tmp_path: Path) -> None:
    """Embedders, modulation and the final layer too, under official names and ComfyUI's."""
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in SHAPES.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    lora = lora_makers.factors(layers, RANK, seed=3, size=0.2)
    short = {
        layer.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer"): matrices
        for layer, matrices in lora.items()
    }
    lora_makers.diffusers(tmp_path / "official.safetensors", lora, ALPHA, BASE)
    lora_makers.kohya(tmp_path / "short.safetensors", short, ALPHA, BASE)
    pictures = []
    for backend in ("numpy", "mlx"):
        pipe = make_pipeline(model, backend, bits)
        for name in ("official", "short"):
            ((file, _),) = pipe.read_loras([tmp_path / f"{name}.safetensors"])
            assert file.updates.keys() == layers.keys() and len(layers) == 37
            pictures.append(picture(pipe, file.path))
    for other in pictures[1:]:
        assert np.abs(other - pictures[0]).max() < ROUNDING
