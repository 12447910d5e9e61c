"""LoRA files: what is read from each dialect, what is refused, what other naming, dtype or sum comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import lora_makers
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from zimage_cli.app import main
from zimage_ref import ConfigError, FormatError, WeightError, ZImageError, names
from zimage_ref.lora import LoRA, LowRank, Update
from zimage_ref.lora_file import read_lora
from zimage_ref.lora_merge import combined, merged, norm
from zimage_ref.lora_writer import NAMINGS, write_lora
from zimage_ref.tensors import Tensor
from zimage_ref.weights import delta

SHAPES = names.transformer_parameters(tiny.TRANSFORMER)
TARGETS = ("attention", "feed_forward", "refiners")
LAYERS = {layer: SHAPES[f"{layer}.weight"] for layer in names.lora_modules(tiny.TRANSFORMER, TARGETS)}
BASE = tiny.random_weights(SHAPES, "transformer")
RANK, ALPHA = 4, 3.0
FACTORS = lora_makers.factors(LAYERS, RANK)
EXACT = 1e-6  # relative, float32


def make(name: str, folder: Path) -> Path:
    path = folder / ("lora.npz" if name == "npz" else "lora.safetensors")
    lora_makers.MAKERS[name](path, FACTORS, ALPHA, BASE)
    return path


def difference(update: Update, name: str) -> np.ndarray:
    return delta(update, BASE[name].astype(np.float64))


def assert_same(one: LoRA, other: LoRA, tolerance: float = EXACT) -> None:
    assert one.keys() == other.keys()
    for name, update in one.items():
        wanted = difference(other[name], name)
        np.testing.assert_allclose(
            difference(update, name), wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name
        )


@pytest.mark.parametrize("name", lora_makers.MAKERS)
@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["checked", "any model"])
def test_every_dialect_says_the_same(name: str, shapes: names.Shapes | None, tmp_path: Path) -> None:
    file = read_lora(make(name, tmp_path), shapes)
    assert file.updates.keys() == {f"{layer}.weight" for layer in LAYERS}
    for layer, (A, B) in FACTORS.items():
        update = file.updates[f"{layer}.weight"]
        assert update.shape == LAYERS[layer]
        wanted = ALPHA / RANK * B.astype(np.float64) @ A
        atol = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(difference(update, f"{layer}.weight"), wanted, rtol=0, atol=atol, err_msg=layer)


@pytest.mark.parametrize(
    ("name", "dialect", "alpha_from", "scale"),
    [
        ("comfy", "ComfyUI (diffusion_model.*.lora_A/B)", "default: alpha = rank", 1),
        ("diffusers", "diffusers (transformer.*.lora_A/B)", "metadata lora_adapter_metadata", 0.75),
        ("kohya", "kohya (lora_unet_*.lora_down/up)", "alpha keys", 0.75),
        ("kohya_fused", "kohya (lora_unet_*.lora_down/up, fused qkv)", "alpha keys", 0.75),
        ("peft", "PEFT (base_model.model.*.lora_A/B)", "adapter_config.json", 0.75),
        ("burn", "bare (*.lora_a/b, fused qkv)", "lora.lora.json", 0.75),
        ("anime_z", "bare (*.lora.down/up, fused qkv)", "alpha keys", 0.75),
    ],
)
def test_the_report_tells_dialect_rank_and_scale(
    name: str, dialect: str, alpha_from: str, scale: float, tmp_path: Path
) -> None:
    file = read_lora(make(name, tmp_path), SHAPES)
    assert file.facts() == {
        "dialect": dialect, "modules": f"{len(LAYERS)} LowRank", "rank": str(RANK), "scale": f"{scale:g}",
        "alpha from": alpha_from, "dtype": "f32",
    }  # fmt: skip


def test_fused_layers_with_matrices_of_their_own_are_told_from_those_with_one(tmp_path: Path) -> None:
    """A block-diagonal qkv of rank 3 r is three of rank r; one A of a rank that 3 divides stays shared."""
    rng, layer = np.random.default_rng(0), "layers.0.attention"
    A, B = rng.standard_normal((6, 96)), rng.standard_normal((288, 6))
    diagonal = B.copy()
    for i in range(3):
        diagonal[i * 96 : (i + 1) * 96, [c for c in range(6) if c // 2 != i]] = 0
    for up, rank in ((B, 6), (diagonal, 2)):
        path = tmp_path / "fused.safetensors"
        name = f"diffusion_model.{layer}.qkv"
        save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": np.ascontiguousarray(up)}, path)
        file = read_lora(path, SHAPES)
        assert file.ranks == [rank]
        for i, part in enumerate("qkv"):
            update = file.updates[f"{layer}.to_{part}.weight"]
            wanted = (up @ A)[i * 96 : (i + 1) * 96]
            np.testing.assert_allclose(delta(update, np.zeros((96, 96))), wanted, atol=1e-4)


def test_kronecker_products_match_their_definition_and_split_by_rows(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "lokr.safetensors"
    plain = {"w1": rng.standard_normal((4, 8)), "w2": rng.standard_normal((24, 12))}
    fused = {"w1": rng.standard_normal((6, 8)), "w2": rng.standard_normal((48, 12))}
    crooked = {"w1": rng.standard_normal((8, 4)), "w2": rng.standard_normal((36, 24))}
    tensors = {}
    for module, parts in {
        "layers.0.attention.to_out.0": plain, "layers.0.attention.qkv": fused, "layers.1.attention.qkv": crooked,
    }.items():  # fmt: skip
        tensors |= {f"diffusion_model.{module}.lokr_{k}": v.astype(np.float32) for k, v in parts.items()}
    save_file(tensors, path)
    updates = read_lora(path, SHAPES).updates
    zeros = np.zeros((96, 96))
    for block, parts in ((0, fused), (1, crooked)):
        for i, part in enumerate("qkv"):
            got = delta(updates[f"layers.{block}.attention.to_{part}.weight"], zeros)
            np.testing.assert_allclose(got, np.kron(parts["w1"], parts["w2"])[96 * i : 96 * i + 96], atol=1e-5)
    got = delta(updates["layers.0.attention.to_out.0.weight"], zeros)
    np.testing.assert_allclose(got, np.kron(plain["w1"], plain["w2"]), atol=1e-5)
    write_lora(tmp_path / "again.safetensors", updates, {}, "comfy", "f32")
    assert_same(read_lora(tmp_path / "again.safetensors", SHAPES).updates, updates)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_dtypes_and_containers_are_read(dtype: str, suffix: str, tmp_path: Path) -> None:
    lora = read_lora(make("kohya", tmp_path), SHAPES).updates
    path = tmp_path / f"other{suffix}"
    write_lora(path, lora, {}, "peft", dtype, with_sidecar=False)
    file = read_lora(path, SHAPES)
    assert file.dtype == dtype and file.scales == [ALPHA / RANK]
    assert_same(file.updates, lora, {"f32": EXACT, "bf16": 2**-7, "f16": 2**-10}[dtype])


@pytest.mark.parametrize("there", NAMINGS)
@pytest.mark.parametrize("back", NAMINGS)
def test_converting_there_and_back_loses_nothing(there: str, back: str, tmp_path: Path) -> None:
    """In bfloat16, whose numbers a scale of 1/2 does not round: exactly the same deltas."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    lora_makers.kohya(tmp_path / "made.safetensors", FACTORS, RANK / 2, BASE)
    write_lora(paths[0], read_lora(tmp_path / "made.safetensors", SHAPES).updates, {}, back, "bf16")
    for source, target, naming in ((0, 1, there), (1, 2, back)):
        argv = [f"--input={paths[source]}", f"--output={paths[target]}", f"--naming={naming}", "--model-type=lora"]
        assert main(["convert", *argv]) == 0
    first, *others = (read_lora(path, SHAPES) for path in paths)
    for other in others:
        assert other.dtype == "bf16" and other.updates.keys() == first.updates.keys()
        for name, update in first.updates.items():
            np.testing.assert_array_equal(difference(other.updates[name], name), difference(update, name), name)


