"""The second pass: both engines alike, in tiles as whole, and no more memory than a tile takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import controls, tiny
from support.daily import daily
from support.networks import BACKENDS, long_only, mlx_only, pipeline
from support.parity import assert_parity

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.checkpoints.hub import BUILT_IN
from zimage_ref.generation.previews import quick_picture
from zimage_ref.generation.provenance import Recorder, Repeat
from zimage_ref.generation.run import GenerationRun, RunSettings
from zimage_ref.generation.tiles import Tiles
from zimage_ref.generation.upscale import enlarged
from zimage_ref.model.shared_moments import SharedMoments
from zimage_ref.model.steering import Box
from zimage_ref.pictures.images import fit, read_picture, to_array
from zimage_ref.pictures.metadata import read_record

PROMPT = "a red fox in the snow"
SIZE: dict[str, Any] = {"width": 64, "height": 48, "steps": 3}
PHOTO, MAP = tiny.photograph(64, 48, seed=8), tiny.photograph(64, 48, seed=7)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def drawn(pipe: Any, prompt: str = PROMPT, **options: Any) -> np.ndarray:
    made: np.ndarray = pipe(prompt, **{**SIZE, "output": "array", **options})[0]
    return made


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return controls.write(tmp_path_factory.mktemp("net"), controls.SMALL["2.1"])


@every_backend
def test_the_second_pass_is_the_picture_enlarged_and_begun_again(backend: str, model_dir: Path) -> None:
    pipe = pipeline(backend, model_dir)
    (first,) = pipe(PROMPT, **SIZE)
    (both,) = pipe(PROMPT, **SIZE, upscale=1.5, tile_size=64)
    assert both.size == (96, 64)  # 96 x 72: multiples of 16
    (alone,) = pipe(PROMPT, **SIZE, init_image=first, upscale=1.5, tile_size=64)
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(both))
    large = fit(first, 96, 64, "crop")
    begun = pipe(PROMPT, width=96, height=64, steps=3, init_image=large, strength=0.33)[0]
    whole = pipe(PROMPT, **SIZE, init_image=first, upscale=1.5)[0]
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(begun))  # one tile: bit for bit
    assert np.abs(np.asarray(whole, int) - np.asarray(large, int)).max() > 2


def test_each_of_its_options_changes_the_picture(model_dir: Path) -> None:
    pipe = pipeline("numpy", model_dir)
    made = {
        name: drawn(pipe, **{"init_image": PHOTO, "upscale": 1.5, "tile_size": 96} | options)
        for name, options in {
            "plain": {}, "stronger": {"upscale_strength": 0.9}, "tiles": {"tile_size": 64}, "seed": {"seed": 1},
            "first pass": {"strength": 0.5}, "larger": {"upscale": 2},
        }.items()
    }  # fmt: skip
    assert made["larger"].shape == (96, 128, 3)
    for name in ("stronger", "tiles", "seed", "first pass"):
        assert made[name].shape == (64, 96, 3)
        assert np.abs(made[name] - made["plain"]).max() > 0.004, name


@mlx_only
@pytest.mark.parametrize(
    "more",
    daily(["guidance", "control", "its own picture", "regions"], "guidance"),
)
def test_engines_agree(more: str, model_dir: Path, net: Path) -> None:
    options: dict[str, Any] = {
        "guidance": {"guidance": 2.0, "cfg_normalization": 1.0},
        "control": {"control": [(net, MAP, 0.8)], "init_image": PHOTO, "guidance": 1.0},
        "its own picture": {"control": str(net), "control_kind": "gray"},
        "regions": {"region": ("0,0,0.4,1: soft waves", "0.6,0.5,0.4,0.5: the snow")},
    }[more]
    expected, actual = (
        drawn(pipeline(backend, model_dir), upscale=1.5, tile_size=64, upscale_strength=0.7, **options)
        for backend in ("numpy", "mlx")
    )
    assert_parity(actual, expected, "picture")
    if "region" in options or "control" in options:
        left_out = {name: value for name, value in options.items() if name not in ("region", "control", "control_kind")}
        plain = drawn(pipeline("mlx", model_dir), upscale=1.5, tile_size=64, upscale_strength=0.7, **left_out)
        assert np.abs(plain - actual).max() > 0.01


@every_backend
def test_the_networks_see_no_more_than_a_tile(
    backend: str, model_dir: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, seen, contexts = pipeline(backend, model_dir), Counter[tuple[str, int, int]](), []
    for name in ("_encode", "_decode", "predict"):
        plain = getattr(pipe, name)

        def spied(x: Any, *more: Any, name: str = name, plain: Any = plain, **named: Any) -> Any:
            seen[name, x.shape[2], x.shape[3]] += 1
            return plain(x, *more, **named)

        monkeypatch.setattr(pipe, name, spied)
    controlled = pipe.controlled
    monkeypatch.setattr(
        pipe, "controlled", lambda own, file, context, scale: contexts.append(np.asarray(context))
        or controlled(own, file, context, scale),
    )  # fmt: skip
    counted: list[tuple[int, int]] = []
    made = pipe(
        PROMPT, **SIZE, init_image=PHOTO, upscale=2, tile_size=64, control=[(net, MAP, 1.0)], output="latents",
        progress=lambda stage, done, total: counted.append((done, total)) if stage == "denoise" else None,
    )[0]  # fmt: skip
    assert made.shape == (16, 12, 16)  # latents of 128 x 96
    assert {(name, rows, columns) for name, rows, columns in seen} == {("_encode", 64, 64), ("predict", 8, 8)}
    tiles = Tiles.of(12, 16, 8)
    assert len(tiles.places) == 6 and seen["_encode", 64, 64] == 2 * 2 * 6  # picture and map, each twice
    assert seen["predict", 8, 8] == 6 and counted == [(i + 1, 6) for i in range(6)]
    assert all(context.shape[2:] == (8, 8) for context in contexts) and len(contexts) == 6
    assert len({context.tobytes() for context in contexts}) == 6  # each is its own part of the map
    pipe.decode(pipe.to_backend(made[None]), tiles)
    assert seen["_decode", 8, 8] == 2 * 6 and len(seen) == 3


def test_a_batch_is_its_pictures(model_dir: Path) -> None:
    pipe, prompts = pipeline("numpy", model_dir), [PROMPT, "soft waves and more " * 3]
    options: dict[str, Any] = {**SIZE, "upscale": 1.5, "tile_size": 64, "output": "array"}
    together = pipe(prompts, seed=4, **options)
    for i, prompt in enumerate(prompts):
        assert_parity(together[i], pipe(prompt, seed=4 + i, **options)[0], "picture")
    steps = list(pipe.stream(PROMPT, seed=4, **SIZE, upscale=1.5, tile_size=64))
    assert [step.index for step in steps] == [1, 2, 3, 1] and steps[-1].x.shape == (1, 16, 8, 12)


def test_the_autoencoder_norms_a_tile_as_the_whole_picture(model_dir: Path) -> None:
    """A tile of plain background alone would be normed to other colours."""
    pipe, tiles = pipeline("numpy", model_dir), Tiles.of(20, 16, 10)
    picture = Image.new("RGB", (128, 160), (248, 218, 48))
    picture.paste((38, 92, 214), (70, 16, 112, 60))
    pixels = to_array(picture)[None]
    latents = pipe.encode(pixels)
    alone = tiles.blend(lambda place: np.asarray(pipe._decode(latents[place.index()]))[None], 8)[0]
    _is_nearer(pipe.decode(latents, tiles), alone, pipe.decode(latents))
    alone = tiles.blend(lambda place: np.asarray(pipe._encode(pixels[place.index(8)])))
    _is_nearer(np.asarray(pipe.encode(pixels, tiles)), alone, np.asarray(latents))


def _is_nearer(shared: np.ndarray, alone: np.ndarray, whole: np.ndarray) -> None:
    assert np.abs(shared - whole).mean() < 0.8 * np.abs(alone - whole).mean()


@mlx_only
def test_engines_agree_on_a_picture_in_tiles(model_dir: Path) -> None:
    tiles, engines = Tiles.of(9, 14, 6), [pipeline(backend, model_dir) for backend in ("numpy", "mlx")]
    latents = np.random.default_rng(0).standard_normal((1, 16, 9, 14)).astype(np.float32)
    assert_parity(*(pipe.decode(pipe.to_backend(latents), tiles) for pipe in reversed(engines)), "picture")
    pixels = to_array(tiny.photograph(112, 72, seed=3))[None]
    assert_parity(*(np.asarray(pipe.encode(pixels, tiles)) for pipe in reversed(engines)), "picture")


def test_shared_moments_are_the_mean_over_tiles() -> None:
    shared: SharedMoments[np.ndarray] = SharedMoments()
    parts = [np.array([1.0, 3.0]), np.array([7.0, 9.0])]
    for part in parts:
        shared.begin()
        assert shared.of(part.mean(), part.var()) == (part.mean(), part.var())
    shared.close()
    shared.begin()
    mean, variance = shared.of(np.array(0.0), np.array(0.0))
    whole = np.concatenate(parts)
    assert (mean, variance) == (whole.mean(), whole.var())


@pytest.mark.parametrize(("h", "w", "side"), [(24, 30, 12), (9, 14, 6), (33, 8, 16), (17, 17, 16), (64, 64, 9)])
def test_tiles_cover_every_cell_smoothly(h: int, w: int, side: int) -> None:
    tiles, rng = Tiles.of(h, w, side), np.random.default_rng(0)
    x = rng.standard_normal((2, 3, h, w)).astype(np.float32)
    np.testing.assert_allclose(tiles.blend(lambda place: x[place.index()]), x, atol=1e-6)
    shares = dict(tiles.shares())
    total = np.zeros((h, w))
    for place, share in shares.items():
        total[place.index()[2:]] += share
        assert share.shape == (min(side, h), min(side, w)) and (share > 0).all()
        if place.left:  # it fades in from the left, over at least a quarter of its side
            middle = share[share.shape[0] // 2]
            assert middle[0] < 0.3 and np.abs(np.diff(middle)).max() < 0.9
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    for start, end in ((tiles.places[0], tiles.places[-1]),):
        assert (start.top, start.left) == (0, 0)
        assert (end.top + end.rows, end.left + end.columns) == (h, w)
    assert Tiles.of(h, w, max(h, w)).single and Tiles.of(h, w, None).single and not tiles.single


def test_a_region_is_moved_into_the_view_of_a_tile() -> None:
    box, tiles = Box(0.5, 0.25, 0.25, 0.5), Tiles.of(16, 24, 8)
    for place in tiles.places:
        mine = box.seen_from(tiles.box(place)).cells(8, 8)
        np.testing.assert_array_equal(mine, box.cells(16, 24)[place.index()[2:]])


def test_a_mask_acts_in_the_first_pass(model_dir: Path) -> None:
    mask = Image.new("L", PHOTO.size)
    mask.paste(255, (16, 16, 40, 40))
    pipe = pipeline("numpy", model_dir)
    (request,) = pipe.plan([GenerateConfig(PROMPT, init_image=PHOTO, mask=mask, upscale=2, steps=3)])
    assert request.second is not None and request.mask is not None and request.second.mask is None
    (first,) = pipe(PROMPT, init_image=PHOTO, mask=mask, **SIZE)
    (both,) = pipe(PROMPT, init_image=PHOTO, mask=mask, upscale=1.5, **SIZE)
    (alone,) = pipe(PROMPT, init_image=first, upscale=1.5, **SIZE)
    np.testing.assert_array_equal(np.asarray(both), np.asarray(alone))


def test_variety_is_for_the_first_pass(model_dir: Path) -> None:
    pipe = pipeline("numpy", model_dir)
    (first,) = pipe(PROMPT, variety=0.8, **SIZE)
    (both,) = pipe(PROMPT, variety=0.8, upscale=1.5, **SIZE)
    np.testing.assert_array_equal(np.asarray(both), np.asarray(pipe(PROMPT, init_image=first, upscale=1.5, **SIZE)[0]))


def test_a_preview_of_a_large_picture_takes_no_more_than_a_tile(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, shapes = pipeline("numpy", model_dir), []
    monkeypatch.setattr(
        pipe, "decode", lambda x, tiles=None: shapes.append(x.shape[2:]) or np.zeros((3, *(8 * n for n in x.shape[2:])))
    )
    assert quick_picture(pipe, np.zeros((1, 16, 512, 300), np.float32)).size == (2400, 4096)
    assert shapes == [(128, 75)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscale_strength": 0.3}, "`upscale_strength` needs `upscale`"),
        ({"tile_size": 512}, "`tile_size` needs `upscale`"),
        ({"upscale": 1}, "`upscale` 1 must be above 1"),
        ({"upscale": 5}, "`upscale` 5 must be at most 4"),
        ({"upscale": 2, "upscale_strength": 0}, "`upscale_strength` 0 must be above 0"),
        ({"upscale": 2, "tile_size": 32}, "`tile_size` 32 must be at least 64"),
        ({"upscale": 2, "tile_size": 100}, "`tile_size` 100 must be a multiple of 16: 96 is the nearest"),
        ({"upscale": 2, "tile_size": 4096}, "4096 x 4096 is more than 2048 x 2048 pixels"),
        ({"control": "net"}, "`control` needs `control_image`"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        GenerateConfig("x", **options)


def test_a_tile_must_be_possible_for_the_model(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1024 for"):  # the positions of this model
        pipeline("numpy", model_dir).plan([GenerateConfig("x", upscale=4, tile_size=2048)])


def test_sizes_are_rounded_to_whole_tokens() -> None:
    assert [enlarged(1040, 784, factor, 16) for factor in (1.5, 2, 4)] == [(1568, 1184), (2080, 1568), (4160, 3136)]


def test_the_record_makes_it_again(model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    PHOTO.save(tmp_path / "photo.png")
    out, again = tmp_path / "large.png", tmp_path / "again.png"
    common = ["--model-dir", str(model_dir), "--backend", "numpy"]
    given = ["--init-image", str(tmp_path / "photo.png"), "--upscale", "2", "--tile-size", "64", "--steps", "3"]
    assert main(["generate", *common, "--prompt", PROMPT, *given, "--output", str(out)]) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "to 128 x 96, 1 step, 6 tiles of 64 x 64" in shown
    assert main(["generate", *common, "--from-image", str(out), "--output", str(again)]) == 0
    np.testing.assert_array_equal(np.asarray(read_picture(out)), np.asarray(read_picture(again)))
    record = read_record(out)
    assert (record["upscale"], record["upscale_strength"], record["tile_size"]) == (2.0, 0.33, 64)
    assert "strength" not in record  # with one, there would be a first pass
    plain = Recorder({}).record(GenerateConfig("x"))
    assert not {"upscale", "upscale_strength", "tile_size"} & plain.keys()
    assert Repeat.read(out).config().upscale == 2
    saved = ["--control", "net", "--save-control", "--output", str(tmp_path / "c.png"), "--overwrite"]
    assert main(["generate", *common, "--prompt", PROMPT, *given, *saved]) == 1
    assert "--save-control needs --control-image" in capfd.readouterr().err


def test_memory_is_that_of_a_tile(model_dir: Path) -> None:
    run = GenerationRun(pipeline("numpy", model_dir), RunSettings())

    def needs(**options: Any) -> list[int]:
        requests = run.pipeline.plan([GenerateConfig("x", width=512, height=512, steps=4, **options)])
        return [stage.activations for stage in run.pipeline.memory(requests, 1)]

    plain, doubled, fourfold = needs(), needs(upscale=2, tile_size=512), needs(upscale=4, tile_size=512)
    assert needs(upscale=2)[1] > 3 * plain[1]  # 1024 x 1024 in one tile
    for stage, pixels in ((1, 8), (2, 40)):  # latents and the picture itself are all that grows
        assert doubled[stage] - plain[stage] == pixels * 1024**2
        assert fourfold[stage] - plain[stage] == pixels * 2048**2


@mlx_only
@long_only
@pytest.mark.slow
def test_no_seam_shows_at_the_borders_of_tiles() -> None:
    """The mean gradient across the borders of tiles and across other borders of tokens, on the built-in model."""
    pipe, tiles = pipeline("mlx", BUILT_IN), Tiles.of(32, 32, 16)
    edges = {edge for place in tiles.places for edge in (place.left, place.left + place.columns)} - {0, 32}
    at, elsewhere = [], []
    for seed in range(10):
        photo = tiny.photograph(128, 128, seed=seed)
        options: dict[str, Any] = {"upscale": 2, "tile_size": 128, "upscale_strength": 0.2, "steps": 10}
        gray = drawn(pipe, "", init_image=photo, guidance=0.0, seed=seed, **options | {"width": 128, "height": 128})
        gray = gray.mean(-1)
        for axis in (0, 1):
            steps = np.abs(np.diff(gray, axis=axis)).mean(1 - axis)[15::16]  # across the borders of tokens
            border = np.array([2 * (i + 1) in edges for i in range(len(steps))])
            at.append(steps[border].mean())
            elsewhere.append(steps[~border].mean())
    assert 0.9 < np.mean(at) / np.mean(elsewhere) < 1.1
