"""The model of time: work counted from shapes, seconds from rates and measured parts, the choice that fits."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.networks import network

from zimage_ref.doctor import work
from zimage_ref.doctor.prediction import Part, Rates, TimeModel
from zimage_ref.doctor.work import Tokens, Work
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE
from zimage_ref.model.parameters import vae_parameters
from zimage_ref.networks import vae as reference

H100 = Rates(products=651e12, attention=400e12, convolutions=300e12, memory=2.6e12)
SMALL_VAE = replace(OFFICIAL_VAE, block_out_channels=(32, 64, 64))


def test_a_forward_pass_is_counted_as_the_benchmark_counts_it() -> None:
    config, tokens = OFFICIAL_TRANSFORMER, Tokens.of(512)
    weights = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim
    expected = 30 * (2 * 1088 * weights + 4 * 1088**2 * config.dim) + 2 * (
        2 * 1024 * weights + 4 * 1024**2 * config.dim
    )
    assert work.forward(config, tokens, 2).flops == expected
    assert work.forward(config, tokens, 2, layers=3).flops < expected / 6
    assert work.step(config, tokens, 2, lean=True).products > work.step(config, tokens, 2, lean=False).products


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_convolutions_are_counted_exactly(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    conv2d = reference.conv2d

    def counting(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int = 1) -> np.ndarray:
        y = conv2d(x, weight, bias, stride)
        counted.append(2 * y.size * weight[0].size)
        return y

    monkeypatch.setattr(reference, "conv2d", counting)
    weights = {name: np.ones(shape, np.float32) for name, shape in vae_parameters(SMALL_VAE).items()}
    vae = network("numpy", "vae", SMALL_VAE, weights, "float32")
    if way == "decode":
        vae.decode(np.ones((1, 16, 8, 8), np.float32))
    else:
        vae.encode(np.ones((1, 3, 32, 32), np.float32))
    assert getattr(work, way)(SMALL_VAE, 32 * 32, 4).convolutions == sum(counted)


@pytest.mark.parametrize(
    ("what", "side", "measured", "within"),
    [("forward", 512, 0.0273, 0.25), ("forward", 768, 0.0553, 0.25), ("forward", 1024, 0.102, 0.25),
     ("fast", 1024, 0.46, 0.35), ("lean", 1024, 0.607, 0.35)],
)  # fmt: skip
def test_rates_alone_are_near_what_an_h100_was_measured_at(
    what: str, side: int, measured: float, within: float
) -> None:
    """The figures are those of docs/performance.md. A step at 512 x 512 is left out: launches limit it, not rates."""
    model = TimeModel({"bf16": H100}, "bf16")
    seconds = model.forward("bf16", side) if what == "forward" else model.step("bf16", side, what)
    assert seconds == pytest.approx(measured, rel=within)


def part(case: str, precision: str, side: int, amount: Work, seconds: float) -> Part:
    return Part(case, precision, side, amount, seconds)


def test_a_measured_part_sets_the_ratio() -> None:
    amount = work.forward(OFFICIAL_TRANSFORMER, Tokens.of(512), 2, layers=4)
    slow = part("forward", "bf16", 512, amount, 3 * H100.seconds(amount))
    plain, model = TimeModel({"bf16": H100}, "bf16"), TimeModel({"bf16": H100}, "bf16", [slow])
    assert model.forward("bf16", 512) == pytest.approx(3 * plain.forward("bf16", 512))
    assert model.forward("bf16", 1024) == pytest.approx(3 * plain.forward("bf16", 1024))  # the nearest that is known
    assert model.ratio("step lean", "bf16", 512) == pytest.approx(3)  # until a step was measured
    large = work.forward(OFFICIAL_TRANSFORMER, Tokens.of(1024), 2)
    both = TimeModel({"bf16": H100}, "bf16", [slow, part("forward", "bf16", 1024, large, H100.seconds(large))])
    assert 1 < both.ratio("forward", "bf16", 768) < 3


def test_a_precision_that_was_not_measured_follows_the_one_that_was() -> None:
    rates = {"bf16": H100, "4": H100}
    amount = work.step(OFFICIAL_TRANSFORMER, Tokens.of(512), 2, lean=True, layers=2)
    forward = work.forward(OFFICIAL_TRANSFORMER, Tokens.of(512), 2)
    parts = [
        part("step lean", "bf16", 512, amount, 2 * H100.seconds(amount)),
        part("forward", "bf16", 512, forward, H100.seconds(forward)),
        part("forward", "4", 512, forward, 1.5 * H100.seconds(forward)),
    ]
    model = TimeModel(rates, "bf16", parts)
    assert model.ratio("step lean", "4", 512) == pytest.approx(3)
    assert model.picture("4", 512, "lean") > model.picture("bf16", 512, "lean")


def predictions(limit: int | None) -> dict:  # type: ignore[type-arg]
    slower = replace(H100, products=0.9 * H100.products)
    return TimeModel({"bf16": H100, "8": slower, "4": slower}, "bf16").to_json(limit)


def test_the_best_choice_fits_and_prefers_more_bits() -> None:
    plenty, eight, nothing = predictions(None), predictions(11_000_000_000), predictions(1_000)
    assert plenty["best"]["picture"]["1024"] == {"precision": "bf16", "mode": "lean"}  # as fast, in less memory
    assert plenty["best"]["step"]["512"] == {"precision": "bf16", "mode": "fast"}
    assert eight["best"]["picture"]["1024"] == {"precision": "8", "mode": "lean"}
    assert nothing["best"]["step"]["512"] is None
    assert predictions(3_000_000_000)["best"]["picture"]["1024"] == {"precision": "bf16", "mode": "stream"}
    assert plenty["step_seconds"]["bf16"]["stream"] == plenty["step_seconds"]["bf16"]["lean"]
    assert plenty["stream_bytes_per_second"]["bf16"]["1024"] == pytest.approx(
        12.3e9 / plenty["forward_seconds"]["bf16"]["1024"], rel=0.01
    )
    for work_, key in (("picture", "picture_bytes"), ("step", "step_bytes")):
        best = eight["best"][work_]["512"]
        assert eight[key][best["precision"]][best["mode"]]["512"] <= 11_000_000_000


def test_the_keys_that_programs_read() -> None:
    found = predictions(None)
    assert found["forward_seconds"]["bf16"]["512"] > 0
    assert found["step_seconds"]["bf16"]["lean"]["1024"] > found["step_seconds"]["bf16"]["fast"]["1024"]
    assert found["picture_seconds"]["4"]["fast"]["768"] > 8 * found["forward_seconds"]["4"]["768"]
    assert {"decode_seconds", "encode_seconds", "text_seconds", "memory_limit"} <= found.keys()
    json.dumps(found)