@pytest.mark.parametrize("naming", NAMINGS)
def test_mixed_ranks_and_scales_survive_every_naming(naming: str, tmp_path: Path) -> None:
    rng, lora = np.random.default_rng(2), {}
    for i, (layer, (outputs, inputs)) in enumerate(LAYERS.items()):
        A = rng.standard_normal((2 + i % 3, inputs)).astype(np.float32)
        lora[f"{layer}.weight"] = LowRank(A, rng.standard_normal((outputs, len(A))).astype(np.float32), 0.3 + i)
    del lora["layers.1.attention.to_k.weight"]
    write_lora(tmp_path / "mixed.safetensors", lora, {}, naming, "f32")
    again = read_lora(tmp_path / "mixed.safetensors", SHAPES).updates
    if naming == "burn":  # a fused qkv has all three
        absent = again.pop("layers.1.attention.to_k.weight")
        assert not difference(absent, "layers.1.attention.to_k.weight").any()
    assert_same(again, lora, 1e-5)


@pytest.mark.parametrize("name", ["lokr", "loha", "full_difference", "onetrainer_dora", "lycoris_dora"])
@pytest.mark.parametrize("naming", ["comfy", "kohya"])
def test_other_kinds_survive_the_namings_that_know_them(name: str, naming: str, tmp_path: Path) -> None:
    lora = read_lora(make(name, tmp_path), SHAPES).updates
    write_lora(tmp_path / "x.safetensors", lora, {}, naming, "f32")
    assert_same(read_lora(tmp_path / "x.safetensors", SHAPES).updates, lora, 1e-5)
    for other in ("peft", "burn"):
        with pytest.raises(WeightError, match="use comfy or kohya"):
            write_lora(tmp_path / "y.safetensors", lora, {}, other)
    assert not (tmp_path / "y.safetensors").exists()


