"""The memory that pages promise is the memory that the program estimates."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.pages import ROOT, read
from test_estimates import official

from zimage_ref import TrainConfig
from zimage_ref.formats.quantize import Quantization
from zimage_ref.memory import (
    FAST,
    LEAN,
    METAL_FAST,
    METAL_LEAN,
    METAL_STREAM,
    STREAM,
    Footprint,
    LoadedModel,
    generation_stages,
    lora_bytes,
    peak,
    trainable_parameters,
    training_stages,
)
from zimage_ref.model.parameters import lora_modules, transformer_parameters
from zimage_ref.training.full import state_bytes, with_step
from zimage_ref.training.optimizers import OPTIMIZERS

FOOTPRINTS = {True: (METAL_LEAN, METAL_FAST), False: (LEAN, FAST)}  # by whether it is a Mac, and then fast
README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"


def quantization(bits: int | None) -> Quantization | None:
    return Quantization(bits) if bits else None


def generated(side: int, bits: int | None = None, fast: bool = False, metal: bool = True) -> str:
    """GB that a picture takes, as a page writes them."""
    footprint = FOOTPRINTS[metal][fast]
    model = LoadedModel(official(), "bfloat16", quantization(bits))
    stages = generation_stages(model, footprint, (side, side), one_at_a_time=not fast)
    return f"{peak(stages).total / 1e9:.1f}"


def trained(side: int, bits: int | None = None, fast: bool = False, metal: bool = True) -> str:
    """GB that training in the default settings takes."""
    model, config = official(), TrainConfig("model", "dataset")
    layers = lora_modules(model.transformer, config.targets)
    trainable = trainable_parameters(transformer_parameters(model.transformer), layers, config.rank)
    lora = lora_bytes(trainable, OPTIMIZERS[config.optimizer].slots)
    tokens = side * side // model.size_multiple**2
    loaded = LoadedModel(model, "bfloat16", quantization(bits))
    stages = training_stages(loaded, tokens, lora, lean=not fast, footprint=FOOTPRINTS[metal][False])
    return f"{peak(stages).total / 1e9:.1f}"


def row(text: str, start: str) -> list[str]:
    """The GB of the table row that begins with `start`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return re.findall(r"\d+\.\d", line)


@pytest.mark.parametrize(
    ("memory", "figures"),
    [
        ("8 GB", [generated(1024, 4), trained(512, 4)]),
        ("16 GB", [generated(1024, 8), trained(512, 8), trained(768, 8), trained(1024, 4)]),
        ("24 GB", [generated(1024), trained(512), trained(768, 8), trained(1024, 8)]),
        ("32 GB", [trained(1024)]),
        ("64 GB", [generated(1024, fast=True), trained(1024, fast=True)]),
    ],
)
def test_what_fits_which_mac(memory: str, figures: list[str]) -> None:
    assert row(read(README), memory) == figures


def whole(
    side: int, optimizer: str, master_weights: bool = False, footprint: Footprint = METAL_LEAN, batch: int = 1
) -> str:
    """GB that training the whole transformer takes."""
    model, shapes = official(), transformer_parameters(official().transformer)
    state = state_bytes(shapes, optimizer, master_weights)
    loaded, tokens = LoadedModel(model, "bfloat16"), side * side // model.size_multiple**2
    *before, train = training_stages(loaded, tokens, state, batch, footprint=footprint)
    return f"{peak([*before, with_step(train, shapes, loaded.itemsize, optimizer, footprint)]).total / 1e9:.1f}"


@pytest.mark.parametrize("side", [512, 768, 1024])
def test_training_the_whole_transformer(side: int) -> None:
    kinds: list[Any] = [("adafactor",), ("adamw8bit",), ("adafactor", True), ("adafactor", False, METAL_STREAM)]
    assert row(read(TRAINING), f"{side}x{side}") == [whole(side, *kind) for kind in kinds]
    assert f"512 x 512 with `adafactor` takes {whole(512, 'adafactor', footprint=LEAN)} GB" in read(TRAINING)
    assert float(whole(512, "adafactor", footprint=LEAN)) < 12.3 + 4
    more = (f"{whole(512, 'adafactor', batch=batch)} GB" for batch in (2, 3))
    assert f"512 x 512 with `adafactor` then takes {', or '.join(more)}" in read(TRAINING)
    assert f"`--memory stream` {whole(512, 'adafactor', footprint=STREAM)} GB in all" in read(ROOT / "CHANGELOG.md")


@pytest.mark.parametrize("side", [512, 768, 1024])
def test_training_on_16_gb(side: int) -> None:
    assert row(read(TRAINING), str(side)) == [trained(side, 8), trained(side, 4)]


def test_the_estimates_beside_the_measured_runs() -> None:
    text = " ".join(read(ROOT / "docs" / "performance.md").split())
    figures = [make(side, 4, metal=False) for make in (generated, trained) for side in (512, 1024)]
    assert f"are {', '.join(figures[:3])} and {figures[3]} GB for these four" in text
