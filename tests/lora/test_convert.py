"""LoRAs converted, combined and baked in: nothing is lost, and what cannot be done is refused."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support import lora_makers, tiny
from support.daily import daily
from support.tiny_loras import BASE, FACTORS, LAYERS, RANK, SHAPES, assert_same, delta, difference, make

from zimage_cli.app import main
from zimage_ref import TrainConfig, WeightError
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import read_lora, write_lora
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.lora.merge import combine_loras, merge_loras
from zimage_ref.lora.spellings import lora_namings

NAMINGS = list(lora_namings())


@pytest.mark.parametrize(
    ("there", "back"), daily(product(NAMINGS, NAMINGS), *zip(NAMINGS, NAMINGS[1:] + NAMINGS[:1], strict=True))
)
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


@pytest.mark.parametrize("naming", lora_namings())
def test_mixed_ranks_and_scales_survive_every_naming(naming: str, tmp_path: Path) -> None:
    rng, lora = np.random.default_rng(2), {}
    for i, (layer, (outputs, inputs)) in enumerate(LAYERS.items()):
        A = rng.standard_normal((2 + i % 3, inputs)).astype(np.float32)
        lora[layer] = LowRank(A, rng.standard_normal((outputs, len(A))).astype(np.float32), scale=0.3 + i)
    del lora["layers.1.attention.to_k"]
    write_lora(tmp_path / "mixed.safetensors", lora, {}, naming, "f32")
    again = read_lora(tmp_path / "mixed.safetensors", SHAPES).updates
    if naming == "burn":  # a fused qkv has all three
        absent = again.pop("layers.1.attention.to_k")
        assert not difference(absent, "layers.1.attention.to_k").any()
    assert_same(again, lora, 1e-5)


@pytest.mark.parametrize("name", ["lokr", "loha", "full_difference", "onetrainer_dora", "lycoris_dora"])
@pytest.mark.parametrize("naming", ["comfy", "kohya", "musubi"])
def test_other_kinds_survive_the_namings_that_know_them(name: str, naming: str, tmp_path: Path) -> None:
    lora = read_lora(make(name, tmp_path), SHAPES).updates
    write_lora(tmp_path / "x.safetensors", lora, {}, naming, "f32")
    assert_same(read_lora(tmp_path / "x.safetensors", SHAPES).updates, lora, 1e-5)
    for other in ("peft", "burn"):
        with pytest.raises(WeightError, match="use comfy or musubi or kohya"):
            write_lora(tmp_path / "y.safetensors", lora, {}, other)
    assert not (tmp_path / "y.safetensors").exists()


def test_alpha_is_applied_once(tmp_path: Path) -> None:
    """The default naming folds it into B, says so beside the file, and no reader takes it from there again."""
    lora = {"layers.0.attention.to_q": LowRank(np.ones((2, 96), np.float32), np.ones((96, 2), np.float32), scale=4.0)}
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, {"rank": 2, "alpha": 8.0})
    sidecar = json.loads((tmp_path / "x.lora.json").read_text(encoding="utf-8"))
    assert sidecar == {"rank": 2, "alpha": 8.0, "alpha_folded": True}
    file = read_lora(path, SHAPES)
    assert file.scales == [1.0]
    assert_same(file.updates, lora)


def test_combining_is_exact_and_reducing_is_the_best_of_its_rank(tmp_path: Path) -> None:
    first = read_lora(make("kohya", tmp_path), SHAPES).updates
    lora_makers.comfy(tmp_path / "b.safetensors", lora_makers.factors(LAYERS, 3, seed=9), 3, BASE)
    second = read_lora(tmp_path / "b.safetensors", SHAPES).updates
    whole, few = combine_loras([(first, 0.7), (second, -0.5)]), combine_loras([(first, 0.7), (second, -0.5)], rank=5)
    for name in list(first)[::5]:  # every shape
        wanted = 0.7 * difference(first[name], name) - 0.5 * difference(second[name], name)
        np.testing.assert_allclose(difference(whole[name], name), wanted, atol=1e-5)
        assert isinstance(whole[name], LowRank) and whole[name].rank == 7 and few[name].shape == whole[name].shape
        singular = np.linalg.svd(wanted, compute_uv=False)
        error = np.linalg.norm(difference(few[name], name) - wanted)
        np.testing.assert_allclose(error, np.linalg.norm(singular[5:]), rtol=1e-3)
    np.testing.assert_allclose(
        whole["layers.0.attention.to_q"].norm(),
        np.linalg.norm(difference(whole["layers.0.attention.to_q"], "layers.0.attention.to_q")),
        rtol=1e-5,
    )


def test_what_is_not_low_rank_becomes_low_rank_by_reducing(tmp_path: Path) -> None:
    dense = read_lora(make("full_difference", tmp_path), SHAPES).updates
    lokr = read_lora(make("lokr", tmp_path), SHAPES).updates
    assert_same(combine_loras([(dense, 1.0)], rank=RANK), dense, 1e-5)  # the differences are of this rank
    assert_same(combine_loras([(dense, 0.25), (lokr, 0.75)], rank=RANK), lokr, 1e-5)
    assert_same(combine_loras([(dense, 0.25), (lokr, 0.75)]), lokr, 1e-5)


def test_dora_is_not_combined_without_its_base(tmp_path: Path) -> None:
    dora = read_lora(make("onetrainer_dora", tmp_path), SHAPES).updates
    assert combine_loras([(dora, 1.0)]) == dora
    for loras, rank in (([(dora, 0.5)], None), ([(dora, 1.0), (dora, 1.0)], None), ([(dora, 1.0)], 2)):
        with pytest.raises(WeightError, match=r"\.attention\.to_k: .*`merge_lora`"):
            combine_loras(loras, rank)


@pytest.mark.parametrize("name", ["comfy", "lokr", "onetrainer_dora"])
def test_baking_in_is_the_weight_plus_the_delta_in_the_checkpoints_dtype(name: str, tmp_path: Path) -> None:
    lora = read_lora(make(name, tmp_path), SHAPES).updates
    tensors = {key: Tensor.of(value.astype(np.float16)) for key, value in BASE.items()}
    baked = merge_loras(tensors, [(lora, 0.5)])
    assert baked.keys() == tensors.keys()
    for key, tensor in baked.items():
        wanted = tensors[key].read().astype(np.float64)
        layer = key.removesuffix(".weight")
        if layer in lora:
            wanted = wanted + 0.5 * delta(lora[layer], wanted)
        assert tensor.read().dtype == np.float16
        np.testing.assert_allclose(tensor.read(), wanted, rtol=2**-10, atol=1e-6)


def test_numbers_that_a_dtype_cannot_hold_are_not_written(tmp_path: Path) -> None:
    lora = {"layers.0.attention.to_q": LowRank(np.ones((2, 96), np.float32), np.full((96, 2), 1e6, np.float32))}
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
    assert_same(read_lora(out, SHAPES).updates, combine_loras([(first, 0.7), (second, -0.5)], 5), 1e-5)

    baked = tmp_path / "baked.npz"
    argv = ["convert", "--model-type=transformer", f"--input={model / 'transformer'}", f"--output={baked}"]
    assert main([*argv, f"--merge-lora={a}:0.7", f"--merge-lora={b}"]) == 0
    with np.load(baked) as tensors:
        for name in BASE:
            wanted, layer = BASE[name], name.removesuffix(".weight")
            if layer in first:
                wanted = wanted + 0.7 * difference(first[layer], layer) + difference(second[layer], layer)
            np.testing.assert_allclose(tensors[name], wanted, atol=1e-5)

    capfd.readouterr()
    assert main(["inspect", f"--input={a}", "--limit=1"]) == 0
    text = capfd.readouterr().out
    for fact in ("kohya (lora_unet_*.lora_down/up)", "alpha keys", "0.75", "layers.*.attention.to_q", "28 LoRA"):
        assert fact in text


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["generate", "--prompt=x", "--model-dir={model}", "--lora=x:nan"], "x:nan: give a LoRA as PATH"),
        (["convert", "--model-type=lora", "--input={a}", "--output={x}.bin"], "x.bin: "),
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


@pytest.mark.parametrize("naming", lora_namings())
def test_training_writes_the_naming_that_is_asked_for(naming: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)
    from zimage_mlx import train

    model, data = tiny.write_model_folder(tmp_path / "model"), tiny.write_dataset(tmp_path / "data")
    for picture in sorted(data.glob("photo[1-9]*")):
        picture.unlink()
    config = TrainConfig(
        model, data, tmp_path / "x.safetensors", rank=4, alpha=2.0, epochs=1, resolution=32, lr=0.1, lora_format=naming
    )
    *_, saved = train(config)
    file = read_lora(saved.path, SHAPES)
    assert file.updates.keys() == LAYERS.keys()
    assert (
        file.scales == ([1.0] if naming in ("comfy", "peft") else [0.5]) and file.dtype == "bf16" and file.ranks == [4]
    )
    assert file.updates["layers.1.feed_forward.w2"].norm() > 0