def test_alpha_is_applied_once(tmp_path: Path) -> None:
    """The default naming folds it into B, says so beside the file, and no reader takes it from there again."""
    lora = {"layers.0.attention.to_q.weight": LowRank(np.ones((2, 96), np.float32), np.ones((96, 2), np.float32), 4.0)}
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, {"rank": 2, "alpha": 8.0})
    sidecar = json.loads((tmp_path / "x.lora.json").read_text(encoding="utf-8"))
    assert sidecar == {"rank": 2, "alpha": 8.0, "alpha_folded": True}
    file = read_lora(path, SHAPES)
    assert file.scales == [1.0]
    assert_same(file.updates, lora)


def rename(key: str) -> Callable[[dict[str, np.ndarray]], str]:
    def change(tensors: dict[str, np.ndarray]) -> str:
        new = key.replace("to_q", "to_w").replace("w1", "w4")
        tensors[new] = tensors.pop(key)
        return new

    return change


def shrink(key: str) -> Callable[[dict[str, np.ndarray]], str]:
    def change(tensors: dict[str, np.ndarray]) -> str:
        tensors[key] = np.ascontiguousarray(tensors[key][..., :-1])
        return key

    return change


def drop(key: str, other: str) -> Callable[[dict[str, np.ndarray]], str]:
    def change(tensors: dict[str, np.ndarray]) -> str:
        del tensors[key]
        return other

    return change


def add(key: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], str]:
    def change(tensors: dict[str, np.ndarray]) -> str:
        tensors[key] = value
        return key

    return change


def replace(key: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], str]:
    return add(key, value)


