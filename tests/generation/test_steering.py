"""NAG, variety and regions: both engines alike, off by default, and measurable on the built-in model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import HAS_MLX, long_only, mlx_only, pipeline
from support.parity import assert_parity

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig, ModelFolder
from zimage_ref.generation.jobs import plan_requests
from zimage_ref.generation.provenance import Recorder, Repeat
from zimage_ref.generation.steering import predictions_of, with_noise
from zimage_ref.model.steering import Box, Nag, region_mask
from zimage_ref.networks.steering import guide
from zimage_ref.pictures.images import Picture
from zimage_ref.tiny.drawings import COLOURS, SHAPES, SIDE
from zimage_ref.tiny.judge import look

SIZE: dict[str, Any] = {"width": 128, "height": 64, "steps": 3, "guidance": 0.0, "output": "latents"}  # 32 tokens
LONG = "a picture of soft waves and a red fox in the snow, " * 3  # padded to 64 tokens, the others to 32
HALVES = ("0,0,0.5,1: a fox", f"0.5,0,0.5,1: {LONG}")
STEERED: dict[str, dict[str, Any]] = {
    "nag": {"negative_prompt": "snow", "nag": 4.0},
    "nag against a longer prompt": {"negative_prompt": "fox " * 70, "nag": 12.0},
    "variety": {"variety": 0.8, "variety_until": 0.5},
    "regions": {"region": HALVES},
    "regions and guidance": {"region": HALVES, "guidance": 2.0, "negative_prompt": LONG},
    "all but guidance": {"region": HALVES, "nag": 4.0, "negative_prompt": "snow", "variety": 0.5},
}


def made(pipe: Any, **options: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in pipe(["waves", LONG], seed=3, **(SIZE | options))]


@mlx_only
@pytest.mark.parametrize("name", STEERED)
def test_both_engines_steer_alike_and_the_picture_changes(name: str, reference: Any, model_dir: Path) -> None:
    options = STEERED[name]
    plain = made(reference, **{k: v for k, v in options.items() if k == "guidance"})
    for mine, theirs, before in zip(
        made(pipeline("mlx", model_dir), **options), made(reference, **options), plain, strict=True
    ):
        assert_parity(mine, theirs, "twin")
        assert np.abs(theirs - before).max() > 0.02 * np.abs(before).max()


def test_a_scale_of_1_is_bit_identical_to_none(pipe: Any) -> None:
    for before, after in zip(made(pipe), made(pipe, nag=1.0, negative_prompt="snow"), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("text", ["waves", "waves " * 30])
def test_nag_against_the_prompt_itself_changes_nothing(text: str, pipe: Any) -> None:
    before, after = (pipe(text, seed=1, **SIZE, **more)[0] for more in ({}, {"nag": 7.0, "negative_prompt": text}))
    assert_parity(np.asarray(after), np.asarray(before), "same")


def test_a_region_of_the_whole_picture_replaces_the_prompt(pipe: Any) -> None:
    before = pipe("a fox", seed=1, **SIZE)[0]
    after = pipe("waves", seed=1, region=["0,0,1,1: a fox"], **SIZE)[0]
    assert_parity(np.asarray(after), np.asarray(before), "same")


def test_nag_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.standard_normal((2, 1, 5, 7))
    negative[0, 0] *= 30  # the limit acts on this token only
    result = guide(positive, negative, Nag(2.0))
    for token, (p, n) in enumerate(zip(positive[0], negative[0], strict=True)):
        g = 2 * p - n
        ratio = sum(map(abs, g)) / sum(map(abs, p))
        assert (ratio > 3.5) == (token == 0)
        np.testing.assert_allclose(result[0, token], (g * min(1, 3.5 / ratio) + p) / 2, rtol=1e-12)


def test_who_attends_to_whom_in_regions() -> None:
    lengths = np.array([[40, 3], [5, 6]])  # the second picture's captions are filled up from 32 to 64
    mask = region_mask([Box(0, 0, 0.5, 1)], lengths, 2, 4)[:, 0]
    L, T = 32, 64
    assert mask.shape == (2, L + 2 * T, L + 2 * T)
    in_box = [0, 1, 4, 5]
    for token in range(L):
        own, other = (slice(L + T, L + T + 32), slice(L, L + 32))[:: 1 if token in in_box else -1]
        assert mask[1, token, :L].all() and mask[1, token, own].all() and mask[1, own, token].all()
        assert not mask[1, token, other].any() and not mask[1, other, token].any()
    assert not mask[1, :, L + 32 : L + T].any() and mask[0, 2, L : L + T].all()
    assert not mask[:, L : L + T, L + T :].any() and not mask[:, L + T :, L : L + T].any()
    assert mask.any(axis=-1).all()  # a row without any key is not a number


def test_variety_is_noise_on_half_of_the_features(pipe: Any) -> None:
    features = pipe.encode_prompt(LONG)
    plain = np.asarray(features)
    change = np.asarray(with_noise(pipe, features, 0.5, 7, 0)) - plain
    assert 0.4 < np.mean(change == 0) < 0.6
    assert 0.45 * plain.std() < np.abs(change).max() <= 0.501 * plain.std()
    again, seed, place = (np.asarray(with_noise(pipe, features, 0.5, *key)) for key in ((7, 0), (8, 0), (7, 1)))
    np.testing.assert_array_equal(again, plain + change)
    assert np.abs(seed - again).max() > 0.1 * plain.std() < np.abs(place - again).max()


@pytest.mark.parametrize(("until", "early"), [(None, 2), (0.5, 5), (1.0, 10), (0.01, 1)])
def test_variety_acts_in_the_first_steps(
    until: float | None, early: int, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    real = reference.predict
    monkeypatch.setattr(
        reference, "predict", lambda x, sigma, given, copies=1: seen.append(given.caption) or real(x, sigma, given)
    )
    reference("waves", **(SIZE | {"steps": 10}), variety=0.3, variety_until=until)
    plain = reference.condition([reference.encode_prompt("waves")], 8, 16).caption
    assert [np.array_equal(caption, plain) for caption in seen] == [False] * early + [True] * (10 - early)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"nag": 0.5}, "`nag` 0.5 must be at least 1"),
        ({"nag": 3.0}, "`nag` needs `negative_prompt`"),
        ({"nag": 3.0, "negative_prompt": "x", "guidance": 2.0}, "`nag` is for pictures without guidance"),
        ({"variety": 1.5}, "`variety` 1.5 must be at most 1"),
        ({"variety_until": 0.5}, "`variety_until` needs `variety`"),
        ({"region": ["a fox"]}, "`region` 'a fox' must be LEFT,TOP,WIDTH,HEIGHT: PROMPT"),
        ({"region": ["0,0,x,1: a fox"]}, "`region` '0,0,x,1: a fox' must be LEFT,TOP,WIDTH,HEIGHT: PROMPT"),
        ({"region": ["0,0,nan,1: a fox"]}, "is not inside the picture: its sides are shares from 0 to 1"),
        ({"region": ["0.6,0,0.5,1: a fox"]}, "is not inside the picture"),
        ({"region": ["0,0,0.01,1: a fox"]}, "`region` 'a fox' is smaller than a cell of 16 pixels"),
        ({"region": "0,0,1,1: a fox"}, "`region` must be a list of texts"),
    ],
)
def test_wrong_values_are_refused_in_one_line(options: Any, fact: str, model_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_requests([GenerateConfig("waves", width=128, height=64, **options)], ModelFolder.open(model_dir))
    assert fact in str(caught.value) and "\n" not in str(caught.value)


def test_the_second_of_two_pictures_needs_a_negative_prompt_too(model_dir: Path) -> None:
    first = GenerateConfig("waves", nag=3.0, negative_prompt="snow", width=64, height=64)
    with pytest.raises(ConfigError, match="`nag` needs `negative_prompt`"):
        plan_requests([first, replace(first, negative_prompt="")], ModelFolder.open(model_dir))


def test_the_memory_estimate_counts_captions_masks_and_the_second_attention(model_dir: Path, reference: Any) -> None:
    def request(**options: Any) -> Any:
        return plan_requests([GenerateConfig("x", width=512, height=512, **options)], reference.folder)

    plain = request()
    for options in ({"nag": 3.0, "negative_prompt": "y"}, {"region": HALVES}, {"guidance": 1.0}):
        more = request(**options)
        assert 1 == predictions_of(plain[0]) < predictions_of(more[0]) <= 2
        assert reference.memory(plain, 1)[1].activations < reference.memory(more, 1)[1].activations


def test_the_record_repeats_a_steered_picture_and_says_nothing_of_a_plain_one(tmp_path: Path) -> None:
    config = GenerateConfig("x", nag=3.0, negative_prompt="y", variety=0.2, variety_until=0.4, region=HALVES)
    record = json.loads(json.dumps(Recorder({"model": "tiny"}).record(config)))
    assert Repeat.of(record, tmp_path / "x.png").config() == config
    assert not {"nag", "variety", "variety_until", "region"} & Recorder({}).record(GenerateConfig("x")).keys()


def test_the_command_line_steers(tmp_path: Path, model_dir: Path) -> None:
    first, again, plain = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    common = ["generate", f"--model-dir={model_dir}", "--prompt=waves", "--width=64", "--height=64", "--steps=2"]
    steered = ["--nag=4", "--negative-prompt=snow", "--variety=0.5", f"--region={HALVES[0]}", f"--region={HALVES[1]}"]
    assert main([*common, *steered, f"--output={first}"]) == 0
    assert main(["generate", f"--from-image={first}", f"--output={again}"]) == 0
    assert main([*common, f"--output={plain}"]) == 0
    pictures = [Path(name).read_bytes() for name in (first, again, plain)]
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return pipeline("mlx" if HAS_MLX else "numpy", Path("tiny"), None)


def redness(pictures: list[Any]) -> float:
    """How much more red than other light the pictures have on average, in levels."""
    pixels = np.stack([np.asarray(picture, np.float64) for picture in pictures])
    return float((pixels[..., 0] - pixels[..., 1:].max(axis=-1)).mean())


@pytest.mark.slow
def test_nag_turns_a_colour_away(tiny_model: Any) -> None:
    how = {"width": SIDE, "height": SIDE, "steps": 5, "guidance": 0.0, "seed": 4}
    without, with_nag = (
        tiny_model(["a red circle"] * 3, **how, **more) for more in ({}, {"nag": 8.0, "negative_prompt": "red"})
    )
    assert redness(without) - redness(with_nag) > 15  # levels


def halves_of(picture: Picture) -> list[Picture]:
    """The left and the right half, each in the middle of a white picture."""
    halves = []
    for box in ((0, 0, SIDE // 2, SIDE), (SIDE // 2, 0, SIDE, SIDE)):
        halves.append(Image.new("RGB", picture.size, "white"))
        halves[-1].paste(picture.crop(box), (SIDE // 4, 0))
    return halves


def share_in_regions(pipe: Any, count: int) -> float:
    """The share of pictures that show in each half the shape and colour that it names; smudges are allowed."""
    rng, right = np.random.default_rng(5), 0
    for seed in range(count):
        (a, b), (p, q) = (rng.choice(list(x), 2, replace=False) for x in (SHAPES, [c for c in COLOURS if c != "white"]))
        halves = [f"{box}: a {c} {s} on a white background" for box, c, s in
                  (("0,0,0.5,1", p, a), ("0.5,0,0.5,1", q, b))]  # fmt: skip
        (picture,) = pipe(
            "a white background", width=SIDE, height=SIDE, steps=8, guidance=0.0, seed=seed, region=halves
        )
        left, other = (look(half).things for half in halves_of(picture))
        right += (a, p) in left and (b, q) in other
    return right / count


@pytest.mark.slow
def test_two_regions_hold_what_their_prompts_name(tiny_model: Any) -> None:
    assert share_in_regions(tiny_model, 3) == 1


@long_only
@pytest.mark.slow
def test_regions_come_out_as_named_in_nine_of_ten_pictures(tiny_model: Any) -> None:
    assert share_in_regions(tiny_model, 100) >= 0.9
