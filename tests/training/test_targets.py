"""Which layers train: presets, patterns, ranges of blocks, and their own ranks."""

from __future__ import annotations

import pytest
from support import tiny

from zimage_ref import ConfigError, TrainConfig
from zimage_ref.lora.trained import UpdateSize
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.parameters import lora_modules
from zimage_ref.training.targets import by_module, chosen_layers, normalized, ranges

COMMON = UpdateSize(16, 8.0)
FULL = OFFICIAL_TRANSFORMER


def chosen(*targets: str) -> dict[str, UpdateSize]:
    return chosen_layers(FULL, targets, COMMON)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("attention",), 120), (("feed-forward",), 90), (("attn-mlp",), 210), (("attention", "refiners"), 136),
        (("attention", "feed_forward", "refiners"), 238), (("adaln",), 30), (("all",), 30 * 8 + 2 * 8 + 2 * 7),
        (("layers.10-20.attention.*",), 44), (("layers.3",), 8), (("layers.*.feed_forward.w2",), 30),
        (("*.to_q",), 34), (("*_refiner.*.attention",), 16), (("*.0-1.attention.to_k",), 6),
        (("attn-mlp", "cap_embedder.*"), 211), (("layers.2?.adaLN_modulation.*",), 10), (("*",), 276),
        (("all_final_layer.2-1.linear",), 1), (("layers.0-2.*", "layers.1-3.*"), 32),
    ],
)  # fmt: skip
def test_entries_choose_layers(targets: tuple[str, ...], count: int) -> None:
    assert len(chosen(*targets)) == count


def test_presets_choose_what_they_always_did_in_the_same_order() -> None:
    for targets in (("attention",), ("feed_forward", "adaln"), ("attention", "feed_forward", "refiners"), ("all",)):
        assert list(chosen(*targets)) == lora_modules(FULL, targets)
    assert list(chosen("layers.*.attention.*")) == lora_modules(FULL, ("attention",))


def test_an_entry_has_its_own_rank_and_alpha_and_the_later_one_counts() -> None:
    sizes = chosen("attention=32", "layers.10-20.attention.*=8/4", "feed-forward")
    assert sizes["layers.9.attention.to_q"] == UpdateSize(32, 16.0)  # alpha / rank is that of the run
    assert sizes["layers.10.attention.to_q"] == sizes["layers.20.attention.to_out.0"] == UpdateSize(8, 4.0)
    assert sizes["layers.10.feed_forward.w1"] == COMMON
    assert chosen("layers.10-20.*=8", "attention")["layers.10.attention.to_q"].rank == 8
    refined = chosen("attention", "refiners=4")
    assert refined["noise_refiner.0.attention.to_q"].rank == 4 and refined["layers.0.attention.to_q"].rank == 16


@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ("layers.10-20.atention.*", "no layer has such a name: is .*layers.*.attention.*"),
        ("layers.30.attention.*", "blocks are counted from 0: 29 is the last of layers, 1 is the last of refiners"),
        ("layers.*.attention.to_w", r"is .*attention\.to_q"),
        ("blocks.*", "`targets` blocks.*: no layer has such a name"),
        ("layers.20-10.*", "blocks are counted from 0"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_may_be_meant(target: str, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        chosen("attention", target)


@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ("atention", "'atention' is unknown: known are attention, feed_forward, .*is attention or"),
        ("attention=", "after = stands a rank, or a rank and alpha, such as attention=32/16"),
        ("attention=x", "after = stands a rank"),
        ("attention=8/", "after = stands a rank"),
        ("attention=0", "`targets` 0 must be at least 1"),
        ("attention=8/0", "`targets` 0.0 must be above 0"),
    ],
)
def test_an_entry_that_is_none_is_refused_before_anything_is_read(target: str, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        TrainConfig("m", "d", targets=target)


def test_entries_are_stored_in_one_form() -> None:
    assert normalized(["feed-forward", " attn-mlp = 8", "layers.3-4.*=8/2.50"]) == (
        "feed_forward", "attn_mlp=8", "layers.3-4.*=8/2.5",
    )  # fmt: skip


def test_what_was_chosen_is_told_by_module() -> None:
    sizes = chosen_layers(tiny.TRANSFORMER, ("attention", "layers.1.attention.to_q=4", "cap_embedder.*"), COMMON)
    table = by_module(sizes)
    assert table["layers.*.attention.to_q", 16, 8.0] == ["0"] and table["layers.*.attention.to_q", 4, 2.0] == ["1"]
    assert table["cap_embedder.1", 16, 8.0] == [""]
    assert ranges(["0", "1", "2", "5", "7", "8"]) == "0-2, 5, 7-8" and ranges([""]) == ""
