"""The frozen base of a training run: which files it is read from, in which precision, with and without an adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import lora_makers, tiny
from support.daily import daily
from support.training_runs import Workshop, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import zimage_mlx.training.loop
from zimage_cli.app import main
from zimage_mlx import ZImagePipeline
from zimage_mlx.lora import layers as lora_layers
from zimage_mlx.lora.adapter import TrainingAdapter
from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.tree import find
from zimage_mlx.networks.weights import load, to_mlx
from zimage_ref import ConfigError
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.updates import LoRA
from zimage_ref.model.parameters import transformer_parameters
from zimage_ref.model.quantization import covers
from zimage_ref.options_file import to_json

SHAPES = transformer_parameters(tiny.TRANSFORMER)
QUANTIZED, FLOAT, UNTRAINED = "layers.1.feed_forward.w2", "layers.0.attention.to_q", "cap_embedder.1"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(shop: Workshop) -> LoRA:
    """Over layers that are quantized and not, trained and not."""
    layers = {layer: SHAPES[f"{layer}.weight"] for layer in (QUANTIZED, FLOAT, UNTRAINED)}
    path = shop.folder / "adapter.safetensors"
    lora_makers.comfy(path, lora_makers.factors(layers, 3, size=0.3), 3.0, SHAPES)
    return read_lora(path, SHAPES).updates


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("bits", daily([8, 4], 4))
def test_the_base_is_quantized_where_the_rule_says(bits: int, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = zimage_mlx.training.loop.Learner
    monkeypatch.setattr(
        zimage_mlx.training.loop, "Learner", lambda plan, model, *rest: seen.append(model) or real(plan, model, *rest)
    )
    full, quantized = shop.train(f"full{bits}", steps=2), shop.train(f"q{bits}", base_precision=str(bits), steps=2)
    assert full.losses != quantized.losses
    assert full.losses == pytest.approx(quantized.losses, rel=0.02 if bits == 8 else 0.3)
    layers = {name.removesuffix(".base"): module for name, module in seen[1].named_modules()}
    how, found = Quantization(bits), 0
    for name, shape in SHAPES.items():
        layer = layers[name.removesuffix(".weight")] if name.endswith(".weight") else None
        assert isinstance(layer, nn.QuantizedLinear) == covers(how, name, shape), name
        found += isinstance(layer, nn.QuantizedLinear) and layer.bits == bits
    assert found == sum(covers(how, *parameter) for parameter in SHAPES.items()) > 0


def test_quantizing_while_loading_never_holds_the_whole_base() -> None:
    config = replace(tiny.WIDE, dim=512, n_heads=4, axes_dims=(32, 48, 48), n_layers=4)
    weights = tiny.random_weights(transformer_parameters(config))
    model = Transformer(config)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    load(model, {name: Tensor.of(array) for name, array in weights.items()}, mx.float32, Quantization(4))
    whole = sum(array.nbytes for array in weights.values())
    assert mx.get_peak_memory() - before < 0.6 * whole


def test_a_quantized_file_as_it_is_trains_like_the_base_quantized_while_loading(shop: Workshop, tmp_path: Path) -> None:
    file = tmp_path / "q4.npz"
    write_model(open_source(shop.model, "transformer"), Target(file, "transformer", quantization=Quantization(4)))
    loaded = shop.train("while-loading", steps=2, base_precision="4")
    stored = shop.train("stored", steps=2, transformer=file)
    assert stored.bytes == loaded.bytes and stored.losses == loaded.losses
    assert stored.losses != shop.train("unquantized", steps=2).losses


def test_parts_are_taken_from_where_the_options_say(shop: Workshop, tmp_path: Path) -> None:
    """A folder with nothing but the schedule, all else named one by one in other containers."""
    parts = {"tokenizer": str(shop.model / "tokenizer" / "tokenizer.json")}
    for component, naming in (("transformer", "comfy"), ("text_encoder", "comfy"), ("vae", "ldm")):
        parts[component] = str(tmp_path / f"{component}.safetensors")
        write_model(open_source(shop.model, component), Target(Path(parts[component]), component, naming=naming))
    bare = tmp_path / shop.model.name
    shutil.copytree(shop.model / "scheduler", bare / "scheduler")
    expected = shop.train("parts", steps=2, cache=tmp_path / "cache")
    entries = sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))

    config = to_json(shop.config("parts", steps=2, cache=tmp_path / "cache", model_dir=bare))
    config = {name: value for name, value in config.items() if value is not None and name != "output"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in parts.items()]
    lines = [f"{name} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for name, v in config.items()]
    (tmp_path / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / "from-parts.safetensors"
    assert main(["train", f"--config={tmp_path / 'run.toml'}", f"--output={output}", *flags]) == 0
    assert output.read_bytes() == expected.bytes
    assert entries == sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))  # nothing anew


@pytest.mark.parametrize("part", daily(["transformer", "text_encoder", "vae", "tokenizer"], "vae", "tokenizer"))
def test_a_part_of_another_model_changes_the_training_and_is_no_resumption(
    part: str, shop: Workshop, tmp_path: Path
) -> None:
    other = tiny.write_model_folder(tmp_path / "other", dtype="bf16") / part
    if part == "tokenizer":
        file = other / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        ids = content["model"]["vocab"]
        ids["Ġred"], ids["Ġfox"] = ids["Ġfox"], ids["Ġred"]
        file.write_text(json.dumps(content), encoding="utf-8")
    own = shop.train(f"own-{part}", steps=1)
    if part != "tokenizer":
        assert shop.train(f"other-{part}", steps=1, **{part: other}).losses != own.losses
    with pytest.raises(ConfigError, match="differs from this one: the model's weights or tokenizer"):
        shop.train(f"own-{part}", steps=1, resume=True, **{part: other})


@pytest.mark.parametrize("quantize", [None, 8, 4])
def test_the_adapter_comes_out_without_a_trace(quantize: int | None, shop: Workshop, adapter: LoRA) -> None:
    pipe = ZImagePipeline.from_pretrained(shop.model, dtype="bfloat16", quantize=quantize)
    model, stored = pipe.transformer, pipe.folder.weights["transformer"]
    lora_layers.add_trainable_loras(model, [QUANTIZED, FLOAT], 2, 2.0, np.random.default_rng(0))
    pristine = {name: mx.array(array) for name, array in tree_flatten(model.parameters())}
    trained = dict(tree_flatten(model.trainable_parameters())).keys()
    taken = TrainingAdapter(model, adapter, lambda name: to_mlx(stored[name], pipe.dtype))

    def same(a: dict[str, mx.array]) -> bool:
        now = dict(tree_flatten(model.parameters()))
        return now.keys() == a.keys() and all(mx.array_equal(now[name], a[name]).item() for name in a)

    assert same(pristine)
    taken.merge()
    merged = {name: mx.array(array) for name, array in tree_flatten(model.parameters())}
    assert not same(pristine)
    assert dict(tree_flatten(model.trainable_parameters())).keys() == trained
    assert lora_layers.trained_loras(model).keys() == {QUANTIZED, FLOAT}
    with taken.removed():
        assert same(pristine)
    assert same(merged)
    branch: Any = find(model, f"{QUANTIZED}.base")
    assert isinstance(branch, lora_layers.LoRALinear) == bool(quantize)
    if quantize:  # its few bits stay as they are
        assert mx.array_equal(branch.base.weight, pristine[f"{QUANTIZED}.base.weight"])


@pytest.mark.parametrize("quantize", [None, 4])
def test_the_adapter_does_what_it_does_in_generation(quantize: int | None, shop: Workshop, adapter: LoRA) -> None:
    ours, theirs, plain = (ZImagePipeline.from_pretrained(shop.model, quantize=quantize) for _ in range(3))
    stored = ours.folder.weights["transformer"]
    lora_layers.add_trainable_loras(ours.transformer, [QUANTIZED, FLOAT], 2, 2.0, np.random.default_rng(0))
    TrainingAdapter(ours.transformer, adapter, lambda name: to_mlx(stored[name], ours.dtype)).merge()
    theirs.use_loras(theirs.read_loras([(shop.folder / "adapter.safetensors", 1.0)]))
    x, caption = mx.random.normal((1, 16, 4, 6), key=mx.random.key(1)), [plain.encode_prompt("a fox")]
    one, two, base = (pipe.transformer(x, mx.array([0.4]), caption) for pipe in (ours, theirs, plain))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    assert np.abs(np.array(one) - np.array(base)).max() > 1e-2
