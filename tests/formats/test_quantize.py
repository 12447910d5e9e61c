"""Quantization: bit for bit MLX's, while converting and while loading, in both packages."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny

import zimage_ref
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats import npz
from zimage_ref.formats.affine import affine_layers
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import (
    BITS,
    GROUP_SIZES,
    Quantization,
    QuantizedTensor,
    dequantized,
    quantize,
    quantized,
    unfold,
)
from zimage_ref.formats.small_floats import E4M3
from zimage_ref.formats.tensors import BFLOAT16, DTYPES, Tensor, cast
from zimage_ref.model import parameters
from zimage_ref.model.config import OFFICIAL_TEXT_ENCODER, OFFICIAL_TRANSFORMER
from zimage_ref.model.quantization import covers, quantize_all

MLX_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("quantize") / "model")


def matrix(rows: int, columns: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(rows)
    values = rng.standard_normal((rows, columns)) * rng.uniform(0.01, 3, (rows, 1))
    values[0], values[1, ::2], values[2, :128] = 0, -1.5, 0.25  # constant groups, and such with two values
    return cast(values.astype(np.float32), DTYPES[dtype])


@pytest.mark.parametrize("dtype", MLX_DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_it_is_mlxs_bit_for_bit(bits: int, group_size: int, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    weight, how = matrix(24, 256, dtype), Quantization(bits, group_size)
    with mx.stream(mx.cpu):
        array = mx.array(cast(weight, DTYPES["f32"])).astype(getattr(mx, MLX_DTYPES[dtype]))
        theirs = mx.quantize(array, group_size=group_size, bits=bits)
        restored = mx.dequantize(*theirs, group_size=group_size, bits=bits)
        mx.eval(theirs, restored)
    ours = quantize(weight, how)
    for name, mine, their in zip(("weight", "scales", "biases"), ours, theirs, strict=True):
        np.testing.assert_array_equal(bits_of(mine), mlx_bits(mx, their), err_msg=name)
    np.testing.assert_array_equal(bits_of(dequantized(*ours, how)), mlx_bits(mx, restored))


def test_bits_that_are_asked_for_replace_those_of_the_file(model: Path, tmp_path: Path) -> None:
    for name, source, bits in (("8.npz", model, 8), ("4.npz", tmp_path / "8.npz", 4)):
        target = Target(tmp_path / name, "transformer", quantization=Quantization(bits))
        write_model(open_source(source, "transformer"), target)
    found = open_source(tmp_path / "4.npz", "transformer").tensors.values()
    assert {t.quantization.bits for t in found if isinstance(t, QuantizedTensor)} == {4}


def test_a_group_of_almost_nothing_is_mlxs_too() -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    weight, how = np.full((2, 64), 1e-9, np.float32), Quantization(4, 32)
    weight[1] = 0
    with mx.stream(mx.cpu):
        theirs = mx.quantize(mx.array(weight), group_size=32, bits=4)
        mx.eval(theirs)
    for mine, their in zip(quantize(weight, how), theirs, strict=True):
        np.testing.assert_array_equal(mine, np.array(their))


def test_a_nan_stays_one_in_bfloat16() -> None:
    values = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], "<u4").view("<f4")  # rounding could carry into the sign
    assert np.isnan(cast(cast(values, DTYPES["bf16"]), DTYPES["f32"])).all()


def test_float8_without_infinity_has_two_codes_that_are_no_numbers() -> None:
    assert np.flatnonzero(np.isnan(E4M3)).tolist() == [0x7F, 0xFF]


def test_a_width_of_the_file_decides_before_what_most_layers_have(tmp_path: Path) -> None:
    def triple(words: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        scales = np.zeros((128, groups), np.float32)
        return Tensor.of(np.zeros((128, words), "<u4")), Tensor.of(scales), Tensor.of(scales)

    layers = {name: triple(16, 2) for name in "abc"} | {"d": triple(32, 4)}  # 4 bits in groups of 64, or 8 of 32
    found = affine_layers(layers, {name: parts[0] for name, parts in layers.items()}, {}, tmp_path)
    assert {name: tensor.shape for name, tensor in found.items()} == dict.fromkeys("abcd", (128, 128))
    assert [found[name].quantization.bits for name in "ad"] == [4, 8]


def bits_of(array: np.ndarray) -> np.ndarray:
    return array.view({2: "<u2", 4: "<u4"}[array.dtype.itemsize])


def mlx_bits(mx, array) -> np.ndarray:
    return np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size]))


@pytest.mark.parametrize(("bits", "bound"), [(4, 1 / 15), (8, 1 / 255)])
def test_the_error_is_at_most_half_a_step_or_so(bits: int, bound: float) -> None:
    weight, how = matrix(24, 256, "f32"), Quantization(bits, 32)
    error = np.abs(dequantized(*quantize(weight, how), how) - weight).reshape(24, 8, 32).max(-1)
    spread = np.ptp(weight.reshape(24, 8, 32), axis=-1)
    assert (error <= bound * spread * 1.01 + 1e-6).all() and error.max() > 0


def test_what_is_sensitive_stays_as_it_is() -> None:
    how = Quantization(4)
    shapes = parameters.transformer_parameters(OFFICIAL_TRANSFORMER) | parameters.text_encoder_parameters(
        OFFICIAL_TEXT_ENCODER
    )
    covered = {name for name, shape in shapes.items() if covers(how, name, shape)}
    assert len(covered) == 34 * 7 + 36 * 7
    for part in ("embed", "adaLN", "final_layer", "norm", "pad_token"):
        assert not any(part in name for name in covered)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (7, 64), (4, 16), (16, 64), ("4", 64)])
def test_what_mlx_has_not_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        Quantization(bits, group_size)


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    how = Quantization(4, 32)
    for component in ("transformer", "text_encoder"):
        for suffix in ("npz", "safetensors"):
            target = Target(folder / f"{component}.{suffix}", component, "bf16", how)
            write_model(open_source(model, component), target)
    return {path.name: path for path in folder.iterdir()}


def test_a_quantized_file_says_so_and_mlx_reads_its_layout(converted: dict[str, Path]) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    file = Checkpoint.open(converted["transformer.npz"])
    assert file.record["quantization"] == {"mode": "affine", "bits": 4, "group_size": 32}
    arrays = mx.load(str(file.path))
    layer = "layers.1.feed_forward.w2"
    parts = [arrays[f"{layer}.{part}"] for part in ("weight", "scales", "biases")]
    assert [p.dtype for p in parts] == [mx.uint32, mx.bfloat16, mx.bfloat16]
    with mx.stream(mx.cpu):
        theirs = mx.dequantize(*parts, group_size=32, bits=4)
        mx.eval(theirs)
    tensor = file.tensors[f"{layer}.weight"]
    assert isinstance(tensor, QuantizedTensor) and tensor.shape == (96, 256)
    np.testing.assert_array_equal(bits_of(tensor.read()), mlx_bits(mx, theirs))


def test_it_converts_between_containers_without_change_and_back_to_plain(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    source = open_source(converted["transformer.safetensors"], "transformer")
    write_model(source, Target(tmp_path / "a.npz", "transformer"))
    same = npz.read(tmp_path / "a.npz")[0]
    for name, tensor in npz.read(converted["transformer.npz"])[0].items():
        np.testing.assert_array_equal(same[name].read(), tensor.read(), strict=True)
    write_model(source, Target(tmp_path / "plain.safetensors", "transformer", naming="comfy"))
    plain = open_source(tmp_path / "plain.safetensors", "transformer")
    assert not any(isinstance(t, QuantizedTensor) for t in plain.tensors.values())
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(tensor.read(), source.tensors[name].read(), strict=True)
    write_model(source, Target(tmp_path / "again.npz", "transformer", quantization=Quantization(8, 32)))
    assert Checkpoint.open(tmp_path / "again.npz").record["quantization"]["bits"] == 8


def draw(package, model: Path, **options: object) -> np.ndarray:
    pipe = package.ZImagePipeline.from_pretrained(model, dtype="float32", **options)
    return pipe("a red fox", width=32, height=48, steps=1, output="array")[0]


def test_both_packages_read_a_quantized_file_alike(model: Path, converted: dict[str, Path]) -> None:
    zimage_mlx = pytest.importorskip("zimage_mlx.pipeline", reason="MLX is not installed")
    parts = {name: converted[f"{name}.npz"] for name in ("transformer", "text_encoder")}
    ours, theirs = (draw(package, model, parts=parts) for package in (zimage_ref, zimage_mlx))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - draw(zimage_ref, model)).max() > 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_both_packages_quantize_alike_while_loading(bits: int, model: Path) -> None:
    zimage_mlx = pytest.importorskip("zimage_mlx.pipeline", reason="MLX is not installed")
    ours, theirs = (draw(package, model, quantize=bits) for package in (zimage_ref, zimage_mlx))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_both_packages_encode_alike_with_a_quantized_encoder() -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    from zimage_mlx.networks import text_encoder, weights
    from zimage_ref.networks.text_encoder import TextEncoder
    from zimage_ref.networks.weights import Weights

    config = replace(tiny.TEXT_ENCODER, hidden_size=64, intermediate_size=96, head_dim=16)
    shapes, unused = parameters.text_encoder_parameters(config), parameters.text_encoder_unused(config)
    plain = {n: Tensor.of(a) for n, a in tiny.random_weights(shapes).items() if n not in unused}
    tensors = quantize_all(plain, Quantization(4, 32))
    assert sum(isinstance(tensor, QuantizedTensor) for tensor in tensors.values()) == 2 * 7
    ids = np.array([3, 200, 7, 7, 150])
    ours = TextEncoder(config, Weights(tensors, np.dtype("<f4")))(ids)
    model = text_encoder.TextEncoder(config)
    weights.load(model, tensors, mx.float32)
    np.testing.assert_allclose(np.array(model(mx.array(ids))), ours, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - TextEncoder(config, Weights(plain, np.dtype("<f4")))(ids)).max() > 0.01


def test_loading_quantized_is_what_the_quantized_file_holds(model: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    nn = pytest.importorskip("mlx.nn")
    from zimage_mlx import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(model, dtype="bfloat16", quantize=8)
    layer, plain = pipe.transformer.layers[1].feed_forward.w2, pipe.transformer.t_embedder.mlp[0]
    assert isinstance(layer, nn.QuantizedLinear) and (layer.bits, layer.group_size) == (8, 64)
    assert layer.scales.dtype == mx.bfloat16 and layer.weight.dtype == mx.uint32
    assert type(plain) is nn.Linear and plain.weight.dtype == mx.bfloat16
    tensor = pipe.folder.weights["transformer"]["layers.1.feed_forward.w2.weight"].cast("bf16")
    how = Quantization(8)
    if mx.default_device() == mx.cpu:
        np.testing.assert_array_equal(np.array(layer.weight), quantize(tensor.read(), how)[0])


def test_quantizing_holds_one_tensor(tmp_path: Path) -> None:
    nbytes = 4 * 2048 * 1024
    tensors = {
        f"{i}.w": Tensor((2048, 1024), DTYPES["f32"], lambda i=i: np.full((2048, 1024), i, "<f4")) for i in range(8)
    }
    stored = unfold({name: quantized(tensor, Quantization(4)) for name, tensor in tensors.items()})
    tracemalloc.start()
    npz.write(tmp_path / "a.npz", stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * nbytes  # the tensor, blocks of it in work, and what becomes of it; 8 tensors would be 8


def test_parts_that_do_not_fit_are_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    tensors, record = npz.read(converted["transformer.npz"])
    layer = "layers.1.feed_forward.w2"
    for name, change, fact in (
        (f"{layer}.scales", None, "lacks one of"),
        (
            f"{layer}.biases",
            np.zeros((96, 4), "<u2").view(BFLOAT16),
            "which are not 3, 4, 5, 6, 8 bits in groups of 32",
        ),
        (f"{layer}.weight", np.zeros((96, 32), np.float32), "which are not 3, 4, 5, 6, 8 bits"),
        ("", {"bits": 7, "group_size": 64}, "bits 7 must be one of"),
        ("", ["q4"], "does not know"),
    ):
        broken = {n: t for n, t in tensors.items() if n != name}
        if isinstance(change, np.ndarray):
            broken[name] = Tensor.of(change)
        elif name:
            broken.pop(f"{layer}.biases")
            broken[name] = tensors[name]
        changed = record if name else record | {"quantization": change}
        npz.write(tmp_path / "broken.npz", broken, changed)
        with pytest.raises(FormatError, match=fact):
            Checkpoint.open(tmp_path / "broken.npz")