Q = "diffusion_model.layers.1.attention.to_q"
FAULTS = {
    "a key renamed": ("comfy", rename(f"{Q}.lora_A.weight")),
    "a half missing": ("comfy", drop(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")),
    "the other half missing": ("comfy", drop(f"{Q}.lora_B.weight", f"{Q}.lora_A.weight")),
    "A of another width": ("comfy", shrink(f"{Q}.lora_A.weight")),
    "B of another rank": ("comfy", shrink(f"{Q}.lora_B.weight")),
    "another prefix": ("comfy", add("transformer.layers.0.attention.to_q.lora_A.weight", np.ones((4, 96)))),
    "a layer too many": ("comfy", add("diffusion_model.layers.2.attention.to_q.lora_A.weight", np.ones((4, 96)))),
    "a stray tensor": ("comfy", add("diffusion_model.layers.0.attention.to_q.weight", np.ones((96, 96)))),
    "a bias where there is none": ("comfy", add(f"{Q}.diff_b", np.ones(96))),
    "a bias of another length": ("comfy", add("diffusion_model.t_embedder.mlp.0.diff_b", np.ones(7))),
    "alpha of nothing": ("comfy", add("diffusion_model.t_embedder.mlp.0.alpha", np.ones(()))),
    "alpha of many": ("kohya", replace("lora_unet_layers_1_attention_to_q.alpha", np.ones(3))),
    "alpha not a number": ("kohya", replace("lora_unet_layers_1_attention_to_q.alpha", np.array(np.nan))),
    "integers": ("comfy", replace(f"{Q}.lora_A.weight", np.ones((4, 96), np.int32))),
    "infinity": ("comfy", replace(f"{Q}.lora_B.weight", np.full((96, 4), np.inf))),
    "no rank": ("lokr", replace(f"{Q}.lokr_w2_b", np.ones((0, 96)))),
    "a convolution": ("comfy", replace(f"{Q}.lora_A.weight", np.ones((4, 96, 1, 1)))),
    "a fused layer of other rows": ("burn", replace("layers.0.attention.qkv.lora_b", np.ones((289, 4)))),
    "a fused layer that differs": ("anime_z", replace("layers.0.attention.qkv.lora.up.weight", np.ones((288, 4)))),
    "a repeated layer that differs": ("anime_z", replace("layers.0.attention.out.lora.up.weight", np.ones((96, 4)))),
    "a magnitude of another shape": (
        "onetrainer_dora",
        add("transformer.layers.0.attention.to_q.dora_scale", np.ones((96, 2))),
    ),
    "Hadamard factors of two shapes": ("loha", shrink("lora_unet_layers_0_attention_to_q.hada_w2_b")),
    "Tucker's core": ("loha", add("lora_unet_layers_0_attention_to_q.hada_t1", np.ones((4, 4)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused_with_the_key_named(fault: str, tmp_path: Path) -> None:
    name, change = FAULTS[fault]
    path = make(name, tmp_path)
    tensors = load_file(path)
    key = change(tensors)
    save_file(tensors, path)
    with pytest.raises(WeightError) as error:
        read_lora(path, SHAPES)
    named = key if "fused layer that" not in fault else "layers.0.attention.to_q.weight"
    assert str(error.value).startswith(f"{path}: ") and named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight", "Stable Diffusion"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "Qwen-Image"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        ("diffusion_model.blocks.0.cross_attn.q.lora_A.weight", "Wan"),
    ],
)
def test_a_lora_for_another_model_is_refused_with_the_model_named(key: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: np.ones((4, 96), np.float32)}, path)
    with pytest.raises(WeightError) as error:
        read_lora(path, SHAPES)
    assert key in str(error.value) and model in str(error.value)


def test_a_lora_for_a_wider_transformer_is_refused(tmp_path: Path) -> None:
    path = make("kohya_native", tmp_path)
    with pytest.raises(WeightError, match="lora_unet_context_refiner_0_attention_out.lora_down.weight"):
        read_lora(path, names.transformer_parameters(tiny.NARROW))


def test_a_file_without_its_alpha_is_refused_or_takes_the_default(tmp_path: Path) -> None:
    path = make("burn", tmp_path)
    path.with_suffix(".lora.json").unlink()
    with pytest.raises(FormatError, match="lora.lora.json"):
        read_lora(path, SHAPES)
    path = make("peft", tmp_path)
    path.with_name("adapter_config.json").unlink()
    assert read_lora(path, SHAPES).scales == [1.0]
    path.with_name("adapter_config.json").write_text('{"lora_alpha": "many"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="lora_alpha"):
        read_lora(path, SHAPES)


def test_alphas_of_peft_follow_pattern_and_rank_stabilization(tmp_path: Path) -> None:
    path = make("peft", tmp_path)
    pattern = {"attention.to_q": 10, "layers.0.feed_forward.w1": 2}
    config = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": pattern}
    path.with_name("adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    updates = read_lora(path, SHAPES).updates
    assert updates["layers.1.attention.to_q.weight"].scale == 10 / RANK**0.5
    assert updates["layers.0.feed_forward.w1.weight"].scale == 2 / RANK**0.5
    assert updates["layers.1.feed_forward.w1.weight"].scale == 6 / RANK**0.5


def test_a_folder_that_peft_saved_is_read(tmp_path: Path) -> None:
    path = make("peft", tmp_path)
    assert read_lora(tmp_path, SHAPES).path == path


def test_combining_is_exact_and_reducing_is_the_best_of_its_rank(tmp_path: Path) -> None:
    first = read_lora(make("kohya", tmp_path), SHAPES).updates
    lora_makers.comfy(tmp_path / "b.safetensors", lora_makers.factors(LAYERS, 3, seed=9), 3, BASE)
    second = read_lora(tmp_path / "b.safetensors", SHAPES).updates
    whole, few = combined([(first, 0.7), (second, -0.5)]), combined([(first, 0.7), (second, -0.5)], rank=5)
    for name in first:
        wanted = 0.7 * difference(first[name], name) - 0.5 * difference(second[name], name)
        np.testing.assert_allclose(difference(whole[name], name), wanted, atol=1e-5)
        assert isinstance(whole[name], LowRank) and whole[name].rank == 7 and few[name].shape == whole[name].shape
        singular = np.linalg.svd(wanted, compute_uv=False)
        error = np.linalg.norm(difference(few[name], name) - wanted)
        np.testing.assert_allclose(error, np.linalg.norm(singular[5:]), rtol=1e-3)
    np.testing.assert_allclose(
        norm(whole["layers.0.attention.to_q.weight"]),
        np.linalg.norm(difference(whole["layers.0.attention.to_q.weight"], "layers.0.attention.to_q.weight")),
        rtol=1e-5,
    )


def test_what_is_not_low_rank_becomes_low_rank_by_reducing(tmp_path: Path) -> None:
    dense = read_lora(make("full_difference", tmp_path), SHAPES).updates
    lokr = read_lora(make("lokr", tmp_path), SHAPES).updates
    assert_same(combined([(dense, 1.0)], rank=RANK), dense, 1e-5)  # the differences are of this rank
    assert_same(combined([(dense, 0.25), (lokr, 0.75)], rank=RANK), lokr, 1e-5)
    assert_same(combined([(dense, 0.25), (lokr, 0.75)]), lokr, 1e-5)


def test_dora_is_not_combined_without_its_base(tmp_path: Path) -> None:
    dora = read_lora(make("onetrainer_dora", tmp_path), SHAPES).updates
    assert combined([(dora, 1.0)]) == dora
    for loras, rank in (([(dora, 0.5)], None), ([(dora, 1.0), (dora, 1.0)], None), ([(dora, 1.0)], 2)):
        with pytest.raises(WeightError, match=r"\.attention\.to_k\.weight: .*--merge-lora"):
            combined(loras, rank)


@pytest.mark.parametrize("name", ["comfy", "lokr", "onetrainer_dora"])
def test_baking_in_is_the_weight_plus_the_delta_in_the_checkpoints_dtype(name: str, tmp_path: Path) -> None:
    lora = read_lora(make(name, tmp_path), SHAPES).updates
    tensors = {key: Tensor.of(value.astype(np.float16)) for key, value in BASE.items()}
    baked = merged(tensors, [(lora, 0.5)])
    assert baked.keys() == tensors.keys()
    for key, tensor in baked.items():
        wanted = tensors[key].read().astype(np.float64)
        if key in lora:
            wanted = wanted + 0.5 * delta(lora[key], wanted)
        assert tensor.read().dtype == np.float16
        np.testing.assert_allclose(tensor.read(), wanted, rtol=2**-10, atol=1e-6)


def test_numbers_that_a_dtype_cannot_hold_are_not_written(tmp_path: Path) -> None:
    lora = {"layers.0.attention.to_q.weight": LowRank(np.ones((2, 96), np.float32), np.full((96, 2), 1e6, np.float32))}
    with pytest.raises(WeightError, match="does not fit in f16"):
        write_lora(tmp_path / "x.safetensors", lora, {}, dtype="f16")
    assert not list(tmp_path.iterdir())


def test_the_command_line_combines_converts_bakes_and_inspects(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, a, b = tiny.write_model_folder(tmp_path / "model"), make("kohya", tmp_path), tmp_path / "b.safetensors"
    lora_makers.burn(b, lora_makers.factors(LAYERS, 3, seed=9), 6, BASE)
    out = tmp_path / "sum.npz"
    argv = ["convert", "--model-type=lora", f"--input={a}:0.7", f"--input={b}:-0.5", f"--output={out}", "--rank=5"]
    assert main(argv) == 0
    first, second = (read_lora(path, SHAPES).updates for path in (a, b))
    assert_same(read_lora(out, SHAPES).updates, combined([(first, 0.7), (second, -0.5)], 5), 1e-5)

    baked = tmp_path / "baked.npz"
    argv = ["convert", "--model-type=transformer", f"--input={model / 'transformer'}", f"--output={baked}"]
    assert main([*argv, f"--merge-lora={a}:0.7", f"--merge-lora={b}"]) == 0
    with np.load(baked) as tensors:
        for name in BASE:
            wanted = BASE[name]
            if name in first:
                wanted = wanted + 0.7 * difference(first[name], name) + difference(second[name], name)
            np.testing.assert_allclose(tensors[name], wanted, atol=1e-5)

    capfd.readouterr()
    assert main(["inspect", f"--input={a}", "--limit=1"]) == 0
    text = capfd.readouterr().out
    for fact in ("kohya (lora_unet_*.lora_down/up)", "alpha keys", "0.75", "layers.*.attention.to_q", "28 LowRank"):
        assert fact in text


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["generate", "--prompt=x", "--model-dir={model}", "--lora=x:nan"], "x:nan: a LoRA is given as PATH"),
        (["convert", "--model-type=lora", "--input={a}", "--output={x}.bin"], "unknown format"),
        (["convert", "--model-type=lora", "--input={a}", "--output={x}.npz", "--rank=0"], "--rank 0 must be"),
        (["convert", "--model-type=vae", "--input={a}", "--input={a}", "--output={x}.npz"], "--model-type lora only"),
        (["convert", "--model-type=vae", "--input={model}/vae", "--output={x}.npz", "--merge-lora={a}"], "transformer"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_in_one_line(
    argv: list[str], fact: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, a = tiny.write_model_folder(tmp_path / "model"), make("kohya", tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main([part.format(model=model, a=a, x=tmp_path / "x") for part in argv]) == 1
    assert fact in capfd.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_no_error_is_anything_but_a_zimage_error(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{}      "):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(ZImageError):
            read_lora(path, SHAPES)
