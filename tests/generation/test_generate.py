"""What a pipeline makes of a request, on both backends: batches, defaults, samplers, pictures to start from, memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.daily import daily
from support.networks import HAS_MLX, pipeline
from support.parity import assert_parity

from zimage_ref import ConfigError, DatasetError, GenerateConfig, ModelFolder
from zimage_ref.generation.jobs import plan_requests
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, SchedulerConfig

SIZE: dict[str, Any] = {"width": 48, "height": 32}
LONG = "a picture of soft waves and a red fox in the snow, " * 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heun": {"sampler": "heun"},
    "dpm++2m": {"sampler": "dpm++2m", "shift": 1.5},
    "guided": {"guidance": 3.0, "negative_prompt": "snow", "cfg_normalization": 1.0, "cfg_truncation": 0.5},
    "picture": {"init_image": tiny.photograph(70, 50, 1), "strength": 0.5},
    "mask": {"init_image": tiny.photograph(70, 50, 1), "mask": tiny.photograph(70, 50, 2), "fit": "pad"},
}

mlx_only = pytest.mark.skipif(not HAS_MLX, reason="mlx is not installed")


def array(pipe: Any, prompt: Any = "a fox", **options: Any) -> Any:
    return pipe(prompt, **({"output": "array", "steps": 3} | SIZE | options))


@mlx_only
@pytest.mark.parametrize("name", OPTIONS)
def test_mlx_and_numpy_make_the_same_picture_with_every_option(reference: Any, model_dir: Path, name: str) -> None:
    mlx, numpy = (array(p, seed=4, **OPTIONS[name])[0] for p in (pipeline("mlx", model_dir), reference))
    assert_parity(mlx, numpy, "picture")
    if name != "plain":
        assert np.abs(numpy - array(reference, seed=4)[0]).max() > 2 / 255  # the option does something


@pytest.mark.parametrize("name", daily(["plain", "guided", "mask"], "guided", "mask"))
def test_a_picture_does_not_depend_on_its_batch(pipe: Any, name: str) -> None:
    options = OPTIONS[name] | {"steps": 2}
    together = array(pipe, ["waves", LONG, "fox"], seed=[1, 2], batch_size=4, **options)
    alone = [array(pipe, p, seed=s, **options)[0] for p in ("waves", LONG, "fox") for s in (1, 2)]
    assert len(together) == 6
    for picture, other in zip(together, alone, strict=True):
        assert_parity(picture, other, "picture")
    assert np.abs(alone[0] - alone[1]).max() > 0.1 and np.abs(alone[0] - alone[2]).max() > 1 / 255


def test_texts_and_pictures_are_encoded_once_and_each_batch_is_decoded_at_once(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name, stage in (("encode_prompt", "text"), ("encode", "vae in"), ("predict", "dit"), ("decode", "vae out")):
        real = getattr(pipe, name)
        monkeypatch.setattr(
            pipe, name, lambda *args, real=real, stage=stage, **kw: order.append(stage) or real(*args, **kw)
        )
    array(pipe, ["a", "b", "a"], seed=[1, 2], batch_size=2, steps=2, init_image=tiny.photograph(40, 40, 1), strength=1)
    assert order == ["text"] * 2 + ["vae in"] + (["dit"] * 2 + ["vae out"] * 2) * 3


def test_the_scheduler_tells_turbo_from_the_base_model(tmp_path: Path) -> None:
    for shift, steps, guidance in ((3.0, 8, 0.0), (6.0, 50, 4.0)):
        folder = ModelFolder.open(
            tiny.write_model_folder(tmp_path / str(shift), scheduler=SchedulerConfig(shift=shift))
        )
        (request,) = plan_requests([GenerateConfig("x", negative_prompt="y")], folder)
        assert (request.config.steps, request.config.guidance, len(request.sigmas)) == (steps, guidance, steps + 1)
        assert request.guidance.scale == guidance and (request.width, request.height) == (512, 512)
        halfway = request.sigmas[steps // 2]
        assert halfway == pytest.approx(shift / (shift + 1), abs=1e-6)
        (given,) = plan_requests([GenerateConfig("x", steps=4, guidance=0.5, shift=1.0)], folder)
        assert given.sigmas == pytest.approx([1, 0.75, 0.5, 0.25, 0]) and given.guidance.scale == 0.5


@pytest.mark.slow
def test_all_samplers_come_to_one_picture_in_a_hundred_steps(reference: Any) -> None:
    few, many = (
        {name: array(reference, seed=5, steps=steps, sampler=name)[0] * 255 for name in ("euler", "heun", "dpm++2m")}
        for steps in (4, 100)
    )
    for name in ("euler", "dpm++2m"):
        assert np.abs(many[name] - many["heun"]).max() < 3
        assert np.abs(few[name] - few["heun"]).max() > 4
        assert np.abs(few[name] - many[name]).max() > 10


def test_strength_one_ignores_the_picture_and_less_keeps_more_of_it(pipe: Any) -> None:
    photo = tiny.photograph(48, 32, 1)
    made = {s: array(pipe, seed=2, init_image=photo, strength=s, steps=10, output="latents") for s in (1.0, 0.5, 0.1)}
    plain = pipe("a fox", seed=2, steps=10, output="latents", **SIZE)
    np.testing.assert_array_equal(made[1.0][0], plain[0])
    own = np.asarray(pipe.encode(np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)[0])
    distances = [np.abs(made[s][0] - own).mean() for s in (1.0, 0.5, 0.1)]
    assert distances[0] > distances[1] > distances[2]


def test_outside_the_mask_the_picture_is_kept_bit_for_bit(pipe: Any) -> None:
    photo, mask = tiny.photograph(48, 32, 1), np.zeros((32, 48), np.uint8)
    mask[5:21, 10:30] = 255  # not on the grid of latents
    made = np.asarray(pipe("a fox", init_image=photo, mask=Image.fromarray(mask), steps=2, seed=1)[0])
    kept = np.asarray(photo)
    np.testing.assert_array_equal(made[mask == 0], kept[mask == 0])
    changed = (made != kept).any(axis=2)
    assert changed[mask == 255].mean() > 0.95


def test_every_cell_that_a_white_pixel_touches_is_painted_anew(model_dir: Path) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[7, 8], mask[31, 47] = 255, 255
    config = GenerateConfig("x", init_image=tiny.photograph(48, 32, 1), mask=Image.fromarray(mask))
    (request,) = plan_requests([config], ModelFolder.open(model_dir))
    cells = np.zeros((4, 6))
    cells[0, 1], cells[3, 5] = 1, 1
    np.testing.assert_array_equal(request.latent_mask(4, 6), cells)
    assert request.config.strength == 1.0


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_picture_and_mask_are_fitted_alike(how: str, model_dir: Path) -> None:
    left = np.zeros((50, 100, 3), np.uint8)
    left[:, :30] = 255  # a white part, which the mask shows too
    config = GenerateConfig(
        "x", width=64, height=64, init_image=Image.fromarray(left), mask=Image.fromarray(left), fit=how
    )
    (request,) = plan_requests([config], ModelFolder.open(model_dir))
    bright, painted = np.asarray(request.picture)[..., 0] > 127, request.mask
    assert painted is not None and painted.shape == (64, 64)
    share = {"crop": 0.1, "pad": 0.65, "stretch": 0.3}[how]  # pad: half is around the picture, and painted
    assert painted.mean() == pytest.approx(share, abs=0.03)
    inside = slice(16, 48) if how == "pad" else slice(0, 64)
    assert (bright[inside] == painted[inside]).mean() > 0.95


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((70, 50), {}, (64, 48)),
        ((1000, 1000), {}, (992, 992)),
        ((6000, 3000), {}, (2880, 1456)),
        ((300, 200), {"width": 96}, (96, 64)),
        ((300, 200), {"height": 96}, (144, 96)),
        ((300, 200), {"width": 32, "height": 48}, (32, 48)),
    ],
)
def test_the_size_comes_from_the_picture(size: Any, asked: Any, expected: Any, model_dir: Path) -> None:
    folder = ModelFolder.open(model_dir)
    axes = folder.transformer.axes_lens
    object.__setattr__(folder.transformer, "axes_lens", OFFICIAL_TRANSFORMER.axes_lens)  # the tiny model ends at 1024
    try:
        (request,) = plan_requests([GenerateConfig("x", init_image=Image.new("RGB", size), **asked)], folder)
    finally:
        object.__setattr__(folder.transformer, "axes_lens", axes)
    assert (request.width, request.height) == expected and request.width * request.height <= 2048**2
    assert request.picture is not None and request.picture.size == expected and request.config.strength == 0.6


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"width": 40}, "`width` 40 must be a multiple of 16: 32 is the nearest"),
        ({"width": 4096, "height": 2048}, r"4096 x 2048 is more than 2048 x 2048 pixels: \d+ x \d+ fits"),
        ({"width": 1040}, "at most 1024"),
        ({"sampler": "ddim"}, "`sampler` 'ddim' is unknown: known are euler, heun, dpm++2m"),
        ({"fit": "tile"}, "`fit` 'tile' is unknown"),
        ({"strength": 0.5}, "`strength` needs `init_image`"),
        ({"mask": tiny.photograph(8, 8, 1)}, "`mask` needs `init_image`"),
        ({"init_image": tiny.photograph(32, 32, 1), "strength": 1.5}, "`strength` 1.5 must be at most 1"),
        (
            {"init_image": tiny.photograph(32, 32, 1), "strength": 0.0},
            "`strength` 0 leaves none of 3 steps",
        ),
        (
            {"init_image": tiny.photograph(32, 32, 1), "mask": tiny.photograph(32, 16, 1)},
            "is 32 x 16, `init_image` (a picture in memory) 32 x 32: they must be of one size",
        ),
        ({"init_image": tiny.photograph(32, 32, 1), "mask": Image.new("L", (32, 32))}, "is black"),
        ({"cfg_truncation": -0.1}, "`cfg_truncation` -0.1 must be at least 0"),
        ({"cfg_normalization": float("nan")}, "`cfg_normalization` nan must be at least 0"),
        ({"shift": 0.0}, "`shift` 0.0 must be at least 0.001"),
        ({"prompt": "\udcff"}, "`prompt` is not valid Unicode"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_weights(options: Any, fact: str, reference: Any) -> None:
    fact = fact if "\\d" in fact else fact.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+")
    with pytest.raises(ConfigError, match=fact) as caught:
        reference.plan([GenerateConfig(**({"prompt": "x", "steps": 3} | SIZE | options))])
    assert "\n" not in str(caught.value)


def test_an_unreadable_picture_is_refused_before_any_weights(reference: Any, tmp_path: Path) -> None:
    for name in ("init_image", "mask"):
        files = {"init_image": tiny.photograph(8, 8, 1), name: tmp_path / "missing.png"}
        with pytest.raises(DatasetError, match=r"missing\.png: cannot be read as a picture"):
            reference.plan([GenerateConfig("x", **files)])


def test_streaming_shows_every_step_and_ends_at_the_picture(pipe: Any) -> None:
    steps = list(pipe.stream("a fox", seed=7, steps=4, **SIZE))
    assert [(step.index, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[-1].sigma == 0 and all(a.sigma > b.sigma for a, b in pairwise(steps))
    (picture,) = pipe("a fox", seed=7, steps=4, **SIZE)
    assert np.asarray(pipe.picture(steps[-1].x)).tolist() == np.asarray(picture).tolist()
    errors = [np.abs(np.asarray(step.x_0) - np.asarray(steps[-1].x)).mean() for step in steps]
    noisy = [np.abs(np.asarray(step.x) - np.asarray(steps[-1].x)).mean() for step in steps]
    assert errors[0] < noisy[0] and errors[-1] < 1e-5  # the prediction is ahead of the state


def test_a_pipeline_that_was_interrupted_works_on(pipe: Any) -> None:
    expected = array(pipe, seed=3)[0]

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("denoise", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        array(pipe, seed=3, progress=interrupt)
    stream = pipe.stream("waves", steps=4, **SIZE)
    next(stream)
    stream.close()
    lean = type(pipe)(pipe.folder, "float32", lean=True)
    with pytest.raises(KeyboardInterrupt):
        array(lean, seed=3, progress=interrupt)
    loaded = []
    watched = array(lean, seed=3, progress=lambda *_: loaded.append(getattr(lean, "loaded", {"mapped"})))
    np.testing.assert_array_equal(watched[0], expected)
    assert all(len(names) == 1 for names in loaded)
    np.testing.assert_array_equal(array(pipe, seed=3)[0], expected)


def test_a_pipeline_estimates_the_largest_of_its_requests(pipe: Any) -> None:
    small, large = ({"width": side, "height": side} for side in (32, 64))
    requests = [r for size in (small, large, small) for r in pipe.plan([GenerateConfig("x", **size)])]
    assert pipe.memory(requests, 1) == pipe.memory(requests[1:2], 1) != pipe.memory(requests[:1], 1)
    limit = pipe.memory_limit()
    assert limit is None or limit > 500_000_000


def test_only_prompts_and_seeds_may_differ_in_a_batch(model_dir: Path) -> None:
    first = GenerateConfig("a", seed=1, steps=2, width=32, height=32)
    others = [
        replace(first, prompt="b", negative_prompt="c", seed=2),
        *(replace(first, **more) for more in ({"width": 48}, {"steps": 3}, {"guidance": 2.0}, {"sampler": "heun"})),
    ]
    own, *rest = plan_requests([first, *others], ModelFolder.open(model_dir))
    assert [own.batches_with(each) for each in rest] == [True, False, False, False, False]
