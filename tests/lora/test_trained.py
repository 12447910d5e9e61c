"""The kinds that training makes: first values, layers on MLX, gradients, and their files in other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import HAS_MLX, mlx_only
from support.tiny_loras import BASE, SHAPES

from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import DTYPE_NAMES, Tensor
from zimage_ref.lora.arithmetic import NumPyArithmetic
from zimage_ref.lora.file import read_lora, write_lora
from zimage_ref.lora.merge import merge_loras
from zimage_ref.lora.trained import MAGNITUDE, TRAINED, Factors, UpdateSize, split
from zimage_ref.lora.updates import Update

if HAS_MLX:
    import mlx.core as mx
    import mlx.nn as nn

    from zimage_mlx.lora import layers as mlx_layers
    from zimage_mlx.lora import trained as mlx_trained

LAYER, BIASED = "layers.1.feed_forward.w1", "layers.0.adaLN_modulation.0"
SIZES = {
    "lora": ("lora", UpdateSize(4, 6.0)),
    "lokr": ("lokr", UpdateSize(3, 6.0)),
    "lokr factor 4": ("lokr", UpdateSize(2, 5.0, factor=4)),
    "lokr of four": ("lokr", UpdateSize(2, 3.0, decompose_both=True)),
    "lokr of whole matrices": ("lokr", UpdateSize(64, 16.0)),
    "loha": ("loha", UpdateSize(3, 6.0)),
    "dora": ("dora", UpdateSize(4, 6.0)),
}
F64 = NumPyArithmetic(np.dtype(np.float64))


def matrices(name: str, weight: np.ndarray, moved: float = 0.2) -> tuple[Factors, float]:
    """Matrices that no longer add nothing, and their scale."""
    kind, size = SIZES[name]
    rng, known = np.random.default_rng(3), TRAINED[kind]
    shapes = known.matrices(*weight.shape, size)
    factors = known.initial(shapes, rng)
    if MAGNITUDE in shapes:
        factors[MAGNITUDE] = np.linalg.norm(weight, axis=1).astype(np.float32)
    factors = {n: a + moved * rng.standard_normal(a.shape).astype(np.float32) for n, a in factors.items()}
    return factors, known.scale(shapes, size)


def update(name: str, weight: np.ndarray, moved: float = 0.2) -> Update:
    factors, scale = matrices(name, weight, moved)
    return TRAINED[SIZES[name][0]].update(factors, scale)


def test_the_square_most_split_and_a_factor_that_does_not_divide() -> None:
    assert split(3840, -1) == (60, 64) and split(10240, -1) == (80, 128) and split(127, -1) == (1, 127)
    assert split(3840, 8) == (8, 480) and split(360, 16) == (15, 24) and split(250, 4) == (2, 125)
    assert split(12, 6) == (2, 6)  # a factor that divides is one of the two


def test_matrices_are_whole_if_the_rank_is_at_least_half_of_their_larger_side() -> None:
    shapes = TRAINED["lokr"].matrices
    assert shapes(3840, 3840, UpdateSize(16, 16.0)) == {
        "lokr_w1": (60, 60), "lokr_w2_a": (64, 16), "lokr_w2_b": (16, 64)
    }  # fmt: skip
    assert shapes(3840, 3840, UpdateSize(32, 16.0)) == {"lokr_w1": (60, 60), "lokr_w2": (64, 64)}
    assert shapes(10240, 3840, UpdateSize(8, 8.0, factor=4, decompose_both=True)).keys() == {
        "lokr_w1", "lokr_w2_a", "lokr_w2_b"
    }  # fmt: skip
    assert "lokr_w1_a" in shapes(10240, 3840, UpdateSize(8, 8.0, decompose_both=True))


@mlx_only
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("layer", [LAYER, BIASED])
def test_a_fresh_layer_changes_nothing(kind: str, bits: int | None, layer: str) -> None:
    base = linear(layer, bits)
    x = mx.random.normal((2, 5, base_inputs(layer)), key=mx.random.key(1))
    shapes = TRAINED[kind].matrices(*SHAPES[f"{layer}.weight"], UpdateSize(4, 2.0))
    factors = TRAINED[kind].initial(shapes, np.random.default_rng(0))
    made = mlx_trained.LAYERS[kind](base, factors, 0.5)
    np.testing.assert_allclose(np.array(made(x)), np.array(base(x)), atol=1e-5)
    assert {name: array.shape for name, array in made.factors().items()} == shapes


def linear(layer: str, bits: int | None = None) -> Any:
    outputs, inputs = SHAPES[f"{layer}.weight"]
    made = nn.Linear(inputs, outputs, bias=f"{layer}.bias" in SHAPES)
    made.weight = mx.array(BASE[f"{layer}.weight"])
    if "bias" in made:
        made.bias = mx.array(BASE[f"{layer}.bias"])
    made = nn.QuantizedLinear.from_linear(made, 32, bits) if bits else made
    made.freeze()
    return made


def base_inputs(layer: str) -> int:
    return SHAPES[f"{layer}.weight"][1]


@mlx_only
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("layer", [LAYER, BIASED])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_layer_does_what_its_update_says(name: str, layer: str, bits: int | None) -> None:
    base = linear(layer, bits)
    weight = np.array(mlx_trained.dense_weight(base)).astype(np.float64)
    factors, scale = matrices(name, weight)
    made = mlx_trained.LAYERS[SIZES[name][0]](base, factors, scale)
    x = np.random.default_rng(5).standard_normal((2, 5, weight.shape[1]))
    wanted = x @ (weight + made.learned().added(weight, F64)).T + (np.array(base.bias) if "bias" in base else 0)
    got = np.array(made(mx.array(x.astype(np.float32))))
    np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())


@mlx_only
@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_central_differences_in_float64(name: str) -> None:
    weight = BASE[f"{LAYER}.weight"].astype(np.float64)
    factors, scale = matrices(name, weight)
    kind, rng = SIZES[name][0], np.random.default_rng(7)
    x, d = rng.standard_normal((6, weight.shape[1])), rng.standard_normal((6, weight.shape[0]))

    def loss(changed: Factors) -> float:
        added = TRAINED[kind].update(changed, scale).added(weight, F64)
        return float(np.sum(d * (x @ (weight + added).T)))

    made = mlx_trained.LAYERS[kind](linear(LAYER), factors, scale)
    x32, d32 = mx.array(x.astype(np.float32)), mx.array(d.astype(np.float32))
    gradients = nn.value_and_grad(made, lambda layer: mx.sum(d32 * layer(x32)))(made)[1]
    wide = {n: a.astype(np.float64) for n, a in factors.items()}
    for factor, array in wide.items():
        direction = rng.standard_normal(array.shape)
        ahead, behind = (loss({**wide, factor: array + s * 1e-5 * direction}) for s in (1, -1))
        wanted = (ahead - behind) / 2e-5
        got = np.sum(np.array(gradients[factor]).astype(np.float64) * direction)
        size = np.linalg.norm(np.array(gradients[factor])) * np.linalg.norm(direction)
        assert abs(got - wanted) < 2e-4 * size, factor


@mlx_only
@pytest.mark.parametrize("kind", TRAINED)
def test_a_bfloat16_stream_stays_bfloat16(kind: str) -> None:
    base = linear(LAYER)
    base.set_dtype(mx.bfloat16)
    factors, scale = matrices(kind, BASE[f"{LAYER}.weight"])
    made = mlx_trained.LAYERS[kind](base, factors, scale)
    x = mx.random.normal((1, 4, base_inputs(LAYER)), key=mx.random.key(2)).astype(mx.bfloat16)
    assert made(x).dtype == mx.bfloat16


@mlx_only
def test_a_branch_below_is_part_of_the_weight() -> None:
    """The training adapter is one, on a quantized base."""
    base, rng = linear(LAYER, 8), np.random.default_rng(0)
    outputs, inputs = SHAPES[f"{LAYER}.weight"]
    A, B = (rng.standard_normal(s).astype(np.float32) for s in ((2, inputs), (outputs, 2)))
    branch = mlx_layers.LoRALinear(base, {"lora_A": A, "lora_B": B}, 0.5)
    wanted = np.array(mlx_trained.dense_weight(base)) + 0.5 * B @ A
    np.testing.assert_allclose(np.array(mlx_trained.dense_weight(branch)), wanted, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("naming", ["comfy", "kohya", "musubi"])
def test_a_file_holds_the_matrices_that_were_trained(name: str, naming: str, tmp_path: Path) -> None:
    weight = BASE[f"{LAYER}.weight"].astype(np.float64)
    ours = update(name, weight)
    write_lora(tmp_path / "x.safetensors", {LAYER: ours}, {}, naming, "f32")
    stored, _ = safetensors.read(tmp_path / "x.safetensors")
    trained = sum(a.size for a in matrices(name, weight)[0].values())
    assert sum(t.size for k, t in stored.items() if not k.endswith(".alpha")) == trained
    again = read_lora(tmp_path / "x.safetensors", SHAPES).updates[LAYER]
    np.testing.assert_allclose(again.added(weight, F64), ours.added(weight, F64), atol=1e-5)


def test_a_magnitude_is_written_in_float32(tmp_path: Path) -> None:
    weight = BASE[f"{LAYER}.weight"]
    write_lora(tmp_path / "x.safetensors", {LAYER: update("dora", weight)}, {}, "comfy", "bf16")
    stored, _ = safetensors.read(tmp_path / "x.safetensors")
    kinds = {key.rpartition(LAYER)[2]: DTYPE_NAMES[tensor.dtype] for key, tensor in stored.items()}
    assert kinds.pop(".dora_scale") == "f32" and set(kinds.values()) == {"bf16"}


def moved_by(loaded: Any, name: str, atol: float = 1e-5) -> None:
    """Asserts that a weight that another program made is the one that we make."""
    weight = BASE[f"{LAYER}.weight"].astype(np.float64)
    wanted = update(name, weight, 0.05).added(weight, F64)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(np.asarray(loaded, np.float64) - weight, wanted, atol=atol)


def written(name: str, path: Path, naming: str = "comfy") -> dict[str, Any]:
    """The tensors of our file by the end of their keys."""
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
    weight = BASE[f"{LAYER}.weight"].astype(np.float64)
    write_lora(path, {LAYER: update(name, weight, 0.05)}, {}, naming, "f32")
    stored, _ = safetensors.read(path)
    return {key.rpartition(f"{LAYER}.")[2]: torch.tensor(np.array(tensor.read())) for key, tensor in stored.items()}


@pytest.mark.oracle
@pytest.mark.parametrize("name", SIZES)
def test_lycoris_loads_our_file_and_makes_the_same_weight(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
    lycoris = pytest.importorskip("lycoris", reason="needs the package lycoris-lora")
    kinds = {"lokr": lycoris.LokrModule, "loha": lycoris.LohaModule}
    kind = kinds.get(name.split()[0], lycoris.LoConModule)
    tensors = written(name, tmp_path / "x.safetensors", "kohya")
    outputs, inputs = SHAPES[f"{LAYER}.weight"]
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(BASE[f"{LAYER}.weight"]))
        module = kind.make_module_from_state_dict("x", layer, *(tensors.get(key) for key in kind.weight_list))
        module.apply_to()
        loaded = layer(torch.eye(inputs)).T  # what it computes with; get_merged_weight multiplies by the scale twice
    assert not [key for key in tensors if key not in kind.weight_list]
    moved_by(loaded.numpy(), name)


@pytest.mark.oracle
@pytest.mark.parametrize("name", SIZES)
def test_peft_loads_our_file_and_makes_the_same_weight(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
    peft = pytest.importorskip("peft", reason="needs the extra `oracle`")
    tensors = written(name, tmp_path / "x.safetensors")
    kind, size = SIZES[name]
    common = {"r": size.rank, "target_modules": ["w1"]}
    config = {
        "lora": lambda: peft.LoraConfig(lora_alpha=size.rank, **common),
        "dora": lambda: peft.LoraConfig(lora_alpha=size.rank, use_dora=True, **common),
        "loha": lambda: peft.LoHaConfig(alpha=size.rank, **common),
        "lokr": lambda: peft.LoKrConfig(
            alpha=size.rank, decompose_both=size.decompose_both, decompose_factor=size.factor, **common
        ),
    }[kind]()
    outputs, inputs = SHAPES[f"{LAYER}.weight"]
    model = torch.nn.ModuleDict({"w1": torch.nn.Linear(inputs, outputs, bias=False)})
    with torch.no_grad():
        model["w1"].weight.copy_(torch.tensor(BASE[f"{LAYER}.weight"]))
    adapted = peft.get_peft_model(model, config)
    tensors.pop("alpha", None)  # 1 x rank: the scale is in the matrices
    if kind == "dora":
        tensors["lora_magnitude_vector"] = tensors.pop("dora_scale")[:, 0]
    result = peft.set_peft_model_state_dict(adapted, {f"base_model.model.w1.{k}": v for k, v in tensors.items()})
    assert not result.unexpected_keys
    moved_by(adapted.merge_and_unload()["w1"].weight.detach().numpy(), name)


@pytest.mark.oracle
@pytest.mark.parametrize("name", SIZES)
def test_first_values_are_spread_as_those_of_lycoris(name: str) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
    lycoris = pytest.importorskip("lycoris", reason="needs the package lycoris-lora")
    kind, size = SIZES[name]
    module = {"lokr": lycoris.LokrModule, "loha": lycoris.LohaModule}.get(kind, lycoris.LoConModule)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3840, 2560, bias=False)
    more = {"decompose_both": size.decompose_both, "factor": size.factor} if kind == "lokr" else {}
    theirs = module("x", layer, 1.0, 8, 4, weight_decompose=kind == "dora", **more).state_dict()
    names = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", MAGNITUDE: "dora_scale"}
    shapes = TRAINED[kind].matrices(2560, 3840, UpdateSize(8, 4.0, size.factor, size.decompose_both))
    ours = TRAINED[kind].initial(shapes, np.random.default_rng(0))
    assert {names.get(n, n): int(np.prod(s)) for n, s in shapes.items()} == {
        n: t.numel() for n, t in theirs.items() if n != "alpha"
    }  # fmt: skip
    for factor, array in ours.items():
        other = theirs[names.get(factor, factor)].detach().numpy()
        assert array.shape == other.shape
        if kind == "loha":
            continue  # it begins with values of its own; `TRAINED` says why
        np.testing.assert_allclose(array.std(), other.std(), rtol=0.25, err_msg=factor)
        np.testing.assert_allclose(np.abs(array).max(), np.abs(other).max(), rtol=0.5, err_msg=factor)
    assert TRAINED[kind].scale(shapes, UpdateSize(8, 4.0)) == pytest.approx(float(theirs["alpha"]) / 8)


def test_merging_a_trained_file_gives_the_weight_that_the_layer_has(tmp_path: Path) -> None:
    weight = BASE[f"{LAYER}.weight"]
    for name in SIZES:
        write_lora(tmp_path / "x.safetensors", {LAYER: update(name, weight)}, {}, "comfy", "f32")
        lora = read_lora(tmp_path / "x.safetensors", SHAPES).updates
        merged = merge_loras({f"{LAYER}.weight": Tensor.of(weight)}, [(lora, 1.0)])[f"{LAYER}.weight"].read()
        wide = weight.astype(np.float64)
        np.testing.assert_allclose(merged, wide + update(name, wide).added(wide, F64), atol=2e-5, err_msg=name)


def first_step(kind: str, size: UpdateSize, out: int, inputs: int) -> float:
    """How far a first step of Adam goes: the sum, over the matrix that is zero, of the changes that a 1 there makes."""
    known, total, seeds = TRAINED[kind], 0.0, range(4)
    shapes = known.matrices(out, inputs, size)
    (zero,) = (name for name in shapes if name in known.last)
    for seed in seeds:
        factors = known.initial(shapes, np.random.default_rng(seed))
        for place in np.ndindex(*shapes[zero]):
            factors[zero][place] = 1.0
            total += known.update(factors, 1.0).norm()
            factors[zero][place] = 0.0
    return total / len(seeds)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("lokr", UpdateSize(3, 3.0)), ("lokr", UpdateSize(3, 3.0, decompose_both=True)),
        ("lokr", UpdateSize(64, 1.0, factor=4)), ("loha", UpdateSize(16, 1.0)),
    ],
)  # fmt: skip
def test_the_rate_of_a_kind_makes_its_first_step_as_long_as_that_of_a_lora(kind: str, size: UpdateSize) -> None:
    out, inputs = 56, 42
    expected = first_step("lora", UpdateSize(16, 16.0), out, inputs)
    rate = TRAINED[kind].rate(TRAINED[kind].matrices(out, inputs, size))
    assert rate * first_step(kind, size, out, inputs) == pytest.approx(expected, rel=0.1)


def test_lora_and_dora_have_one_rate_whatever_their_rank() -> None:
    for kind, rank in (("lora", 1), ("lora", 64), ("dora", 8)):
        assert TRAINED[kind].rate(TRAINED[kind].matrices(20, 30, UpdateSize(rank, 1.0))) == 1
