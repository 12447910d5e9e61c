"""Estimates of memory: weights exactly, activations as measured at full size, one arithmetic for every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny

from zimage_ref import ConfigError, GenerateConfig, ModelFolder
from zimage_ref import ZImagePipeline as NumPyPipeline
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.doctor.prediction import official_model
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.memory import (
    FAST,
    LEAN,
    METAL_LEAN,
    NUMPY,
    STREAM,
    Footprint,
    LoadedModel,
    Stage,
    generation_stages,
    lora_bytes,
    peak,
    require_memory,
    training_stages,
)
from zimage_ref.model.config import OFFICIAL_SCHEDULER, OFFICIAL_TEXT_ENCODER, OFFICIAL_TRANSFORMER, OFFICIAL_VAE
from zimage_ref.model.parameters import (
    block_of,
    text_encoder_parameters,
    text_encoder_unused,
    transformer_parameters,
    vae_parameters,
)
from zimage_ref.requirements import memory_needs
from zimage_ref.streaming import pass_bytes


def official() -> ModelFolder:
    """The published Turbo model: every shape, no data."""

    def stored(shapes: Any) -> dict[str, Tensor]:
        return {name: Tensor(shape, BFLOAT16, lambda: np.zeros(0)) for name, shape in shapes.items()}

    encoder = text_encoder_parameters(OFFICIAL_TEXT_ENCODER)
    unused = text_encoder_unused(OFFICIAL_TEXT_ENCODER)
    weights = {
        "transformer": stored(transformer_parameters(OFFICIAL_TRANSFORMER)),
        "text_encoder": stored({name: shape for name, shape in encoder.items() if name not in unused}),
        "vae": stored(vae_parameters(OFFICIAL_VAE)),
    }
    configs = {"transformer": OFFICIAL_TRANSFORMER, "text_encoder": OFFICIAL_TEXT_ENCODER, "vae": OFFICIAL_VAE}
    return ModelFolder(Path("Z-Image-Turbo"), configs, weights, OFFICIAL_SCHEDULER, Path("tokenizer.json"))


def loaded(precision: str = "bfloat16", quantization: Quantization | None = None) -> LoadedModel:
    """The same as an engine would hold it."""
    return LoadedModel(official(), precision, quantization)


FOUR = Quantization(4)
TRAINABLE = 36_000_000
LORA = lora_bytes(TRAINABLE, slots=2)  # with AdamW


def test_the_estimate_of_generation_is_what_was_measured() -> None:
    model = loaded()
    encode, denoise, decode = generation_stages(model, LEAN, (1024, 1024))
    assert encode.activations == pytest.approx(0.78e9, rel=0.1)
    assert encode.weights == 2 * (4_022_468_096 - 201_866_752 // 2)
    assert denoise.weights == 2 * 6_154_908_736 and decode.weights == 2 * 83_819_683
    for footprint, side, forward, picture in (
        (FAST, 512, 0.40e9, 1.3e9), (FAST, 1024, 1.31e9, 4.0e9), (LEAN, 512, 0.18e9, 0.8e9), (LEAN, 1024, 0.69e9, 1.8e9)
    ):  # fmt: skip
        stages = generation_stages(model, footprint, (side, side))
        assert stages[1].activations == pytest.approx(forward, rel=0.15)
        assert picture < stages[2].activations < 1.5 * picture
    by_numpy = generation_stages(loaded("float32"), NUMPY, (192, 192))
    assert by_numpy[2].activations == pytest.approx(199e6, rel=0.1)


@pytest.mark.parametrize(
    ("lean", "side", "measured", "within"),
    [(True, 512, 1.2e9, 0.2), (True, 1024, 3.44e9, 0.05), (False, 512, 5.1e9, 0.35), (False, 1024, 21.8e9, 0.05)],
)
def test_the_estimate_of_training_is_what_was_measured(lean: bool, side: int, measured: float, within: float) -> None:
    captions, pictures, train = training_stages(loaded(), (side // 16) ** 2, LORA, lean=lean)
    assert train.total - train.weights == pytest.approx(measured, rel=within)
    assert train.weights == 2 * 6_154_908_736 and train.lora == TRAINABLE * 16
    assert captions.weights > pictures.weights > 0


@pytest.mark.parametrize(("side", "generated", "trained"), [(512, 4.95e9, 5.15e9), (1024, 5.72e9, 6.53e9 + 0.71e9)])
def test_the_estimates_at_4_bits_are_what_whole_runs_took(side: int, generated: float, trained: float) -> None:
    """The gradient of attention was fused there. In chunks, a step at 1024 took 3.44 instead of 2.73 GB."""
    model = loaded(quantization=FOUR)
    picture = peak(generation_stages(model, LEAN, (side, side)))
    run = peak(training_stages(model, (side // 16) ** 2, LORA))
    assert picture.total == pytest.approx(generated, rel=0.05) and run.total == pytest.approx(trained, rel=0.08)


@pytest.mark.parametrize(
    ("bits", "pictures", "training"), [(None, (1.5e9, 2.2e9), (2.5e9, 4.7e9)), (FOUR, (2.2e9, 2.7e9), (2.5e9, 4.6e9))]
)
def test_streaming_needs_the_memory_of_three_blocks(
    bits: Quantization | None, pictures: tuple[float, float], training: tuple[float, float]
) -> None:
    model = loaded(quantization=bits)
    for i, side in enumerate((512, 1024)):
        streamed, lean = (generation_stages(model, footprint, (side, side)) for footprint in (STREAM, LEAN))
        assert peak(streamed).total < pictures[i]
        assert [s.activations for s in streamed] == [s.activations for s in lean]
        assert streamed[2] == lean[2] and streamed[1].weights < lean[1].weights / 3
        assert peak(training_stages(model, (side // 16) ** 2, LORA, footprint=STREAM)).total < training[i]


def test_the_weights_of_three_blocks_are_counted() -> None:
    model, sizes = loaded(), loaded().sizes("transformer")
    block = sum(size for name, size in sizes.items() if name.startswith("layers.7."))
    outside = sum(size for name, size in sizes.items() if not block_of(name))
    assert model.weight_bytes("transformer", streamed=3) == outside + 3 * block
    four = loaded(quantization=FOUR)  # quantized as it is read, so one block is there in bfloat16
    packed = sum(size for name, size in four.sizes("transformer").items() if name.startswith("layers.7."))
    assert four.weight_bytes("transformer", streamed=3) == outside + 2 * packed + block
    assert model.weight_bytes("text_encoder", streamed=1) < 0.3e9  # without the table of tokens
    assert model.weight_bytes("vae", streamed=3) == model.weight_bytes("vae")
    assert pass_bytes(model.folder) == sum(sizes.values()) - outside


def test_a_mac_of_8_gb_generates_at_1024_and_does_not_train() -> None:
    model, limit = loaded(quantization=FOUR), 5_726_623_061  # what an M1 says
    require_memory(generation_stages(model, METAL_LEAN, (1024, 1024)), limit)
    with pytest.raises(ConfigError, match=r"about 5\.8 GB to train, .* there are 5\.7 GB"):
        require_memory(training_stages(model, 32**2, LORA, footprint=METAL_LEAN), limit)


def test_the_estimate_of_training_follows_the_options() -> None:
    def last(model: LoadedModel | None = None, image_tokens: int = 1024, lora: int = LORA, **options: Any) -> Stage:
        return training_stages(model or loaded(), image_tokens, lora, **options)[-1]

    plain, four, whole = last(), last(loaded(quantization=FOUR)), last(lean=False)
    assert four.weights == pytest.approx(3.6e9, rel=0.05)
    block = 2 * 3840 * (3 * 10240 + 4 * 3840)  # bytes of its matrices
    assert four.activations - plain.activations == pytest.approx(1.2 * block, rel=0.02)
    assert last(loaded("float32")).weights == 2 * plain.weights
    assert whole.activations - plain.activations > 2 * (1024 + 128) * 34 * (6 * 3840 + 2 * 10240)
    assert last(lora=lora_bytes(TRAINABLE, slots=2, ema=True)).lora == TRAINABLE * 20
    assert last(batch=2).activations == 2 * plain.activations
    assert last(image_tokens=4096).activations > 3 * plain.activations
    captions = training_stages(loaded(quantization=FOUR), 1024, lora_bytes(1, slots=2))[0]
    assert captions.weights == pytest.approx(2.9e9, rel=0.05)  # the table of tokens is not quantized


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_weights_take_exactly_what_is_estimated(bits: int | None, tmp_path: Path) -> None:
    mlx = pytest.importorskip("zimage_mlx.pipeline", reason="MLX is not installed", exc_type=ImportError)
    utils = pytest.importorskip("mlx.utils")
    model = tiny.write_model_folder(tmp_path / "model")
    how = Quantization(bits) if bits else None
    file = tmp_path / "t.npz"
    write_model(open_source(model, "transformer"), Target(file, "transformer", quantization=how))
    for parts, asked in (({}, bits), ({"transformer": file}, None)):
        pipe = mlx.ZImagePipeline.from_pretrained(model, "bfloat16", quantize=asked, parts=parts)
        held = sum(array.nbytes for _, array in utils.tree_flatten(pipe.transformer.parameters()))
        assert LoadedModel(pipe.folder, "bfloat16", pipe.quantization).weight_bytes("transformer") == held


def test_the_memory_estimate_follows_the_options() -> None:
    model, size = loaded(), (1024, 1024)
    plain = generation_stages(model, FAST, size)
    four = generation_stages(loaded(quantization=FOUR), FAST, size)
    assert four[1].weights == pytest.approx(3.6e9, rel=0.05) and four[2] == plain[2]
    assert generation_stages(loaded("float32"), FAST, size)[1].weights == 2 * plain[1].weights
    guided_or_two = generation_stages(model, FAST, size, predictions=2)
    assert guided_or_two[1].activations == 2 * plain[1].activations
    together = generation_stages(model, FAST, size, one_at_a_time=False)
    assert {s.weights for s in together} == {sum(s.weights for s in plain)}
    assert generation_stages(loaded("float32"), NUMPY, size)[1].weights == 4 * 3840 * 10240


def test_a_batch_and_guidance_each_double_the_predictions(tmp_path: Path) -> None:
    pipe = NumPyPipeline.from_pretrained(tiny.write_model_folder(tmp_path / "model"))

    def estimate(count: int, batch_size: int, guidance: float) -> int:
        configs = [GenerateConfig("a fox", width=64, height=64, guidance=guidance)] * count
        return pipe.memory(pipe.plan(configs), batch_size)[1].activations

    one = estimate(1, 1, 0.0)
    assert estimate(1, 1, 3.0) == estimate(2, 2, 0.0) == estimate(2, 9, 0.0) == 2 * one
    assert estimate(2, 1, 0.0) == one and estimate(2, 2, 3.0) == 4 * one


@pytest.mark.parametrize(
    ("side", "predictions", "footprint", "limit", "fact"),
    [
        (512, 1, LEAN, 10e9, "about 12.5 GB to denoise, 12.3 of it weights, and there are 10.0 GB: `quantize`"),
        (2048, 4, FAST, 24e9, "GB to denoise, 12.3 of .* a smaller `width`"),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_with_a_way_out(
    side: int, predictions: int, footprint: Footprint, limit: float, fact: str
) -> None:
    stages = generation_stages(loaded(), footprint, (side, side), predictions)
    with pytest.raises(ConfigError, match=fact) as caught:
        require_memory(stages, int(limit))
    assert "`force`" in str(caught.value)
    require_memory(stages, 200_000_000_000)
    require_memory(stages, None)


def test_training_that_does_not_fit_is_refused_with_its_own_way_out() -> None:
    stages = training_stages(loaded(), 1024, LORA)
    with pytest.raises(ConfigError, match="to train, 12.3 of it weights, .* 10.0 GB: `base_precision` 8 or 4"):
        require_memory(stages, 10_000_000_000, "base_precision")


def test_memory_of_the_official_model_is_what_its_parameters_need() -> None:
    needs = memory_needs(official())
    used = 6_154_908_736 + 4_022_468_096 + 83_819_683 - 201_866_752 // 2
    assert needs[16]["weights"] == 2 * used
    for bits in (8, 4):
        assert needs[bits]["weights"] < needs[16]["weights"] * (bits + 2.5) / 16
        assert needs[bits]["generate"] < needs[16]["generate"]
    assert all(need["train"] > need["generate"] for need in needs.values())


def test_inspect_and_the_doctor_have_the_margin_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    model, here = official_model(), memory_needs(official_model())
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    there = memory_needs(model)
    for bits, needs in here.items():
        assert there[bits]["weights"] == needs["weights"]
    assert there[16]["generate"] == pytest.approx(1.15 * here[16]["generate"])
    assert there[16]["train"] == pytest.approx(1.15 * here[16]["train"])
