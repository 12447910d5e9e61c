"""The recipe of the small ControlNet, its data and its judge."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx.core", reason="MLX is not installed")

import mlx.core as mx
from support.networks import long_only, pipeline

from zimage_cli.app import main
from zimage_cli.commands import demo
from zimage_mlx.tiny import __main__ as command
from zimage_mlx.tiny import control
from zimage_mlx.tiny.losses import Denoiser, denoising_loss
from zimage_mlx.tiny.recipe import BuildOptions
from zimage_ref.checkpoints.control_file import ControlFile
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.hub import BUILT_IN
from zimage_ref.model.control import controlnet_parameters
from zimage_ref.tiny.data import TOKENS
from zimage_ref.tiny.drawings import COLOURS, SHAPES, Scene, Thing, draw, take
from zimage_ref.tiny.judge import in_place
from zimage_ref.tiny.outlines import edge_map, name_colours

PAIR = Scene((Thing("ring", "blue", 38, 60), Thing("star", "red", 92, 66)), "yellow", "a blue ring left of a red star")


def test_an_edge_map_shows_every_outline_and_nothing_else() -> None:
    lines = np.asarray(edge_map(draw(PAIR, np.random.default_rng(0))))
    assert lines.shape == (128, 128, 3) and set(np.unique(lines)) == {0, 255}
    y, x = np.nonzero(lines[..., 0])
    distance = np.hypot(x - 38, y - 60)[x < 65]
    assert ((np.abs(distance - 25) < 2.5) | (np.abs(distance - 0.55 * 25) < 2.5)).all()  # both rims of the ring
    assert 0.01 < lines.mean() / 255 < 0.06
    for first in COLOURS:  # every pair of colours has an edge
        for second in set(COLOURS) - {first}:
            scene = Scene((Thing("square", first),), second, "")
            assert np.asarray(edge_map(draw(scene, np.random.default_rng(1))))[..., 0].sum() > 255 * 100, (
                first,
                second,
            )


def test_edges_are_those_of_canny() -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (extra `control`)")
    picture = draw(PAIR, np.random.default_rng(0))
    canny = cv2.Canny(np.asarray(picture), 100, 200) > 0
    near = cv2.dilate(np.asarray(edge_map(picture))[..., 0], np.ones((3, 3))) > 0
    assert (canny & near).sum() > 0.98 * canny.sum()


def test_a_caption_names_only_colours() -> None:
    rng = np.random.default_rng(0)
    for scene in take(50, seed=3):
        words = set(name_colours(scene, rng).replace(",", "").split())
        assert not words & {form for shape in SHAPES for form in (shape, f"{shape}s", f"{shape}es")}
        assert {thing.colour for thing in scene.things} | {scene.ground} == words & set(COLOURS)


def test_the_judge_asks_for_every_shape_in_its_place() -> None:
    def shown(*things: Thing) -> bool:
        return in_place(draw(Scene(things, "black", ""), np.random.default_rng(2)), PAIR)

    ring, star = (replace(thing, colour="pink") for thing in PAIR.things)
    assert shown(ring, star)  # colours do not count
    assert not shown(ring)
    assert not shown(ring, replace(star, x=star.x - 12))
    assert not shown(replace(ring, shape="circle"), replace(star, radius=18))
    assert shown(ring, replace(star, x=star.x + 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder, lines = tmp_path_factory.mktemp("control") / "made", []
    recipe = control.ControlRecipe(pictures=3, steps=2, batch=2)
    options = BuildOptions(every=1, judged=1, report=lambda facts: lines.append(dict(facts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "STEPS", 1)
        assert control.build_control(BUILT_IN, folder, recipe, options)
    return folder, lines


@pytest.mark.slow
def test_the_recipe_writes_a_small_network_of_the_layout_of_2_1(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, lines = trained
    file = ControlFile.open(folder / "controlnet", ModelFolder.open(BUILT_IN))
    assert file.config.variant == "2.1 lite: 1 block, 16 channels"
    assert set(file.tensors) == set(controlnet_parameters(file.config))
    size = sum(path.stat().st_size for path in (folder / "controlnet").iterdir())
    assert size < 1_550_000
    assert [(line["stage"], line["step"]) for line in lines] == [("control", 1), ("control", 2)]
    assert {"loss", "in place", "without control"} <= lines[-1].keys() and json.loads(json.dumps(lines)) == lines
    with pytest.raises(SystemExit, match="a ControlNet has no `vae_steps`"):
        _run("--control-for", "tiny", "--output", str(folder), "--vae-steps", "3")


def _run(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tiny", *arguments])
        command.main()


@pytest.mark.slow
def test_the_demo_shows_a_row_of_pictures_that_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "FOLLOWED", 2)
    assert main(["demo", "--control", f"--output={tmp_path}"]) == 0
    with Image.open(tmp_path / "control.png") as sheet:
        assert sheet.size == (2 * 132 + 4, 2 * 132 + 4)
        maps = np.asarray(sheet)[4:132, 4:264].astype(int)
    assert (np.abs(maps - 128) == 128).mean() + (np.abs(maps - 127.5) == 127.5).mean() > 0.9  # black and white
    assert [file.name for file in tmp_path.iterdir()] == ["control.png"]
    assert capsys.readouterr().out.count(" background") >= 1


@long_only
@pytest.mark.slow
def test_the_built_in_control_puts_shapes_in_their_places() -> None:
    shares = control.judge_control(BUILT_IN, BUILT_IN / "controlnet", 40)
    assert shares["in place"] >= 0.9 and shares["without control"] < 0.2  # docs/tiny.md has the figures of 200 pictures


def test_a_new_network_changes_nothing_and_a_step_does() -> None:
    pipe = pipeline("mlx", BUILT_IN)
    model = Denoiser(pipe.folder.transformer, pipe.folder.text_encoder)
    model.transformer, model.text_encoder = pipe.transformer, pipe.text_encoder
    network = control.beginning(control.config_for(pipe.folder.transformer), model)
    layout = model.transformer.layout([TOKENS], 16, 16)
    rng = np.random.default_rng(0)
    x, maps = (mx.array(rng.standard_normal((2, 16, 16, 16)).astype(np.float32)) for _ in range(2))
    given = model, mx.random.key(0), x, mx.ones((2, TOKENS), mx.int32), mx.full((2,), 20), layout
    plain = denoising_loss(*given)
    assert denoising_loss(*given, control.Control(network, maps, 1.0)).item() == plain.item()
    for block in (*network.refiner, *network.control_layers):
        block.after_proj.weight = 0.1 * mx.random.normal(block.after_proj.weight.shape, key=mx.random.key(1))
    changed = denoising_loss(*given, control.Control(network, maps, 1.0)).item()
    other = denoising_loss(*given, control.Control(network, maps[::-1], 1.0)).item()
    assert len({plain.item(), changed, other}) == 3  # it depends on the maps
