"""Macs of every size: the limit that MLX is given, the mode that is chosen, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="Macs run MLX", exc_type=ImportError)

import mlx.core as mx
from support.macs import RECOMMENDED, pretend
from support.training_runs import Workshop, pictures, workshop
from test_estimates import LORA, loaded

from zimage_mlx import ZImagePipeline, device, train
from zimage_ref import ConfigError
from zimage_ref.doctor.remembered import Figures
from zimage_ref.formats.quantize import Quantization
from zimage_ref.memory import (
    FAST,
    LEAN,
    METAL_FAST,
    METAL_LEAN,
    Stage,
    generation_stages,
    require_memory,
    training_stages,
)
from zimage_ref.streaming import choose
from zimage_ref.training.events import Checkpointed
from zimage_ref.training.run_folder import RunFolder


def bits(number: int | None) -> Quantization | None:
    return Quantization(number) if number else None


def generated(number: int | None, side: int = 1024, fast: bool = False) -> list[Stage]:
    footprint = ZImagePipeline.footprint("fast" if fast else "lean")
    return generation_stages(loaded(quantization=bits(number)), footprint, (side, side), one_at_a_time=not fast)


def trained(number: int | None, side: int = 512) -> list[Stage]:
    footprint = ZImagePipeline.footprint("lean")
    return training_stages(loaded(quantization=bits(number)), (side // 16) ** 2, LORA, footprint=footprint)


def fits(stages: list[Stage], limit: int | None) -> bool:
    try:
        require_memory(stages, limit)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("memory", RECOMMENDED)
@pytest.mark.parametrize("lean", [True, False])
def test_mlx_is_kept_within_what_metal_gives_and_nothing_is_wired(
    memory: int, lean: bool, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = pretend(monkeypatch, memory)
    pipe = ZImagePipeline.from_pretrained(model_dir, lean=lean)
    cache = {True: 10**9, False: mac.limit // 10}
    assert pipe.memory_limit() == mac.limit
    assert mac.told == {"set_memory_limit": mac.limit, "set_cache_limit": cache[lean]}
    pipe.set_mode("fast" if lean else "lean")
    assert mac.told == {"set_memory_limit": mac.limit, "set_cache_limit": cache[not lean]}


def test_elsewhere_mlx_is_left_alone(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mac = pretend(monkeypatch)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    pipe = ZImagePipeline.from_pretrained(model_dir, lean=True)
    assert not mac.told and pipe.unpack and (pipe.footprint("lean"), pipe.footprint("fast")) == (LEAN, FAST)


def test_the_gpu_is_asked_even_if_the_cpu_is_the_default(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda *asked: pytest.fail("nothing to ask"))
    assert device.gpu_memory() is None
    assert ZImagePipeline.from_pretrained(model_dir).memory_limit() is not None  # that of the machine


@pytest.mark.parametrize(
    ("memory", "pictures", "training", "mode"),
    [
        (8, [4], [], "lean"),
        (16, [8, 4], [8, 4], "lean"),
        (24, [None, 8, 4], [None, 8, 4], "lean"),
        (36, [None, 8, 4], [None, 8, 4], "lean"),
        (64, [None, 8, 4], [None, 8, 4], "fast"),
        (128, [None, 8, 4], [None, 8, 4], "fast"),
    ],
)
def test_what_fits_which_mac(
    memory: int, pictures: list[int | None], training: list[int | None], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = pretend(monkeypatch, memory).limit
    assert device.gpu_memory() == limit
    assert [n for n in (None, 8, 4) if fits(generated(n), limit)] == pictures
    assert [n for n in (None, 8, 4) if fits(trained(n), limit)] == training
    modes = {"fast": generated(None, fast=True), "lean": generated(None)}
    assert choose("auto", modes, limit).mode == mode


@pytest.mark.parametrize(
    ("memory", "number", "words"),
    [
        (8, 8, "about 8.5 GB to denoise, 6.7 of it weights, and there are 5.7 GB: `quantize` 8 or 4 makes"),
        (16, None, "about 15.0 GB to denoise, 12.3 of it weights, and there are 11.5 GB: `quantize` 8 or 4 makes"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_loaded(
    memory: int, number: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = pretend(monkeypatch, memory)
    with pytest.raises(ConfigError) as caught:
        require_memory(generated(number), mac.limit)
    assert words in str(caught.value) and "`force`" in str(caught.value)


def test_estimates_for_metal_have_a_margin_and_lean_ones_unpack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = loaded(), (1024, 1024)
    for plain, metal in ((LEAN, METAL_LEAN), (FAST, METAL_FAST)):
        for here, there in zip(*(generation_stages(model, f, size) for f in (plain, metal)), strict=True):
            assert there.total == pytest.approx(1.15 * here.total) and there.weights == here.weights
    four = loaded(quantization=Quantization(4))
    packed = 0.15 * generation_stages(four, METAL_LEAN, size)[1].weights
    assert generation_stages(four, METAL_LEAN, size)[1].activations - packed == pytest.approx(
        1.15 * generation_stages(model, LEAN, size)[1].activations
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = workshop(tmp_path_factory.mktemp("macs"))
    return Workshop(shop.folder, shop.model, pictures(shop.folder / "shapes", (40, 40), (64, 32)))


@pytest.mark.parametrize(("memory", "cache"), [("lean", 10**9), ("auto", 11_453_246_122 // 10)])
def test_training_frees_the_buffers_of_another_shape(
    shop: Workshop, memory: str, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = shop.train(f"plain-{memory}", steps=6, memory=memory).bytes
    mac = pretend(monkeypatch)
    run = shop.train(f"mac-{memory}", steps=6, memory=memory, base_precision="f32")
    assert mac.told == {"set_memory_limit": mac.limit, "set_cache_limit": cache}
    assert mac.cleared > 2 + 1  # one for each of the two networks that encode, and where the shape changes
    assert run.bytes == expected


def test_a_resumed_run_unpacks_weights_as_it_was_saved(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor may have run in between. Then another program would compute the steps."""
    pretend(monkeypatch)
    options = {"steps": 4, "memory": "fast", "base_precision": "4", "resume_every": 2}
    monkeypatch.setattr(Figures, "of_this_machine", lambda: Figures({"packed_speed": {"4": 1.2}}))
    whole = shop.train("packed", **options)
    events = train(shop.config("interrupted", **options))
    while not isinstance(next(events), Checkpointed):
        pass
    events.close()
    monkeypatch.setattr(Figures, "of_this_machine", lambda: None)
    assert shop.train("interrupted", **options, resume=True).bytes == whole.bytes
    for name in ("packed", "interrupted"):
        state = RunFolder(shop.folder / f"{name}.safetensors").path / "resume" / "step4" / "state.json"
        assert json.loads(state.read_text(encoding="utf-8"))["facts"]["unpacks"] is False
