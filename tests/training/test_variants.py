"""Captions that a run draws: lines, choices, orders of tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_runs import Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_mlx.training.encode import drawn_captions
from zimage_ref import TrainConfig
from zimage_ref.training.dataset import list_dataset
from zimage_ref.training.plan import make_plan
from zimage_ref.training.variants import ORDERS, Variants


def variants(**options: Any) -> Variants:
    return Variants(TrainConfig(Path("m"), Path("d"), **options))


def drawn(caption: str, **options: Any) -> set[str]:
    return {variants(**options).draw(caption, epoch, item) for epoch in range(40) for item in range(3)}


def test_each_line_is_drawn_about_equally_often() -> None:
    texts = [variants(caption_lines=True).draw("one\n\n two \nthree", epoch, 0) for epoch in range(300)]
    assert set(texts) == {"one", "two", "three"}
    assert all(70 < texts.count(text) < 130 for text in set(texts))
    assert drawn("one\ntwo") == {"one\ntwo"}


def test_choices_are_drawn_each_for_itself_and_hold_others() -> None:
    assert drawn("a {red|{big|small} blue} {fox|owl}", caption_choices=True) == {
        f"a {colour} {what}" for colour in ("red", "big blue", "small blue") for what in ("fox", "owl")
    }
    assert drawn("a {red|blue} fox") == {"a {red|blue} fox"}
    assert drawn("no choice, { here", caption_choices=True) == {"no choice, { here"}


def test_tags_are_shuffled_after_those_that_are_kept() -> None:
    texts = drawn("sks, a, b,c , d", shuffle_tags=True)
    assert 1 < len(texts) <= ORDERS and all(text.startswith("sks, ") for text in texts)
    assert all(sorted(text.split(", ")) == ["a", "b", "c", "d", "sks"] for text in texts)
    kept = drawn("x, y, a, b", shuffle_tags=True, keep_tags=3)
    assert kept == {"x, y, a, b"}
    assert {text.split(", ")[0] for text in drawn("x, y, z", shuffle_tags=True, keep_tags=0)} == {"x", "y", "z"}


def test_draws_follow_from_the_seed() -> None:
    texts = [[variants(caption_lines=True, seed=seed).draw("a\nb", e, 0) for e in range(20)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_held_out_pictures_have_the_first_of_all() -> None:
    every = variants(caption_lines=True, caption_choices=True, shuffle_tags=True)
    assert every.first("z, {a|b}, {c|{d|e}}\nline") == "z, a, c"
    assert every.all_of("{a|b} {c|d}\nline") == ["a c", "a d", "b c", "b d", "line"]


def test_the_trigger_is_in_every_line(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (32, 32), captions=["a [trigger]\n\na dog\n"])
    assert list_dataset(data, "sks", lines=True)[0][1] == "a sks\nsks, a dog"
    assert list_dataset(data, "sks")[0][1] == "a sks\n\na dog"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("variants"))


def test_all_that_is_drawn_is_encoded_before_the_first_step(shop: Workshop) -> None:
    data = pictures(shop.folder / "drawn", (32, 32), (32, 48), captions=["sks, {a|b}, c\nsks", "sks\nan owl, x, y"])
    options = {"dataset": data, "caption_lines": True, "caption_choices": True, "shuffle_tags": True, "epochs": 5}
    config = shop.config("drawn", **options, trigger="sks", preserve="cat", preserve_prompt=("a cat", "an owl"))
    plan = make_plan(config)
    texts = drawn_captions(plan)
    shown = {Variants(config).draw(plan.examples[i].caption, e, i) for e in range(5) for i in range(2)}
    assert set(texts) == shown | {text.replace("sks", "cat") for text in shown} | {"a cat", "an owl"}
    assert len(shown) > 4
    plain, varied = shop.train("one-caption", dataset=data, epochs=5), shop.train("drawn", **options)
    assert plain.losses != varied.losses


def test_no_captions_are_named_as_too_long_that_are_short_line_by_line(shop: Workshop) -> None:
    long = "\n".join(["a picture of soft waves"] * 200)
    data = pictures(shop.folder / "long", (32, 32), captions=[long])
    assert "are cut off" in "".join(make_plan(shop.config("long", dataset=data)).notices)
    assert not make_plan(shop.config("short", dataset=data, caption_lines=True)).notices
